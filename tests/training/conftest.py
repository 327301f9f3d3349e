"""Runs whose engine computes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fake_layers_run import Run
from pipekit.distributed.processes import join_alone, leave_processes
from pipekit.engine.late_number import LateNumber


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """This process is all of the run."""
    join_alone(device="cpu")
    yield
    leave_processes()


@pytest.fixture(params=[True, False], ids=["as on a CPU", "as on a GPU"])
def run(alone: None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Builder of a run whose numbers are on the host as soon as a step is launched, or are never seen to be there."""
    monkeypatch.setattr(LateNumber, "is_here", request.param)
    return lambda **settings: Run(monkeypatch, tmp_path, **settings)

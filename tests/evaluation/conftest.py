"""A small random model as a run and as an export."""

from __future__ import annotations

from pathlib import Path

import pytest

from hand_made import random_model, write_checkpoint
from pipekit.inference.export import export_checkpoint


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a random model in it."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    write_checkpoint(folder, *random_model())
    return folder


@pytest.fixture(scope="session")
def export(run: Path) -> Path:
    """The same model as an export."""
    export_checkpoint(run, run.parent / "export")
    return run.parent / "export"

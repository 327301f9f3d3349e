"""Every schedule against one process that uses nothing but torch."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from engine_jobs import Case, reference_run, train_job
from gloo_workers import GlooWorkers

pytestmark = pytest.mark.distributed

SCHEDULES = ["gpipe", "1f1b", "interleaved-1f1b", "zb-h1", "zb-v", "auto"]


@cache
def reference(tied: bool) -> dict[str, Any]:
    return reference_run(Case(tied=tied, steps=4))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("pp", [2, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_trains_as_one_process_does(gloo: GlooWorkers, schedule: str, pp: int, tied: bool) -> None:
    case = Case(pp=pp, schedule=schedule, tied=tied, steps=4)
    expected = reference(tied)
    for result in gloo.run(pp, train_job, case, {}):
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert result["norms"] == pytest.approx(expected["norms"], rel=1e-5)

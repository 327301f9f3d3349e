"""Verdicts on GPUs."""

from __future__ import annotations

from typing import Any

from pipekit.doctor.checks.gpus import judge_gpus

FREE = {
    "error": None,
    "name": "NVIDIA H100 80GB HBM3",
    "capability": [9, 0],
    "memory_bytes": 80e9,
    "free_bytes": 79e9,
}


def libraries(*gpus: dict[str, Any], cuda: str | None = "12.8") -> dict[str, Any]:
    return {"cuda": cuda, "hip": None, "architectures": ["sm_80", "sm_90", "sm_100"], "gpus": list(gpus)}


def verdicts(num_gpus: int | None, facts: dict[str, Any]) -> list[str]:
    return [row.verdict for row in judge_gpus(num_gpus, None, "570.1", facts)]


def test_free_gpus_are_well_and_so_is_a_machine_without() -> None:
    assert verdicts(2, libraries(FREE, FREE)) == ["ok", "ok", "ok"]
    (none,) = judge_gpus(None, None, "", libraries())
    assert (none.verdict, none.found) == ("ok", "none; runs compute on the CPU")


def test_gpus_that_are_hidden_are_a_warning() -> None:
    (row,) = judge_gpus(None, "", "570.1", libraries())
    assert row.verdict == "warning"
    assert "with CUDA_VISIBLE_DEVICES=''" in row.found


def test_a_torch_for_cpus_is_bad_where_there_are_gpus() -> None:
    (row,) = judge_gpus(1, None, "570.1", libraries(cuda=None))
    assert (row.verdict, row.found) == ("bad", "1, driver 570.1, but this build of torch is for CPUs")


def test_gpus_that_torch_does_not_see_are_bad() -> None:
    assert verdicts(2, libraries(FREE)) == ["bad"]


def test_a_gpu_that_cannot_compute_or_is_in_use_is_named() -> None:
    broken = {"error": "AcceleratorError: CUDA error: out of memory"}
    busy = FREE | {"free_bytes": 30e9}
    rows = judge_gpus(3, None, "", libraries(FREE, broken, busy))[1:]
    assert [(row.check, row.verdict) for row in rows] == [("GPU 0", "ok"), ("GPU 1", "bad"), ("GPU 2", "warning")]
    assert rows[2].found == "NVIDIA H100 80GB HBM3, 80 GB, of which 50 GB are in use"


def test_a_gpu_that_torch_is_not_built_for_is_bad() -> None:
    assert verdicts(1, libraries(FREE | {"capability": [12, 0]})) == ["ok", "bad"]
    assert verdicts(1, libraries(FREE | {"capability": [8, 6]})) == ["ok", "ok"]


def test_nothing_is_said_where_torch_cannot_be_imported() -> None:
    assert verdicts(2, {"error": "crash"}) == []

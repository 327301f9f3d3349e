"""Verdicts on Python, torch, DeepSpeed and backends."""

from __future__ import annotations

from typing import Any

from pipekit.doctor.checks.software import judge_backends, judge_versions
from pipekit.doctor.rows import Row

REQUIRED = ["torch<2.14,>=2.6", "deepspeed<0.20,>=0.19", "torchvision; extra == 'x'"]
VERSIONS: dict[str, str | None] = {"pipekit": "0.1.0", "torch": "2.9.1+cpu", "deepspeed": "0.19.8"}
LIBRARIES: dict[str, Any] = {"torch_error": None, "deepspeed_error": None, "backends": ["gloo"]}


def rows(python: str = "3.11.7", libraries: dict[str, Any] = LIBRARIES, **versions: str | None) -> dict[str, Row]:
    found = judge_versions(python, VERSIONS | versions, REQUIRED, libraries)
    return {row.check: row for row in found}


def test_all_is_well() -> None:
    assert {row.verdict for row in rows().values()} == {"ok"}
    assert [(row.check, row.verdict) for row in judge_backends(LIBRARIES, None)] == [("gloo", "ok")]


def test_an_old_python_is_bad() -> None:
    assert rows("3.9.18")["Python"].verdict == "bad"
    assert rows("3.10.0")["Python"].verdict == "ok"


def test_what_is_not_installed_is_named_with_the_versions_to_install() -> None:
    row = rows(deepspeed=None)["deepspeed"]
    assert (row.verdict, row.found) == ("bad", "is not installed")
    assert row.advice == "Type: pip install 'deepspeed<0.20,>=0.19'"


def test_a_version_beside_those_that_are_tested_is_a_warning() -> None:
    assert [rows(torch=version)["torch"].verdict for version in ("2.5.1", "2.6.0", "2.13.9", "2.14.0")] == [
        "warning",
        "ok",
        "ok",
        "warning",
    ]


def test_a_library_that_cannot_be_imported_is_bad_with_its_error() -> None:
    row = rows(libraries=LIBRARIES | {"torch_error": "ImportError: libcudart.so.12: cannot open"})["torch"]
    assert row.verdict == "bad"
    assert "libcudart.so.12" in row.found
    crashed = rows(libraries={"error": "importing torch and DeepSpeed crashes: Illegal instruction"})
    assert [crashed[name].verdict for name in ("torch", "deepspeed")] == ["bad", "bad"]


def test_gpus_need_nccl() -> None:
    nccl = judge_backends(LIBRARIES, 2)[1]
    assert (nccl.check, nccl.verdict) == ("NCCL", "bad")
    both = judge_backends({"backends": ["gloo", "nccl"], "nccl": "2.27.3"}, 2)
    assert [(row.verdict, row.found) for row in both] == [("ok", "present"), ("ok", "2.27.3")]
    assert judge_backends({"error": "crash"}, 2) == []

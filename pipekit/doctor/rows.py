"""Findings of an examination: rows with a verdict, and what they are about."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

Verdict = Literal["ok", "warning", "bad"]

_LIBRARIES_S = 90.0


@dataclass(frozen=True)
class Row:
    """One finding.

    Attributes:
        check: what was looked at, in a few words.
        verdict: whether a run can do with it.
        found: what was found.
        advice: what to do about it; empty where all is well.
        measured: numbers, for programs.
        family: the file of the check, which the examination fills in.
    """

    check: str
    verdict: Verdict
    found: str
    advice: str = ""
    measured: Mapping[str, Any] = field(default_factory=dict)
    family: str = ""

    def to_record(self) -> dict[str, Any]:
        """The row as JSON holds it."""
        return asdict(self)

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> Row:
        """The row of a record; a TypeError or ValueError if it is none."""
        row = Row(**record)
        if row.verdict not in ("ok", "warning", "bad") or not all(
            isinstance(text, str) for text in (row.check, row.found, row.advice, row.family)
        ):
            raise ValueError(f"not a row: {record}")
        return row


@dataclass(frozen=True)
class Site:
    """Subject of the examination: this machine, as runs with this environment and these folders would find it.

    Attributes:
        environ: the environment variables.
        run_dir: folder of the runs; it need not exist.
        cache_dir: folder of the cache; it need not exist.
        num_gpus: number of GPUs; None where there are none.
        uses_ranks: whether ranks are started, to measure what passes between them.
    """

    environ: Mapping[str, str]
    run_dir: Path
    cache_dir: Path
    num_gpus: int | None = None
    uses_ranks: bool = True

    @cached_property
    def libraries(self) -> dict[str, Any]:
        """Facts of torch and DeepSpeed about themselves and the GPUs, from a process of their own, which may crash."""
        on_cpu = {} if self.num_gpus else {"DS_ACCELERATOR": "cpu"}
        command = [sys.executable, "-m", "pipekit.deepspeed.library_facts"]
        try:
            done = subprocess.run(
                command, env={**self.environ, **on_cpu}, capture_output=True, text=True, timeout=_LIBRARIES_S
            )
        except subprocess.TimeoutExpired:
            return {"error": f"importing torch and DeepSpeed takes more than {_LIBRARIES_S:.0f} s"}
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            return {"error": f"importing torch and DeepSpeed ends the process: {said[-1]}"}
        facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return facts


def existing_parent(path: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    absolute = path.expanduser().absolute()
    return next(folder for folder in (absolute, *absolute.parents) if folder.is_dir())

"""Findings of an examination: rows with a verdict, and the machine that they describe."""

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
    """Finding of a check, with a verdict and a remedy.

    Attributes:
        check: name of the checked item, in a few words.
        verdict: "ok", "warning" or "bad", which means that a run would likely fail.
        found: the finding.
        advice: remedy; empty if there is no problem.
        measured: measurements for programs.
        family: file of the check, which the examination fills in.
    """

    check: str
    verdict: Verdict
    found: str
    advice: str = ""
    measured: Mapping[str, Any] = field(default_factory=dict)
    family: str = ""

    def to_record(self) -> dict[str, Any]:
        """Row as a JSON record."""
        return asdict(self)

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> Row:
        """Row from a JSON record; raises TypeError or ValueError if it is not a row."""
        row = Row(**record)
        if row.verdict not in ("ok", "warning", "bad") or not all(
            isinstance(text, str) for text in (row.check, row.found, row.advice, row.family)
        ):
            raise ValueError(f"not a row: {record}")
        return row


@dataclass(frozen=True)
class Site:
    """Machine to examine, with the environment and folders that runs would use.

    Attributes:
        environ: environment variables.
        run_dir: folder of the runs; it may be missing.
        cache_dir: folder of the cache; it may be missing.
        num_gpus: number of GPUs; None if there are none.
        uses_ranks: whether to start ranks and measure the messages between them.
    """

    environ: Mapping[str, str]
    run_dir: Path
    cache_dir: Path
    num_gpus: int | None = None
    uses_ranks: bool = True

    @cached_property
    def libraries(self) -> dict[str, Any]:
        """Facts about torch, DeepSpeed and the GPUs, from a separate process, because importing them may crash."""
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
            return {"error": f"importing torch and DeepSpeed crashes: {said[-1]}"}
        facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return facts


def existing_parent(path: Path) -> Path:
    """Folder itself, or its nearest existing parent."""
    absolute = path.expanduser().absolute()
    return next(folder for folder in (absolute, *absolute.parents) if folder.is_dir())

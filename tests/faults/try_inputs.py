"""Runs of the command with bad input, each in a fork with limits, and what was wrong with how it ended."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import sys
import time
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import fork_server
from faults.bad_inputs import CASES
from faults.cases import Case, fill_workspace

MAX_LINES = 20
MAX_CHARACTERS = 4000
MAX_CPU_S = 3.0
MAX_BYTES = 10**9
HANG_S = 120
"""Other work may hold up a command that takes little time of the processor; after so long it hangs."""

ACCEPTED = 99


@dataclass(frozen=True)
class Outcome:
    """End of a command: its output, what it used, and what was wrong with that, which is empty where it is well."""

    name: str
    returncode: int
    output: str
    cpu_s: float
    num_bytes: int
    faults: list[str]


def try_inputs(names: Sequence[str], folder: Path) -> list[Outcome]:
    """Run the cases of these names one after the other, in folders of their own below `folder`."""
    results = folder / "outcomes.json"
    process = fork_server.fork(_try_all, list(names), str(folder), str(results))
    process.join(60 + HANG_S * len(names))
    assert process.exitcode == 0, f"the runner ended with {process.exitcode}"
    process.close()
    return [Outcome(**values) for values in json.loads(results.read_text())]


def _try_all(names: Sequence[str], folder: str, results: str) -> None:
    template = Path(folder) / "template"
    template.mkdir()
    fill_workspace(template)
    warm_up = Case("warm-up", ("train", "c.yaml"), "")
    assert _try(warm_up, Path(folder), template).returncode == ACCEPTED
    cases = {case.name: case for case in CASES}
    outcomes = [asdict(_try(cases[name], Path(folder), template)) for name in names]
    Path(results).write_text(json.dumps(outcomes))


def _try(case: Case, root: Path, template: Path) -> Outcome:
    folder = root / "case"
    shutil.copytree(template, folder, symlinks=True)
    case.write(folder)
    before = _listing(folder)
    output = root / "output"
    begun_s = time.monotonic()
    if (pid := os.fork()) == 0:
        _run(case, folder, output)
    _, status, used = os.wait4(pid, 0)
    wall_s = time.monotonic() - begun_s
    text = output.read_bytes().decode("utf-8", "replace")
    returncode, cpu_s, num_bytes = (
        os.waitstatus_to_exitcode(status),
        used.ru_utime + used.ru_stime,
        used.ru_maxrss << 10,
    )
    faults = list(_faults(case, returncode, text, cpu_s, num_bytes))
    faults += [f"left {name}" for name in sorted(_listing(folder) ^ before)]
    faults += [f"took {wall_s:.0f} s"] if wall_s >= HANG_S else []
    shutil.rmtree(folder)
    return Outcome(case.name, returncode, text, cpu_s, num_bytes, faults)


def _run(case: Case, folder: Path, output: Path) -> None:
    """Be the command, in a fork; where it would start ranks or read a model, its input has been accepted."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(HANG_S)
    os.chdir(folder)
    for number in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    sys.argv, sys.path[0:0] = ["pipekit", *case.command], [str(folder)]
    os.environ |= {"HOME": str(folder), "COLUMNS": "80"}
    limit = _virtual_bytes() + 2 * MAX_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    from pipekit.cli import main
    from pipekit.commands import train
    from pipekit.launch import trial

    def accept(*_: Any, **__: Any) -> None:
        os._exit(ACCEPTED)

    code = 1
    with mock.patch.object(train, "run_plan", accept), mock.patch.object(trial, "run_processes", accept):
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:
            import traceback

            with suppress(BaseException):
                traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with suppress(BaseException):
            stream.flush()
    os._exit(code)


def _faults(case: Case, returncode: int, text: str, cpu_s: float, num_bytes: int) -> Any:
    if returncode == ACCEPTED:
        yield "was accepted"
    elif returncode == -signal.SIGALRM:
        yield "hung"
    elif returncode != 2:
        yield f"ended with {returncode}"
    if "Traceback" in text:
        yield "traceback"
    if case.says not in text.replace("\n", " "):
        yield f"does not say {case.says!r}"
    if text.count("\n") > MAX_LINES or len(text) > MAX_CHARACTERS:
        yield f"{text.count(chr(10))} lines, {len(text)} characters"
    if controls := {c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf")}:
        yield f"printed {controls}"
    if len(re.findall("^error:", text, re.MULTILINE)) > 1:
        yield "several messages"
    if cpu_s > MAX_CPU_S:
        yield f"{cpu_s:.1f} s of the processor"
    if num_bytes > MAX_BYTES:
        yield f"{num_bytes / 1e9:.1f} GB"


def _listing(folder: Path) -> set[str]:
    names = set()
    for where, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(where, name)
            if "cache" not in path.relative_to(folder).parts:
                status = path.lstat()
                size = 0 if path.is_dir() else status.st_size
                names.add(f"{path.relative_to(folder)} of {size} bytes")
    return names


def _virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")

"""A training script of one's own as processes on this machine: `pipekit launch script.py`.

Each process is `python -m pipekit.launch.script SCRIPT [ARGUMENTS]`, which runs the script as Python itself would, and
tells the launcher how it failed.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pipekit.errors import LaunchError
from pipekit.launch.environment import detect_ranks
from pipekit.launch.local import run_processes
from pipekit.launch.resources import check_process_count
from pipekit.launch.restarts import start_until_done
from pipekit.launch.worker import end_finished, error_file_from, report_failure, tie_to_parent


def launch_script(
    script: Path,
    arguments: Sequence[str],
    *,
    processes: int | Literal["auto"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    log_dir: Path | None = None,
    restarts: int = 0,
) -> None:
    """Run a script in several processes on this machine, and return when all have succeeded.

    Each finds its rank in the environment, as under torchrun. All end together.

    Args:
        script: the Python file.
        arguments: its arguments.
        processes: their number; "auto" is the number of GPUs, or 1 on a CPU.
        device: what the processes compute on; "auto" takes the GPUs where there are any.
        log_dir: folder of the ranks' logs; `runs/<name of the script>/logs` unless given.
        restarts: the most times that the processes are started again after one was lost; the script goes on from its
            own checkpoints.

    Raises:
        LaunchError: if there is no such script, or the processes cannot be started.
        RankError: if one of them fails.
    """
    if not script.is_file():
        raise LaunchError(f"{script}: no such file; give the path of a Python script")
    ranks = detect_ranks(os.environ)
    if ranks is not None:
        raise LaunchError(
            f"pipekit launch starts the processes itself, and is already one that {ranks.launcher} has started; leave "
            f"it out, as in {ranks.launcher} {script}, or start pipekit launch alone"
        )
    check_process_count(1 if processes == "auto" else processes, "--processes")
    logs = log_dir or Path("runs", script.stem, "logs")

    def start(goes_on: bool) -> None:
        run_processes(
            [sys.executable, "-m", __name__, str(script), *arguments],
            processes=processes,
            device=device,
            log_dir=logs,
            option="--processes ",
        )

    start_until_done(start, restarts=restarts, failures=logs / "failures.jsonl", checkpoints=None)


def main(arguments: Sequence[str]) -> None:
    """Run a script, with its arguments, as the rank whose number is in the environment."""
    tie_to_parent(os.environ)
    with report_failure(error_file_from(os.environ)):
        script = arguments[0]
        sys.argv = list(arguments)
        # Python looks for modules beside the script that it runs.
        sys.path[0] = os.path.dirname(os.path.abspath(script))
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    with contextlib.suppress(SystemExit):  # of a success: a failure has ended the process
        main(sys.argv[1:])
    end_finished()

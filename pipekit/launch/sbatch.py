"""Batch scripts of SLURM for `pipekit train`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipekit.errors import ExitCode, LaunchError

_NAME = re.compile(r"[A-Za-z0-9_.+-]{1,64}")
_TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d\d?(:\d\d){0,2}")


@dataclass(frozen=True)
class BatchJob:
    """A job of SLURM that trains a configuration.

    Attributes:
        arguments: of `pipekit train`.
        name: name of the job.
        folder: the working directory, which all nodes share.
        python: the Python that runs there.
        nodes: number of nodes.
        tasks_per_node: processes on each.
        gpus_per_node: GPUs of each; None on CPUs.
        cpus_per_task: cores of each process; None leaves it to the cluster.
        time: time limit in a form of SLURM's; None leaves it to the partition.
        partition: the partition.
        account: who pays.
        requeue: whether the job goes on by itself, in a new turn, when its time is up or its nodes are taken.
        notice_s: seconds before its time is up at which the ranks are told to save.
        more: more options of sbatch, as they are typed there.
        environ: variables to set.
    """

    arguments: Sequence[str]
    name: str
    folder: Path
    python: str
    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    requeue: bool = True
    notice_s: int = 120
    more: Sequence[str] = ()
    environ: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for option, value in {"--name": self.name, "--partition": self.partition, "--account": self.account}.items():
            # A list of partitions is separated by commas.
            if value is not None and not all(_NAME.fullmatch(part) for part in value.split(",")):
                raise LaunchError(f"{option} {value[:70]!r}: use letters, digits, dots, dashes and underscores")
        if self.time is not None and not _TIME.fullmatch(self.time):
            raise LaunchError(
                f"--time {self.time!r} must be minutes, hours:minutes:seconds or days-hours; try 12:00:00"
            )
        for option in self.more:
            if not re.fullmatch(r"--?[A-Za-z][^\n\r\0]*", option):
                raise LaunchError(f"--sbatch {option[:70]!r} is no option; give one such as --sbatch=--constraint=a100")


def batch_script(job: BatchJob, *, log: Path) -> str:
    """The text of a batch script, to be read before it is submitted.

    A process of `pipekit train` starts for each task, and finds its rank in SLURM's environment. Before its time is up,
    SLURM sends SIGUSR1 to all of them: they save and stop, and the job goes back into the queue.

    Args:
        job: what to run.
        log: file of the job's own output.
    """
    options = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.tasks_per_node}",
        *([] if job.gpus_per_node is None else [f"--gpus-per-node={job.gpus_per_node}"]),
        *([] if job.cpus_per_task is None else [f"--cpus-per-task={job.cpus_per_task}"]),
        *([] if job.time is None else [f"--time={job.time}"]),
        *([] if job.partition is None else [f"--partition={job.partition}"]),
        *([] if job.account is None else [f"--account={job.account}"]),
        f"--chdir={_quote_option(str(job.folder))}",
        f"--output={_quote_option(str(log))}",
        "--open-mode=append",
        f"--signal=USR1@{job.notice_s}",
        "--requeue" if job.requeue else "--no-requeue",
        *job.more,
    ]
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in sorted(job.environ.items()))
    command = shlex.join([job.python, "-m", "pipekit", "train", *job.arguments])
    requeue = (
        f"""
# {ExitCode.STOPPED:d}: stopped on request, with a checkpoint, from which the next turn goes on.
if [ "$code" -eq {ExitCode.STOPPED:d} ]; then
    echo "saved; back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
"""
        if job.requeue
        else ""
    )
    lines = "\n".join(f"#SBATCH {option}" for option in options)
    return f"""#!/bin/bash
{lines}

set -u
{exports}
# SLURM tells the ranks {job.notice_s} s before the end (SIGUSR1): they save and stop. This shell waits for them,
# whatever it is told itself. A minute after one rank has ended, srun ends the others.
trap : USR1 TERM
srun --kill-on-bad-exit=0 --wait=60 {command} &
ranks=$!
while kill -0 "$ranks" 2>/dev/null; do
    wait "$ranks"
done
wait "$ranks"
code=$?
{requeue}
exit "$code"
"""


def _quote_option(text: str) -> str:
    """The value of an option in an #SBATCH line, which sbatch splits as a shell does."""
    if re.search(r"[\n\r\0]", text):
        raise LaunchError(f"{text!r}: a path with a line break cannot stand in a batch script")
    return shlex.quote(text)

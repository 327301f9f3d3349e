"""`pipekit slurm`: a SLURM batch script that trains a configuration."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipekit.commands.shared_options import ConfigFile, Exports, HostPython, Overrides
from pipekit.errors import LaunchError

_SBATCH_S = 60.0


def command(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes.")] = 1,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="GPUs per node, each with a process.", show_default=False)
    ] = None,
    tasks_per_node: Annotated[
        int | None, typer.Option(min=1, help="Processes per node, on CPUs.", show_default=False)
    ] = None,
    cpus_per_task: Annotated[int | None, typer.Option(min=1, help="Cores per process.", show_default=False)] = None,
    time: Annotated[str | None, typer.Option(help="Time limit, such as 12:00:00.", show_default=False)] = None,
    partition: Annotated[str | None, typer.Option(help="Partition of the cluster.", show_default=False)] = None,
    account: Annotated[str | None, typer.Option(help="Account to charge.", show_default=False)] = None,
    name: Annotated[str | None, typer.Option(help="Name of the job; by default the YAML file's.")] = None,
    notice: Annotated[
        int, typer.Option(min=10, max=65535, help="Seconds before the time limit at which to save and stop.")
    ] = 120,
    requeue: Annotated[bool, typer.Option(help="Requeue the job after that, and resume training.")] = True,
    python: HostPython = None,
    export: Exports = None,
    sbatch: Annotated[
        list[str] | None, typer.Option(help="Additional sbatch option, such as --sbatch=--constraint=a100; repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; by default job.sbatch in the run folder.")] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Submit the script.")] = False,
) -> None:
    """Write a SLURM batch script that trains a configuration."""
    from pipekit.files import write_atomically
    from pipekit.launch.exports import exported_environ
    from pipekit.launch.facts import load_any_config
    from pipekit.launch.resources import check_degrees
    from pipekit.launch.sbatch import BatchJob, batch_script

    if gpus_per_node is not None and tasks_per_node is not None:
        raise LaunchError("--gpus-per-node starts a process for each GPU; remove --tasks-per-node")
    arguments = [str(config), *(overrides or [])]
    loaded = load_any_config(arguments)
    per_node = gpus_per_node or tasks_per_node or 1
    check_degrees(loaded, world_size=nodes * per_node, num_devices=None)
    folder = Path(loaded.run.dir).absolute()
    job = BatchJob(
        arguments=arguments,
        name=name or config.stem,
        folder=Path.cwd(),
        python=python or sys.executable,
        nodes=nodes,
        tasks_per_node=per_node,
        gpus_per_node=gpus_per_node,
        cpus_per_task=cpus_per_task,
        time=time,
        partition=partition,
        account=account,
        requeue=requeue,
        notice_s=notice,
        more=sbatch or [],
        environ=exported_environ({}, _with_values(export or []), home=Path.home(), folder=Path.cwd()),
    )
    path = out or folder / "job.sbatch"
    text = batch_script(job, log=folder / "logs" / "job-%j.log")
    if submit and shutil.which("sbatch") is None:
        raise LaunchError("--submit: sbatch is not in PATH; submit the script on a machine of the cluster")
    try:
        # SLURM does not create the folder of a log.
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    except OSError as error:
        raise LaunchError(f"{path}: cannot be written: {error.strerror}; give --out FILE") from None
    typer.echo(f"wrote {path}")
    if not submit:
        typer.echo(f"submit it with: sbatch {path}")
        return
    try:
        done = subprocess.run(["sbatch", str(path)], capture_output=True, text=True, timeout=_SBATCH_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LaunchError(f"sbatch: {error}") from None
    if done.returncode:
        raise LaunchError(f"sbatch failed with exit code {done.returncode}:\n{done.stderr.strip()}")
    typer.echo(done.stdout.strip())


def _with_values(asked: list[str]) -> list[str]:
    """Requested variables with their values here, since the job starts in a different environment."""
    return [text if "=" in text or text not in os.environ else f"{text}={os.environ[text]}" for text in asked]

"""`pipekit launch` on several machines: over ssh, through another launcher, or as one of them."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Literal, NoReturn

from pipekit.errors import LaunchError
from pipekit.launch.environment import detect_ranks
from pipekit.launch.exports import exported_environ
from pipekit.launch.facts import configuration_facts, load_any_config
from pipekit.launch.fleet import FleetRun, run_fleet
from pipekit.launch.hosts import Host, check_address
from pipekit.launch.node import NodeJob, NodePlace, run_node
from pipekit.launch.resources import check_degrees, processes_text
from pipekit.launch.restarts import start_until_done
from pipekit.launch.runners import RunnerJob, runner_command
from pipekit.launch.ssh import SshSettings, split_arguments
from pipekit.signals import noting

DEFAULT_PORT = 29_500


@dataclass(frozen=True)
class MachineOptions:
    """Options of `pipekit launch` for several machines, as its help describes them."""

    launcher: Literal["ssh", "pdsh", "openmpi", "mpich", "slurm"] = "ssh"
    master_addr: str | None = None
    master_port: int | None = None
    ssh_port: int | None = None
    ssh_arguments: str = ""
    launcher_arguments: str = ""
    python: str | None = None
    exports: Sequence[str] = ()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    log_dir: Path | None = None
    restarts: int = 0


def launch_on_hosts(command: str, arguments: Sequence[str], hosts: Sequence[Host], options: MachineOptions) -> None:
    """Run `train` or a script on several hosts, with a process for each slot, and return when all have succeeded.

    Raises:
        PipekitError: if something does not fit, a host cannot be reached, or a rank fails.
    """
    _check_start(command, options)
    num_processes = sum(len(host.slots) for host in hosts)
    job, own_facts = _plan_job(command, arguments, num_processes, options)
    ssh = SshSettings.from_options(options.python, options.ssh_port, options.ssh_arguments)
    if options.launcher != "ssh":
        _become(hosts, job, ssh, options)
    names = ", ".join(host.name for host in hosts)
    sys.stdout.write(f"starting {processes_text(num_processes)} on {names} ...\n")
    sys.stdout.flush()
    first = FleetRun(
        hosts=hosts,
        job=job,
        ssh=ssh,
        log_dir=Path(job.log_dir),
        master_addr=options.master_addr,
        master_port=options.master_port,
        own_facts=own_facts,
    )
    starts = count()

    def run(fleet: FleetRun) -> None:
        # A host that was lost may need its time to come back.
        run_fleet(replace(fleet, patience_s=fleet.job.timeout_s) if next(starts) else fleet)

    if command != "train":
        failures = first.log_dir / "failures.jsonl"
        start_until_done(lambda goes_on: run(first), restarts=options.restarts, failures=failures, checkpoints=None)
        return
    from pipekit.plan.run_folder import RunFolder, describe_progress

    config = load_any_config(arguments)
    folder = RunFolder(config.run.dir)
    newest = "fit.latest_checkpoint=null" if hasattr(config, "trial") else "checkpoint.resume=auto"

    def start(goes_on: bool) -> None:
        if not goes_on:
            run(first)
            return
        job, own_facts = _plan_job(command, [*arguments, newest], num_processes, options)
        run(replace(first, job=job, own_facts=own_facts))

    with noting(lambda: describe_progress(folder.path)):
        start_until_done(
            start,
            restarts=options.restarts or config.run.restarts,
            failures=folder.failures,
            checkpoints=folder.checkpoints,
            page=folder.report,
        )


def launch_as_node(
    command: str,
    arguments: Sequence[str],
    *,
    num_nodes: int,
    node_rank: int,
    num_processes: int,
    options: MachineOptions,
) -> None:
    """Run the ranks of this machine, one of several on each of which this is started, with as many processes on each.

    Raises:
        PipekitError: if something does not fit, or a rank of this machine fails.
    """
    _check_start(command, options)
    if options.master_addr is None:
        raise LaunchError("--nnodes: every machine must know the first; give --master_addr ADDRESS, the same on all")
    if not 0 <= node_rank < num_nodes:
        raise LaunchError(f"--node_rank {node_rank} must be between 0 and {num_nodes - 1}, as --nnodes is {num_nodes}")
    job, _ = _plan_job(command, arguments, num_nodes * num_processes, options)
    job = replace(job, slots=tuple(range(num_processes)))
    os.environ.update(job.environ)
    place = NodePlace(
        first_rank=node_rank * num_processes,
        world_size=num_nodes * num_processes,
        master_addr=options.master_addr,
        master_port=options.master_port or DEFAULT_PORT,
    )
    run_node(job, place)


def _check_start(command: str, options: MachineOptions) -> None:
    ranks = detect_ranks(os.environ)
    if ranks is not None:
        raise LaunchError(
            f"pipekit launch starts the processes itself, and is already one that {ranks.launcher} has started; start "
            "it alone"
        )
    if command != "train" and not Path(command).is_file():
        raise LaunchError(f"{command}: no such file; give train and a configuration, or the path of a Python script")
    if options.master_addr is not None:
        check_address(options.master_addr, "--master_addr")
    if options.master_port is not None and not 1 <= options.master_port <= 65535:
        raise LaunchError(f"--master_port {options.master_port} must be between 1 and 65535; try {DEFAULT_PORT}")


def _plan_job(
    command: str, arguments: Sequence[str], num_processes: int, options: MachineOptions
) -> tuple[NodeJob, dict[str, str]]:
    """Job of every host, without its slots; and the facts of this machine that must be those of the hosts."""
    environ = exported_environ(os.environ, options.exports, home=Path.home(), folder=Path.cwd())
    if command != "train":
        log_dir = options.log_dir or Path("runs", Path(command).stem, "logs")
        return NodeJob(command, tuple(arguments), (), options.device, environ=environ, log_dir=str(log_dir)), {}
    config = load_any_config(arguments)
    check_degrees(config, world_size=num_processes, num_devices=None)
    log_dir = options.log_dir or Path(config.run.dir) / "logs"
    job = NodeJob(
        command,
        tuple(arguments),
        slots=(),
        device=config.run.device,
        environ=environ,
        log_dir=str(log_dir),
        timeout_s=config.run.timeout_s,
    )
    return job, configuration_facts(config)


def _become(hosts: Sequence[Host], job: NodeJob, ssh: SshSettings, options: MachineOptions) -> NoReturn:
    """Become another launcher, which starts the processes."""
    runner_job = RunnerJob(
        hosts=hosts,
        job=job,
        ssh=ssh,
        master_addr=options.master_addr or hosts[0].name,
        master_port=options.master_port or DEFAULT_PORT,
        arguments=split_arguments(options.launcher_arguments, "--launcher_args"),
    )
    command = runner_command(options.launcher, runner_job)
    program = command.arguments[0]
    if shutil.which(program) is None:
        raise LaunchError(f"--launcher {options.launcher}: {program} is not in PATH; install it, or use --launcher ssh")
    sys.stdout.write(f"{shlex.join(command.arguments)}\n")
    sys.stdout.flush()
    os.execvpe(program, command.arguments, {**os.environ, **command.environ})

"""`pipekit launch`: the processes of a script of one's own on this machine, or of a run on several machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pipekit.commands.shared_options import (
    Exclude,
    Exports,
    Hostfile,
    HostPython,
    Include,
    MasterAddress,
    SshArguments,
    SshPort,
)
from pipekit.errors import LaunchError

# What follows the script is the script's.
CONTEXT_SETTINGS = {"allow_interspersed_args": False}


def command(
    script: Annotated[
        str, typer.Argument(metavar="SCRIPT|train", help="Python file to run, or train.", show_default=False)
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(help="The script's arguments, or those of pipekit train.", show_default=False),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option("--processes", "-n", min=1, help="Number of processes; by default that of the GPUs, or 1."),
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Device to compute on; for train, run.device says it.")
    ] = "auto",
    log_dir: Annotated[
        Path | None, typer.Option(help="Folder of the logs; by default runs/<name of the script>/logs.")
    ] = None,
    restarts: Annotated[
        int,
        typer.Option(min=0, help="The most times that all are started again after one was lost; run.restarts, too."),
    ] = 0,
    hostfile: Hostfile = None,
    include: Include = "",
    exclude: Exclude = "",
    num_nodes: Annotated[
        int | None, typer.Option("--num_nodes", "--num-nodes", help="Use the first so many hosts.")
    ] = None,
    num_gpus: Annotated[
        int | None, typer.Option("--num_gpus", "--num-gpus", help="Use the first so many slots of each host.")
    ] = None,
    master_addr: MasterAddress = None,
    master_port: Annotated[
        int | None, typer.Option("--master_port", "--master-port", help="Port of rank 0; a free one if not given.")
    ] = None,
    launcher: Annotated[
        Literal["ssh", "pdsh", "openmpi", "mpich", "slurm"], typer.Option(help="What starts processes on the hosts.")
    ] = "ssh",
    launcher_args: Annotated[
        str, typer.Option("--launcher_args", "--launcher-args", help="More arguments of that launcher, in one string.")
    ] = "",
    ssh_port: SshPort = None,
    ssh_args: SshArguments = "",
    python: HostPython = None,
    export: Exports = None,
    nnodes: Annotated[
        int | None, typer.Option(min=1, help="Without ssh: the number of machines, on each of which this is started.")
    ] = None,
    node_rank: Annotated[
        int, typer.Option("--node_rank", "--node-rank", help="With --nnodes: the number of this machine, from 0.")
    ] = 0,
) -> None:
    """Run a training script in several processes on this machine, as torchrun does, and end them together.

    With --hostfile, the processes run on several machines, of a script or of pipekit train.
    """
    if hostfile is None and nnodes is None:
        for option, value in {"--include": include, "--exclude": exclude, "--num_nodes": num_nodes}.items():
            if value:
                raise LaunchError(f"{option} chooses among the hosts of --hostfile; give that, too")
        if script == "train" and not Path(script).is_file():
            raise LaunchError(
                "pipekit launch train runs on several machines; give --hostfile FILE, or type pipekit train to run here"
            )
        from pipekit.launch.script import launch_script

        launch_script(
            Path(script),
            arguments or [],
            processes=processes or num_gpus or "auto",
            device=device,
            log_dir=log_dir,
            restarts=restarts,
        )
        return
    if hostfile is not None and nnodes is not None:
        raise LaunchError("--hostfile starts all machines, and --nnodes is for one alone; give one of them")
    if hostfile is not None and processes is not None:
        raise LaunchError(
            f"--processes {processes}: the slots in the hostfile say how many start on each host; use "
            f"--num_gpus {processes}"
        )
    from pipekit.launch.hosts import read_hostfile, select_hosts
    from pipekit.launch.machines import MachineOptions, launch_as_node, launch_on_hosts

    options = MachineOptions(
        launcher=launcher,
        master_addr=master_addr,
        master_port=master_port,
        ssh_port=ssh_port,
        ssh_arguments=ssh_args,
        launcher_arguments=launcher_args,
        python=python,
        exports=export or [],
        device=device,
        log_dir=log_dir,
        restarts=restarts,
    )
    if hostfile is not None:
        hosts = select_hosts(
            read_hostfile(hostfile), include=include, exclude=exclude, num_nodes=num_nodes, num_gpus=num_gpus
        )
        launch_on_hosts(script, arguments or [], hosts, options)
        return
    assert nnodes is not None
    launch_as_node(
        script,
        arguments or [],
        num_nodes=nnodes,
        node_rank=node_rank,
        num_processes=processes or num_gpus or 1,
        options=options,
    )

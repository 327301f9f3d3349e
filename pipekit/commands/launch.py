"""`pipekit launch`: a training script in several processes, or a run on several machines."""

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

# Options after the script belong to the script.
CONTEXT_SETTINGS = {"allow_interspersed_args": False}


def command(
    script: Annotated[
        str, typer.Argument(metavar="SCRIPT|train", help="Python file to run, or train.", show_default=False)
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(help="Arguments of the script, or of pipekit train.", show_default=False),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option("--processes", "-n", min=1, help="Number of processes; by default one per GPU, or 1."),
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Device to compute on; train uses run.device instead.")
    ] = "auto",
    log_dir: Annotated[
        Path | None, typer.Option(help="Folder for logs; by default runs/SCRIPT/logs, or logs in the run folder.")
    ] = None,
    restarts: Annotated[
        int,
        typer.Option(min=0, help="Maximum number of restarts after a failure; for train, by default run.restarts."),
    ] = 0,
    hostfile: Hostfile = None,
    include: Include = "",
    exclude: Exclude = "",
    num_nodes: Annotated[
        int | None, typer.Option("--num_nodes", "--num-nodes", help="Use only this many hosts, the first ones.")
    ] = None,
    num_gpus: Annotated[
        int | None,
        typer.Option("--num_gpus", "--num-gpus", help="Use only this many slots of each host, the first ones."),
    ] = None,
    master_addr: MasterAddress = None,
    master_port: Annotated[
        int | None,
        typer.Option(
            "--master_port", "--master-port", help="Port of rank 0; by default a free one over ssh, else 29500."
        ),
    ] = None,
    launcher: Annotated[
        Literal["ssh", "pdsh", "openmpi", "mpich", "slurm"],
        typer.Option(help="Program that starts processes on the hosts."),
    ] = "ssh",
    launcher_args: Annotated[
        str, typer.Option("--launcher_args", "--launcher-args", help="More arguments for this launcher, in one string.")
    ] = "",
    ssh_port: SshPort = None,
    ssh_args: SshArguments = "",
    python: HostPython = None,
    export: Exports = None,
    nnodes: Annotated[
        int | None, typer.Option(min=1, help="Without ssh: number of machines; start this command on each.")
    ] = None,
    node_rank: Annotated[
        int, typer.Option("--node_rank", "--node-rank", help="With --nnodes: index of this machine, from 0.")
    ] = 0,
) -> None:
    """Run a training script in several processes, as torchrun does.

    If one process fails, all are ended. With --hostfile or --nnodes, run a script or pipekit train on several machines.
    """
    if hostfile is None and nnodes is None:
        for option, value in {"--include": include, "--exclude": exclude, "--num_nodes": num_nodes}.items():
            if value:
                raise LaunchError(f"{option} chooses among the hosts of --hostfile; give that as well")
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
        raise LaunchError(
            "--hostfile starts processes on all machines, and --nnodes only on this one; give only one of them"
        )
    if hostfile is not None and processes is not None:
        raise LaunchError(
            f"--processes {processes}: the slots in the hostfile set how many processes each host starts; use "
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

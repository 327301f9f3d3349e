"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path, typer.Argument(help="YAML file of the run.", show_default=False)]

Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes, such as train.steps=20 parallel.pp=1.", show_default=False)
]

ModelConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="YAML file whose model section describes what a script trained."),
]

TrustCode = Annotated[
    bool, typer.Option("--trust-code", help="Run the code that a stored configuration names, such as model.builder.")
]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

Hostfile = Annotated[
    Path | None, typer.Option("--hostfile", "-H", help="Machines, a line each, such as: worker-1 slots=4")
]

Include = Annotated[str, typer.Option("--include", "-i", help="Hosts and slots to use, such as worker-0@worker-1:0,2.")]

Exclude = Annotated[str, typer.Option("--exclude", "-e", help="Hosts and slots not to use.")]

MasterAddress = Annotated[
    str | None,
    typer.Option("--master_addr", "--master-addr", help="Address of the first host; found out if not given."),
]

SshPort = Annotated[
    int | None, typer.Option("--ssh_port", "--ssh-port", min=1, max=65535, help="Port of ssh on the hosts.")
]

SshArguments = Annotated[str, typer.Option("--ssh_args", "--ssh-args", help="More arguments of ssh, in one string.")]

HostPython = Annotated[str | None, typer.Option("--python", help="Python on the hosts; by default this one's path.")]

Exports = Annotated[
    list[str] | None, typer.Option("--export", "-x", help="Variable of all processes: NAME, or NAME=VALUE.")
]

Stages = Annotated[int, typer.Option("--pp", min=1, help="Pipeline stages, each in a process of its own.")]
TensorRanks = Annotated[int, typer.Option("--tp", min=1, help="Tensor-parallel processes of each stage.")]

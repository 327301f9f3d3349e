"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path, typer.Argument(help="YAML file of the run.", show_default=False)]

Overrides = Annotated[
    list[str] | None, typer.Argument(help="Keys to change, such as train.steps=20 parallel.pp=1.", show_default=False)
]

ModelConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help="YAML file whose model section describes the model that a script trained."
    ),
]

TrustCode = Annotated[
    bool, typer.Option("--trust-code", help="Run the code that a stored configuration names, such as model.builder.")
]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

Hostfile = Annotated[
    Path | None, typer.Option("--hostfile", "-H", help="File with a host per line, such as: worker-1 slots=4")
]

Include = Annotated[str, typer.Option("--include", "-i", help="Hosts and slots to use, such as worker-0@worker-1:0,2.")]

Exclude = Annotated[str, typer.Option("--exclude", "-e", help="Hosts and slots not to use.")]

MasterAddress = Annotated[
    str | None,
    typer.Option("--master_addr", "--master-addr", help="Address of the first host; detected by default."),
]

SshPort = Annotated[
    int | None, typer.Option("--ssh_port", "--ssh-port", min=1, max=65535, help="Port of ssh on the hosts.")
]

SshArguments = Annotated[str, typer.Option("--ssh_args", "--ssh-args", help="More arguments for ssh, in one string.")]

HostPython = Annotated[
    str | None, typer.Option("--python", help="Path of Python on the hosts; by default the same as here.")
]

Exports = Annotated[
    list[str] | None,
    typer.Option("--export", "-x", help="Environment variable for all processes: NAME or NAME=VALUE; repeatable."),
]

Stages = Annotated[int, typer.Option("--pp", min=1, help="Number of pipeline stages; starts pp x tp processes.")]
TensorRanks = Annotated[int, typer.Option("--tp", min=1, help="Number of tensor-parallel processes per stage.")]

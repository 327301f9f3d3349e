"""Command lines of ssh."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipekit.errors import LaunchError
from pipekit.launch.hosts import Host

# So often does ssh ask whether the other end is there, within the longest silence, and gives up after three.
_ASKS = 6
_CONNECT_S = 20


@dataclass(frozen=True)
class SshSettings:
    """Settings of ssh: how hosts are reached, and what runs there.

    Attributes:
        folder: the working directory, the same on all hosts.
        python: the Python that runs there.
        port: port of sshd; None leaves it to ssh's configuration.
        arguments: more arguments of ssh, which come first and so win over ours.
        python_path: `PYTHONPATH`, with which `python` finds pipekit; None where it needs none.
    """

    folder: Path
    python: str
    port: int | None = None
    arguments: Sequence[str] = ()
    python_path: str | None = None

    @classmethod
    def from_options(cls, python: str | None, port: int | None, arguments: str) -> SshSettings:
        """Settings from `--python`, `--ssh_port` and `--ssh_args`, with this process's folder, Python and its path.

        Raises:
            LaunchError: if a quote is left open in the arguments.
        """
        return cls(
            folder=Path.cwd(),
            python=python or sys.executable,
            port=port,
            arguments=split_arguments(arguments, "--ssh_args"),
            python_path=os.environ.get("PYTHONPATH"),
        )


def ssh_command(
    host: Host,
    settings: SshSettings,
    *,
    silence_s: float,
    module: Sequence[str] = ("pipekit.launch.node",),
    program: Sequence[str] | None = None,
) -> list[str]:
    """The command that runs a host's agent over ssh, or another module of Python's or program with its arguments.

    ssh never asks for a password, and ends when the host has not answered for `silence_s`.

    Example:
        >>> command = ssh_command(Host("worker-1", (0,)), SshSettings(Path("/data/my run"), "python3"), silence_s=30)
        >>> command[-3:]
        ['--', 'worker-1', "cd '/data/my run' && exec python3 -m pipekit.launch.node"]
    """
    options = {
        "BatchMode": "yes",
        "ConnectTimeout": f"{_CONNECT_S}",
        "ServerAliveInterval": f"{max(1, int(silence_s / _ASKS))}",
        "ServerAliveCountMax": "3",
    }
    python = [settings.python, "-m", *module]
    if settings.python_path is not None:
        python = ["env", f"PYTHONPATH={settings.python_path}", *python]
    return [
        "ssh",
        *settings.arguments,
        *(argument for name, value in options.items() for argument in ("-o", f"{name}={value}")),
        *([] if settings.port is None else ["-p", str(settings.port)]),
        "-T",
        "--",
        host.name,
        # The login shell of the host reads this.
        f"cd {shlex.quote(str(settings.folder))} && exec {shlex.join(program or python)}",
    ]


def split_arguments(text: str, option: str) -> list[str]:
    """Arguments for another program, as a shell splits them.

    Raises:
        LaunchError: if a quote is left open; the message names the option.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise LaunchError(f"{option} {text!r}: {error}; quote it as a shell's words") from None

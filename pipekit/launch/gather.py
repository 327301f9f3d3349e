"""Copying the files of a checkpoint that this machine lacks from the hosts of its run, over ssh."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pipekit.checkpoint.manifest import (
    CHECKPOINTS_FOLDER,
    LATEST_FILE,
    MANIFEST_FILE,
    Manifest,
    find_latest,
    load_manifest,
    read_manifest,
)
from pipekit.checkpoint.reader import sound_files
from pipekit.errors import CheckpointError, LaunchError, PipekitError
from pipekit.files import write_atomically
from pipekit.launch.hosts import Host
from pipekit.launch.ssh import SshSettings, ssh_command
from pipekit.run_lock import hold_run
from pipekit.storage import storing

_NAME = re.compile(r"step-\d{8,19}")
_SILENCE_S = 30.0
_MOST_MANIFEST_BYTES = 2**30
_PIECE_BYTES = 2**20


@dataclass(frozen=True)
class Gathered:
    """Summary of the copies.

    Attributes:
        checkpoint: the checkpoint, which is whole now.
        sources: for each file that was copied the host that it is from.
    """

    checkpoint: Path
    sources: dict[str, str] = field(default_factory=dict)


def gather_over_ssh(path: Path, hosts: Sequence[Host], ssh: SshSettings) -> Gathered:
    """Make a checkpoint whole on this machine, from the parts that hosts have under the same path.

    Every byte is checked against the checkpoint's manifest before a file gets its name.

    Args:
        path: folder of a run, whose newest checkpoint is meant, or of a checkpoint.
        hosts: where to look, in this order.
        ssh: how the hosts are reached.

    Raises:
        CheckpointError: if there is no checkpoint, or the hosts do not have all of it together.
        LaunchError: if there is no ssh.
        StorageError: if it cannot be written.
        InUseError: if a run is going on in the folder.
    """
    fleet = _Fleet(hosts, ssh)
    path = path.absolute()
    if _NAME.fullmatch(path.name):
        run, name = path.parent.parent, path.name
    else:
        run, name = path, _newest(path, fleet)
    folder = run / CHECKPOINTS_FOLDER
    checkpoint = folder / name
    with hold_run(run):
        manifest, text = _manifest(checkpoint, fleet)
        sound = sound_files(checkpoint, manifest, manifest.file_bytes)
        gathered = Gathered(checkpoint)
        with storing(checkpoint):
            checkpoint.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=folder))
            try:
                for file in sorted(manifest.file_bytes.keys() - sound):
                    gathered.sources[file] = _copy(file, checkpoint, manifest, temporary, fleet)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            # Last, as it makes a checkpoint of the folder.
            write_atomically(checkpoint / MANIFEST_FILE, text)
            if (latest := _own_latest(folder)) is None or latest < name:
                write_atomically(folder / LATEST_FILE, f"{name}\n")
    load_manifest(checkpoint)
    return gathered


class _Fleet:
    """Hosts from which files are read, and what went wrong with them."""

    def __init__(self, hosts: Sequence[Host], ssh: SshSettings) -> None:
        self.hosts, self._ssh, self.faults = hosts, ssh, dict[str, str]()

    def read(self, host: Host, path: Path, target: Path, *, most_bytes: int) -> bool:
        """Copy a file of a host to `target`; False if it is not there, or longer."""
        if host.name in self.faults:
            return False
        command = ssh_command(host, self._ssh, silence_s=_SILENCE_S, program=["cat", "--", str(path)])
        with tempfile.TemporaryFile() as said, target.open("wb") as file:
            try:
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said)
            except FileNotFoundError:
                raise LaunchError("ssh is not in PATH; install it, or copy the files by hand") from None
            assert process.stdout is not None
            try:
                while piece := process.stdout.read(_PIECE_BYTES):
                    file.write(piece)
                    if file.tell() > most_bytes:
                        return False
            finally:
                process.stdout.close()
                if process.poll() is None and file.tell() > most_bytes:
                    process.kill()
                code = process.wait()
            said.seek(0)
            if code == 255:  # ssh's own
                lines = said.read(4096).decode(errors="replace").strip().splitlines()
                self.faults[host.name] = lines[-1] if lines else "ssh ended with exit code 255"
        return code == 0

    def describe_faults(self) -> str:
        """The hosts that cannot be reached, for the end of a message."""
        return "".join(f"; {name} cannot be reached: {fault}" for name, fault in self.faults.items())


def _own_latest(folder: Path) -> str | None:
    with suppress(CheckpointError):
        latest = find_latest(folder)
        return None if latest is None else latest.name
    return None


def _newest(run: Path, fleet: _Fleet) -> str:
    folder = run / CHECKPOINTS_FOLDER
    names = {_own_latest(folder) or ""}
    with tempfile.TemporaryDirectory() as temporary:
        for host in fleet.hosts:
            copy = Path(temporary) / LATEST_FILE
            if fleet.read(host, folder / LATEST_FILE, copy, most_bytes=255):
                name = copy.read_bytes().decode(errors="replace").strip()
                names |= {name} if _NAME.fullmatch(name) else set()
    if not max(names):
        asked = ", ".join(host.name for host in fleet.hosts)
        raise CheckpointError(
            f"{run}: neither this machine nor {asked} has a checkpoint there; give the run's folder as it is on the "
            f"hosts{fleet.describe_faults()}"
        )
    return max(names)


def _manifest(checkpoint: Path, fleet: _Fleet) -> tuple[Manifest, str]:
    """The manifest of a checkpoint, from here or from the first host that has a sound one, and its text."""
    with suppress(PipekitError, OSError):
        return read_manifest(checkpoint), (checkpoint / MANIFEST_FILE).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / MANIFEST_FILE
        for host in fleet.hosts:
            if fleet.read(host, checkpoint / MANIFEST_FILE, copy, most_bytes=_MOST_MANIFEST_BYTES):
                with suppress(CheckpointError):
                    return read_manifest(Path(temporary)), copy.read_text(encoding="utf-8")
    raise CheckpointError(f"{checkpoint}: no host has its {MANIFEST_FILE} as it was written{fleet.describe_faults()}")


def _copy(file: str, checkpoint: Path, manifest: Manifest, temporary: Path, fleet: _Fleet) -> str:
    """Copy a file from the first host that has it as it was written, and return the host's name."""
    for host in fleet.hosts:
        is_there = fleet.read(host, checkpoint / file, temporary / file, most_bytes=manifest.file_bytes[file])
        if is_there and sound_files(temporary, manifest, [file]):
            (temporary / file).replace(checkpoint / file)
            return host.name
    asked = ", ".join(host.name for host in fleet.hosts)
    raise CheckpointError(
        f"{checkpoint / file}: neither this machine nor {asked} has it as it was written"
        f"{fleet.describe_faults()}; give the hostfile of the run, or gather an earlier checkpoint"
    )

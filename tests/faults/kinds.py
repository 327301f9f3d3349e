"""Kinds of faults, each with the moment when it strikes, how a run must end, and what it must say."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fork_server import StartedCommand
from pipekit.errors import ExitCode

START_LIMIT_S = 180.0


def wait_until(condition: Callable[[], Any], what: str, limit_s: float) -> None:
    """Wait for a condition; a TimeoutError that names it after the limit."""
    deadline_s = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"waited {limit_s:g} s for {what}")
        time.sleep(0.005)


def losses_of(run: Path) -> list[float]:
    """Losses of a run in the order of its metrics."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def processes_of(folder: Path) -> list[int]:
    """Numbers of the processes of a round: those that work in its folder, or have its folder for temporary files.

    A fork shows the environment of the server that forked it, and a watcher works elsewhere, so that it takes both.
    """
    mark = f"TMPDIR={folder / 'tmp'}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        try:
            is_here = Path(os.readlink(entry / "cwd")) == folder or mark in (entry / "environ").read_bytes().split(
                b"\0"
            )
            if is_here and b") Z " not in (entry / "stat").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


class Round:
    """One run, and the place and moment of its fault.

    Args:
        folder: its folder, with `c.yaml`.
        rng: draws whatever else is random.
        world_size: number of ranks.
        rank: the rank that is struck.
        step: the step at which, or after which, it is.
    """

    def __init__(self, folder: Path, rng: random.Random, *, world_size: int, rank: int, step: int) -> None:
        self.folder, self.rng, self.world_size, self.rank, self.step = folder, rng, world_size, rank, step
        self.run = folder / "run"
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.sockets: list[socket.socket] = []
        self._num_starts = 0

    def start(self, *overrides: str, environ: dict[str, str] | None = None) -> None:
        """Start `pipekit train`, which is `command` from now on."""
        self.command = self.started(*overrides, environ=environ)

    def started(self, *overrides: str, environ: dict[str, str] | None = None) -> StartedCommand:
        """Start `pipekit train` beside what runs already."""
        self._num_starts += 1
        output = self.folder / f"start-{self._num_starts}"
        output.mkdir()
        return StartedCommand(
            ["pipekit", "train", "c.yaml", *overrides],
            cwd=self.folder,
            output=output,
            environ={"TMPDIR": str(self.temporary), **(environ or {})},
        )

    def num_steps(self) -> int:
        """Steps that the metrics know."""
        try:
            return (self.run / "metrics.jsonl").read_text().count("\n")
        except OSError:
            return 0

    def wait_for_step(self) -> None:
        """Wait until the round's step has been reported, and then a moment of a part of a step."""
        wait_until(lambda: self.num_steps() >= self.step or self.command.has_ended, f"step {self.step}", START_LIMIT_S)
        time.sleep(self.rng.uniform(0, 0.05))

    def wait_for_save(self) -> None:
        """Wait until a checkpoint is being written, or the run has ended."""
        checkpoints = self.run / "checkpoints"
        wait_until(
            lambda: self.command.has_ended or (checkpoints.is_dir() and any(checkpoints.glob(".step-*.tmp"))),
            "a save",
            START_LIMIT_S,
        )
        time.sleep(self.rng.uniform(0, 0.01))

    def published(self) -> list[str]:
        """Names of the checkpoints that are there."""
        checkpoints = self.run / "checkpoints"
        return sorted(path.parent.name for path in checkpoints.glob("step-*/manifest.json"))

    def pid_of_rank(self) -> int:
        """Process number of the rank that is struck."""
        found: list[int] = []

        def find() -> bool:
            for entry in self.run.glob(f"logs/rank-{self.rank}.log"):
                found.extend(_writers_of(entry, self.folder))
            return bool(found) or self.command.has_ended

        wait_until(find, f"rank {self.rank}", START_LIMIT_S)
        return found[0] if found else 0

    def kill_rank(self, signum: int) -> None:
        """Send a signal to the rank that is struck, if it is there."""
        pid = self.pid_of_rank()
        if pid:
            os.kill(pid, signum)


def _writers_of(log: Path, folder: Path) -> list[int]:
    """Processes of a round whose stderr is a log."""
    found = []
    for pid in processes_of(folder):
        try:
            if Path(os.readlink(f"/proc/{pid}/fd/2")) == log:
                found.append(pid)
        except OSError:
            continue
    return found


class Kind:
    """A kind of fault. Subclasses say how it strikes, and what belongs to it.

    Attributes:
        name: for tables, and the command line.
        ends: exit codes with which the run may end.
        says: regular expression that its output holds where the exit code is not 0, with `{rank}` and `{step}`.
        shows_traceback: whether the user's own code has failed, so that its traceback is shown.
    """

    name: str
    ends: Sequence[int] = (ExitCode.RANK_LOST,)
    says = ""
    shows_traceback = False

    def is_possible(self) -> bool:
        return True

    def prepare(self, own: Round) -> None:
        """Do what is to be done before the start."""

    def overrides(self, own: Round) -> list[str]:
        """Changes of the configuration."""
        return []

    def environ(self, own: Round) -> dict[str, str]:
        """Variables of the start that is struck."""
        return {}

    def strike(self, own: Round) -> None:
        """Wait for the moment, and strike."""

    def mend(self, own: Round) -> None:
        """Mend what keeps the run from going on."""

    def clean_up(self, own: Round) -> None:
        """Take away what the fault itself has made."""


class KillRank(Kind):
    name, says = "a rank is killed", "rank {rank} was killed by SIGKILL"

    # A rank that had finished cannot be killed any more.
    ends = (ExitCode.RANK_LOST, ExitCode.DONE)

    def strike(self, own: Round) -> None:
        own.wait_for_step()
        own.kill_rank(signal.SIGKILL)


class KillRankAtStart(KillRank):
    name = "a rank is killed while it starts"

    def strike(self, own: Round) -> None:
        own.pid_of_rank()
        time.sleep(own.rng.uniform(0, 0.3))
        own.kill_rank(signal.SIGKILL)


class KillRankInSave(KillRank):
    name = "a rank is killed in a save"

    def strike(self, own: Round) -> None:
        own.wait_for_save()
        own.kill_rank(signal.SIGKILL)


class KillLauncher(Kind):
    name, ends = "the launcher is killed", (-signal.SIGKILL, ExitCode.DONE)

    def strike(self, own: Round) -> None:
        own.wait_for_step()
        _send(own, signal.SIGKILL)


class KillLauncherInSave(KillLauncher):
    name = "the launcher is killed in a save"

    def strike(self, own: Round) -> None:
        own.wait_for_save()
        _send(own, signal.SIGKILL)


class KillLauncherAtStart(KillLauncher):
    name = "the launcher is killed at the start"

    def strike(self, own: Round) -> None:
        time.sleep(own.rng.uniform(0, 0.6))
        _send(own, signal.SIGKILL)


class StopRank(Kind):
    name, ends = "a rank stands still", (ExitCode.HANG, ExitCode.DONE)
    says = "the run hangs: rank {rank} "

    def overrides(self, own: Round) -> list[str]:
        return ["run.timeout_s=4"]

    def strike(self, own: Round) -> None:
        own.wait_for_step()
        own.kill_rank(signal.SIGSTOP)


class Signal(Kind):
    ends = (ExitCode.STOPPED, ExitCode.DONE)
    says = "step"

    def __init__(self, signum: signal.Signals) -> None:
        self.signum = signum
        self.name = f"{signum.name} to the launcher"

    def strike(self, own: Round) -> None:
        own.wait_for_step()
        _send(own, self.signum)


class SignalToRank(Signal):
    """As SLURM sends it, which knows nothing of launchers."""

    def __init__(self, signum: signal.Signals) -> None:
        super().__init__(signum)
        self.name = f"{signum.name} to a rank"

    def strike(self, own: Round) -> None:
        own.wait_for_step()
        own.kill_rank(self.signum)


class SignalInSave(Signal):
    def __init__(self, signum: signal.Signals) -> None:
        super().__init__(signum)
        self.name = f"{signum.name} in a save"

    def strike(self, own: Round) -> None:
        own.wait_for_save()
        _send(own, self.signum)


class InTrial(Kind):
    """A fault that the trial makes in a step."""

    def __init__(self, fault: str, name: str, ends: int, says: str = "", *, shows_traceback: bool = False) -> None:
        self.fault, self.name, self.ends, self.says = fault, name, (ends,), says
        self.shows_traceback = shows_traceback

    def environ(self, own: Round) -> dict[str, str]:
        return {"FAULT": f"{self.fault}:{own.rank}:{own.step}"}


class DamageCheckpoint(Kind):
    """The newest checkpoint is damaged, and the one before it is whole."""

    name, ends, says = "the newest checkpoint is damaged", (ExitCode.STOPPED, ExitCode.DONE), "step"

    def strike(self, own: Round) -> None:
        own.step = max(own.step, 8)
        own.wait_for_step()
        _send(own, signal.SIGTERM)

    def mend(self, own: Round) -> None:
        newest = own.run / "checkpoints" / own.published()[-1]
        files = sorted(path for path in newest.iterdir() if path.stat().st_size)
        file = own.rng.choice(files)
        content = bytearray(file.read_bytes())
        place = own.rng.randrange(len(content))
        how = own.rng.choice(["bit", "cut", "gone", "zeros"])
        if how == "gone":
            file.unlink()
            return
        if how == "bit":
            content[place] ^= 1 << own.rng.randrange(8)
        elif how == "zeros":
            content[place : place + 512] = bytes(len(content[place : place + 512]))
        file.write_bytes(content[:place] if how == "cut" else content)


class SecondStart(Kind):
    name, ends = "a second start of the same run", (ExitCode.DONE,)

    def strike(self, own: Round) -> None:
        own.wait_for_step()
        if own.command.has_ended:
            return
        second = own.started()
        done = second.wait(START_LIMIT_S)
        if done.returncode not in (ExitCode.IN_USE, ExitCode.DONE):
            raise OSError(f"the second start ended with {done.returncode}: {done.stderr}")
        if done.returncode == ExitCode.IN_USE and str(own.command.pid) not in done.stderr:
            raise OSError(f"the second start does not name the process that has the folder: {done.stderr}")


class FullDisk(Kind):
    name, ends, says = "the disk is full", (ExitCode.STORAGE,), "(?i)no space|no room|full"

    def is_possible(self) -> bool:
        return os.geteuid() == 0 and _can_mount()

    def prepare(self, own: Round) -> None:
        own.run.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(own.run)], check=True)

    def strike(self, own: Round) -> None:
        own.step = min(own.step, 12)
        own.wait_for_step()
        with (own.run / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(bytes(4096)):
                pass

    def mend(self, own: Round) -> None:
        (own.run / "filler").unlink()

    def clean_up(self, own: Round) -> None:
        subprocess.run(["umount", "-l", str(own.run)], check=False, stderr=subprocess.DEVNULL)


class PortTaken(Kind):
    name, ends, says = "the port is taken", (ExitCode.MISTAKE,), "another program uses its port"

    def prepare(self, own: Round) -> None:
        own.sockets.append(socket.create_server(("127.0.0.1", 0)))

    def environ(self, own: Round) -> dict[str, str]:
        port = str(own.sockets[0].getsockname()[1])
        return {
            "RANK": "0",
            "WORLD_SIZE": str(own.world_size),
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }

    def overrides(self, own: Round) -> list[str]:
        return ["run.timeout_s=20"]

    def clean_up(self, own: Round) -> None:
        for taken in own.sockets:
            taken.close()


def _send(own: Round, signum: int) -> None:
    if not own.command.has_ended:
        os.kill(own.command.pid, signum)


def _can_mount() -> bool:
    done = subprocess.run(["unshare", "--mount", "true"], check=False, stderr=subprocess.DEVNULL)
    return done.returncode == 0


_ALL: list[Kind] = [
    KillRank(),
    KillRankAtStart(),
    KillRankInSave(),
    KillLauncher(),
    KillLauncherInSave(),
    KillLauncherAtStart(),
    StopRank(),
    Signal(signal.SIGTERM),
    Signal(signal.SIGINT),
    Signal(signal.SIGUSR1),
    SignalToRank(signal.SIGTERM),
    SignalToRank(signal.SIGUSR1),
    SignalInSave(signal.SIGTERM),
    InTrial(
        "crash", "a rank raises", ExitCode.RANK_LOST, "rank {rank} failed: ZeroDivisionError", shows_traceback=True
    ),
    InTrial("abort", "a rank aborts", ExitCode.RANK_LOST, "rank {rank} was killed by SIGABRT"),
    InTrial("slow", "a rank is slow", ExitCode.DONE),
    InTrial("clock", "the clock jumps", ExitCode.DONE),
    DamageCheckpoint(),
    SecondStart(),
    FullDisk(),
    PortTaken(),
]
KINDS = {kind.name: kind for kind in _ALL}

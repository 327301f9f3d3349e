"""Agent of one host of a run on several: `python -m pipekit.launch.node`, which the launcher starts over ssh.

The launcher's messages come on stdin, and the agent's go to stdout. First the agent tells what the hosts must have in
common; told to start, it runs the host's ranks as a launcher on one machine does. When the launcher is gone, or silent
for too long, the agent ends its ranks.

Under pdsh, which has no way back, the whole job is an argument: `python -m pipekit.launch.node JOB NODE_RANK`.
"""

from __future__ import annotations

import base64
import codecs
import contextlib
import fcntl
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from pipekit.errors import ExitCode, LaunchError, PipekitError, StoppedError
from pipekit.launch.environment import LOCALHOST
from pipekit.launch.facts import host_facts
from pipekit.launch.failures import HangError, RankError, RankFailure
from pipekit.launch.link import BEAT_S, Link, Message
from pipekit.launch.local import process_environ, run_local
from pipekit.launch.network import own_address
from pipekit.launch.ports import choose_port
from pipekit.launch.resources import num_accelerators
from pipekit.launch.worker import report_failure
from pipekit.signals import Interrupted

_POLL_S = 0.25
_MOST_BYTES = 1 << 20
# After a second signal, everything is gone in less.
_LEAVE_S = 15.0


@dataclass(frozen=True)
class NodeJob:
    """Job of one host of a run.

    Attributes:
        command: "train", the path of a script, or a module of pipekit's as `-m MODULE`.
        arguments: of the command.
        slots: the host's slots that are used; a process each.
        device: what the processes compute on.
        host: the host's name for the launcher.
        environ: variables to set.
        log_dir: folder of the logs of this host's ranks.
        timeout_s: the longest silence between heartbeats of a rank.
        silence_s: the longest silence of the launcher.
    """

    command: str
    arguments: Sequence[str]
    slots: Sequence[int]
    device: Literal["auto", "cpu", "cuda"]
    host: str = ""
    environ: Mapping[str, str] = field(default_factory=dict)
    log_dir: str = "logs"
    timeout_s: float = 600.0
    silence_s: float = 30.0

    def to_message(self) -> Message:
        """The job as values that JSON can hold."""
        return asdict(self)


@dataclass(frozen=True)
class NodePlace:
    """The place of one host among those of a run.

    Attributes:
        first_rank: rank of its first process.
        world_size: number of processes on all hosts.
        master_addr: address of the host of rank 0.
        master_port: port on which rank 0 listens.
    """

    first_rank: int
    world_size: int
    master_addr: str
    master_port: int


def run_node(job: NodeJob, place: NodePlace, *, on_failing: Callable[[RankFailure], object] | None = None) -> None:
    """Run the ranks of this host, and return when all have succeeded; see `run_local`."""
    num_gpus = take_gpus(job)
    log_dir = Path(job.log_dir)
    environ: dict[str, str] = {}
    if job.command == "train":
        # Each rank finds the rest out for itself, as under any launcher.
        command = [sys.executable, "-m", "pipekit", "train", *job.arguments]
    else:
        module = ["pipekit.launch.script", job.command]
        if job.command.startswith("-m "):
            module = job.command.split()[1:]
        command = [sys.executable, "-m", *module, *job.arguments]
        environ = process_environ(len(job.slots), num_gpus, log_dir)
    run_local(
        command,
        world_size=place.world_size,
        ranks=range(place.first_rank, place.first_rank + len(job.slots)),
        log_dir=log_dir,
        env=environ,
        port=place.master_port,
        master_addr=place.master_addr,
        timeout_s=job.timeout_s,
        on_failing=on_failing,
    )


def take_gpus(job: NodeJob) -> int | None:
    """Make the GPUs of the job's slots the only ones that this process and its children see; None for the CPU.

    Raises:
        LaunchError: if there is no GPU of a slot's number.
    """
    if job.device == "cpu":
        return None
    variables = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
    present = num_accelerators({name: value for name, value in os.environ.items() if name not in variables})
    if not present:
        if job.device == "cuda":
            raise LaunchError("device=cuda: no GPU is present; use auto or cpu")
        return None
    if max(job.slots) >= present:
        raise LaunchError(
            f"slot {max(job.slots)} has no GPU: there are {present}, counted from 0; correct slots= in the hostfile"
        )
    os.environ.pop("HIP_VISIBLE_DEVICES", None)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, job.slots))
    return len(job.slots)


def main(arguments: Sequence[str]) -> None:
    """Be the agent of this host."""
    if arguments:
        _run_alone(*arguments)
        return
    # What anything here prints goes to stderr, and so does not meet the messages.
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    link = Link(sys.stdin.buffer, channel)
    orders = _Orders(link)
    try:
        ended = _obey(link, orders)
    except (KeyboardInterrupt, Interrupted):
        ended = {"exit_code": ExitCode.RANK_LOST, "kind": "signal"}
    except StoppedError as stop:
        ended = {"exit_code": stop.exit_code, "kind": "stopped", "message": str(stop)}
    except RankError as error:
        ended = describe(error.failure) | {"exit_code": error.exit_code, "message": str(error)}
    except PipekitError as error:
        kind = "hang" if isinstance(error, HangError) else "user"
        ended = {"exit_code": error.exit_code, "kind": kind, "message": str(error)}
    except Exception:
        ended = {"exit_code": ExitCode.RANK_LOST, "kind": "crash", "message": traceback.format_exc()}
    link.send(ended=ended)
    os._exit(0)  # threads of it wait for messages


def describe(failure: RankFailure) -> dict[str, Any]:
    """Rank and kind of a failure."""
    return {"rank": failure.rank, "kind": "killed" if failure.report is None else failure.report.kind}


def _obey(link: Link, orders: _Orders) -> dict[str, Any]:
    """Do what the launcher says; return how it ended."""
    job = NodeJob(**orders.next("job"))
    orders.watch(job.silence_s)
    os.environ.update(job.environ)
    facts = host_facts(job.command, job.arguments)
    facts["the kind of device"] = "cpu" if take_gpus(job) is None else "cuda"
    link.send(facts=facts, time_s=time.time(), address=_address())
    order = orders.next("choose", "start")
    if "hosts" in order:
        port = order["port"]
        link.send(master=[_master_address(order["hosts"]), choose_port(port)])
        order = orders.next("start")
    place = NodePlace(**order["place"])
    job = replace(job, log_dir=order["log_dir"], timeout_s=order["timeout_s"])
    log_dir = Path(job.log_dir)
    log_dir.mkdir(parents=True, exist_ok=True)
    lock_file = log_dir / f".{socket.gethostname()}.{job.host}.lock"
    lock = _wait_for_turn(lock_file, link, limit_s=job.silence_s + _LEAVE_S)
    logs = _LogReader(link, {rank: log_dir / f"rank-{rank}.log" for rank in _ranks(job, place)})
    terminal = _TerminalReader(link)
    try:
        run_node(job, place, on_failing=lambda failure: link.send(failing=describe(failure)))
    finally:
        terminal.end()
        logs.end()
        lock_file.unlink(missing_ok=True)
        os.close(lock)
    return {"exit_code": ExitCode.DONE, "kind": "done"}


def _ranks(job: NodeJob, place: NodePlace) -> range:
    return range(place.first_rank, place.first_rank + len(job.slots))


class _Orders:
    """Messages of the launcher. Signals and the end of the link are acted on at once, whatever the agent does."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._queue: queue.Queue[Message] = queue.Queue()
        self._heard_s = time.monotonic()
        threading.Thread(target=self._read, name="orders", daemon=True).start()

    def next(self, *kinds: str) -> Any:
        """Wait for a message of one of these kinds, and return its content."""
        while True:
            message = self._queue.get()
            for kind in kinds:
                if kind in message:
                    return message[kind]

    def watch(self, silence_s: float) -> None:
        """Show the launcher from now on that this end is there, and leave when the launcher is silent for too long."""

        def beat() -> None:
            while self._link.send(beat=time.time()):
                time.sleep(BEAT_S)

        # Another thread: where the connection stands still, sending does, too.
        def listen() -> None:
            while time.monotonic() - self._heard_s < silence_s:
                time.sleep(BEAT_S)
            _leave()

        for target in (beat, listen):
            threading.Thread(target=target, name=target.__name__, daemon=True).start()

    def _read(self) -> None:
        for message in self._link.messages():
            self._heard_s = time.monotonic()
            if "signal" in message:
                os.kill(os.getpid(), message["signal"])
            elif "end" in message:
                threading.Thread(target=_leave, daemon=True).start()
            else:
                self._queue.put(message)
        _leave()


def _leave() -> NoReturn:
    """End the ranks as a user would, with two signals; then by force, as the watcher of the launcher does it."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_LEAVE_S)
    os._exit(1)


class _TerminalReader:
    """Sends on what rank 0 writes to stdout, which goes through a pipe."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._read_end, write_end = os.pipe()
        os.dup2(write_end, 1)
        os.close(write_end)
        self._thread = threading.Thread(target=self._run, name="terminal", daemon=True)
        self._thread.start()

    def end(self) -> None:
        os.dup2(2, 1)
        self._thread.join(2.0)

    def _run(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        while data := os.read(self._read_end, 1 << 16):
            self._link.send(out=decoder.decode(data))


class _LogReader:
    """Sends on what is appended to the logs of the ranks, line by line."""

    def __init__(self, link: Link, files: Mapping[int, Path]) -> None:
        self._link = link
        self._files = files
        self._places = {rank: file.stat().st_size if file.exists() else 0 for rank, file in files.items()}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="logs", daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        self._thread.join(5.0)

    def _run(self) -> None:
        while not self._ended.wait(_POLL_S):
            self._send_new()
        self._send_new(whole_lines=False)

    def _send_new(self, *, whole_lines: bool = True) -> None:
        for rank, file in self._files.items():
            try:
                with file.open("rb") as log:
                    log.seek(self._places[rank])
                    data = log.read(_MOST_BYTES)
            except OSError:
                continue
            end = data.rfind(b"\n") + 1
            if whole_lines and (end or len(data) < _MOST_BYTES):
                data = data[:end]
            if data:
                self._places[rank] += len(data)
                lines = data.decode(errors="replace").splitlines()
                self._link.send(log="".join(f"rank {rank}: {line}\n" for line in lines))


def _wait_for_turn(lock_file: Path, link: Link, *, limit_s: float) -> int:
    """Wait for an earlier agent of this run on this host, which may not know yet that its launcher is gone.

    Returns:
        The descriptor of the locked file; the system frees the lock when the process ends, however it ends.
    """
    deadline_s = time.monotonic() + limit_s
    told = False
    while True:
        lock = os.open(lock_file, os.O_RDWR | os.O_CREAT, 0o644)
        with contextlib.suppress(BlockingIOError):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise
            except OSError:
                return lock  # some network file systems cannot lock
            # Its owner removes it in the end; then this one is nobody's.
            if lock_file.exists() and os.path.samestat(os.fstat(lock), lock_file.stat()):
                return lock
        os.close(lock)
        if time.monotonic() > deadline_s:
            raise LaunchError(
                f"another launch has had its ranks of {lock_file.parent} on this host for {limit_s:g} s; end it first"
            )
        if not told:
            link.send(log="waiting for the ranks of an earlier launch to end\n")
            told = True
        time.sleep(_POLL_S)


def _address() -> str | None:
    """Address of this host at which ssh has reached it; None over the loopback."""
    parts = os.environ.get("SSH_CONNECTION", "").split()
    address = parts[2] if len(parts) == 4 else None
    return None if address is None or address.startswith("127.") or address == "::1" else address


def _master_address(others: Sequence[str | None]) -> str:
    """Address of this host for the other hosts, whose addresses are given."""
    if not any(others) and _address() is None:
        return LOCALHOST  # there is one host, or all are this machine
    found = _address()
    for other in others:
        found = found or (other and own_address(other))
    if found is None:
        raise LaunchError("which address the other hosts reach this one at is not clear; give --master_addr ADDRESS")
    return found


def _run_alone(job_text: str, node_rank: str) -> None:
    """Run the ranks of this host as one of the job's hosts, without a launcher that listens."""
    message = json.loads(base64.urlsafe_b64decode(job_text))
    number, hosts = int(node_rank), message.pop("hosts")
    place = NodePlace(
        first_rank=sum(len(slots) for slots in hosts[:number]),
        world_size=sum(map(len, hosts)),
        master_addr=message.pop("master_addr"),
        master_port=message.pop("master_port"),
    )
    job = NodeJob(**message, slots=hosts[number])
    os.environ.update(job.environ)
    with report_failure(None):
        run_node(job, place)


if __name__ == "__main__":
    main(sys.argv[1:])

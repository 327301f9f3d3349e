"""A run on several hosts over ssh: starting the agents of the hosts, watching over them, and ending them together."""

from __future__ import annotations

import contextlib
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from pipekit.errors import ExitCode, LaunchError, StoppedError
from pipekit.hangs.monitor import HangMonitor, save_report
from pipekit.launch.facts import CLOCK_LIMIT_S, check_same
from pipekit.launch.failures import HangError
from pipekit.launch.hosts import Host
from pipekit.launch.link import BEAT_S, Link, Message
from pipekit.launch.node import NodeJob
from pipekit.launch.ssh import SshSettings, ssh_command
from pipekit.signals import Interrupted, name_signal, signals_noted

LONGEST_SILENCE_S = 30.0
"""A host that is silent for longer is given up, and so is a launcher by its agents."""

_POLL_S = 0.1
# Where ranks have only lost others, the time for the cause to be heard from another host.
_SETTLE_S = 3.0
# A host that is silent for so many beats may be the cause itself.
_MISSED_BEATS = 4
# The time for an agent to end its ranks by force.
_END_S = 20.0
# Once a host cannot be reached, the time for others to say so, too.
_TOGETHER_S = 1.0
_RETRY_S = 2.0
_SHOWN_LINES = 20


@dataclass(frozen=True)
class FleetRun:
    """A run on several hosts.

    Attributes:
        hosts: the hosts, in the order of their ranks.
        job: what each does; the slots are its own.
        ssh: how the hosts are reached.
        log_dir: folder, on this machine, of a log for each host.
        master_addr: address of the first host; None lets it find out.
        master_port: port on which rank 0 listens; None lets the first host choose.
        own_facts: facts about this machine that the hosts must share.
        patience_s: so long are hosts tried again that cannot be reached, such as one that has been lost before.
    """

    hosts: Sequence[Host]
    job: NodeJob
    ssh: SshSettings
    log_dir: Path
    master_addr: str | None = None
    master_port: int | None = None
    own_facts: dict[str, str] = field(default_factory=dict)
    patience_s: float = 0.0

    @property
    def silence_s(self) -> float:
        """The longest silence of a host."""
        return min(LONGEST_SILENCE_S, self.job.timeout_s)


class HostError(LaunchError):
    """The failure of a host, or of a rank on it, as the end of the run.

    Attributes:
        host: its name.
        exit_code: that of the rank's failure.
    """

    def __init__(self, host: str, message: str, exit_code: int) -> None:
        self.host = host
        self.exit_code = ExitCode(exit_code) if exit_code in set(ExitCode) else ExitCode.RANK_LOST
        super().__init__(f"{host}: {message}")


def run_fleet(run: FleetRun) -> None:
    """Run a command's ranks on several hosts, and return when all have succeeded.

    The output of every host is appended to `log_dir/<host>.log`; what rank 0 writes to stdout goes to this process's.
    Before anything starts, versions, code and configuration are compared. When one host fails, all are ended. The first
    signal is passed on to all ranks, and a second ends them at once.

    Raises:
        LaunchError: if hosts differ.
        HangError: if ranks have waited too long for one another, and the heartbeats of all are seen here.
        HostError: if a host cannot be reached, is silent for too long, or a rank on it fails.
        StoppedError: if the ranks have stopped on request, with a checkpoint.
        Interrupted: if a signal has ended them otherwise.
    """
    with signals_noted() as signals:
        fleet = _Fleet(run, signals)
        try:
            fleet.connect()
            if not signals:
                fleet.compare()
                fleet.start(fleet.choose_master())
                fleet.wait()
        finally:
            fleet.end()
        fleet.raise_outcome()


@dataclass
class _Failure:
    host: str
    kind: str
    message: str
    exit_code: int
    time_s: float


class _HostLog:
    """The log of a host on this machine. There is none, nor a folder, before the host has said something."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    def write(self, text: str) -> None:
        # A full disk here must not end the run there.
        with self._lock, contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8", errors="replace") as file:
                file.write(text)


class _Node:
    """The launcher's side of one host: its ssh process, and what has been heard."""

    def __init__(self, host: Host, run: FleetRun, events: queue.Queue[tuple[_Node, Message | None]]) -> None:
        self.host = host
        self.facts: Message | None = None
        self.master: list[Any] | None = None
        self.ended: Message | None = None
        self.failing: Message | None = None
        self.heard_s = time.monotonic()
        self.is_gone = False
        self.said: deque[str] = deque(maxlen=_SHOWN_LINES)
        self.log = _HostLog(run.log_dir / f"{host.name}.log")
        command = ssh_command(host, run.ssh, silence_s=run.silence_s)
        try:
            # In a session of its own, so that Ctrl-C reaches the ranks through the launcher alone.
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise LaunchError(
                f"{command[0]} cannot be started: {error.strerror}; install OpenSSH's client, or try --launcher"
            ) from None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.link = Link(self.process.stdout, self.process.stdin)
        self._errors_thread = threading.Thread(target=self._read_errors, args=(self.process.stderr,), daemon=True)
        self._errors_thread.start()
        # It waits for the other in the end, and so starts after it.
        self._thread = threading.Thread(target=self._read, args=(events,), daemon=True)
        self._thread.start()

    def _read(self, events: queue.Queue[tuple[_Node, Message | None]]) -> None:
        for message in self.link.messages():
            events.put((self, message))
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_TOGETHER_S)
        self._errors_thread.join(_TOGETHER_S)  # what ssh says is read before its end is told
        events.put((self, None))

    def _read_errors(self, stream: IO[bytes]) -> None:
        with contextlib.suppress(ValueError, OSError):
            for line in stream:
                text = line.decode(errors="replace").rstrip()
                self.said.append(text)
                if self.facts is not None:
                    self.log.write(f"{text}\n")

    def close(self) -> None:
        """End the connection; the agent then ends its ranks, if it has any."""
        streams = (self.process.stdin, self.process.stdout, self.process.stderr)
        with contextlib.suppress(OSError):
            self.process.stdin.close()  # type: ignore[union-attr]
        try:
            self.process.wait(1.0 if self.ended is not None or self.is_gone else _POLL_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for thread in (self._thread, self._errors_thread):
            thread.join(2.0)
        for stream in streams:
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]


class _Fleet:
    def __init__(self, run: FleetRun, signals: Sequence[int]) -> None:
        self.run = run
        self.nodes: list[_Node] = []
        self._signals = signals
        self._num_passed_on = 0
        self._failures: list[_Failure] = []
        self._has_started = False
        self._ending_s: float | None = None
        self._beat_s = 0.0
        # Where the run folder is shared, the heartbeats of all ranks are seen here.
        num_ranks = sum(len(host.slots) for host in run.hosts)
        self._monitor = HangMonitor(run.log_dir, range(num_ranks))
        self._hang_report: str | None = None
        self._events: queue.Queue[tuple[_Node, Message | None]] = queue.Queue()

    def connect(self) -> None:
        """Connect to all hosts, and wait until each has told its facts."""
        give_up_s = time.monotonic() + self.run.patience_s
        while True:
            for host in self.run.hosts:
                node = _Node(host, self.run, self._events)
                self.nodes.append(node)
                job = replace(self.run.job, host=host.name, slots=host.slots, silence_s=self.run.silence_s)
                node.link.send(job=job.to_message())
            failed_s: float | None = None
            while any(node.facts is None and not node.is_gone for node in self.nodes) and not self._signals:
                self._listen()
                if self._failures:
                    failed_s = failed_s or time.monotonic()
                    if time.monotonic() - failed_s > _TOGETHER_S:
                        break
            if not self._failures or self._signals:
                return
            is_unreachable = all(failure.kind == "lost" for failure in self._failures)
            if not is_unreachable or time.monotonic() > give_up_s:
                self._raise_unreachable()
            self._close_all()
            self.nodes, self._failures, self._events = [], [], queue.Queue()
            time.sleep(_RETRY_S)

    def compare(self) -> None:
        """Check that the hosts have the same versions, code and configuration; warn where clocks differ."""
        facts = {node.host.name: node.facts["facts"] for node in self.nodes if node.facts is not None}
        check_same(facts | ({"this machine": self.run.own_facts} if self.run.own_facts else {}))
        for node in self.nodes:
            assert node.facts is not None
            ahead_s = node.facts["ahead_s"]
            if abs(ahead_s) > CLOCK_LIMIT_S:
                which = "ahead of" if ahead_s > 0 else "behind"
                sys.stderr.write(
                    f"warning: {node.host.name}: its clock is {abs(ahead_s):.0f} s {which} this machine's; times in "
                    "logs and files differ\n"
                )

    def choose_master(self) -> tuple[str, int]:
        """Address and port of rank 0, which its host chooses where they are not given."""
        first, *others = self.nodes
        addresses = [node.facts["address"] for node in others if node.facts is not None]
        known = self.run.master_addr
        first.link.send(choose={"hosts": [] if known else addresses, "port": self.run.master_port})
        self._wait_until(lambda: first.master is not None)
        if first.master is None:
            return "", 0
        address, port = first.master
        return known or address, port

    def start(self, master: tuple[str, int]) -> None:
        """Let all hosts start their ranks."""
        self._has_started = True
        world_size = sum(len(host.slots) for host in self.run.hosts)
        job, first_rank = self.run.job, 0
        for node in self.nodes:
            place = {
                "first_rank": first_rank,
                "world_size": world_size,
                "master_addr": master[0],
                "master_port": master[1],
            }
            node.link.send(start={"place": place, "log_dir": job.log_dir, "timeout_s": job.timeout_s})
            first_rank += len(node.host.slots)

    def wait(self) -> None:
        """Wait until all hosts have ended, or one has failed."""
        self._wait_until(lambda: all(node.ended is not None or node.is_gone for node in self.nodes))

    def end(self) -> None:
        """End what still runs, and all connections."""
        self._end_all()
        assert self._ending_s is not None
        # Agents without ranks leave as soon as their link is closed.
        deadline_s = self._ending_s + (_END_S if self._has_started else 0.0)
        while time.monotonic() < deadline_s and any(self._is_there(node) for node in self.nodes):
            self._listen()
        self._close_all()

    def raise_outcome(self) -> None:
        """Raise the failure that caused the others, or what a signal has come to; nothing if all have succeeded."""
        failures = self._failures
        if self._signals:
            # What a signal ends has no failure of its own, and those that lost it have failed because of it.
            failures = [each for each in failures if each.kind not in ("peer", "lost", "killed")]
            ends = [None if node.ended is None else node.ended["kind"] for node in self.nodes]
            have_ended = all(end in ("done", "stopped") for end in ends)
            has_cause = any(each.kind != "stopped" for each in failures)
            if not have_ended and (len(self._signals) > 1 or not has_cause):
                name = name_signal(self._signals[0])
                raise Interrupted(self._signals[0], f"stopped by {name}: ended {len(self.nodes)} hosts")
        if failures:
            last = {"peer": 1, "stopped": 2}
            first = min(failures, key=lambda failure: (last.get(failure.kind, 0), failure.time_s))
            if first.kind == "stopped":
                raise StoppedError(first.message)
            if first.kind == "hang" and self._hang_report is not None:
                raise HangError(save_report(self._hang_report, self.run.log_dir))
            raise HostError(first.host, first.message, first.exit_code)

    def _is_there(self, node: _Node) -> bool:
        return node.ended is None and not node.is_gone

    def _close_all(self) -> None:
        for node in self.nodes:
            with contextlib.suppress(OSError):
                node.process.stdin.close()  # type: ignore[union-attr]
        for node in self.nodes:
            node.close()

    def _wait_until(self, is_done: Callable[[], bool]) -> None:
        peer_lost_s: float | None = None
        while not is_done():
            self._listen()
            if self._signals:
                if all(not self._is_there(node) for node in self.nodes):
                    return
                continue
            kinds = {failure.kind for failure in self._failures}
            kinds |= {node.failing["kind"] for node in self.nodes if node.failing is not None}
            if kinds - {"peer", "stopped"}:
                return
            if "peer" in kinds:
                peer_lost_s = peer_lost_s or time.monotonic()
                is_quiet = any(
                    time.monotonic() - node.heard_s > _MISSED_BEATS * BEAT_S
                    for node in self.nodes
                    if self._is_there(node)
                )
                if time.monotonic() - peer_lost_s > _SETTLE_S and not is_quiet:
                    return

    def _end_all(self) -> None:
        if self._ending_s is None:
            self._ending_s = time.monotonic()
            if not self._signals:
                for node in self.nodes:
                    # One that has a failure is ending by itself.
                    if self._is_there(node) and node.failing is None:
                        node.link.send(end=True)

    def _listen(self) -> None:
        """Take what the hosts have sent, pass signals on, and note hosts that are silent."""
        with contextlib.suppress(queue.Empty):
            node, message = self._events.get(timeout=_POLL_S)
            self._take(node, message)
            while True:
                self._take(*self._events.get_nowait())
        if self._has_started and not self._failures and all(node.failing is None for node in self.nodes):
            self._listen_to_ranks()
        now_s = time.monotonic()
        while self._num_passed_on < len(self._signals):
            for node in self.nodes:
                node.link.send(signal=int(self._signals[self._num_passed_on]))
            self._num_passed_on += 1
        if now_s - self._beat_s > BEAT_S:
            self._beat_s = now_s
            for node in self.nodes:
                if self._is_there(node):
                    node.link.send(beat=True)
        for node in self.nodes:
            # Before the first message, ssh may need its time to connect, and the host to start Python.
            limit_s = self.run.silence_s if node.facts is not None else max(2 * LONGEST_SILENCE_S, self.run.silence_s)
            if self._is_there(node) and now_s - node.heard_s > limit_s:
                self._lose(node, f"has not been heard from for {limit_s:.0f} s; is it up, and its network?")

    def _listen_to_ranks(self) -> None:
        """Keep the report of a hang, for which the heartbeats are gone once ranks are ended."""
        self._monitor.listen()
        longest_s = max(self._monitor.longest_wait_s(), self._monitor.longest_silence_s())
        if longest_s > self.run.job.timeout_s / 2:
            first_rank, lines = 0, []
            for host in self.run.hosts:
                ranks = range(first_rank, first_rank := first_rank + len(host.slots))
                lines.append(f"{host.name}  {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else ""))
            self._hang_report = "\n".join([self._monitor.report(), "", "host  ranks", *lines])

    def _take(self, node: _Node, message: Message | None) -> None:
        node.heard_s = time.monotonic()
        if message is None:
            if self._is_there(node):
                said = "\n".join(node.said) or "(nothing)"
                doing = "lost" if node.facts is not None else "cannot be reached"
                self._lose(node, f"{doing}: ssh ended with exit code {node.process.poll()}, and said:\n{said}")
            node.is_gone = True
        elif "out" in message:
            sys.stdout.write(message["out"])
            sys.stdout.flush()
        elif "log" in message or "noise" in message:
            node.log.write(message.get("log") or message["noise"])
        elif "facts" in message:
            node.facts = message | {"ahead_s": message["time_s"] - time.time()}
        elif "master" in message:
            node.master = message["master"]
        elif "failing" in message:
            node.failing = message["failing"]
        elif "ended" in message:
            self._note_end(node, message["ended"])

    def _note_end(self, node: _Node, ended: Message) -> None:
        node.ended = ended
        # A host that was told to end says so, and that is no failure of its own.
        is_expected = ended["kind"] == "signal" and (self._ending_s is not None or bool(self._signals))
        if ended["kind"] != "done" and not is_expected:
            message = ended.get("message", "its ranks were ended by a signal on that host")
            self._failures.append(
                _Failure(node.host.name, ended["kind"], message, ended["exit_code"], time.monotonic())
            )

    def _lose(self, node: _Node, message: str) -> None:
        node.is_gone = True
        if self._ending_s is None:
            if node.facts is not None:
                node.log.write(f"{message}\n")
            self._failures.append(_Failure(node.host.name, "lost", message, ExitCode.RANK_LOST, time.monotonic()))

    def _raise_unreachable(self) -> None:
        first, *others = sorted(
            self._failures, key=lambda failure: [host.name for host in self.run.hosts].index(failure.host)
        )
        more = "".join(f"\n{failure.host}: {failure.message}" for failure in others[:3])
        raise HostError(first.host, first.message + more, first.exit_code)

"""Starting the ranks of a run as processes on this machine, watching over them, and ending them together."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipekit.errors import ConfigError, ExitCode, LaunchError, StoppedError
from pipekit.hangs.heartbeat import Heartbeat, heartbeat_file
from pipekit.hangs.monitor import HangMonitor, save_report
from pipekit.launch.compiler import compiler_environ
from pipekit.launch.environment import LOCALHOST, RankEnvironment
from pipekit.launch.extensions import extensions_dir, guard_extension_builds
from pipekit.launch.failures import (
    FailureReport,
    HangError,
    RankError,
    RankFailure,
    TimeLimitError,
    first_failure,
)
from pipekit.launch.gpu_environment import gpu_environ
from pipekit.launch.network import gloo_environ
from pipekit.launch.ports import choose_port
from pipekit.launch.resources import count_gpus, processes_text, thread_environ
from pipekit.launch.watcher import Watcher
from pipekit.launch.worker import ERROR_FILE_VARIABLE, LAUNCHER_PID_VARIABLE
from pipekit.signals import Interrupted, name_signal, signals_noted
from pipekit.storage import storing

if TYPE_CHECKING:
    from pipekit.plan.plan import Plan

_POLL_S = 0.05
# After a rank has lost another, the time for that other to report its own failure.
_SETTLE_S = 2.0
# After SIGKILL a process is gone at once, unless it is stuck in a driver.
_KILLED_S = 5.0
_PORT_ATTEMPTS = 3
# Ranks of pipekit's own note SIGTERM as a request to stop, and have nothing to do once another has failed.
RANK_GRACE_S = 1.0
# Ranks that lose each other after a wait of this share of the limit have hung; sooner, a connection was lost.
_SHARE_OF_LIMIT = 0.8


def run_plan(
    plan: Plan,
    plan_file: Path,
    *task: str,
    log_dir: Path,
    stdout_rank: int = 0,
    limit_s: float = math.inf,
    is_last: bool = True,
) -> None:
    """Run every rank of the plan in `plan_file` as a process on this machine; see `run_local`."""
    for note in guard_extension_builds(os.environ):
        sys.stderr.write(f"{note}\n")
    world_size = plan.layout.world_size
    environ = thread_environ(plan.config.run.threads_per_process, world_size, os.environ)
    environ["TORCH_EXTENSIONS_DIR"] = str(extensions_dir(os.environ))
    if plan.device == "cpu":
        environ["DS_ACCELERATOR"] = "cpu"
    else:
        environ |= gpu_environ(log_dir, os.environ)
    environ |= compiler_environ(plan.config, {**os.environ, **environ}, device=plan.device)
    command = [sys.executable, "-m", "pipekit.launch.rank", str(plan_file), *task]
    run_local(
        command,
        world_size=world_size,
        log_dir=log_dir,
        env=environ,
        stdout_rank=stdout_rank,
        grace_s=RANK_GRACE_S,
        timeout_s=plan.config.run.timeout_s,
        limit_s=limit_s,
        is_last=is_last,
    )


def run_processes(
    command: Sequence[str],
    *,
    processes: int | Literal["auto"],
    device: Literal["auto", "cpu", "cuda"],
    log_dir: Path,
    threads: int | Literal["auto"] = "auto",
    grace_s: float = 10.0,
    timeout_s: float = math.inf,
    option: str = "run.processes=",
) -> None:
    """Run a command in as many processes as there are GPUs, or as are asked for; see `run_local`.

    Args:
        command: program and arguments, alike for all ranks.
        processes: their number; "auto" is that of the GPUs, or 1 on a CPU.
        device: what they compute on; "auto" takes the GPUs where there are any.
        log_dir: folder of the logs.
        threads: CPU threads of each; "auto" divides the cores among them.
        grace_s: seconds between SIGTERM and SIGKILL.
        timeout_s: the longest silence between heartbeats of a rank.
        option: what the user types before the number of processes, for messages.

    Raises:
        ConfigError: if there are fewer GPUs than processes, or none and they are asked for.
    """
    world_size, num_gpus = count_processes(processes, device, option=option)
    environ = process_environ(world_size, num_gpus, log_dir, threads=threads)
    sys.stdout.write(f"starting {processes_text(world_size)} ...\n")
    sys.stdout.flush()
    run_local(command, world_size=world_size, log_dir=log_dir, env=environ, grace_s=grace_s, timeout_s=timeout_s)


def count_processes(
    processes: int | Literal["auto"], device: Literal["auto", "cpu", "cuda"], *, option: str = "run.processes="
) -> tuple[int, int | None]:
    """Number of processes that `run_processes` starts, and that of the GPUs; None on a CPU.

    Raises:
        ConfigError: if there are fewer GPUs than processes, or none and they are asked for.
    """
    num_gpus = count_gpus(device, os.environ)
    world_size = (num_gpus or 1) if processes == "auto" else processes
    if num_gpus is not None and world_size > num_gpus:
        raise ConfigError(
            f"{option}{world_size}: there are {num_gpus} GPUs, and each process takes one; try {option}{num_gpus}, or "
            "device=cpu"
        )
    return world_size, num_gpus


def process_environ(
    num_processes: int, num_gpus: int | None, log_dir: Path, *, threads: int | Literal["auto"] = "auto"
) -> dict[str, str]:
    """Environment of the processes of a script or a trial on this machine; locks of dead builds are removed before."""
    for note in guard_extension_builds(os.environ):
        sys.stderr.write(f"{note}\n")
    environ = thread_environ(threads, num_processes, os.environ)
    environ["TORCH_EXTENSIONS_DIR"] = str(extensions_dir(os.environ))
    # A script that asks how many GPUs there are is told what was chosen here.
    on_cpu = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return environ | (gpu_environ(log_dir, os.environ) if num_gpus else on_cpu)


def run_local(
    command: Sequence[str],
    *,
    world_size: int,
    log_dir: Path,
    env: Mapping[str, str],
    stdout_rank: int = 0,
    stdin_rank: int | None = None,
    grace_s: float = 10.0,
    port: int | None = None,
    timeout_s: float = math.inf,
    ranks: range | None = None,
    master_addr: str = LOCALHOST,
    on_failing: Callable[[RankFailure], object] | None = None,
    limit_s: float = math.inf,
    is_last: bool = True,
) -> None:
    """Run `world_size` processes of `command` on this machine, or the `ranks` among them, and return when all have
    succeeded.

    Each process leads a session of its own and finds its rank in the environment, as under torchrun. The stdout of
    `stdout_rank` goes where the launcher's goes; all else that a rank writes is appended to `log_dir/rank-<rank>.log`.

    When one rank fails, the others are ended: SIGTERM first, SIGKILL for those that are there after `grace_s`, each
    with the processes that it started. If the launcher is killed, so are the ranks.

    SIGINT, SIGTERM, SIGHUP and SIGUSR1 are passed on to the ranks, which end as they like: those that train stop after
    the step, with a checkpoint. A second signal ends all at once.

    A rank whose heartbeat stops causes a warning, and after `timeout_s` the end of the run. The warnings stay in
    `log_dir/stalls.jsonl`. If ranks have waited too long for one another, the report of the hang stays in
    `log_dir/hang.txt`.

    Where no port is given, and another program takes the chosen one before rank 0 listens on it, another is chosen and
    the ranks are started again.

    Args:
        command: program and arguments, alike for all ranks.
        world_size: number of processes.
        log_dir: folder of the logs; made if it is not there.
        env: variables to set on top of the launcher's own.
        stdout_rank: the rank that may write to the launcher's stdout.
        stdin_rank: the rank that may read the launcher's stdin; None for none.
        grace_s: seconds between SIGTERM and SIGKILL.
        port: the port on which rank 0 listens for the others; None chooses a free one.
        timeout_s: the longest wait of a rank for another, and the longest silence between its heartbeats.
        ranks: the ranks of this machine; all unless given. The others are started elsewhere, with the same port.
        master_addr: address of the machine of rank 0.
        on_failing: called with the first failure that is seen, before the other ranks are ended.
        limit_s: seconds after which the ranks are ended, whatever they do.
        is_last: whether the caller has nothing left to do after these ranks. Otherwise a signal interrupts it even if
            the ranks have ended as planned by then, or have stopped.

    Raises:
        LaunchError: if the port is taken, or a process cannot be started.
        TimeLimitError: if the ranks have not ended within `limit_s`.
        RankError: if a rank fails; the message begins with the one that failed first.
        HangError: if ranks have waited too long for one another.
        StoppedError: if the ranks have stopped on request, with a checkpoint.
        Interrupted: if a signal has ended them otherwise.
    """
    with storing(log_dir):
        log_dir.mkdir(parents=True, exist_ok=True)
    with signals_noted() as signals:
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            is_first = ranks is None or 0 in ranks
            chosen = choose_port(port) if port is None or is_first else port
            mine = range(world_size) if ranks is None else ranks
            job = _Job(
                command,
                world_size,
                mine,
                log_dir.absolute(),
                env,
                stdout_rank,
                stdin_rank,
                master_addr,
                chosen,
                timeout_s,
                limit_s,
            )
            failure = _run_job(job, signals, grace_s=grace_s, on_failing=on_failing, is_last=is_last)
            if failure is None:
                return
            if failure.has_stopped:
                raise StoppedError(failure.report.message if failure.report is not None else "stopped on request")
            if port is not None or attempt == _PORT_ATTEMPTS or not _port_was_taken(failure, chosen):
                raise RankError(failure)


@dataclass(frozen=True)
class _Job:
    command: Sequence[str]
    world_size: int
    ranks: range
    log_dir: Path
    env: Mapping[str, str]
    stdout_rank: int
    stdin_rank: int | None
    master_addr: str
    port: int
    timeout_s: float
    limit_s: float

    def environ(self, rank: int) -> dict[str, str]:
        place = RankEnvironment(
            launcher="pipekit",
            rank=rank,
            world_size=self.world_size,
            local_rank=rank - self.ranks.start,
            local_world_size=len(self.ranks),
            master_addr=self.master_addr,
            master_port=self.port,
        )
        return {
            # What a killed rank has written must be in its log, and a segmentation fault must say where.
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
            **gloo_environ(place, os.environ),
            **os.environ,
            **self.env,
            **place.as_environ(),
            ERROR_FILE_VARIABLE: str(self.error_file(rank)),
            LAUNCHER_PID_VARIABLE: str(os.getpid()),
        }

    def log(self, rank: int) -> Path:
        return self.log_dir / f"rank-{rank}.log"

    def error_file(self, rank: int) -> Path:
        return self.log_dir / f"rank-{rank}.error.json"


@dataclass
class _Worker:
    """One rank's process, which leads the process group of the same number."""

    rank: int
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int
    error_file: Path
    ended_s: float | None = None
    group_gone: bool = False

    def poll(self) -> bool:
        """True if the process is running; notes the time when it is first seen to have ended."""
        if self.process.poll() is None:
            return True
        if self.ended_s is None:
            self.ended_s = time.time()
            self.signal_group(0)
        return False

    @property
    def has_ended(self) -> bool:
        """True if the process has ended as planned, or stopped on request."""
        return self.ended_s is not None and self.process.returncode in (0, ExitCode.STOPPED)

    def failure(self) -> RankFailure | None:
        """Failure of the rank; None while it runs, and if it has succeeded."""
        if self.ended_s is None or self.process.returncode == 0:
            return None
        beat = Heartbeat.read(heartbeat_file(self.log.parent, self.rank))
        return RankFailure(
            rank=self.rank,
            returncode=self.process.returncode,
            time_s=self.ended_s,
            report=FailureReport.read(self.error_file),
            log=self.log,
            log_start=self.log_start,
            phase="" if beat is None else beat.phase,
        )

    def pass_on(self, signum: int) -> None:
        """Send a signal to the process alone: what it has started may be needed until it stops."""
        if self.poll():
            with contextlib.suppress(OSError):
                os.kill(self.process.pid, signum)

    def signal_group(self, signum: int) -> bool:
        """Send a signal to the process and all that it started; return True if any of them still runs."""
        if not self.group_gone:
            try:
                os.killpg(self.process.pid, signum)
            except OSError:  # nobody is there, or (macOS) nobody but zombies
                self.group_gone = True  # from now on its number may be another program's
        return not self.group_gone


def _run_job(
    job: _Job,
    signals: Sequence[int],
    *,
    grace_s: float,
    on_failing: Callable[[RankFailure], object] | None,
    is_last: bool,
) -> RankFailure | None:
    """Start all ranks, wait, and leave none behind; return the first failure that was not due to a signal, or a stop.

    Raises:
        Interrupted: if a signal has ended them.
    """
    workers: list[_Worker] = []
    failures: list[RankFailure] = []
    hang: str | None = None
    with Watcher() as watcher:
        try:
            for rank in job.ranks:
                workers.append(_start(job, rank))
                watcher.watch(workers[-1].process.pid)
            hang = _wait(workers, signals, HangMonitor(job.log_dir, job.ranks), job.timeout_s, job.limit_s)
            seen = [each for worker in workers if (each := worker.failure()) is not None and not each.has_stopped]
            if on_failing is not None and seen and hang is None and not signals:
                on_failing(first_failure(seen))
        finally:
            failed = [worker.rank for worker in workers if worker.failure() is not None]
            stopped_s = time.time()
            have_ended = all(worker.has_ended for worker in workers)
            _end(workers, signals, grace_s=grace_s)
            # Those that had failed by then, or had written their report and were on their way out.
            failures = [
                failure
                for worker in workers
                if (failure := worker.failure()) is not None
                if worker.rank in failed or (failure.report is not None and failure.report.time_s <= stopped_s)
            ]
            for rank in job.ranks:
                job.error_file(rank).unlink(missing_ok=True)
                heartbeat_file(job.log_dir, rank).unlink(missing_ok=True)
    if hang is not None:
        raise HangError(save_report(hang, job.log_dir))
    stops = [failure for failure in failures if failure.has_stopped]
    failures = [failure for failure in failures if not failure.has_stopped]
    if signals:
        # Whoever a signal ends has no report of its own; and those that lost it have failed because of it.
        failures = [each for each in failures if each.report is not None and each.report.kind != "peer"]
        if not is_last or (not have_ended and (len(signals) > 1 or not failures)):
            raise Interrupted(signals[0], f"stopped by {name_signal(signals[0])}: ended {len(workers)} processes")
    return first_failure(failures or stops) if failures or stops else None


def _start(job: _Job, rank: int) -> _Worker:
    heartbeat_file(job.log_dir, rank).unlink(missing_ok=True)
    with storing(job.log_dir):
        FailureReport.keep_room(job.error_file(rank))
        log_file = job.log(rank).open("ab")
    with log_file as log:
        log_start = log.tell()
        try:
            process = subprocess.Popen(
                job.command,
                env=job.environ(rank),
                stdin=None if rank == job.stdin_rank else subprocess.DEVNULL,
                stdout=None if rank == job.stdout_rank else log,
                stderr=log,
                start_new_session=True,
            )
        except OSError as error:
            raise LaunchError(f"rank {rank} could not be started: {job.command[0]}: {error.strerror}") from None
        return _Worker(rank, process, job.log(rank), log_start, job.error_file(rank))


def _wait(
    workers: Sequence[_Worker], signals: Sequence[int], monitor: HangMonitor, timeout_s: float, limit_s: float
) -> str | None:
    """Wait until all have ended, one has failed, or a second signal has come; return the report of a hang."""
    ends_s = time.monotonic() + limit_s
    peer_lost_s: float | None = None
    is_passed_on = False
    while True:
        num_running = sum([worker.poll() for worker in workers])
        ended = [failure for worker in workers if (failure := worker.failure()) is not None]
        failures = [failure for failure in ended if not failure.has_stopped]
        if len(signals) > 1 or (num_running == 0 and not failures):
            return None
        if signals and not is_passed_on:
            is_passed_on = True
            for worker in workers:
                worker.pass_on(signals[0])
        if num_running and time.monotonic() > ends_s:
            raise TimeLimitError(f"not finished within {limit_s:g} s")
        if not failures:
            monitor.listen()
            monitor.warn(sys.stderr)
            if monitor.longest_silence_s() > timeout_s:
                return monitor.report()
        elif not all(map(_gave_up_waiting, failures)):
            return None
        else:
            # The heartbeats before the first of them gave up tell why.
            peer_lost_s = peer_lost_s or time.monotonic()
            if num_running == 0 or time.monotonic() - peer_lost_s > _SETTLE_S:
                is_hang = monitor.longest_wait_s() > _SHARE_OF_LIMIT * timeout_s
                return monitor.report({failure.rank for failure in failures}) if is_hang else None
        time.sleep(_POLL_S)


def _end(workers: Sequence[_Worker], signals: Sequence[int], *, grace_s: float) -> None:
    """End what still runs, and what the ranks that have ended left behind."""
    num_signals = len(signals)
    remaining = [worker for worker in workers if worker.signal_group(signal.SIGTERM)]
    for worker in remaining:
        worker.signal_group(signal.SIGCONT)  # one that was stopped hears the other signal now
    deadline_s = time.monotonic() + (grace_s if num_signals < 2 else 0.0)
    while remaining and time.monotonic() < deadline_s and len(signals) == num_signals:
        time.sleep(_POLL_S)
        remaining = [worker for worker in remaining if worker.poll() or worker.signal_group(0)]
    for worker in remaining:
        worker.signal_group(signal.SIGKILL)
    deadline_s = time.monotonic() + _KILLED_S
    for worker in workers:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(max(0.0, deadline_s - time.monotonic()))
        worker.poll()


def _gave_up_waiting(failure: RankFailure) -> bool:
    # NCCL's watchdog aborts the process.
    return failure.returncode == -signal.SIGABRT if failure.report is None else failure.report.kind == "peer"


def _port_was_taken(failure: RankFailure, port: int) -> bool:
    # The port's own number must be named: any other address in use is the program's own affair.
    message = failure.report.message if failure.report is not None else ""
    return failure.rank == 0 and "EADDRINUSE" in message and str(port) in message

"""Ranks that succeed, fail, hang and are killed: the messages, and that nothing of them stays.

The ranks are small programs without torch. Each writes its process number to a file, so that the tests can see
when it is gone.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipekit.errors import ExitCode, LaunchError
from pipekit.launch import local
from pipekit.launch.failures import HangError, TimeLimitError
from pipekit.launch.local import run_local

PRELUDE = """
import json, os, pathlib, signal, socket, subprocess, sys, time
from pipekit.errors import *
from pipekit.launch.worker import error_file_from, report_failure, tie_to_parent
tie_to_parent(os.environ)
rank = int(os.environ["RANK"])
folder = pathlib.Path(sys.argv[1])

def wait_for(path, timeout_s=120):
    deadline_s = time.monotonic() + timeout_s
    while not (folder / path).exists():
        assert time.monotonic() < deadline_s, path
        time.sleep(0.01)

def say(path, text=""):
    (folder / f"{path}.tmp").write_text(text)
    os.replace(folder / f"{path}.tmp", folder / path)

say(f"pid-{rank}", str(os.getpid()))
for other in range(int(os.environ["WORLD_SIZE"])):
    wait_for(f"pid-{other}")
with report_failure(error_file_from(os.environ)):
"""

LAUNCHER = """
import pathlib, signal, sys
from pipekit.errors import StoppedError
from pipekit.launch.local import run_local
from pipekit.signals import Interrupted
signal.signal(signal.SIGINT, signal.default_int_handler)
for signum in (signal.SIGTERM, signal.SIGHUP):  # a shell may have them ignored
    signal.signal(signum, signal.SIG_DFL)
folder = pathlib.Path(sys.argv[1])
command = [sys.executable, str(folder / "rank.py"), str(folder)]
try:
    is_last = "--more" not in sys.argv
    run_local(command, world_size=2, log_dir=folder / "logs", env={}, grace_s=float(sys.argv[2]), is_last=is_last)
except (Interrupted, StoppedError) as end:
    print(end, file=sys.stderr)
    sys.exit(end.exit_code)
"""


def write_rank(folder: Path, body: str) -> list[str]:
    """Write the program of a rank; return its command line."""
    (folder / "rank.py").write_text(PRELUDE + textwrap.indent(textwrap.dedent(body), "    "))
    return [sys.executable, str(folder / "rank.py"), str(folder)]


def run(
    folder: Path,
    body: str,
    *,
    world_size: int = 3,
    grace_s: float = 10,
    port: int | None = None,
    timeout_s: float = 600,
    limit_s: float = 600,
) -> None:
    run_local(
        write_rank(folder, body),
        world_size=world_size,
        log_dir=folder / "logs",
        env={"X": "x"},
        grace_s=grace_s,
        port=port,
        timeout_s=timeout_s,
        limit_s=limit_s,
    )


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    # A zombie is gone too: only its parent, which may be the container's first process, has to notice.
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


def eventually(condition: Callable[[], bool], *, timeout_s: float = 120) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.02)
    return True


def assert_nothing_left(folder: Path, *, num_pids: int) -> None:
    pids = [int(path.read_text()) for path in folder.glob("pid-*")]
    assert len(pids) == num_pids
    assert eventually(lambda: not any(is_running(pid) for pid in pids))
    # On a busy machine a rank may fall silent.
    kept = re.compile(r"rank-\d+\.log|stalls\.jsonl")
    assert all(kept.fullmatch(path.name) for path in (folder / "logs").iterdir())


def test_success(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(
        tmp_path,
        """
        names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "X"]
        print(*(os.environ[name] for name in names))
        print("chatter", file=sys.stderr)
        assert os.getpgrp() == os.getsid(0) == os.getpid()
        with socket.create_server((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]) * (rank == 0))):
            pass
        """,
    )
    assert capfd.readouterr() == ("0 3 0 3 127.0.0.1 x\n", "")
    logs = [(tmp_path / "logs" / f"rank-{rank}.log").read_text() for rank in range(3)]
    assert logs == ["chatter\n", "1 3 1 3 127.0.0.1 x\nchatter\n", "2 3 2 3 127.0.0.1 x\nchatter\n"]
    assert_nothing_left(tmp_path, num_pids=3)


def test_signal_handlers_are_put_back(tmp_path: Path) -> None:
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    run(tmp_path, "pass", world_size=1)
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_ranks_that_take_longer_than_the_limit_are_ended(tmp_path: Path) -> None:
    with pytest.raises(TimeLimitError, match=r"not finished within 1\.5 s"):
        run(tmp_path, "time.sleep(300)", world_size=2, limit_s=1.5)
    assert_nothing_left(tmp_path, num_pids=2)


def test_one_rank_raises_while_the_others_sleep(tmp_path: Path) -> None:
    started_s = time.monotonic()
    with pytest.raises(LaunchError) as caught:
        run(tmp_path, "if rank == 1: raise ValueError('one is bad')\ntime.sleep(300)")
    message = str(caught.value)
    assert message.startswith("rank 1 failed: ValueError: one is bad\nTraceback (most recent call last)")
    assert message.endswith(f"{tmp_path}/logs/rank-1.log")
    assert time.monotonic() - started_s < 30
    assert_nothing_left(tmp_path, num_pids=3)


def test_a_users_error_is_shown_as_its_message_alone(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"^rank 2: data\.source=x: no such file; type another$"):
        run(
            tmp_path,
            "if rank == 2: raise DataError('data.source=x: no such file; type another')\ntime.sleep(300)",
        )
    assert_nothing_left(tmp_path, num_pids=3)


def test_a_killed_rank_is_blamed_and_not_those_that_lost_it(tmp_path: Path) -> None:
    with pytest.raises(LaunchError) as caught:
        run(
            tmp_path,
            """
            if rank == 2:
                print("allocating", flush=True)
                wait_for("lost")
                time.sleep(0.5)  # rank 0 is seen to have failed well before
                os.kill(os.getpid(), signal.SIGKILL)
            if rank == 0:
                say("lost")
                raise CommunicationError("rank 2 does not answer")
            time.sleep(300)
            """,
        )
    message = str(caught.value)
    assert message.startswith("rank 2 was killed by SIGKILL; out of memory?\nits last output:\nallocating\n")
    assert_nothing_left(tmp_path, num_pids=3)


def test_a_lost_peer_is_told_when_no_rank_failed_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_SETTLE_S", 0.3)
    with pytest.raises(LaunchError, match=r"^rank 0 lost contact with another rank: rank 1 does not answer\n"):
        run(tmp_path, "if rank == 0: raise CommunicationError('rank 1 does not answer')\ntime.sleep(300)")
    assert_nothing_left(tmp_path, num_pids=3)


BEATING = """
from pipekit.hangs.activity import Activity
from pipekit.hangs.heartbeat import HeartbeatThread
activity = Activity()
with HeartbeatThread(activity, folder / "logs", rank=rank, world_size=3, stages=(rank,)):
    activity.begin_step(5)
    time.sleep(1)
"""


def test_a_rank_that_is_stopped_is_named_and_ended(tmp_path: Path) -> None:
    body = BEATING + "    os.kill(os.getpid(), signal.SIGSTOP) if rank == 1 else time.sleep(300)"
    started_s = time.monotonic()
    with pytest.raises(HangError, match=r"^the run hangs: rank 1 \(stage 1\) has not been heard from for") as caught:
        run(tmp_path, body, timeout_s=4, grace_s=120)
    assert caught.value.exit_code == ExitCode.HANG
    # Nobody had to wait for the end of the grace.
    assert time.monotonic() - started_s < 120
    report = tmp_path / "logs" / "hang.txt"
    assert str(caught.value) == f"{report.read_text().rstrip()}\n\nsaved in {report}"
    report.unlink()
    assert_nothing_left(tmp_path, num_pids=3)


def test_a_rank_that_others_gave_up_waiting_for_is_named(tmp_path: Path) -> None:
    body = (
        BEATING
        + """    if rank == 0:
        time.sleep(300)
    time.sleep(2)
    raise CommunicationError("gave up")"""
    )
    with pytest.raises(HangError, match=r"^the run hangs: rank 0 \(stage 0\) waits for nobody"):
        run(tmp_path, body, timeout_s=3)
    (tmp_path / "logs" / "hang.txt").unlink()
    assert_nothing_left(tmp_path, num_pids=3)


def test_a_rank_that_exits_without_a_word(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"^rank 0 ended with exit code 5"):
        run(tmp_path, "if rank == 0: os._exit(5)\ntime.sleep(300)")
    assert_nothing_left(tmp_path, num_pids=3)


def test_a_rank_that_ignores_sigterm_is_killed_with_what_it_started(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"^rank 0 failed: ValueError: bad"):
        run(
            tmp_path,
            """
            if rank == 1:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                child = subprocess.Popen(["sleep", "300"])
                say("pid-child", str(child.pid))
                time.sleep(300)
            wait_for("pid-child")
            raise ValueError("bad")
            """,
            world_size=2,
            grace_s=0.5,
        )
    assert_nothing_left(tmp_path, num_pids=3)


def test_processes_that_a_successful_rank_left_running_are_ended(tmp_path: Path) -> None:
    run(tmp_path, "say('pid-child', str(subprocess.Popen(['sleep', '300']).pid))", world_size=1)
    assert_nothing_left(tmp_path, num_pids=2)


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"^rank 0 could not be started: /no/such/program: No such file"):
        run_local(["/no/such/program"], world_size=2, log_dir=tmp_path, env={})


def test_an_occupied_port_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(LaunchError, match=f"^port {port} cannot be used"):
            run(tmp_path, "pass", port=port)
    assert list(tmp_path.glob("pid-*")) == []


@pytest.mark.parametrize(("num_failures", "num_tries"), [(1, 2), (9, 3)])
def test_a_chosen_port_that_is_taken_meanwhile(tmp_path: Path, num_failures: int, num_tries: int) -> None:
    body = f"""
    if rank == 0:
        with open(folder / "tried", "a") as file:
            print(os.environ["MASTER_PORT"], file=file)
        if len((folder / "tried").read_text().split()) <= {num_failures}:
            raise RuntimeError(f"failed to listen. port: {{os.environ['MASTER_PORT']}}, name: EADDRINUSE")
    """
    if num_failures < num_tries:
        run(tmp_path, body, world_size=2)
    else:
        with pytest.raises(LaunchError, match=r"^rank 0 failed: .*EADDRINUSE"):
            run(tmp_path, body, world_size=2)
    assert len((tmp_path / "tried").read_text().split()) == num_tries
    assert_nothing_left(tmp_path, num_pids=2)


def test_a_requested_port_is_tried_once(tmp_path: Path) -> None:
    body = """
    with open(folder / "tried", "a") as file:
        print(file=file)
    raise RuntimeError(f"failed to listen. port: {os.environ['MASTER_PORT']}, name: EADDRINUSE")
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(LaunchError, match=f"port: {port}"):
        run(tmp_path, body, world_size=1, port=port)
    assert (tmp_path / "tried").read_text() == "\n"


StartLauncher = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start_launcher(tmp_path: Path) -> Iterator[StartLauncher]:
    """A function that starts a launcher as a process, and returns when its two ranks say they are ready."""
    launchers: list[subprocess.Popen[str]] = []

    def start(body: str, *, grace_s: float = 10, is_last: bool = True) -> subprocess.Popen[str]:
        write_rank(tmp_path, body)
        command = [sys.executable, "-c", LAUNCHER, str(tmp_path), str(grace_s), *([] if is_last else ["--more"])]
        launchers.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        assert eventually(lambda: all((tmp_path / f"ready-{rank}").exists() for rank in range(2)))
        return launchers[-1]

    yield start
    for launcher in launchers:
        launcher.kill()
        launcher.communicate()
    for path in tmp_path.glob("pid-*"):  # of a test that failed
        if is_running(int(path.read_text())):
            os.kill(int(path.read_text()), signal.SIGKILL)


@pytest.mark.parametrize(("signum", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_to_the_launcher_ends_all_ranks(
    tmp_path: Path, start_launcher: StartLauncher, signum: signal.Signals, exit_code: int
) -> None:
    launcher = start_launcher("say(f'ready-{rank}')\ntime.sleep(300)")
    launcher.send_signal(signum)
    _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == exit_code
    assert errors == f"stopped by {signum.name}: ended 2 processes\n"
    assert_nothing_left(tmp_path, num_pids=2)


def test_a_second_signal_does_not_wait(tmp_path: Path, start_launcher: StartLauncher) -> None:
    body = """
    signal.signal(signal.SIGINT, lambda *_: say(f"asked-{rank}"))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say(f"ready-{rank}")
    while True:
        time.sleep(1)
    """
    launcher = start_launcher(body, grace_s=300)
    launcher.send_signal(signal.SIGINT)
    assert eventually(lambda: all((tmp_path / f"asked-{rank}").exists() for rank in range(2)))
    launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=120)
    assert launcher.returncode == 130
    assert_nothing_left(tmp_path, num_pids=2)


def test_ranks_stop_on_the_signal_that_is_passed_on(tmp_path: Path, start_launcher: StartLauncher) -> None:
    body = """
    child = subprocess.Popen(["sleep", "300"])
    signal.signal(signal.SIGUSR1, lambda *_: say(f"asked-{rank}"))
    say(f"ready-{rank}")
    wait_for(f"asked-{rank}")
    assert child.poll() is None
    time.sleep(rank)
    raise StoppedError("stopped by SIGUSR1 after step 3")
    """
    launcher = start_launcher(body)
    launcher.send_signal(signal.SIGUSR1)
    _, errors = launcher.communicate(timeout=120)
    assert (launcher.returncode, errors) == (ExitCode.STOPPED, "stopped by SIGUSR1 after step 3\n")
    assert_nothing_left(tmp_path, num_pids=2)


@pytest.mark.parametrize(("is_last", "exit_code"), [(True, 0), (False, 130)])
def test_a_signal_interrupts_a_launcher_that_has_more_to_do_even_if_its_ranks_have_ended(
    tmp_path: Path, start_launcher: StartLauncher, is_last: bool, exit_code: int
) -> None:
    body = """
    signal.signal(signal.SIGINT, lambda *_: say(f"asked-{rank}"))
    say(f"ready-{rank}")
    wait_for(f"asked-{rank}")
    """
    launcher = start_launcher(body, is_last=is_last)
    launcher.send_signal(signal.SIGINT)
    _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == exit_code
    assert errors == ("" if is_last else "stopped by SIGINT: ended 2 processes\n")
    assert_nothing_left(tmp_path, num_pids=2)


def test_a_failure_after_a_signal_is_told(tmp_path: Path, start_launcher: StartLauncher) -> None:
    body = """
    signal.signal(signal.SIGTERM, lambda *_: say(f"asked-{rank}"))
    say(f"ready-{rank}")
    wait_for(f"asked-{rank}")
    if rank == 1:
        raise StorageError("the disk is full")
    time.sleep(300)
    """
    launcher = start_launcher(body, grace_s=0.1)
    launcher.send_signal(signal.SIGTERM)
    _, errors = launcher.communicate(timeout=120)
    assert errors.rstrip().endswith("RankError: rank 1: the disk is full")
    assert_nothing_left(tmp_path, num_pids=2)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "by the watcher alone"])
def test_the_ranks_of_a_killed_launcher_end(tmp_path: Path, start_launcher: StartLauncher, tied: bool) -> None:
    body = """
    child = subprocess.Popen(["sleep", "300"])
    say(f"pid-child-{rank}", str(child.pid))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    say(f"ready-{rank}")
    time.sleep(300)
    """
    if not tied:
        body = "import ctypes\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\n" + textwrap.dedent(body)
    launcher = start_launcher(body)
    launcher.kill()
    launcher.communicate(timeout=120)
    pids = [int(path.read_text()) for path in tmp_path.glob("pid-*")]
    assert len(pids) == 4
    assert eventually(lambda: not any(is_running(pid) for pid in pids))

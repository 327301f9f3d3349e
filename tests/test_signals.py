"""Signals that ask for a stop, in processes of their own, since they end them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from pipekit import signals
from pipekit.signals import STOP_SIGNALS, Interrupted, StopSignals, ending_at_once, noting

# A call of C that takes minutes, lets other threads run, and no handler of Python's.
LONG_CALL = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"


def start(body: str) -> subprocess.Popen[str]:
    """Start a program, and return once it says that it is ready."""
    # A shell has programs in the background ignore it.
    heard = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    script = f"import hashlib, os, signal, sys, time\nfrom pipekit import signals\n{heard}\n{body}"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_the_first_signal_is_noted_and_nothing_else_happens() -> None:
    stops = StopSignals()
    before = [signal.getsignal(signum) for signum in STOP_SIGNALS]
    with stops.listening():
        assert stops.number == 0
        os.kill(os.getpid(), signal.SIGUSR1)
        deadline_s = time.monotonic() + 60
        while not stops.number and time.monotonic() < deadline_s:
            time.sleep(0.001)
        # The same request, passed on by a launcher.
        os.kill(os.getpid(), signal.SIGTERM)
    assert stops.number == signal.SIGUSR1
    assert [signal.getsignal(signum) for signum in STOP_SIGNALS] == before
    assert "signals" not in [thread.name for thread in threading.enumerate()]


def test_a_later_signal_ends_the_process_whatever_it_does() -> None:
    process = start(
        "signals._SAME_REQUEST_S = 0.2\n"
        "with signals.StopSignals().listening():\n"
        "    print('ready', flush=True)\n"
        f"    {LONG_CALL}\n"
    )
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130


@pytest.mark.parametrize("waits_in_c", [False, True])
def test_before_there_is_anything_to_save_a_signal_ends_at_once(waits_in_c: bool) -> None:
    process = start(
        "signals._AT_ONCE_S = 0.3\n"
        "try:\n"
        "    with signals.ending_at_once(lambda: 'nothing was saved yet'):\n"
        "        try:\n"
        "            print('ready', flush=True)\n"
        f"            {LONG_CALL if waits_in_c else 'time.sleep(300)'}\n"
        "        finally:\n"
        "            print('cleaned up')\n"
        "except signals.Interrupted as interrupt:\n"
        "    print(interrupt, file=sys.stderr)\n"
        "    sys.exit(interrupt.exit_code)\n"
    )
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stderr) == (143, "stopped by SIGTERM; nothing was saved yet\n")
    assert waits_in_c or stdout == "cleaned up\n"


def test_a_process_that_has_cleaned_up_in_time_may_go_on() -> None:
    process = start(
        "signals._AT_ONCE_S = 0.1\n"
        "try:\n"
        "    with signals.ending_at_once(lambda: 'nothing was saved yet'):\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(300)\n"
        "except signals.Interrupted:\n"
        "    time.sleep(0.5)\n"
        "    print('still there')\n"
    )
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=120) == ("still there\n", "")
    assert process.returncode == 0


def test_ignored_signals_stay_ignored_and_children_that_are_forked_are_left_alone() -> None:
    stops = StopSignals()
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stops.listening():
            os.kill(os.getpid(), signal.SIGHUP)
            child = os.fork()
            if child == 0:
                time.sleep(60)
                os._exit(0)
            os.kill(child, signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
            time.sleep(0.05)
        assert stops.number == 0
    finally:
        signal.signal(signal.SIGHUP, earlier)


def test_another_thread_hears_nothing() -> None:
    def listen() -> None:
        with StopSignals().listening(), ending_at_once(str):
            handlers.append(signal.getsignal(signal.SIGTERM))

    handlers: list[object] = []
    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)]


def test_what_the_run_has_is_added_to_the_message() -> None:
    with (
        pytest.raises(Interrupted, match=r"^ended 2 processes; nothing was saved yet$") as caught,
        noting(lambda: "nothing was saved yet"),
    ):
        raise Interrupted(signal.SIGINT, "ended 2 processes")
    assert caught.value.exit_code == 130
    assert not signals._handled

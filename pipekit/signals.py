"""Signals that ask a process to stop: noted for a loop that looks, or an end at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""The signals that ask for a stop: of the terminal, of schedulers, and SLURM's warning."""

# One request may come more than once: from SLURM, which signals all processes, and from a launcher that passes it on.
_SAME_REQUEST_S = 3.0
# So long may it take until Python's handler gets its turn in the main thread, and its exception has ended all.
_AT_ONCE_S = 5.0

_handled: dict[int, Any] = {}
"""Handlers that a block of this module has replaced, for a child that is forked meanwhile."""


class Interrupted(BaseException):
    """A signal has ended the process before there was anything to save.

    It is no KeyboardInterrupt, which libraries of command lines end in their own way.

    Args:
        signum: the signal.
        message: what the user is told.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum, self.exit_code = signum, 128 + signum


def name_signal(signum: int) -> str:
    """Name of a signal, such as "SIGTERM"."""
    return signal.Signals(signum).name


class StopSignals:
    """Listens for signals that ask for a stop while its block runs, and ends nothing at the first one.

    A later one, which comes three seconds or more after the first, ends the process at once with 128 and its number,
    whatever the main thread does. Signals that are ignored stay ignored. Only the main thread can listen; elsewhere no
    signal is heard.

    Attributes:
        number: the first signal; 0 before it comes.
    """

    def __init__(self) -> None:
        self.number = 0
        self._heard_s: float | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen while the block runs."""
        with _handling(self._note, self._hear):
            yield

    def _note(self, signum: int, frame: FrameType | None = None) -> None:
        self.number = self.number or signum

    def _hear(self, signum: int) -> None:
        self._note(signum)
        now_s = time.monotonic()
        if self._heard_s is None:
            self._heard_s = now_s
        elif now_s - self._heard_s >= _SAME_REQUEST_S:
            os._exit(128 + signum)


@contextmanager
def ending_at_once(describe: Callable[[], str]) -> Iterator[None]:
    """Let such a signal end the block by an exception, which cleans up.

    Args:
        describe: returns what the run has so far, such as "nothing was trained yet".

    Raises:
        Interrupted: after a signal. If the main thread is in a call that takes longer, the process ends without it.
    """

    raised: list[int] = []
    ended = threading.Event()

    def interrupt(signum: int, frame: FrameType | None) -> None:
        if not raised:  # a second one would disturb the clean-up
            raised.append(signum)
            raise Interrupted(signum, f"stopped by {name_signal(signum)}; {describe()}")

    def insist(signum: int) -> None:
        if ended.wait(_AT_ONCE_S):
            return
        sys.stderr.write(f"stopped by {name_signal(signum)}; {describe()}\n")
        sys.stderr.flush()
        os._exit(128 + signum)

    def hear(signum: int) -> None:
        threading.Thread(target=insist, args=(signum,), name="end at once", daemon=True).start()

    try:
        with _handling(interrupt, hear):
            yield
    finally:
        ended.set()


@contextmanager
def signals_noted() -> Iterator[list[int]]:
    """Note the signals that ask for a stop, and do not act on them; those that nohup ignores stay ignored.

    For a launcher, which passes them on to its ranks.
    """
    signals: list[int] = []
    previous = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for signum in STOP_SIGNALS:
                if signal.getsignal(signum) not in (signal.SIG_IGN, None):
                    previous[signum] = signal.signal(signum, lambda number, frame: signals.append(number))
        yield signals
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


@contextmanager
def noting(describe: Callable[[], str]) -> Iterator[None]:
    """Add what the run has so far to the message of an `Interrupted` that the block raises."""
    try:
        yield
    except Interrupted as interrupt:
        raise Interrupted(interrupt.signum, f"{interrupt}; {describe()}") from None


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None], hear: Callable[[int], None]) -> Iterator[None]:
    """Call `hear` on a thread as soon as a signal comes, and `handler` when Python gets to it in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _forget_in_children()
    read, write = os.pipe()
    os.set_blocking(write, False)

    def listen() -> None:
        while (byte := os.read(read, 1)) and byte[0]:
            if byte[0] in STOP_SIGNALS:
                hear(byte[0])

    thread = threading.Thread(target=listen, name="signals", daemon=True)
    thread.start()
    earlier = dict(_handled)
    earlier_fd = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    replaced = {}
    try:
        for signum in STOP_SIGNALS:
            if signal.getsignal(signum) not in (signal.SIG_IGN, None):
                replaced[signum] = signal.signal(signum, handler)
                _handled.setdefault(signum, replaced[signum])
        yield
    finally:
        for signum, previous in replaced.items():
            signal.signal(signum, previous)
        signal.set_wakeup_fd(earlier_fd)
        _handled.clear()
        _handled.update(earlier)
        os.write(write, b"\0")
        thread.join()
        os.close(read)
        os.close(write)


@cache
def _forget_in_children() -> None:
    """Let children that are forked handle signals as this process did before; a signal to them is none to it."""
    masks: list[set[int]] = []

    def hold_back() -> None:
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS if _handled else ()))

    def go_on() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, masks.pop())

    def forget() -> None:
        if _handled:
            signal.set_wakeup_fd(-1)
        for signum, previous in _handled.items():
            with suppress(ValueError):
                signal.signal(signum, previous)
        _handled.clear()
        go_on()

    os.register_at_fork(before=hold_back, after_in_parent=go_on, after_in_child=forget)

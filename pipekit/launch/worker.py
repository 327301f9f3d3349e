"""Worker processes: reporting a failure to the launcher, and ending with it."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

from pipekit.errors import CommunicationError, ExitCode, PipekitError, StoppedError, printable
from pipekit.launch.failures import FailureKind, FailureReport
from pipekit.signals import Interrupted
from pipekit.storage import find_storage_error

ERROR_FILE_VARIABLE = "PIPEKIT_ERROR_FILE"
LAUNCHER_PID_VARIABLE = "PIPEKIT_LAUNCHER_PID"
STARTED_VARIABLE = "PIPEKIT_STARTED_AT"

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

# gloo raises a bare RuntimeError when another rank is gone. Its text begins with the place in gloo's own sources, or
# says that gloo has given the rank up before.
_GLOO = re.compile(r"gloo/|Application timeout caused pair closure")
_PORT_TAKEN = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)


def error_file_from(environ: Mapping[str, str]) -> Path | None:
    """Return the file for the failure report that the launcher asked for; None under another launcher."""
    path = environ.get(ERROR_FILE_VARIABLE)
    return Path(path) if path else None


def note_start() -> None:
    """Note for all processes that this one starts when the command was started, unless it is one of them itself."""
    os.environ.setdefault(STARTED_VARIABLE, repr(time.time()))


def started_s(environ: Mapping[str, str]) -> float:
    """Return when the command was started, by `time.monotonic`; now where that is not known."""
    return time.monotonic() - max(0.0, time.time() - float(environ.get(STARTED_VARIABLE, "inf")))


@contextlib.contextmanager
def report_failure(error_file: Path | None) -> Iterator[None]:
    """Run the block; if it fails, write a failure report and end the process at once.

    The process ends without Python's clean-up, because the destructor of a process group can wait for ever for ranks
    that are gone. The exit code is that of a `PipekitError`, and `RANK_LOST` after any other exception; an interrupt is
    not reported and ends with 128 and the number of its signal. A block that succeeds is left normally.

    The report goes to `error_file`, see `error_file_from`; None leaves only the text on stderr.
    """
    try:
        yield
    except (KeyboardInterrupt, Interrupted) as interrupt:
        if isinstance(interrupt, Interrupted) and error_file is None and _speaks():
            sys.stderr.write(f"{interrupt}\n")
        end_process(interrupt.exit_code if isinstance(interrupt, Interrupted) else 128 + signal.SIGINT)
    except SystemExit as error:
        if error.code in (0, None):
            raise
        _fail(error, error_file, exit_code=error.code if isinstance(error.code, int) else ExitCode.RANK_LOST)
    except BaseException as error:
        _fail(error, error_file, exit_code=_exit_code(error))


def failure_kind(error: BaseException) -> FailureKind:
    """Classify an exception: the user's fault, another rank's, or that of the code which raised it.

    Exceptions of torch are known by their names, since this module does not import torch.

    Example:
        >>> failure_kind(CommunicationError("rank 1 did not answer"))
        'peer'
        >>> failure_kind(ZeroDivisionError())
        'crash'
    """
    if isinstance(error, CommunicationError):
        return "peer"
    if isinstance(error, PipekitError):
        return "user"
    if _PORT_TAKEN.search(str(error)):
        return "crash"
    names = {cls.__name__ for cls in type(error).__mro__ if cls.__module__.partition(".")[0] == "torch"}
    from_gloo = type(error) is RuntimeError and _GLOO.search(str(error)) is not None
    return "peer" if "DistError" in names or from_gloo else "crash"


def tie_to_parent(environ: Mapping[str, str]) -> None:
    """Have Linux kill this process when the launcher dies, even by SIGKILL. Call it first in a worker.

    Elsewhere, and for the processes that a worker starts, the launcher's own watcher does it.

    Source: prctl(2), PR_SET_PDEATHSIG.
    """
    launcher = environ.get(LAUNCHER_PID_VARIABLE)
    # Behind a wrapper, a profiler for instance, the parent is not the launcher, and may end as it likes.
    if sys.platform != "linux" or launcher is None or os.getppid() != int(launcher):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != int(launcher):  # it died before the request was made
        os._exit(1)


def _fail(error: BaseException, error_file: Path | None, *, exit_code: int) -> NoReturn:
    try:
        text = "".join(traceback.format_exception(error))
        if isinstance(error, OSError) and (of_disk := find_storage_error(error, error.filename)) is not None:
            error, exit_code = of_disk, of_disk.exit_code
        kind = failure_kind(error)
        only = traceback.format_exception_only(type(error), error)
        message = str(error) if isinstance(error, PipekitError) else "".join(only).strip()
        report = FailureReport(kind, message, text, time.time(), _exit_code(error))
        if error_file is not None:
            report.write(error_file)
        # The launcher keeps stderr in the rank's log; under another launcher it is all that the user sees.
        if not (isinstance(error, StoppedError) and error_file is None) or _speaks():
            sys.stderr.write(f"{printable(report.message)}\n" if kind == "user" and error_file is None else text)
    finally:
        end_process(exit_code)


def _speaks() -> bool:
    """True on the rank that says what all ranks know."""
    return os.environ.get("RANK", "0") == "0"


def _exit_code(error: BaseException) -> ExitCode:
    return error.exit_code if isinstance(error, PipekitError) else ExitCode.RANK_LOST


def end_finished() -> NoReturn:
    """End this process, which has done its work, as Python does: threads, exit functions, streams.

    Objects are not destroyed, since a thread of a process group may be about to use one of them, and would crash.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    end_process(0)


def end_process(exit_code: int) -> NoReturn:
    """End this process at once, without Python's clean-up, in which threads of process groups may crash."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(exit_code)

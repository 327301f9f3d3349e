"""Common parts of the commands: the machine, the terminal, and the processes that end with the command."""

from __future__ import annotations

import os
import platform
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status

from pipelines.ranks import RankError, RankPool


def describe_machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    versions = {name: version(name) for name in ("torch", "deepspeed")}
    return {
        "num_cpus": os.cpu_count(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        **versions,
    }


def make_console() -> Console:
    """Return the terminal; where nobody looks at one, the tables are not to be cut at 80 columns."""
    return Console(width=None if sys.stdout.isatty() else 130)


@contextmanager
def start_pool(console: Console) -> Iterator[tuple[RankPool, Status]]:
    """Start a pool, with a line on the terminal that says what its first rank does; both end with the context.

    Raises:
        SystemExit: if a rank fails, or the command is interrupted.
    """
    # The way out is through the pool, which ends its processes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with (
            tempfile.TemporaryDirectory() as logs,
            console.status("start") as status,
            RankPool(Path(logs), show=lambda doing: status.update(doing)) as pool,
        ):
            yield pool, status
    except RankError as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None

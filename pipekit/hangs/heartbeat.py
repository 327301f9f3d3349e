"""Heartbeats: a small file of each rank, in which it writes its current activity twice a second."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from pipekit.hangs.activity import Activity
from pipekit.schedules.messages import name_result
from pipekit.schedules.operations import Operation

_INTERVAL_S = 0.5
# Writes of all ranks together: they may share a file system, so many ranks write less often.
_WRITES_PER_S = 200
# Each record is written over the one before, and padded to this length.
_RECORD_BYTES = 2048


def heartbeat_file(folder: Path, rank: int) -> Path:
    """Path of a rank's heartbeat file in the folder of the logs."""
    return folder / f"rank-{rank}.heartbeat.json"


@dataclass(frozen=True)
class Heartbeat:
    """State of a rank at the time of a beat.

    Attributes:
        rank: global rank.
        stages: the stages that it holds.
        number: number of the beat, counting from 1.
        phase: such as "step 12" or "evaluation after step 12".
        phase_s: seconds that the phase has lasted.
        doing: such as "computing 2F3".
        doing_s: seconds that this has lasted.
        is_waiting: whether it waits for other ranks.
        waits_for: global ranks that it waits for; empty where it is not known which.
        usual_step_s: median seconds of its last steps; None until it has made some.
        interval_s: seconds between beats.
    """

    rank: int
    stages: tuple[int, ...] = ()
    number: int = 0
    phase: str = "start"
    phase_s: float = 0.0
    doing: str = "starting"
    doing_s: float = 0.0
    is_waiting: bool = False
    waits_for: tuple[int, ...] = ()
    usual_step_s: float | None = None
    interval_s: float = _INTERVAL_S

    @property
    def name(self) -> str:
        """Rank and stages, such as "rank 2 (stage 2)"."""
        stages = " and ".join(map(str, self.stages))
        return f"rank {self.rank} (stage{'s' if len(self.stages) > 1 else ''} {stages})" if stages else self.owner

    @property
    def owner(self) -> str:
        """The rank alone, such as "rank 2"."""
        return f"rank {self.rank}"

    @classmethod
    def read(cls, path: Path) -> Heartbeat | None:
        """Heartbeat in a file; None if there is no file, or it was read in the middle of a write."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            record: dict[str, Any] = json.loads(path.read_bytes())
            return cls(**record | {key: tuple(record[key]) for key in ("stages", "waits_for")})
        return None


class HeartbeatThread:
    """Thread that writes a rank's heartbeat while its block runs; the file is removed if the block succeeds.

    The main thread takes no part in it: this one reads the `activity` that the main thread notes, and the main thread's
    stack for a collective in which it waits. That costs the training nothing.

    Args:
        activity: current phase and operation of the main thread.
        folder: folder of the logs, which exists.
        rank: global rank.
        world_size: the number of ranks.
        stages: the stages of the rank.
        pipe_ranks: global ranks of its pipeline, by pipeline rank.
        on_beat: called on the thread after each beat.
    """

    def __init__(
        self,
        activity: Activity,
        folder: Path,
        *,
        rank: int,
        world_size: int,
        stages: Sequence[int] = (),
        pipe_ranks: Sequence[int] = (),
        on_beat: Callable[[Heartbeat], None] | None = None,
    ) -> None:
        self._activity = activity
        self._path = heartbeat_file(folder, rank)
        self._pipe_ranks = pipe_ranks
        self._on_beat = on_beat
        self._beat = Heartbeat(rank, tuple(stages), interval_s=max(_INTERVAL_S, world_size / _WRITES_PER_S))
        self._ended = threading.Event()

    def __enter__(self) -> HeartbeatThread:
        self._main_thread_id = threading.get_ident()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        if kind is None:
            self._path.unlink(missing_ok=True)

    def _run(self) -> None:
        # A full disk must not end the run: the rank then falls silent, and nothing else happens.
        with contextlib.suppress(OSError), self._path.open("wb", buffering=0) as file:
            while True:
                self._beat = self._observe()
                os.pwrite(file.fileno(), json.dumps(asdict(self._beat)).ljust(_RECORD_BYTES).encode(), 0)
                if self._on_beat is not None:
                    self._on_beat(self._beat)
                if self._ended.wait(self._beat.interval_s):
                    return

    def _observe(self) -> Heartbeat:
        activity, now_s = self._activity, time.monotonic()
        (phase, phase_began_s), (operation, began_s) = activity.phase, activity.operation
        doing = operation if isinstance(operation, str) else _describe(operation)
        waits_for: tuple[int, ...] = ()
        awaited = _find_wait(sys._current_frames().get(self._main_thread_id))
        if awaited is not None:
            if (
                isinstance(operation, Operation)
                and operation.kind in ("post", "receive")
                and operation.peer is not None
            ):
                waits_for = (self._pipe_ranks[operation.peer],)
            else:
                doing = f"{doing}: in {awaited}"
        return replace(
            self._beat,
            number=self._beat.number + 1,
            phase=phase,
            phase_s=now_s - phase_began_s,
            doing=doing[: _RECORD_BYTES // 4],
            doing_s=now_s - began_s,
            is_waiting=awaited is not None,
            waits_for=waits_for,
            usual_step_s=activity.usual_step_s,
        )


def _describe(operation: Operation) -> str:
    if operation.kind == "run":
        return f"computing {operation.action}"
    return f"{'sending' if operation.kind == 'send' else 'receiving'} {name_result(operation.action)}"


def _find_wait(frame: FrameType | None) -> str | None:
    """Wait for other ranks in a stack: the awaited message, or the name of the collective; None if it does not wait."""
    found = None
    while frame is not None:
        module, function = frame.f_globals.get("__name__"), frame.f_code.co_name
        if module == "pipekit.distributed.processes" and function == "wait":
            return f"a wait for {frame.f_locals.get('what')}"
        if module == "torch.distributed.distributed_c10d" and not function.startswith("_"):
            found = function  # the outermost is the one that was called
        frame = frame.f_back
    return found

"""Result that rank 0 computes and tells the other ranks, however long it takes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch.distributed as dist

from pipekit import errors
from pipekit.errors import CommunicationError, PipekitError
from pipekit.progress import ProgressCallback

_BEAT_S = 1.0
_LONGEST_PAUSE_S = 1.0
# So long does rank 0, which may hold the store, wait for the others to read its error.
_READ_S = 10.0


class Store(Protocol):
    """Keys and values that all ranks share, such as torch's `TCPStore`."""

    def set(self, key: str, value: str) -> None:
        """Set the value of a key."""

    def get(self, key: str) -> bytes:
        """Return the value of a key, and wait for one that is not there yet."""

    def add(self, key: str, amount: int) -> int:
        """Add to the number of a key, and return the sum."""

    def check(self, keys: list[str]) -> bool:
        """Return True if all of the keys have values."""


def tell_from_first_rank(
    compute: Callable[[ProgressCallback], str],
    *,
    store: Store,
    rank: int,
    world_size: int,
    timeout_s: float,
    purpose: str,
) -> str:
    """Text that rank 0 computes and the other ranks wait for.

    While rank 0 computes, which may take hours, it shows the others that it is alive. They wait as long as it does.

    Args:
        compute: called on rank 0 with a callback for its progress.
        store: shared by all ranks; each call needs a prefix of its own.
        rank: this process's.
        world_size: number of processes.
        timeout_s: the longest silence of rank 0 that the others endure.
        purpose: what rank 0 does, for messages, such as "plan the run".

    Raises:
        PipekitError: on all ranks, with the type and the message of the error that rank 0 had.
        CommunicationError: if rank 0 is silent for `timeout_s`, or gone.
    """
    if rank != 0:
        return _wait_for_answer(store, timeout_s=timeout_s, purpose=purpose)
    try:
        with _heartbeat(store) as on_progress:
            text = compute(on_progress)
    except BaseException as error:
        kind = type(error).__name__
        message = str(error) if isinstance(error, PipekitError) else f"rank 0 could not {purpose}: {kind}: {error}"
        store.set("answer", json.dumps({"error": message, "kind": kind}))
        _wait_for_readers(store, world_size - 1)
        raise
    store.set("answer", json.dumps({"text": text}))
    return text


@contextmanager
def _heartbeat(store: Store) -> Iterator[ProgressCallback]:
    """Write into the store every second, with what is being done, until the block ends."""
    ended = threading.Event()
    doing = [""]

    def beat() -> None:
        number = 0
        while not ended.wait(_BEAT_S if number else 0.0):
            number += 1
            store.set("heartbeat", json.dumps([number, doing[0]]))

    def on_progress(message: str, fraction: float | None = None) -> None:
        doing[0] = message

    thread = threading.Thread(target=beat, name="heartbeat of rank 0", daemon=True)
    thread.start()
    try:
        yield on_progress
    finally:
        ended.set()
        thread.join()


def _wait_for_answer(store: Store, *, timeout_s: float, purpose: str) -> str:
    started_s = heard_s = time.monotonic()
    last: list[object] = [0, ""]
    try:
        while not store.check(["answer"]):
            now_s = time.monotonic()
            if store.check(["heartbeat"]) and (heartbeat := json.loads(store.get("heartbeat"))) != last:
                last, heard_s = heartbeat, now_s
            if now_s - heard_s > timeout_s:
                doing = f"; the last that it did was {last[1]}" if last[1] else ""
                raise CommunicationError(
                    f"rank 0 was to {purpose}, and has not been heard of for {timeout_s:g} s (run.timeout_s){doing}; "
                    "see what it wrote"
                )
            time.sleep(min(_LONGEST_PAUSE_S, 0.01 + (now_s - started_s) / 20))
        answer = json.loads(store.get("answer"))
        store.add("readers", 1)
    except (RuntimeError, dist.DistError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CommunicationError(f"rank 0 was to {purpose}, and is gone: {first_line}; see what it wrote") from error
    if "error" in answer:
        kind = getattr(errors, answer["kind"], PipekitError)
        raise (kind if issubclass(kind, PipekitError) else PipekitError)(answer["error"])
    text: str = answer["text"]
    return text


def _wait_for_readers(store: Store, number: int) -> None:
    deadline_s = time.monotonic() + _READ_S
    while store.add("readers", 0) < number and time.monotonic() < deadline_s:
        time.sleep(0.02)


def prefixed_store(prefix: str) -> Store:
    """The store through which the processes have joined, with a prefix for its keys."""
    return dist.PrefixStore(prefix, dist.distributed_c10d._get_default_store())  # type: ignore[attr-defined]

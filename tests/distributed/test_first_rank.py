"""What rank 0 tells the others, between threads that share a store."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch.distributed as dist

from pipekit.distributed import first_rank
from pipekit.distributed.first_rank import tell_from_first_rank
from pipekit.errors import CommunicationError, ConfigError, PipekitError
from pipekit.progress import ProgressCallback

WORLD_SIZE = 3


def tell(compute: Callable[[ProgressCallback], str], *, timeout_s: float = 30.0) -> list[Future[str]]:
    """Run every rank in a thread, and return what became of each."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    with ThreadPoolExecutor(WORLD_SIZE) as pool:
        return [
            pool.submit(
                tell_from_first_rank,
                compute,
                store=store,
                rank=rank,
                world_size=WORLD_SIZE,
                timeout_s=timeout_s,
                purpose="plan the run",
            )
            for rank in range(WORLD_SIZE)
        ]


def test_rank_0_computes_once_and_all_have_the_text() -> None:
    calls = []

    def compute(on_progress: ProgressCallback) -> str:
        calls.append(threading.current_thread())
        return "é" * 10_000

    assert [future.result() for future in tell(compute)] == ["é" * 10_000] * WORLD_SIZE
    assert len(calls) == 1


def test_an_error_of_rank_0_is_that_of_all() -> None:
    def compute(on_progress: ProgressCallback) -> str:
        raise ConfigError("train.steps=0: type 1")

    for future in tell(compute):
        with pytest.raises(ConfigError, match=r"^train\.steps=0: type 1$"):
            future.result()


def test_a_crash_of_rank_0_is_one_error_on_the_others() -> None:
    def compute(on_progress: ProgressCallback) -> str:
        raise ZeroDivisionError("in the user's code")

    first, *others = tell(compute)
    with pytest.raises(ZeroDivisionError):
        first.result()
    for future in others:
        with pytest.raises(PipekitError, match="rank 0 could not plan the run: ZeroDivisionError: in the user's code"):
            future.result()


def test_the_others_wait_as_long_as_rank_0_is_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_rank, "_BEAT_S", 0.05)

    def compute(on_progress: ProgressCallback) -> str:
        time.sleep(3.0)
        return "done"

    assert [future.result() for future in tell(compute, timeout_s=2.0)] == ["done"] * WORLD_SIZE


def test_a_silent_rank_0_is_named_with_what_it_did_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_rank, "_READ_S", 0.0)
    store = dist.HashStore()  # type: ignore[attr-defined]
    store.set("heartbeat", '[7, "tokenizing the text"]')
    with pytest.raises(CommunicationError) as caught:
        tell_from_first_rank(str, store=store, rank=1, world_size=2, timeout_s=0.2, purpose="plan the run")
    for part in ("rank 0 was to plan the run", "for 0.2 s", "run.timeout_s", "the last that it did was tokenizing"):
        assert part in str(caught.value)


def test_a_store_that_is_gone_is_one_error() -> None:
    class Gone:
        def check(self, keys: list[str]) -> bool:
            raise RuntimeError("Connection reset by peer\nmore")

    with pytest.raises(CommunicationError, match="rank 0 was to plan the run, and is gone: Connection reset by peer;"):
        tell_from_first_rank(str, store=Gone(), rank=1, world_size=2, timeout_s=1, purpose="plan the run")  # type: ignore[arg-type]

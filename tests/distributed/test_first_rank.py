"""Messages of rank 0 to the others, between threads that share a store."""

from __future__ import annotations

import json
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


def tell(compute: Callable[[ProgressCallback], str]) -> list[Future[str]]:
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
                timeout_s=120.0,
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


def test_rank_0_shows_that_it_is_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_rank, "_BEAT_S", 0.01)
    store = dist.HashStore()  # type: ignore[attr-defined]

    def compute(on_progress: ProgressCallback) -> str:
        on_progress("tokenizing the text")
        # Ends as soon as the heart has beaten, however long that takes.
        while not store.check(["heartbeat"]) or json.loads(store.get("heartbeat"))[0] < 3:
            time.sleep(0.005)
        return json.loads(store.get("heartbeat"))[1]  # type: ignore[no-any-return]

    told = tell_from_first_rank(compute, store=store, rank=0, world_size=1, timeout_s=1, purpose="plan the run")
    assert told == "tokenizing the text"


class Working:
    """Store of a rank 0 that writes a heartbeat every second of a clock that only sleep moves, and then an answer."""

    def __init__(self, *, beats_for_s: float, answers_after_s: float) -> None:
        self.now_s = 0.0
        self.beats_for_s, self.answers_after_s = beats_for_s, answers_after_s

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def check(self, keys: list[str]) -> bool:
        return keys == ["heartbeat"] or self.now_s >= self.answers_after_s

    def get(self, key: str) -> bytes:
        beat = json.dumps([int(min(self.now_s, self.beats_for_s)), ""])
        return (beat if key == "heartbeat" else json.dumps({"text": "done"})).encode()

    def add(self, key: str, amount: int) -> int:
        return amount


def test_the_others_wait_as_long_as_rank_0_is_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Working(beats_for_s=3600, answers_after_s=3600)
    monkeypatch.setattr(first_rank, "time", store)
    told = tell_from_first_rank(str, store=store, rank=1, world_size=2, timeout_s=5, purpose="plan the run")  # type: ignore[arg-type]
    assert told == "done"
    assert 3600 <= store.now_s < 3602


def test_the_others_give_up_when_the_heart_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Working(beats_for_s=60, answers_after_s=3600)
    monkeypatch.setattr(first_rank, "time", store)
    with pytest.raises(CommunicationError, match="has not been heard of for 5 s"):
        tell_from_first_rank(str, store=store, rank=1, world_size=2, timeout_s=5, purpose="plan the run")  # type: ignore[arg-type]
    assert 65 < store.now_s < 68


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

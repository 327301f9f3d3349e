"""When a training is asked to stop or to save: signals and clocks, without processes."""

from __future__ import annotations

import signal
from typing import Any

from pipekit.signals import StopSignals
from pipekit.training.requests import Requests


class Echo:
    """Agreement of one rank whose answers come one exchange late, as between ranks."""

    def __init__(self) -> None:
        self._late = [0, 0, 0]

    def exchange(self, *mine: int, at_once: bool = False) -> list[int]:
        known, self._late = self._late, list(mine)
        if at_once:
            known, self._late = [max(pair) for pair in zip(known, mine, strict=True)], [0, 0, 0]
        return known


def build(**settings: Any) -> tuple[Requests, StopSignals, list[float]]:
    """Requests, the signals that they look at, and the seconds of their clock."""
    now, signals = [100.0], StopSignals()
    agreement: Any = Echo()
    return Requests(agreement, signals, **{"has_clock": True, "clock": lambda: now[0], **settings}), signals, now


def test_a_signal_of_any_rank_stops_with_its_name() -> None:
    requests, signals, _ = build(has_clock=False, max_time_s=1.0, started_s=0.0)
    assert requests.exchange() == 0
    signals.number = signal.SIGUSR1
    assert [requests.exchange(), requests.exchange()] == [0, signal.SIGUSR1]
    signals.number = 0
    assert requests.exchange() == signal.SIGUSR1
    assert requests.describe() == "SIGUSR1"


def test_where_ranks_meet_it_is_known_at_once() -> None:
    requests, signals, _ = build()
    signals.number = signal.SIGINT
    assert requests.exchange(at_once=True) == signal.SIGINT


def saves(requests: Requests, now: list[float], *, batches: int, batch_s: float, save_s: float = 0.0) -> list[float]:
    """Times at which checkpoints were asked for and made."""
    times = []
    for _ in range(batches):
        now[0] += batch_s
        requests.exchange()
        if requests.asks_save:
            times.append(now[0])
            now[0] += save_s
            requests.note_save()
    return times


def test_checkpoints_by_time_come_once_each_and_count_from_the_end_of_the_last() -> None:
    requests, _, now = build(save_every_s=10.0)
    assert saves(requests, now, batches=15, batch_s=3.0, save_s=100.0) == [115.0, 230.0, 345.0]
    requests, _, now = build(save_every_s=10.0, has_clock=False)
    assert saves(requests, now, batches=10, batch_s=3.0) == []
    requests, _, now = build()
    assert saves(requests, now, batches=10, batch_s=1e6) == []


def test_a_request_to_save_that_a_validation_hears_of_is_kept() -> None:
    requests, _, now = build(save_every_s=10.0)
    now[0] += 11.0
    requests.exchange()
    assert not requests.asks_save
    requests.exchange()
    requests.exchange()
    assert requests.asks_save
    requests.note_save()
    assert not requests.asks_save


def test_the_time_of_a_save_is_not_taken_for_that_of_a_batch() -> None:
    requests, _, now = build(max_time_s=1000.0, started_s=100.0)
    requests.exchange()
    now[0] += 100.0
    requests.note_save()
    requests.note_written(1.0)
    while not requests.exchange():
        now[0] += 1.0
    assert 1085.0 < now[0] < 1100.0


def stops_at(*, batch_s: float, save_s: float | None, max_time_s: float) -> float:
    """Second at which the run has ended, counted from its start."""
    requests, _, now = build(max_time_s=max_time_s, started_s=90.0)
    if save_s is not None:
        requests.note_written(save_s)
    while not requests.exchange():
        now[0] += batch_s
    assert requests.describe() == "run.max_time"
    return now[0] + (save_s or 0.0) - 90.0


def test_the_run_ends_before_its_time_is_over_with_room_for_the_save() -> None:
    assert 3400 < stops_at(batch_s=1.0, save_s=60.0, max_time_s=3600) <= 3595
    assert 3000 < stops_at(batch_s=100.0, save_s=60.0, max_time_s=3600) <= 3595
    # Nothing has been saved: a save may take a minute, or a twentieth of a shorter limit.
    assert 3400 < stops_at(batch_s=1.0, save_s=None, max_time_s=3600) <= 3540
    assert 15 < stops_at(batch_s=0.1, save_s=None, max_time_s=20) <= 19

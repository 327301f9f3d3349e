"""Metrics gathered over a process group: ranks that report count, and every rank gets the same, or the same error."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gloo_workers import GlooWorkers
from pipekit.errors import PipekitError
from pipekit.training.gather_metrics import gather_metrics
from pipekit.training.reducers import (
    BatchMetrics,
    FunctionReducer,
    MetricReducer,
    Reducer,
    WrappedReducer,
    wrap_reducer,
)


def join(values: list[Any]) -> dict[str, float]:
    """The values as the digits of a number."""
    return {"digits": float("".join(str(int(value)) for value in values))}


class Broken(MetricReducer):
    """Fails on one rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def reset(self) -> None:
        pass

    def per_slot_reduce(self) -> Any:
        if dist.get_rank() == self.rank:
            raise KeyError("gone")

    def cross_slot_reduce(self, per_slot_metrics: list[Any]) -> Any:
        return {}


def collect(rank: int) -> list[WrappedReducer]:
    """Reducers that have seen `rank + 1` batches; batch `i` of a rank has the value `10 * rank + i`."""
    batches = BatchMetrics({"mean": Reducer.AVG, "max": Reducer.MAX})
    function = FunctionReducer(join)
    for index in range(rank + 1):
        value = torch.tensor(10.0 * rank + index, requires_grad=True)
        batches.update({"mean": value, "max": value})
        function.update(value / 10 + 1)
    return [wrap_reducer(batches), wrap_reducer(function)]


def refusal(reducers: list[WrappedReducer], **arguments: Any) -> str:
    try:
        gather_metrics(reducers, **arguments)
    except PipekitError as error:
        return str(error)
    return "nothing raised"


def gather(rank: int) -> dict[str, Any]:
    pair = dist.new_group([1, 2])
    unsendable = FunctionReducer(len)
    unsendable.update(1) if rank != 1 else unsendable._values.append(threading.Lock())
    found: dict[str, Any] = {
        "all": gather_metrics(collect(rank), reports=True),
        "some": gather_metrics(collect(rank), reports=rank != 1),
        "error on one": refusal([wrap_reducer(Broken(1))], reports=True),
        "broken rank does not report": refusal([wrap_reducer(Broken(1), None)], reports=rank != 1),
        "unsendable": refusal([wrap_reducer(unsendable, "locks")], reports=True),
        "bad result": refusal(collect(rank)[:1] * 2, reports=True),
        "none": refusal(collect(rank), reports=False),
        "different": refusal(collect(rank)[: 1 + rank % 2], reports=True),
    }
    if rank != 0:
        found["pair"] = gather_metrics(collect(rank), reports=True, group=pair)
    return found


@pytest.mark.distributed
def test_every_rank_gets_the_metrics_of_the_ranks_that_report_or_the_same_error() -> None:
    first, *others = GlooWorkers().run(3, gather)
    for other in others:
        assert {name: other[name] for name in first} == first
    # The values are 0 on rank 0, 10 and 11 on rank 1, and 20, 21 and 22 on rank 2.
    assert first["all"] == {"mean": 84 / 6, "max": 22.0, "digits": 122333.0}
    assert first["some"] == {"mean": 63 / 4, "max": 22.0, "digits": 1333.0}
    assert others[0]["pair"] == others[1]["pair"] == {"mean": 84 / 5, "max": 22.0, "digits": 22333.0}
    assert first["error on one"] == "rank 1: reducer Broken: per_slot_reduce raised KeyError: 'gone'"
    assert first["broken rank does not report"] == "nothing raised"
    assert first["unsendable"].startswith(
        "rank 1: reducer 'locks' (len): of what per_slot_reduce returned, a _thread.lock is not sent"
    )
    assert first["bad result"] == (
        "the metric 'mean' comes from evaluate_batch and from evaluate_batch; give one of them another name"
    )
    assert first["none"].startswith("no rank reports metrics: should_report_metrics is False on all")
    assert first["different"].startswith("rank 1 wraps other reducers, evaluate_batch, reducer join, than the group's")


def test_a_process_that_has_joined_no_others_is_alone() -> None:
    assert gather_metrics(collect(1), reports=True) == {"mean": 10.5, "max": 11.0, "digits": 22.0}

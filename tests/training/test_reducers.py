"""Reducers, compared with the same over flat lists of what all ranks saw."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipekit import MetricReducer, Reducer
from pipekit.errors import PipekitError
from pipekit.training.reducers import BatchMetrics, FunctionReducer, combine_slots, reduce_per_slot, wrap_reducer

NUMBERS = st.floats(-1e6, 1e6)
RANKS = st.lists(st.lists(st.tuples(NUMBERS, st.integers(1, 9)), max_size=6), min_size=1, max_size=4)


def reduce_ranks(build: Callable[[int], Any], num_ranks: int, **arguments: Any) -> dict[str, float]:
    """Metrics of one reducer, of which `build(rank)` makes each rank's."""
    wrapped = [wrap_reducer(build(rank), **arguments) for rank in range(num_ranks)]
    return combine_slots(wrapped[:1], [reduce_per_slot([each]) for each in wrapped])


@settings(max_examples=100, deadline=None)
@given(ranks=RANKS, as_tensors=st.booleans())
def test_metrics_of_batches_are_those_of_the_flat_list(ranks: list[list[tuple[float, int]]], as_tensors: bool) -> None:
    reducers = {"mean": Reducer.AVG, "sum": Reducer.SUM, "largest": Reducer.MAX, "smallest": Reducer.MIN}

    def build(rank: int) -> BatchMetrics:
        metrics = BatchMetrics(reducers)
        for value, weight in ranks[rank]:
            number: Any = torch.tensor([value], dtype=torch.float64, requires_grad=True) if as_tensors else value
            metrics.update(dict.fromkeys(reducers, number), weight)
        return metrics

    result = reduce_ranks(build, len(ranks))
    flat = [batch for batches in ranks for batch in batches]
    if not flat:
        assert result == {}
        return
    values = [value for value, _ in flat]
    assert result["largest"] == max(values)
    assert result["smallest"] == min(values)
    assert result["sum"] == pytest.approx(math.fsum(values), rel=1e-9, abs=1e-6)
    mean = math.fsum(value * weight for value, weight in flat) / sum(weight for _, weight in flat)
    assert result["mean"] == pytest.approx(mean, rel=1e-9, abs=1e-6)


def test_ranks_with_different_numbers_of_batches_weigh_by_their_batches() -> None:
    def build(rank: int) -> BatchMetrics:
        metrics = BatchMetrics()
        for value in ([1.0, 2.0, 3.0], [10.0])[rank]:
            metrics.update({"loss": value})
        return metrics

    assert reduce_ranks(build, 2) == {"loss": 4.0}


@pytest.mark.parametrize("reducer", Reducer)
def test_a_metric_that_is_no_number_stays_visible(reducer: Reducer) -> None:
    def build(rank: int) -> BatchMetrics:
        metrics = BatchMetrics(reducer)
        metrics.update({"x": float("nan") if rank == 1 else 1.0})
        return metrics

    assert math.isnan(reduce_ranks(build, 3)["x"])


def test_a_reset_forgets() -> None:
    metrics, function = BatchMetrics(Reducer.SUM), FunctionReducer(sum)
    metrics.update({"old": 1.0})
    function.update(1.0)
    metrics.reset()
    function.reset()
    metrics.update({"new": 2.0})
    function.update(2.0)
    both = [wrap_reducer(metrics), wrap_reducer(function, "sum")]
    assert combine_slots(both, [reduce_per_slot(both)]) == {"new": 2.0, "sum": 2.0}


@settings(max_examples=50, deadline=None)
@given(ranks=st.lists(st.lists(st.integers(-99, 99), max_size=5), min_size=1, max_size=4))
def test_a_function_sees_the_values_of_all_ranks_in_order(ranks: list[list[int]]) -> None:
    seen: list[Any] = []

    def count(values: list[Any]) -> int:
        seen.append(values)
        return len(values)

    def build(rank: int) -> FunctionReducer:
        reducer = FunctionReducer(count)
        for value in ranks[rank]:
            reducer.update((value, {"tensor": torch.tensor(value)}))
        return reducer

    result = reduce_ranks(build, len(ranks), name="count")
    flat = [value for values in ranks for value in values]
    if flat:
        assert result == {"count": len(flat)}
        assert seen == [[(value, {"tensor": torch.tensor(value)}) for value in flat]]
    else:
        assert (result, seen) == ({}, [])


def test_a_function_sees_what_the_values_were() -> None:
    total, array = torch.zeros(2, requires_grad=True) + 1, np.zeros(2)
    wrapped = wrap_reducer(lambda values: {"last": values[-1][0][0], "first": values[0][1][0]})
    assert isinstance(wrapped.reducer, FunctionReducer)
    for _ in range(2):
        wrapped.reducer.update((total, array))
        with torch.no_grad():
            total += 1
        array += 1
    (values,) = reduce_per_slot([wrapped])
    assert not values[0][0].requires_grad
    assert combine_slots([wrapped], [[values]]) == {"last": 2.0, "first": 0.0}


class Span(MetricReducer):
    """The span of all values."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.values: list[float] = []

    def update(self, value: float) -> None:
        self.values.append(value)

    def per_slot_reduce(self) -> tuple[float, float]:
        return min(self.values), max(self.values)

    def cross_slot_reduce(self, per_slot_metrics: list[Any]) -> Any:
        lows, highs = zip(*per_slot_metrics, strict=True)
        return {"low": torch.tensor(min(lows)), "span": np.float32(max(highs) - min(lows))}


def test_a_reducer_of_ones_own() -> None:
    def build(rank: int) -> Span:
        span = Span()
        span.update(rank)
        span.update(10 - 2 * rank)
        return span

    result = reduce_ranks(build, 3)
    assert result == {"low": 0, "span": 10}
    assert {type(value) for value in result.values()} <= {int, float}
    with pytest.raises(PipekitError, match=r"reducer Span: per_slot_reduce raised ValueError: min\(\)"):
        reduce_per_slot([wrap_reducer(Span())])


def constant(value: Any) -> Callable[[list[Any]], Any]:
    def returned(values: list[Any]) -> Any:
        if isinstance(value, Exception):
            raise value
        return value

    return returned


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        (None, 3.0, r"reducer returned returned the float 3.0, and has no name; return a dict of metrics by name, or"),
        (None, {1: 2.0}, r"reducer returned returned the dict {1: 2.0}, and has no name"),
        ("auc", {"auc": 1.0}, r"reducer 'auc' \(returned\) returned a dict, and has the name of one metric; return a"),
        (
            "auc",
            torch.zeros(2),
            r"reducer 'auc' \(returned\) returned a tensor of the shape \(2,\) as the metric 'auc'",
        ),
        ("auc", "high", r"returned the str 'high' as the metric 'auc'; return a number"),
        (None, {"auc": None}, r"returned the NoneType None as the metric 'auc'"),
        ("auc", KeyError("x"), r"reducer 'auc' \(returned\): cross_slot_reduce raised KeyError: 'x'"),
    ],
)
def test_what_a_reducer_may_not_return(name: str | None, value: Any, what: str) -> None:
    wrapped = wrap_reducer(constant(value), name)
    with pytest.raises(PipekitError, match=what):
        combine_slots([wrapped], [[[1]]])


def test_two_reducers_of_one_metric_are_refused() -> None:
    metrics = BatchMetrics(source="train_batch")
    metrics.update({"auc": 1.0})
    both = [wrap_reducer(metrics), wrap_reducer(constant(1.0), "auc")]
    what = r"the metric 'auc' comes from train_batch and from reducer 'auc' \(returned\); give one of them another name"
    with pytest.raises(PipekitError, match=what):
        combine_slots(both, [[metrics.per_slot_reduce(), [1]]])


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ((Span,), r"Span is a class; give an instance, Span\(\)"),
        ((3,), "the int 3 is no reducer; give a function"),
        ((sum, 3), "name=3 is no text"),
        ((sum, "total", False, False), r"reducer 'total' \(sum\): reported neither in training nor in validation"),
    ],
)
def test_what_cannot_be_wrapped(arguments: tuple[Any, ...], what: str) -> None:
    with pytest.raises(PipekitError, match=what):
        wrap_reducer(*arguments)


@pytest.mark.parametrize(
    ("reducer", "batches", "what"),
    [
        ("avg", [], "evaluation_reducer: 'avg' is no Reducer; return Reducer.AVG, Reducer.SUM, Reducer.MAX or"),
        ({"loss": max}, [], "is no Reducer"),
        (Reducer.AVG, [torch.zeros(())], r"evaluate_batch returned a tensor of the shape \(\); return a dict"),
        (Reducer.AVG, [{"loss": torch.zeros(2)}], r"a tensor of the shape \(2,\) as the metric 'loss'"),
        (Reducer.AVG, [{"loss": "low"}], "the str 'low' as the metric 'loss'"),
        (Reducer.AVG, [{"loss": 1}, {"acc": 1}], "the metrics acc, and in the batch before loss; return the same in"),
        ({"los": Reducer.AVG}, [{"loss": 1}], "the metric 'loss?' .*; did you mean 'loss?'"),
        ({"loss": Reducer.AVG}, [{"loss": 1, "x": 1}], "evaluate_batch: the metric 'x' has no Reducer in evaluation"),
    ],
)
def test_metrics_of_batches_that_are_refused(reducer: Any, batches: list[Any], what: str) -> None:
    def update() -> None:
        metrics = BatchMetrics(reducer)
        for batch in batches:
            metrics.update(batch)

    with pytest.raises(PipekitError, match=what):
        update()


def test_ranks_with_different_metrics_are_refused() -> None:
    def build(rank: int) -> BatchMetrics:
        metrics = BatchMetrics()
        metrics.update({("loss", "acc")[rank]: 1.0})
        return metrics

    with pytest.raises(PipekitError, match="the metrics acc on one rank and loss on another; return the same on all"):
        reduce_ranks(build, 2)

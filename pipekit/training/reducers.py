"""Reducers: metrics over all batches and ranks, as means, sums, extremes, or functions of all values.

A slot is a rank that reports. Every slot reduces the values that it saw (`per_slot_reduce`). When metrics are reported,
the results are gathered once (`pipekit.training.gather_metrics`), and one rank reduces them to metrics
(`cross_slot_reduce`). Nothing here communicates between processes.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipekit.errors import PipekitError
from pipekit.settings.base import alternatives
from pipekit.settings.suggest import closest
from pipekit.tensors.nested import map_tensors


class Reducer(Enum):
    """Reducer of a metric with one number per batch: its mean, sum, maximum or minimum over all batches."""

    AVG = "avg"
    SUM = "sum"
    MAX = "max"
    MIN = "min"


class MetricReducer(ABC):
    """Base class of user-defined reducers: state that batches add to, reduced on each slot and then over all slots.

    A subclass defines a further method, which the trial calls to add a batch's values to the state.
    """

    @abstractmethod
    def reset(self) -> None:
        """Clear the state; called before each training or validation period that is reported separately."""

    @abstractmethod
    def per_slot_reduce(self) -> Any:
        """Return this rank's values, or a reduction of them, as numbers, text, lists, dicts, arrays or tensors."""

    @abstractmethod
    def cross_slot_reduce(self, per_slot_metrics: list[Any]) -> Any:
        """Return the metric, or a dict of metrics, from the slots' results of `per_slot_reduce`, in rank order."""


class FunctionReducer(MetricReducer):
    """Reducer that calls a function with a flat list of the values of all ranks, in rank order.

    Args:
        function: returns the metric, or a dict of metrics. It is not called if no rank has a value.
    """

    def __init__(self, function: Callable[[list[Any]], Any]) -> None:
        self.function = function
        self._values: list[Any] = []

    def update(self, value: Any) -> None:
        """Add a copy of a value, with its tensors detached; they stay on their device until metrics are reported."""
        self._values.append(copy.deepcopy(map_tensors(Tensor.detach, value)))

    def reset(self) -> None:
        self._values = []

    def per_slot_reduce(self) -> list[Any]:
        return self._values

    def cross_slot_reduce(self, per_slot_metrics: list[Any]) -> Any:
        values = [value for slot in per_slot_metrics for value in slot]
        return self.function(values) if values else {}


class BatchMetrics(MetricReducer):
    """Metrics of single batches, each reduced over all batches of all slots at once.

    A mean weighs every batch equally, or by its `weight`, even if slots have different numbers of batches. Sums are in
    64 bits.

    Args:
        reducer: one reducer for all metrics, or a dict of reducers by metric name.
        source: the method that returns the metrics, for messages.

    Raises:
        PipekitError: if `reducer` is neither.
    """

    def __init__(
        self, reducer: Reducer | Mapping[str, Reducer] = Reducer.AVG, *, source: str = "evaluate_batch"
    ) -> None:
        each = list(reducer.values()) if isinstance(reducer, Mapping) else [reducer]
        wrong = next((value for value in each if not isinstance(value, Reducer)), None)
        if wrong is not None:
            raise PipekitError(
                f"evaluation_reducer: {wrong!r} is no Reducer; return {alternatives(Reducer)}, or a dict that has one "
                "for each metric"
            )
        self._reducer = reducer
        self.source = source
        self._values: dict[str, list[Any]] = {}
        self._weights: list[float] = []

    def update(self, metrics: Mapping[str, Any], weight: float = 1.0) -> None:
        """Add the metrics of one batch.

        Args:
            metrics: a number, or a tensor of one element, for each name; the same names in every batch.
            weight: weight of the batch in means, such as its number of samples.

        Raises:
            PipekitError: if the metrics have other types, or other names than in the batch before.
        """
        if not isinstance(metrics, Mapping):
            raise PipekitError(
                f"{self.source} returned {_kind(metrics)}; return a dict of metrics, such as {{'loss': loss}}"
            )
        if not self._values:
            self._check_reducers(metrics)
        elif set(metrics) != set(self._values):
            raise PipekitError(
                f"{self.source} returned the metrics {_names(metrics)}, and in the batch before "
                f"{_names(self._values)}; return the same in every batch"
            )
        for name, value in metrics.items():
            if not _is_number(value):
                raise PipekitError(
                    f"{self.source} returned {_kind(value)} as the metric {name!r}; return a number, or a tensor of "
                    "one element, and give anything else to a reducer of wrap_reducer"
                )
            self._values.setdefault(name, []).append(value.detach().clone() if isinstance(value, Tensor) else value)
        self._weights.append(float(weight))

    def reset(self) -> None:
        self._values, self._weights = {}, []

    def batches(self) -> list[dict[str, float]]:
        """Return the metrics of each added batch, in order."""
        columns = {name: _on_host(values).tolist() for name, values in self._values.items()}
        return [{name: column[batch] for name, column in columns.items()} for batch in range(len(self._weights))]

    def per_slot_reduce(self) -> dict[str, tuple[float, float]]:
        weights = torch.tensor(self._weights, dtype=torch.float64)
        reduced = {}
        for name, values in self._values.items():
            numbers = _on_host(values)
            if self._reducer_of(name) is Reducer.AVG:
                numbers *= weights
            reduced[name] = (float(self._reduce(name, numbers)), float(weights.sum()))
        return reduced

    def cross_slot_reduce(self, per_slot_metrics: list[Any]) -> dict[str, float]:
        slots = [slot for slot in per_slot_metrics if slot]
        metrics = {}
        for slot in slots:
            if set(slot) != set(slots[0]):
                raise PipekitError(
                    f"{self.source} returned the metrics {_names(slot)} on one rank and {_names(slots[0])} on "
                    "another; return the same on all"
                )
        for name in slots[0] if slots else ():
            numbers, weights = torch.tensor([slot[name] for slot in slots], dtype=torch.float64).unbind(dim=1)
            divisor = weights.sum() if self._reducer_of(name) is Reducer.AVG else 1.0
            metrics[name] = float(self._reduce(name, numbers) / divisor)
        return metrics

    def _reducer_of(self, name: str) -> Reducer:
        return self._reducer if isinstance(self._reducer, Reducer) else self._reducer[name]

    def _reduce(self, name: str, numbers: Tensor) -> Tensor:
        """Sum or extreme `()` of numbers `(N,)`; a mean is divided by the weights in the end."""
        reduce = {Reducer.MAX: torch.max, Reducer.MIN: torch.min}.get(self._reducer_of(name), torch.sum)
        return reduce(numbers)

    def _check_reducers(self, metrics: Mapping[str, Any]) -> None:
        if isinstance(self._reducer, Reducer):
            return
        for name in set(metrics) ^ set(self._reducer):
            match = closest(str(name), metrics if name in self._reducer else self._reducer)
            hint = f"; did you mean {match!r}?" if match else ""
            fault = "is not returned" if name in self._reducer else "has no Reducer in evaluation_reducer"
            raise PipekitError(
                f"{self.source}: the metric {name!r} {fault}{hint}; name the same metrics in evaluation_reducer and in "
                f"what {self.source} returns"
            )


@dataclass(frozen=True)
class WrappedReducer:
    """Reducer of a trial, with the name of its metric and the reports that include it.

    Attributes:
        reducer: the reducer, to which the trial's batches add values.
        name: name of its metric; None if it returns a dict of metrics.
        for_training: whether it is reported with training metrics.
        for_validation: whether it is reported with validation metrics.
    """

    reducer: MetricReducer
    name: str | None = None
    for_training: bool = True
    for_validation: bool = True

    def __str__(self) -> str:
        if isinstance(self.reducer, BatchMetrics):
            return self.reducer.source
        of = self.reducer.function if isinstance(self.reducer, FunctionReducer) else self.reducer
        kind = getattr(of, "__name__", type(of).__name__)
        return f"reducer {kind}" if self.name is None else f"reducer {self.name!r} ({kind})"


def wrap_reducer(
    reducer: MetricReducer | Callable[[list[Any]], Any],
    name: str | None = None,
    for_training: bool = True,
    for_validation: bool = True,
) -> WrappedReducer:
    """Wrap a reducer, or a function of a flat list of all values, with the name of its metric.

    Raises:
        PipekitError: if `reducer` is neither, or its metric would never be reported.
    """
    if isinstance(reducer, type):
        raise PipekitError(f"wrap_reducer: {reducer.__name__} is a class; give an instance, {reducer.__name__}()")
    if not isinstance(reducer, MetricReducer):
        if not callable(reducer):
            raise PipekitError(
                f"wrap_reducer: {_kind(reducer)} is no reducer; give a function of a list of values, or a MetricReducer"
            )
        reducer = FunctionReducer(reducer)
    if name is not None and not isinstance(name, str):
        raise PipekitError(f"wrap_reducer: name={name!r} is no text; give the name of the metric, or None")
    wrapped = WrappedReducer(reducer, name, for_training, for_validation)
    if not (for_training or for_validation):
        raise PipekitError(f"{wrapped}: reported neither in training nor in validation; set one of them to True")
    return wrapped


def reduce_per_slot(reducers: Sequence[WrappedReducer]) -> list[Any]:
    """Return the result of each reducer's `per_slot_reduce`, with all tensors detached and in host memory.

    Raises:
        PipekitError: if a reducer raises; the message names the reducer.
    """
    return [
        map_tensors(lambda tensor: tensor.detach().cpu(), _call(wrapped, wrapped.reducer.per_slot_reduce))
        for wrapped in reducers
    ]


def combine_slots(reducers: Sequence[WrappedReducer], slots: Sequence[Sequence[Any]]) -> dict[str, float]:
    """Return the metrics of all reducers, by name.

    Args:
        reducers: the reducers; their own state does not matter.
        slots: for each slot, in rank order, the values of `reduce_per_slot`.

    Raises:
        PipekitError: if a reducer raises or returns neither its metric nor a dict of metrics, or if two return the same
            metric; the message names the reducer.
    """
    metrics: dict[str, float] = {}
    sources: dict[str, WrappedReducer] = {}
    for index, wrapped in enumerate(reducers):
        per_slot = [slot[index] for slot in slots]
        result = _call(wrapped, wrapped.reducer.cross_slot_reduce, per_slot)
        if isinstance(wrapped.reducer, FunctionReducer) and not any(per_slot):
            continue
        for name, value in _named(wrapped, result).items():
            if name in sources:
                raise PipekitError(
                    f"the metric {name!r} comes from {sources[name]} and from {wrapped}; give one of them another name"
                )
            if not _is_number(value):
                raise PipekitError(
                    f"{wrapped} returned {_kind(value)} as the metric {name!r}; return a number, or a tensor or array "
                    "of one element"
                )
            sources[name] = wrapped
            metrics[name] = value.item() if isinstance(value, Tensor | np.ndarray | np.generic) else value
    return metrics


def _named(wrapped: WrappedReducer, result: Any) -> Mapping[str, Any]:
    if wrapped.name is not None:
        if isinstance(result, Mapping):
            raise PipekitError(
                f"{wrapped} returned a dict, and has the name of one metric; return a number, or leave out the name"
            )
        return {wrapped.name: result}
    if not isinstance(result, Mapping) or not all(isinstance(name, str) for name in result):
        raise PipekitError(
            f"{wrapped} returned {_kind(result)}, and has no name; return a dict of metrics by name, or give "
            "wrap_reducer the name of its metric"
        )
    return result


def _call(wrapped: WrappedReducer, method: Callable[..., Any], *args: Any) -> Any:
    try:
        return method(*args)
    except PipekitError:
        raise
    except Exception as error:
        raise PipekitError(f"{wrapped}: {method.__name__} raised {type(error).__name__}: {error}") from error


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    if isinstance(value, np.ndarray | np.generic):
        return value.size == 1 and value.dtype.kind in "biuf"
    return isinstance(value, int | float)


def _on_host(values: Sequence[Any]) -> Tensor:
    """Numbers `(N,)` in 64 bits; tensors of one device are copied from it all at once."""
    if all(isinstance(value, Tensor) for value in values) and len({value.device for value in values}) == 1:
        return torch.stack([value.reshape(()) for value in values]).cpu().double()
    return torch.tensor([float(value) for value in values], dtype=torch.float64)


def _kind(value: Any) -> str:
    """Describe a value of a wrong type in a message.

    Example:
        >>> _kind(torch.zeros(2, 3)), _kind("x"), _kind({1: 2})
        ('a tensor of the shape (2, 3)', "the str 'x'", 'the dict {1: 2}')
    """
    if isinstance(value, Tensor | np.ndarray):
        return f"{'a tensor' if isinstance(value, Tensor) else 'an array'} of the shape {tuple(value.shape)}"
    shown = repr(value)
    return f"the {type(value).__name__} {shown if len(shown) <= 60 else shown[:60] + '...'}"


def _names(metrics: Mapping[str, Any]) -> str:
    return alternatives(sorted(map(str, metrics)), last="and") if metrics else "none"

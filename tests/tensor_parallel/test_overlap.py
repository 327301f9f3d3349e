"""Collectives of column-parallel layers that run behind the products of their backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipekit.tensor_parallel import PlannedGroup, column_parallel_linears
from pipekit.tensor_parallel.group import Pending
from pipekit.tensors.weight_gradients import add_gradient, deferring

B, S, IN = 2, 12, 5
"""Batch, tokens, inputs."""

both_flows = pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "in parts"])


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Recorder(PlannedGroup):
    """Notes what is begun and what is waited for; its peers are not there."""

    def __init__(self, events: list[str]) -> None:
        super().__init__(rank=0, size=2)
        self._events = events

    def _note(self, name: str, pending: Pending) -> Pending:
        self._events.append(f"{name} begins")
        return _Recorded(name, pending, self._events)

    def start_all_reduce(self, tensor: Tensor) -> Pending:
        return self._note("sum", super().start_all_reduce(tensor))

    def start_all_gather(self, tensor: Tensor, dim: int) -> Pending:
        return self._note("gathering", super().start_all_gather(tensor, dim))

    def start_reduce_scatter(self, tensor: Tensor, dim: int) -> Pending:
        return self._note("sum to parts", super().start_reduce_scatter(tensor, dim))


class _Recorded:
    def __init__(self, name: str, pending: Pending, events: list[str]) -> None:
        self._name, self._pending, self._events = name, pending, events

    def wait(self) -> Tensor:
        self._events.append(f"{self._name} ends")
        return self._pending.wait()


class RecordProducts(TorchDispatchMode):
    """Notes matrix products, by the shape of their result."""

    def __init__(self, names: dict[tuple[int, ...], str], events: list[str]) -> None:
        super().__init__()
        self._names, self._events = names, events

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "mm" in str(func):
            self._events.append(self._names[tuple(result.shape)])
        return result


def record_backward(
    sequence_parallel: bool,
    *,
    num_layers: int = 1,
    put_off: bool = False,
    change: Callable[[Tensor, list[nn.Parameter]], None] = lambda x, weights: None,
) -> list[str]:
    """Events, in order, of the backward of column-parallel layers of one input."""
    events: list[str] = []
    x = drawn(B, S // 2 if sequence_parallel else S, IN, seed=1).requires_grad_()
    weights = [nn.Parameter(drawn(8, IN, seed=index)) for index in range(num_layers)]
    biases = [nn.Parameter(drawn(8, seed=index)) for index in range(num_layers)]
    change(x, weights)
    outputs = column_parallel_linears(
        x, list(zip(weights, biases, strict=True)), Recorder(events), sequence_parallel=sequence_parallel
    )
    assert events == (["gathering begins", "gathering ends"] if sequence_parallel else [])
    events.clear()
    names = {(B * S, IN): "input gradient", (8, IN): "weight gradient"}
    with RecordProducts(names, events), deferring() if put_off else nullcontext():
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    return events


@pytest.mark.parametrize("num_layers", [1, 3])
def test_the_inputs_gradient_is_summed_behind_the_weights_gradient(num_layers: int) -> None:
    assert record_backward(False, num_layers=num_layers) == [
        *["input gradient"] * num_layers,
        "sum begins",
        *["weight gradient"] * num_layers,
        "sum ends",
    ]


@pytest.mark.parametrize("num_layers", [1, 3])
def test_parts_are_gathered_again_behind_the_inputs_gradient(num_layers: int) -> None:
    assert record_backward(True, num_layers=num_layers) == [
        "gathering begins",
        *["input gradient"] * num_layers,
        "sum to parts begins",
        "gathering ends",
        *["weight gradient"] * num_layers,
        "sum to parts ends",
    ]


@both_flows
def test_a_backward_that_puts_weights_off_gathers_no_inputs(sequence_parallel: bool) -> None:
    name = "sum to parts" if sequence_parallel else "sum"
    assert record_backward(sequence_parallel, put_off=True) == ["input gradient", f"{name} begins", f"{name} ends"]


@both_flows
def test_frozen_weights_cost_nothing(sequence_parallel: bool) -> None:
    def freeze(x: Tensor, weights: list[nn.Parameter]) -> None:
        for weight in weights:
            weight.requires_grad_(False)

    name = "sum to parts" if sequence_parallel else "sum"
    assert record_backward(sequence_parallel, change=freeze) == ["input gradient", f"{name} begins", f"{name} ends"]


@both_flows
def test_inputs_that_need_no_gradient_cost_nothing(sequence_parallel: bool) -> None:

    def freeze(x: Tensor, weights: list[nn.Parameter]) -> None:
        x.requires_grad_(False)

    events = record_backward(sequence_parallel, change=freeze)
    assert events == [*(["gathering begins", "gathering ends"] if sequence_parallel else []), "weight gradient"]


def test_put_off_weights_of_one_input_gather_it_once() -> None:
    events: list[str] = []
    x = drawn(B, S // 2, IN, seed=1).requires_grad_()
    weights = [nn.Parameter(drawn(8, IN, seed=index)) for index in range(2)]
    outputs = column_parallel_linears(
        x, [(weight, None) for weight in weights], Recorder(events), sequence_parallel=True
    )
    with deferring() as later:
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    events.clear()
    later.compute(add_gradient)
    assert events == ["gathering begins", "gathering ends"]
    for weight in weights:
        gathered = torch.cat([x.detach()] * 2, 1)
        torch.testing.assert_close(weight.grad, gathered.sum((0, 1)).expand(8, IN))


def test_a_rank_keeps_its_part_of_the_inputs_only() -> None:
    kept: list[tuple[int, ...]] = []
    x, weight = drawn(B, S // 2, IN, seed=1).requires_grad_(), nn.Parameter(drawn(8, IN, seed=2))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tuple(tensor.shape)) or tensor, lambda t: t
    ):
        column_parallel_linears(x, [(weight, None)], PlannedGroup(0, 2), sequence_parallel=True)
    assert kept == [(B, S // 2, IN)]

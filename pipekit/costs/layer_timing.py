"""Time of one layer on a device: its forward, its input gradient and its weight gradient."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor

from pipekit.tensors.host_memory import count_page_faults
from pipekit.tensors.meta import NestedMeta
from pipekit.tensors.nested import Structure, flatten, unflatten
from pipekit.tensors.weight_gradients import add_gradient, deferring, split_linear

_WARM_UPS = 2
_FEWEST_REPEATS = 3
_ENOUGH_S = 5.0
# Some 10 ms.
_HELD_CYCLES = 20_000_000


def time_layer(
    call: Callable[[Any], Any], leaves: Sequence[Tensor], structure: Structure, *, device: torch.device, repeats: int
) -> tuple[dict[str, Any], NestedMeta]:
    """Time a layer, by the clock on CPUs and by events of the stream on GPUs.

    A GPU sleeps while a repeat is launched: its events would count the time in which it waits for the host, which in a
    run is ahead.

    On CPUs only those repeats count that got the fewest fresh pages from the system: fetching them takes a large layer
    many times as long as its computation, and a run has its pages after a few steps.

    Args:
        call: the layer; it is given the nested inputs.
        leaves: the input tensors.
        structure: their nesting.
        device: its device.
        repeats: how often it is run after warming up; a layer that takes seconds is run less often.

    Returns:
        Medians of `forward_s`, `input_gradient_s` and `weight_gradient_s`; shapes and types of the outputs.

    Raises:
        PipekitError: if the layer's output cannot be passed on.
        Exception: whatever the layer raises.
    """
    watch = _Watch(device)
    started_s = time.perf_counter()
    faults = [count_page_faults()]
    outputs, gradients = _run(call, leaves, structure, None, watch)
    faults.append(count_page_faults())
    for run in range(1, _WARM_UPS + repeats):
        if run >= _WARM_UPS + _FEWEST_REPEATS and time.perf_counter() - started_s > _ENOUGH_S:
            break
        _run(call, leaves, structure, gradients, watch)
        faults.append(count_page_faults())
    fresh_pages = [after - before for before, after in pairwise(faults)]
    settled = _settled(fresh_pages) if device.type == "cpu" else range(_WARM_UPS, len(fresh_pages))
    names = ("forward_s", "input_gradient_s", "weight_gradient_s")
    columns = zip(names, watch.seconds(len(names)), strict=True)
    return {name: median(column[run] for run in settled) for name, column in columns}, outputs


def _settled(fresh_pages: Sequence[int]) -> list[int]:
    """Indices of the runs after the warm-ups with the fewest fresh pages, `_FEWEST_REPEATS` or more where there are.

    Example:
        >>> _settled([900, 900, 900, 0, 900, 0, 0, 0])
        [3, 5, 6, 7]
    """
    most = sorted(fresh_pages[_WARM_UPS:])[:_FEWEST_REPEATS][-1]
    return [run for run in range(_WARM_UPS, len(fresh_pages)) if fresh_pages[run] <= most]


def _run(
    call: Callable[[Any], Any],
    leaves: Sequence[Tensor],
    structure: Structure,
    gradients: list[Tensor] | None,
    watch: _Watch,
) -> tuple[NestedMeta, list[Tensor]]:
    # A layer may change its input in place, which a leaf that requires a gradient does not allow.
    entered = unflatten([leaf.clone() if leaf.requires_grad else leaf for leaf in leaves], structure)
    watch.hold()
    with watch, split_linear():
        returned = call(entered)
    tensors, output_structure = flatten(returned, "its output")
    outputs = NestedMeta(NestedMeta.of(tensors, "its output").tensors, output_structure)
    results = [tensor for tensor in tensors if tensor.requires_grad]
    if gradients is None:
        gradients = [leaf.detach() for leaf in build_values(NestedMeta.of(results, "its output"), watch.device)]
    with watch, deferring() as deferred:
        if results:
            torch.autograd.backward(results, gradients)
    with watch, torch.no_grad():
        # As in a run: the gradients of earlier micro-batches are there already.
        deferred.compute(add_gradient)
    return outputs, gradients


def build_values(meta: NestedMeta, device: torch.device, values: Any = None) -> list[Tensor]:
    """Build tensors of given shapes and types on a device, the same ones every time.

    Args:
        meta: shapes and types.
        device: the device.
        values: nested tensors with the values to take; where it is None or they are on the meta device, the values are
            random numbers, True for booleans and zeros for integers.

    Example:
        >>> meta = NestedMeta.of([torch.zeros(2, dtype=torch.int64), torch.zeros(1, dtype=torch.bool)], "an example")
        >>> build_values(meta, torch.device("cpu"))
        [tensor([0, 0]), tensor([True])]
    """
    generator = torch.Generator(device).manual_seed(0)
    sources = [None for _ in meta.tensors] if values is None else flatten(values, "the example")[0]
    built = []
    for tensor, source in zip(meta.tensors, sources, strict=True):
        if source is not None and source.device.type != "meta":
            filled = source.detach()
        elif tensor.dtype.is_floating_point:
            filled = torch.randn(tensor.shape, generator=generator, device=device)
        else:
            filled = torch.full(tensor.shape, tensor.dtype is torch.bool)
        # A copy, since a layer may change it.
        copied = filled.to(device=device, dtype=tensor.dtype, copy=True)
        built.append(copied.requires_grad_(tensor.requires_grad))
    return built


class _Watch:
    """Context manager that times what runs inside, again and again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[float | torch.cuda.Event] = []

    def hold(self) -> None:
        """Have a GPU sleep for the time in which the host launches the kernels of a layer."""
        if self.device.type == "cuda":
            torch.cuda._sleep(_HELD_CYCLES)  # type: ignore[no-untyped-call]

    def __enter__(self) -> None:
        self._marks.append(self._now())

    def __exit__(self, *exception: object) -> None:
        self._marks.append(self._now())

    def _now(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return time.perf_counter()
        event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, num_columns: int) -> list[list[float]]:
        """Seconds of timings in turns of `num_columns`, by column, in order."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        spans = [_elapsed_s(start, end) for start, end in zip(self._marks[::2], self._marks[1::2], strict=True)]
        return [spans[column::num_columns] for column in range(num_columns)]


def _elapsed_s(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, float):
        assert isinstance(end, float)
        return end - start
    assert not isinstance(end, float)
    elapsed_ms: float = start.elapsed_time(end)
    return elapsed_ms / 1000

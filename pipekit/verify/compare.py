"""Comparison of the recording of a layout with that of one process.

What is allowed follows from what fp32 can tell apart, and is the same rule for every tensor:

- Initial weights follow from the seed and the layer's name, so that next to nothing is allowed.
- An output, or the gradient of one, may be off by `tolerance` times its own norm. Where it is far smaller than what it
  is computed from, what was cancelled on the way sets the limit.
- The gradient of a parameter may be off by `tolerance` times the sum of its own norm and a hundredth of the whole
  gradient's. Some gradients are zero but for rounding, such as those of the keys' biases in attention.
- Weights after an update are not compared with those of one process: Adam makes a full-sized update of a gradient that
  is nothing but rounding errors. They are compared with what the same optimizer makes, in one process, of the gradients
  of the layout (`pipekit.verify.replay`), which have been compared themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from pipekit.verify.measurement import LOSS, TOLERANCE, Measurement, MeasurementKind
from pipekit.verify.recording import Recording, TensorCopy, TensorKey, flat_norm

# Torch draws the same numbers everywhere; what is then made of them, a QR decomposition for instance, may be rounded.
_INITIAL = 1e-5
# From the second step on, weights are no longer the same to the last bit.
_DRIFT = 10.0
# How much smaller than what it is computed from an output may be, before rounding errors set the limit.
_CANCELLED = 1e-3
# The part of the whole gradient's norm that counts as a tensor's own, at the least.
_SHARE_OF_GRADIENT = 1e-2
# Rounding of fp32 weights, over a few updates.
_ROUNDING = 5e-7
# Two tensors are proportional if this little of their norm is not.
_PROPORTIONAL = 1e-3


def compare_recordings(
    found: Recording, expected: Recording, layer_names: Sequence[str], *, tolerance: float = TOLERANCE
) -> Iterator[Measurement]:
    """Compare the recording of a layout with that of one process, in all but the weights after updates."""
    comparison = _Comparison(found, layer_names)
    for key in expected.keys("initial weights"):
        yield comparison.measure(key, expected.load(key), relative=_INITIAL)
    yield from _compare_flow(comparison, expected, tolerance)
    for step in range(len(expected.summaries[0]["losses"])):
        yield _compare_numbers(found, expected, "losses", step, tolerance)
        allowance = tolerance * (_DRIFT if step else 1)
        own = _SHARE_OF_GRADIENT * float(expected.summaries[0]["norms"][step])
        for key in _keys_of_either(found, expected, "gradient", step):
            reference = expected.load(key) if expected.copies(key) else None
            yield comparison.measure(key, reference, relative=allowance, absolute=allowance * own, zero_if_missing=True)
        yield _compare_numbers(found, expected, "norms", step, allowance)


def compare_weights(
    found: Recording,
    key: TensorKey,
    layer_names: Sequence[str],
    *,
    before: Tensor,
    after: Tensor,
    tolerance: float = TOLERANCE,
) -> Measurement:
    """Compare weights after an update with those that the optimizer leaves in one process.

    Args:
        found: of a layout.
        key: of the weights.
        layer_names: logical name of each layer.
        before: the initial weights.
        after: what the optimizer has made of them with the gradients of the layout.
        tolerance: relative to what has changed.
    """
    changed = flat_norm(after.double() - before.double())
    return _Comparison(found, layer_names).measure(
        key, after, relative=_ROUNDING, absolute=tolerance * changed, origin=before
    )


def _compare_flow(comparison: _Comparison, expected: Recording, tolerance: float) -> Iterator[Measurement]:
    """Compare the activations between layers in the first step, and their gradients."""
    found, loss = comparison.found, len(comparison.layer_names)
    kinds: tuple[tuple[MeasurementKind, int], ...] = (("output", -1), ("input gradient", +1))
    for kind, source in kinds:
        for key in _keys_of_either(found, expected, kind, 0):
            known = expected.copies(key)
            # The loss may take what the last layer returns without its ever being one tensor.
            if kind == "input gradient" and key.layer_idx == loss and not (known and found.copies(key)):
                continue
            made_of = replace(key, layer_idx=key.layer_idx + source)
            floor = partial(_cancelled, tolerance, expected, made_of, key)
            yield comparison.measure(key, known[0].load() if known else None, relative=tolerance, floor=floor)


def _keys_of_either(found: Recording, expected: Recording, kind: MeasurementKind, step: int) -> list[TensorKey]:
    return sorted(key for key in {*found.keys(kind), *expected.keys(kind)} if key.step == step)


def _cancelled(tolerance: float, expected: Recording, source: TensorKey, key: TensorKey) -> float:
    """Tolerance of a tensor for the rounding errors of the terms that it is a sum of."""
    if not (expected.copies(source) and expected.copies(key)):
        return 0.0
    tensor = expected.load(source)
    norm = flat_norm(tensor) * math.sqrt(expected.load(key).numel() / max(1, tensor.numel()))
    return tolerance * _CANCELLED * norm


def _compare_numbers(found: Recording, expected: Recording, name: str, step: int, tolerance: float) -> Measurement:
    right = float(expected.summaries[0][name][step])
    values = [
        (abs(float(summary[name][step]) - right), summary["rank"], float(summary[name][step]))
        for summary in found.summaries
    ]
    _, rank, value = max(values, key=lambda entry: math.inf if math.isnan(entry[0]) else entry[0])
    error = abs(value - right) / abs(right) if right and math.isfinite(value) else abs(value - right) and math.inf
    return Measurement(
        kind="loss" if name == "losses" else "gradient norm",
        step=step,
        error=error,
        excess=error / tolerance,
        found=value,
        expected=right,
        ranks=(rank,) if any(difference != values[0][0] for difference, _, _ in values) else (),
        ratio=value / right if right and math.isfinite(value) else None,
    )


class _Comparison:
    """Measures tensors of a layout, in every copy that there is."""

    def __init__(self, found: Recording, layer_names: Sequence[str]) -> None:
        self.found = found
        self.layer_names = layer_names

    def measure(
        self,
        key: TensorKey,
        expected: Tensor | None,
        *,
        relative: float,
        absolute: float = 0.0,
        floor: Callable[[], float] = lambda: 0.0,
        origin: Tensor | None = None,
        zero_if_missing: bool = False,
    ) -> Measurement:
        """Return the difference of the worst copy of a tensor.

        Args:
            key: which tensor.
            expected: the tensor of one process; None where it has none.
            relative: the norm that a difference may have, relative to that of the tensor of one process.
            absolute: the norm that it may have beside.
            floor: returns what it may have in any case; asked only where that is more than is allowed.
            origin: what the tensor was before; the error is relative to the change.
            zero_if_missing: whether a tensor that is not there is zero.
        """
        copies = self.found.copies(key)
        if not copies or expected is None:
            ranks = copies[0].ranks if copies else ()
            if zero_if_missing:
                norm = flat_norm(copies[0].load() if expected is None else expected)
                if norm <= absolute + (0.0 if expected is None else relative * norm):
                    return self._measurement(key, 0.0, 0.0, ranks=ranks)
            note = "is there, and not in one process" if expected is None else "is not there, and is in one process"
            return self._incomparable(key, copies, ranks, note)
        right = expected.double()
        norm = flat_norm(right)
        limit = relative * norm + absolute
        results = []
        for copy in copies:
            tensor = copy.load()
            if tensor.shape != right.shape:
                note = f"is {tuple(tensor.shape)}, and {tuple(right.shape)} in one process"
                return self._incomparable(key, copies, copy.ranks, note)
            difference = flat_norm(tensor.double() - right)
            if not difference <= limit:
                limit = max(limit, floor())
            results.append((math.inf if math.isnan(difference) else difference, copy, tensor))
        off_by, worst, tensor = max(results, key=lambda result: result[0])
        start = torch.zeros_like(right) if origin is None else origin.double()
        error = _over(off_by, flat_norm(right - start))
        base = self._measurement(key, error, _over(off_by, limit), num_copies=len(copies), ranks=worst.ranks)
        if not base.is_fault:
            return base
        wrong = [copy for off, copy, _ in results if not off <= limit]
        tensor = tensor.double()
        distance = (tensor - right).abs().nan_to_num(nan=math.inf)
        furthest = int(distance.argmax())
        return replace(
            base,
            num_wrong=len(wrong),
            ranks=tuple(sorted({rank for copy in wrong for rank in copy.ranks})),
            ratio=proportion(tensor - start, right - start),
            apart=_axes_apart(copies, limit),
            share=float((distance > limit / math.sqrt(max(1, right.numel()))).double().mean()),
            found=float(tensor.flatten()[furthest]),
            expected=float(right.flatten()[furthest]),
        )

    def _measurement(self, key: TensorKey, error: float, excess: float, **facts: Any) -> Measurement:
        layer = [*self.layer_names, LOSS][key.layer_idx]
        place = {"layer_idx": key.layer_idx, "tensor": key.name, "micro_batch": key.micro_batch}
        return Measurement(key.kind, key.step, error, excess, layer, **{**place, **facts})

    def _incomparable(
        self, key: TensorKey, copies: Sequence[TensorCopy], ranks: tuple[int, ...], note: str
    ) -> Measurement:
        wrong = len(copies)
        return self._measurement(key, math.inf, math.inf, num_copies=wrong, num_wrong=wrong, ranks=ranks, note=note)


def proportion(found: Tensor, expected: Tensor) -> float | None:
    """Factor by which `expected` must be multiplied to be `found`, or None if there is none.

    Example:
        >>> import torch
        >>> proportion(torch.tensor([2.0, 4.0]), torch.tensor([1.0, 2.0]))
        2.0
        >>> proportion(torch.tensor([2.0, -4.0]), torch.tensor([1.0, 2.0])) is None
        True
    """
    wrong, right = found.double().flatten(), expected.double().flatten()
    square = float(right @ right)
    if square == 0 or not bool(wrong.isfinite().all()):
        return None
    ratio = float(wrong @ right) / square
    return ratio if flat_norm(wrong - ratio * right) <= _PROPORTIONAL * flat_norm(wrong) else None


def _axes_apart(copies: Sequence[TensorCopy], limit: float) -> tuple[str, ...]:
    """Return the axes along which copies differ by more than is allowed."""
    axes: dict[str, None] = {}
    for one, other in combinations(copies, 2):
        places = vars(one.coordinate), vars(other.coordinate)
        differing = [axis for axis in places[0] if places[0][axis] != places[1][axis]]
        if len(differing) != 1 or differing[0] in axes:
            continue
        if not flat_norm(one.load().double() - other.load().double()) <= limit:
            axes[differing[0]] = None
    return tuple(axes)


def _over(difference: float, norm: float) -> float:
    if difference == 0:
        return 0.0
    return difference / norm if norm > 0 else math.inf

"""Cost tracing: operations of a layer's forward and backward, and the tensors kept between, by running it once.

On the meta device nothing is computed and nothing allocated. Two functions are replaced, there and everywhere, as they
are on a GPU: attention by a fused one, which keeps no `(S, S)` matrix, and dropout by one that keeps its mask as
bool.

Shapes: B sequences, H heads, S queries, T keys, E head size, G head size of the values.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import flop_registry

from pipekit.layers.shapes import ShapeRules
from pipekit.predictions.layer_costs import LayerCosts
from pipekit.tensors.meta import NestedMeta
from pipekit.tensors.nested import Structure, flatten, unflatten


@dataclass(frozen=True)
class TracedLayer:
    """Costs of a layer, and the shapes and types of its outputs."""

    costs: LayerCosts
    outputs: NestedMeta


def trace_costs(
    call: Callable[[Any], Any],
    inputs: Sequence[Tensor],
    structure: Structure,
    *,
    parameters: Sequence[Tensor] = (),
    held: Sequence[Tensor] = (),
) -> TracedLayer:
    """Trace the costs of a layer's forward and backward.

    Operations are those of matrix products, convolutions and attention, as `torch.utils.flop_counter` counts them: a
    multiplication and an addition are two, causal attention counts in full, and so does the product of queries and keys
    that a fused attention makes again in its backward.

    Args:
        call: the layer; it is given the nested inputs.
        inputs: the input tensors; those that require a gradient get one.
        structure: their nesting.
        parameters: the trainable ones of the layer.
        held: tensors that exist whether or not the layer runs: its buffers, and parameters that are not trained.

    Raises:
        PipekitError: if the layer returns what cannot be passed on.
        Exception: whatever the layer raises.
    """
    counter = _Counter()
    # A layer may change its input in place, which a leaf that requires a gradient does not allow.
    entered = [tensor.clone() if tensor.requires_grad else tensor for tensor in inputs]
    with counter, _Replacements(counter), _saved() as saved:
        outputs, output_structure = flatten(call(unflatten(entered, structure)), "its output")
        forward_flops = counter.flops
    wanted = [tensor for tensor in entered if tensor.requires_grad]
    results = [tensor for tensor in outputs if tensor.requires_grad]

    input_storages, output_storages = _storages(entered), _storages(outputs)
    kept = _storages([piece.tensor for piece in saved])
    for storage in _storages([*parameters, *held]):
        kept.pop(storage, None)
    kept_of_input = sum(kept.pop(storage, 0) for storage in input_storages)
    kept_of_output = sum(kept.pop(storage, 0) for storage in output_storages)
    # Of several tensors that enter, the backward may keep a small one alone, such as a mask.
    keeps_input = 2 * kept_of_input > sum(input_storages.values())
    keeps_output = 2 * kept_of_output > sum(output_storages.values())

    input_gradient_flops = _backward_flops(counter, results, wanted, retain_graph=True)
    backward_flops = _backward_flops(counter, results, [*wanted, *parameters], retain_graph=False)
    passed, left = (NestedMeta.of(value, "a layer's tensors") for value in (tuple(entered), tuple(outputs)))
    costs = LayerCosts(
        parameters=sum(parameter.numel() for parameter in parameters),
        forward_flops=forward_flops,
        input_gradient_flops=input_gradient_flops,
        weight_gradient_flops=backward_flops - input_gradient_flops,
        input_bytes=passed.num_bytes,
        output_bytes=left.num_bytes,
        saved_bytes=sum(kept.values())
        + (0 if keeps_input else kept_of_input)
        + (0 if keeps_output else kept_of_output),
        keeps_input=keeps_input,
        keeps_output=keeps_output,
    )
    return TracedLayer(costs, NestedMeta(left.tensors, output_structure))


def _backward_flops(
    counter: _Counter, results: Sequence[Tensor], wanted: Sequence[Tensor], *, retain_graph: bool
) -> int:
    if not results or not wanted:
        return 0
    before = counter.flops
    # What is recomputed in the backward is computed as in the forward.
    with counter, _Replacements(counter):
        total: Tensor = _Total.apply(*results)  # type: ignore[no-untyped-call]
        _grad(total, wanted, retain_graph=retain_graph, allow_unused=True)
    return counter.flops - before


class _Total(torch.autograd.Function):
    """One number that depends on all results; gradients of several tensors make torch import its compiler."""

    @staticmethod
    def forward(ctx: Any, *results: Tensor) -> Tensor:
        ctx.results = [torch.empty_like(result) for result in results]
        return results[0].new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(ctx.results)


def _storages(tensors: Sequence[Tensor]) -> dict[int, int]:
    """Bytes of each distinct storage, which the tensors keep alive, by its address."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage.nbytes() for storage in storages}


class _Saved:
    """A tensor that a backward keeps."""

    def __init__(self, tensor: Tensor) -> None:
        # A function that keeps its own result would hold itself.
        self.tensor = tensor.detach()


@contextmanager
def _saved() -> Iterator[weakref.WeakSet[_Saved]]:
    """Collect the tensors that the forward inside keeps; those of a branch without a result are gone when it ends."""
    saved: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        piece = _Saved(tensor)
        saved.add(piece)
        return piece

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda piece: piece.tensor):
        yield saved


class _Counter(ShapeRules):  # type: ignore[no-untyped-call]
    """Counts floating-point operations by torch's formulas, in tensors whose shapes come from our rules."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        results = super().__torch_dispatch__(func, types, args, kwargs)
        self.flops += count_flops(func, args, kwargs or {}, results)
        return results


def count_flops(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], results: Any) -> int:
    """Return the floating-point operations of an operator of torch: 0 for those that are no product.

    Args:
        func: the operator, as a `TorchDispatchMode` is given it.
        args: its arguments by position.
        kwargs: its arguments by name.
        results: what it returned.
    """
    packet = func.overloadpacket
    if packet is _aten.convolution_backward:
        return _convolution_backward(*args)
    count = flop_registry.get(_ALIKE.get(packet, packet))
    return 0 if count is None else int(count(*args, **kwargs, out_val=results))


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *args: Any) -> int:
    """Operations of a convolution's gradients; torch's formula counts the weight gradient once for each group."""
    transposed, mask = args[4], args[7]
    return 2 * (x if transposed else grad).numel() * prod(weight.shape[1:]) * (bool(mask[0]) + bool(mask[1]))


_aten = torch.ops.aten
_ALIKE = {
    _aten.addmm_: _aten.addmm,
    _aten.baddbmm_: _aten.baddbmm,
    _aten._scaled_dot_product_flash_attention_for_cpu: _aten._scaled_dot_product_flash_attention,
}


class _FusedAttention(torch.autograd.Function):
    """Counts the operations and keeps the tensors of a fused attention, and computes zeros.

    Source: Dao 2023, "FlashAttention-2", section 3.1, for the tensors kept and the five products of the backward.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, counter: _Counter) -> Tensor:
        *batch, num_queries, size = query.shape
        num_keys, value_size = value.shape[-2:]
        pairs = prod(batch) * num_queries * num_keys  # B H S T
        counter.flops += 2 * pairs * (size + value_size)
        ctx.backward_flops = 2 * pairs * (3 * size + 2 * value_size)
        ctx.counter = counter
        # As the kernels lay it out, so that joining the heads copies nothing: (B, S, H, G) seen as (B, H, S, G).
        *outer, num_heads = batch or [1]
        output = query.new_zeros((*outer, num_queries, num_heads, value_size)).transpose(-3, -2)
        output = output if batch else output.squeeze(0)
        sums = query.new_zeros(query.shape[:-1], dtype=torch.float32)  # (B, H, S)
        ctx.save_for_backward(query, key, value, output, sums, mask)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, _, _, mask = ctx.saved_tensors
        ctx.counter.flops += ctx.backward_flops
        gradients = [torch.zeros_like(tensor) for tensor in (query, key, value)]
        return *gradients, torch.zeros_like(mask) if ctx.needs_input_grad[3] else None, None


class _Replacements(TorchFunctionMode):
    """Replaces attention and dropout by their kernels for GPUs."""

    def __init__(self, counter: _Counter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is F.dropout or func is torch.dropout:
            return _dropout(func, *args, **kwargs)
        if func is F.multi_head_attention_forward:
            with self:
                return _multi_head_attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        return _FusedAttention.apply(query, key, value, attn_mask, self._counter)  # type: ignore[no-untyped-call]


def _dropout(
    func: Any, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, **kwargs: Any
) -> Any:
    # torch.dropout calls its last argument `train`.
    if not kwargs.get("train", training) or not 0 < p < 1:
        return input
    return torch.native_dropout(input, p, True)[0]


def _asking_no_mode(function: Callable[..., Any], names: Mapping[str, Any]) -> Callable[..., Any]:
    """Function of a module with these names, whose inner functions modes are asked about.

    A mode that handles a function is not asked about the functions inside it, unless the first asks no mode at all.
    """
    assert isinstance(function, FunctionType)
    names = {**names, "has_torch_function": lambda tensors: False}
    return FunctionType(function.__code__, names, argdefs=function.__defaults__)


_multi_head_attention = _asking_no_mode(F.multi_head_attention_forward, F.__dict__)
_grad = _asking_no_mode(torch.autograd.grad, torch.autograd.__dict__)

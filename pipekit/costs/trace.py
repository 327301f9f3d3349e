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
from functools import partial
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
from pipekit.predictions.kernels import Attention, LayerWork, Product, Work
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
    is_sharded: bool = False,
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
        is_sharded: whether tensor-parallel ranks hold shards of its inputs in any case, as of the scores of a loss.

    Raises:
        PipekitError: if the layer returns what cannot be passed on.
        Exception: whatever the layer raises.
    """
    counter = _Counter(0 if is_sharded else sum(tensor.numel() for tensor in inputs))
    # A layer may change its input in place, which a leaf that requires a gradient does not allow.
    entered = [tensor.clone() if tensor.requires_grad else tensor for tensor in inputs]
    with counter, _Replacements(counter), _saved(counter.mark) as saved:
        outputs, output_structure = flatten(call(unflatten(entered, structure)), "its output")
    recomputed, forward = counter.marked, counter.take()
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

    input_gradient = _trace_backward(counter, results, wanted, retain_graph=True)
    backward = _trace_backward(counter, results, [*wanted, *parameters], retain_graph=False)
    passed, left = (NestedMeta.of(value, "a layer's tensors") for value in (tuple(entered), tuple(outputs)))
    costs = LayerCosts(
        parameters=sum(parameter.numel() for parameter in parameters),
        forward_flops=forward.flops,
        input_gradient_flops=input_gradient.flops,
        weight_gradient_flops=backward.flops - input_gradient.flops,
        input_bytes=passed.num_bytes,
        output_bytes=left.num_bytes,
        saved_bytes=sum(kept.values())
        + (0 if keeps_input else kept_of_input)
        + (0 if keeps_output else kept_of_output),
        keeps_input=keeps_input,
        keeps_output=keeps_output,
        work=LayerWork(forward.work, input_gradient.work, backward.work - input_gradient.work, recomputed),
    )
    return TracedLayer(costs, NestedMeta(left.tensors, output_structure))


def _trace_backward(
    counter: _Counter, results: Sequence[Tensor], wanted: Sequence[Tensor], *, retain_graph: bool
) -> _Counted:
    if results and wanted:
        # What is recomputed in the backward is computed as in the forward.
        with counter, _Replacements(counter):
            total: Tensor = _Total.apply(*results)  # type: ignore[no-untyped-call]
            _grad(total, wanted, retain_graph=retain_graph, allow_unused=True)
    return counter.take()


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
def _saved(mark: Callable[[], None]) -> Iterator[weakref.WeakSet[_Saved]]:
    """Collect the tensors that the forward inside keeps; those of a branch without a result are gone when it ends.

    `mark` is called with each, before what keeps its input computes its output.
    """
    saved: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        piece = _Saved(tensor)
        saved.add(piece)
        mark()
        return piece

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda piece: piece.tensor):
        yield saved


@dataclass(frozen=True)
class _Counted:
    """Operations and kernels of one pass over a layer."""

    flops: int
    work: Work


class _Counter(ShapeRules):  # type: ignore[no-untyped-call]
    """Counts floating-point operations by torch's formulas, in tensors whose shapes come from our rules, and kernels.

    Args:
        width: elements of the layer's input, which without sequence parallelism is whole on all tensor-parallel ranks.
            So are tensors no larger than it before the first product of a pass and behind the last; between the
            products ranks have shards.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self._width = width
        self._restart()

    def _restart(self) -> None:
        self._flops = self._other_flops = 0
        self._moved_bytes = self._num_kernels = 0
        # Before the first product, and behind the last so far.
        self._first_bytes = self._last_bytes = 0
        self._products: list[Product] = []
        self._attentions: list[Attention] = []
        self.marked = Work()

    def mark(self) -> None:
        """Note the kernels so far as `marked`."""
        products, attentions = tuple(self._products), tuple(self._attentions)
        counted = (self._other_flops, self._moved_bytes, self._first_bytes + self._last_bytes, self._num_kernels)
        self.marked = Work(products, attentions, *counted)

    def take(self) -> _Counted:
        """Operations and kernels since the last call."""
        self.mark()
        taken = _Counted(self._flops, self.marked)
        self._restart()
        return taken

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        results = super().__torch_dispatch__(func, types, args, kwargs)
        flops = count_flops(func, args, kwargs or {}, results)
        self._flops += flops
        product = _find_product(func, args, results) if flops else None
        if product is not None:
            self._products.append(product)
            self._last_bytes = 0
        else:
            self._other_flops += flops
            self._count_bytes(func, args, results)
        return results

    def count_attention(self, flops: int, length: int, is_causal: bool) -> None:
        """Count a fused attention."""
        self._flops += flops
        self._attentions.append(Attention(flops, length, is_causal))

    def _count_bytes(self, func: Any, args: tuple[Any, ...], results: Any) -> None:
        """Count the bytes that a kernel reads and writes; views and empty tensors take none."""
        name = func.overloadpacket.__name__
        if func.is_view or name in _FREE:
            return
        read, written = ([each for each in _flat(values) if isinstance(each, Tensor)] for values in (args, (results,)))
        if name in _GATHERING:
            read = written
        if name in _FILLING:
            read = []
            if all(each.numel() == 1 for each in written):
                return
        sizes = [min(each.numel() * each.element_size(), each.untyped_storage().nbytes()) for each in (*read, *written)]
        moved = sum(sizes)
        self._num_kernels += 1
        self._moved_bytes += moved
        if all(each.numel() <= self._width for each in (*read, *written)):
            if self._products:
                self._last_bytes += moved
            else:
                self._first_bytes += moved


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def _find_product(func: Any, args: tuple[Any, ...], results: Any) -> Product | None:
    """Shape of a matrix product; None for anything else."""
    operands = _OPERANDS.get(func.overloadpacket)
    if operands is None:
        return None
    a = args[operands]
    batch, m, k = a.shape if a.dim() == 3 else (1, *a.shape)
    return Product(batch, m, results.shape[-1], k)


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
# The first operand of each kind of product, by its place.
_OPERANDS = {
    _aten.mm: 0, _aten.bmm: 0, _aten.addmm: 1, _aten.addmm_: 1, _aten.baddbmm: 1, _aten.baddbmm_: 1
}  # fmt: skip
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "_reshape_alias", "alias", "lift_fresh"}
# These only write.
_FILLING = {"new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like", "zeros", "ones", "full"}
# These read as much as they write, of tensors that may be larger.
_GATHERING = {"embedding", "gather", "index_select", "nll_loss_forward"}
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
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, counter: _Counter
    ) -> Tensor:
        *batch, num_queries, size = query.shape
        num_keys, value_size = value.shape[-2:]
        pairs = prod(batch) * num_queries * num_keys  # B H S T
        counter.count_attention(2 * pairs * (size + value_size), num_keys, is_causal)
        ctx.count_backward = partial(
            counter.count_attention, 2 * pairs * (3 * size + 2 * value_size), num_keys, is_causal
        )
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
        ctx.count_backward()
        gradients = [torch.zeros_like(tensor) for tensor in (query, key, value)]
        return *gradients, torch.zeros_like(mask) if ctx.needs_input_grad[3] else None, None, None


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
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> Any:
        apply: Any = _FusedAttention.apply
        return apply(query, key, value, attn_mask, is_causal, self._counter)


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

"""Linear layers and embeddings that are sharded over a tensor group.

Each layer is built whole, like its torch counterpart, and is sharded by `shard_layer` when the group is known. So
initial weights do not depend on the layout, and with tp=1 the layer computes the same as the torch layer.

Source: Shoeybi et al. 2019, "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipekit.errors import ConfigError, DataError, LayoutError
from pipekit.tensor_parallel.collectives import (
    SEQUENCE_DIM,
    copy_to_shards,
    gather_sequence_for_shards,
    reduce_scatter_sequence,
    sum_partials,
)
from pipekit.tensor_parallel.group import Pending, TensorGroup
from pipekit.tensor_parallel.shards import Shard, mark_partial_gradient, shard_bounds, shard_parameter
from pipekit.tensors.weight_gradients import OuterProduct, SumOverRows, autocasts, defer_weight_gradient, is_deferred


class TensorParallelModule(nn.Module):
    """A module whose parameters are sharded over a tensor group.

    Attributes:
        group: the tensor-parallel peers; None if the module is whole.
        sequence_parallel: True if each rank holds only its shard of the sequence of the module's whole activations.
    """

    group: TensorGroup | None = None
    sequence_parallel: bool = False

    def shard(self, group: TensorGroup, *, sequence_parallel: bool) -> None:
        """Keep this rank's shard of every parameter. Called once, after the layer that contains it is built.

        Raises:
            LayoutError: if a rank would get an empty shard.
        """
        self.group, self.sequence_parallel = group, sequence_parallel

    def sum_outputs(self, partial: Tensor) -> Tensor:
        """Sum the ranks' partial outputs; under sequence parallelism, return this rank's shard of the sum."""
        return (reduce_scatter_sequence if self.sequence_parallel else sum_partials)(partial, self.group)


class ColumnParallelLinear(TensorParallelModule, nn.Linear):
    """Linear layer whose outputs are sharded over the ranks: `(..., I)` to `(..., O / tp)`.

    Summing the input gradient over the group overlaps with the computation of the weight gradient.

    Args:
        in_features: I.
        out_features: O.
        bias: whether there is a bias.
        blocks: lengths of the blocks of outputs, each of which is sharded separately; by default one block.

    Raises:
        ConfigError: if the blocks do not add up to `out_features`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        blocks: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.blocks = (out_features,) if blocks is None else tuple(blocks)
        if sum(self.blocks) != out_features:
            raise ConfigError(
                f"ColumnParallelLinear: blocks={list(self.blocks)} are {sum(self.blocks)} outputs in all, and "
                f"out_features={out_features}; make both the same"
            )

    def shard(self, group: TensorGroup, *, sequence_parallel: bool) -> None:
        super().shard(group, sequence_parallel=sequence_parallel)
        shard = Shard(0, self.blocks, group.rank, group.size)
        shard_parameter(self, "weight", shard)
        if self.bias is not None:
            shard_parameter(self, "bias", shard)

    @property
    def own_blocks(self) -> tuple[int, ...]:
        """Number of outputs of each block that this rank computes."""
        if self.group is None:
            return self.blocks
        bounds = [shard_bounds(length, self.group.rank, self.group.size) for length in self.blocks]
        return tuple(last - first for first, last in bounds)

    def forward(self, x: Tensor) -> Tensor:
        if self.group is None:
            return F.linear(x, self.weight, self.bias)
        return column_parallel_linear(x, self.weight, self.bias, self.group, sequence_parallel=self.sequence_parallel)


class RowParallelLinear(TensorParallelModule, nn.Linear):
    """Linear layer whose inputs are sharded over the ranks: `(..., I / tp)` to `(..., O)`.

    The results are summed over the group; the bias is added to the sum.
    """

    def shard(self, group: TensorGroup, *, sequence_parallel: bool) -> None:
        super().shard(group, sequence_parallel=sequence_parallel)
        shard_parameter(self, "weight", Shard(1, (self.in_features,), group.rank, group.size))

    def forward(self, x: Tensor) -> Tensor:
        if self.group is None:
            return F.linear(x, self.weight, self.bias)
        partial = F.linear(x, self.weight)
        y = self.sum_outputs(partial)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class VocabularyParallelModule(TensorParallelModule):
    """Base class of embeddings and heads, whose weight has one row per token; each rank holds some of the rows.

    Its `weight` is `(V, D)`.

    Args:
        vocab_size: V; it need not be a multiple of the tensor-parallel degree.
        hidden_size: D.
        init_std: standard deviation of the initial weights.
    """

    def __init__(self, vocab_size: int, hidden_size: int, *, init_std: float = 1.0) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        nn.init.normal_(self.weight, std=init_std)

    def shard(self, group: TensorGroup, *, sequence_parallel: bool) -> None:
        super().shard(group, sequence_parallel=sequence_parallel)
        shard_parameter(self, "weight", Shard(0, (self.vocab_size,), group.rank, group.size))


class VocabularyParallelEmbedding(VocabularyParallelModule):
    """Embedding of token ids, sharded over the vocabulary: `(B, S)` int64 to `(B, S, D)`."""

    def forward(self, token_ids: Tensor) -> Tensor:
        if self.group is None:
            return F.embedding(token_ids, self.weight)
        if token_ids.device.type == "cpu" and token_ids.numel():
            lowest, highest = (int(bound) for bound in token_ids.aminmax())
            if lowest < 0 or highest >= self.vocab_size:
                raise DataError(
                    f"token ids from {lowest} to {highest}, and the embedding has {self.vocab_size} rows; prepare the "
                    "data with the model's tokenizer, or raise model.vocab_size"
                )
        first, end = shard_bounds(self.vocab_size, self.group.rank, self.group.size)
        elsewhere = (token_ids < first) | (token_ids >= end)
        found = F.embedding((token_ids - first).masked_fill(elsewhere, 0), self.weight)
        return self.sum_outputs(found.masked_fill(elsewhere.unsqueeze(-1), 0))


class KeyValueLinear(ColumnParallelLinear):
    """Linear layer for keys and values of grouped-query attention, sharded by heads of E outputs each.

    If there are fewer heads than ranks, each rank keeps the whole projection, and computes the one head that its
    queries attend to.

    Args:
        in_features: I.
        num_kv_heads: K; a multiple or a divisor of the tensor-parallel degree.
        head_size: E. The 2 x K x E outputs are the keys of all heads, then the values of all heads.
        bias: whether there is a bias.
    """

    def __init__(self, in_features: int, num_kv_heads: int, head_size: int, *, bias: bool = True) -> None:
        width = num_kv_heads * head_size
        super().__init__(in_features, 2 * width, bias, blocks=(width, width))
        self.num_kv_heads = num_kv_heads
        self.head_size = head_size
        self._own_rows: list[slice] | None = None

    def shard(self, group: TensorGroup, *, sequence_parallel: bool) -> None:
        if self.num_kv_heads % group.size == 0:
            super().shard(group, sequence_parallel=sequence_parallel)
            return
        if group.size % self.num_kv_heads:
            raise LayoutError(
                f"parallel.tp={group.size} and {self.num_kv_heads} key-value heads do not fit: one must divide the "
                f"other; try parallel.tp={math.gcd(group.size, self.num_kv_heads)}"
            )
        TensorParallelModule.shard(self, group, sequence_parallel=sequence_parallel)
        first, width = group.rank * self.num_kv_heads // group.size * self.head_size, self.blocks[0]
        self._own_rows = [slice(start, start + self.head_size) for start in (first, width + first)]
        for parameter in self.parameters(recurse=False):
            mark_partial_gradient(parameter)

    @property
    def own_blocks(self) -> tuple[int, ...]:
        return super().own_blocks if self._own_rows is None else (self.head_size,) * 2

    def own(self) -> tuple[Tensor, Tensor | None]:
        """Return the weight and the bias of the outputs that this rank computes."""
        if self._own_rows is None:
            return self.weight, self.bias
        weight = torch.cat([self.weight[rows] for rows in self._own_rows])
        return weight, None if self.bias is None else torch.cat([self.bias[rows] for rows in self._own_rows])

    def forward(self, x: Tensor) -> Tensor:
        return column_parallel_linear(x, *self.own(), self.group, sequence_parallel=self.sequence_parallel)


def column_parallel_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, group: TensorGroup | None, *, sequence_parallel: bool = False
) -> Tensor:
    """Return this rank's outputs `(..., O / tp)` of a linear layer; without a group, `F.linear`.

    Args:
        x: `(..., I)`; with `sequence_parallel` this rank's shard of the sequence, `(B, S / tp, I)`.
        weight: `(O / tp, I)`, and the bias `(O / tp)`.
    """
    if group is None:
        return F.linear(x, weight, bias)
    (output,) = column_parallel_linears(x, [(weight, bias)], group, sequence_parallel=sequence_parallel)
    return output


def column_parallel_linears(
    x: Tensor,
    layers: Sequence[tuple[Tensor, Tensor | None]],
    group: TensorGroup | None,
    *,
    sequence_parallel: bool = False,
) -> tuple[Tensor, ...]:
    """Return this rank's outputs of several linear layers, given the weight and the bias of each.

    Their common input, as in `column_parallel_linear`, is gathered only once, and so its gradient is summed once.
    """
    if group is not None and not autocasts(x):
        flat = [tensor for layer in layers for tensor in layer]
        outputs: tuple[Tensor, ...] = _ColumnLinears.apply(x, group, sequence_parallel, *flat)  # type: ignore[no-untyped-call]
        return outputs
    x = gather_sequence_for_shards(x, group) if sequence_parallel else copy_to_shards(x, group)
    return tuple(F.linear(x, weight, bias) for weight, bias in layers)


class _ColumnLinears(torch.autograd.Function):
    """Gathers the sequence, where it is sharded, and computes this rank's outputs.

    Only the shard is kept for the backward, which gathers the sequence again behind the computation of the input's
    gradient; that gradient is summed behind the computation of the weights'.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: TensorGroup, sequence_parallel: bool, *layers: Tensor | None
    ) -> tuple[Tensor, ...]:
        weights, biases = layers[0::2], layers[1::2]
        # The inputs are for the gradients of the weights alone.
        ctx.save_for_backward(x if any(ctx.needs_input_grad[3::2]) else None)
        ctx.weights, ctx.biases, ctx.group, ctx.sequence_parallel = weights, biases, group, sequence_parallel
        whole = group.all_gather(x, SEQUENCE_DIM) if sequence_parallel else x
        return tuple(
            F.linear(whole, weight, bias) for weight, bias in zip(weights, biases, strict=True) if weight is not None
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), weights, biases, group = ctx.saved_tensors, ctx.weights, ctx.biases, ctx.group
        # In the order of the forward's arguments, in which weights and biases take turns.
        needs_input, _, _, *needs_layers = ctx.needs_input_grad
        needs_weight, needs_bias = needs_layers[0::2], needs_layers[1::2]
        inputs = _Inputs(x, group if ctx.sequence_parallel else None)
        if any(needed and not is_deferred(weight) for needed, weight in zip(needs_weight, weights, strict=True)):
            inputs.start()
        summing = None
        if needs_input:
            partial = grads[0].matmul(weights[0])
            for grad, weight in zip(grads[1:], weights[1:], strict=True):
                partial += grad.matmul(weight)
            if ctx.sequence_parallel:
                summing = group.start_reduce_scatter(partial, SEQUENCE_DIM)
            else:
                summing = group.start_all_reduce(partial)
        gradients: list[Tensor | None] = []
        for index, grad in enumerate(grads):
            weight, bias = weights[index], biases[index]
            gradients += [
                defer_weight_gradient(weight, OuterProduct(grad, inputs.get)) if needs_weight[index] else None,
                defer_weight_gradient(bias, SumOverRows(grad)) if needs_bias[index] else None,
            ]
        return None if summing is None else summing.wait(), None, None, *gradients


class _Inputs:
    """Inputs of linear layers in their backward: whole where `group` is None, else gathered when they are needed."""

    def __init__(self, x: Tensor, group: TensorGroup | None) -> None:
        self._x, self._group = x, group
        self._pending: Pending | None = None
        self._whole: Tensor | None = None

    def start(self) -> None:
        if self._group is not None:
            self._pending = self._group.start_all_gather(self._x, SEQUENCE_DIM)

    def get(self) -> Tensor:
        if self._group is None:
            return self._x
        if self._whole is None:
            self._whole = (self._pending or self._group.start_all_gather(self._x, SEQUENCE_DIM)).wait()
        return self._whole

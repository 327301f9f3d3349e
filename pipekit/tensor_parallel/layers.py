"""Linear layers and embeddings that a tensor group shares out.

Each is built whole, like the torch layer that it is, and cut by `shard_layer` when the group is known: initial weights
do not depend on the layout, and with tp=1 it is the torch layer.

Source: Shoeybi et al. 2019, "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipekit.errors import ConfigError
from pipekit.tensor_parallel.collectives import (
    SEQUENCE_DIM,
    copy_to_parts,
    gather_sequence_for_parts,
    sum_parts,
    sum_parts_to_sequence,
)
from pipekit.tensor_parallel.group import TensorGroup
from pipekit.tensor_parallel.shards import Shard, cut_parameter
from pipekit.weight_gradients import OuterProduct, SumOverRows, defer_weight_gradient, is_deferred


class TensorParallelModule(nn.Module):
    """A module whose parameters a tensor group shares out.

    Attributes:
        group: the tensor-parallel peers; None where the module is whole.
        in_parts: whether its whole activations are held as each rank's part of the sequence.
    """

    group: TensorGroup | None = None
    in_parts: bool = False

    def shard(self, group: TensorGroup, *, in_parts: bool) -> None:
        """Keep this rank's part of every parameter. Called once, when the layer that it is in has been built.

        Args:
            group: the tensor-parallel peers.
            in_parts: whether activations outside are this rank's part of the sequence.

        Raises:
            LayoutError: if there is not enough to share out.
        """
        self.group, self.in_parts = group, in_parts


class ColumnParallelLinear(TensorParallelModule, nn.Linear):
    """A linear layer of which each rank computes some of the outputs: `(..., I)` to `(..., O / tp)`.

    The gradient of its input is summed over the group behind the computation of the weight's.

    Args:
        in_features: I.
        out_features: O.
        bias: whether there is one.
        blocks: lengths of the blocks that the outputs consist of, each of which is shared out by itself; one unless
            given.

    Raises:
        ConfigError: if the blocks are not `out_features` in all.
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

    def shard(self, group: TensorGroup, *, in_parts: bool) -> None:
        super().shard(group, in_parts=in_parts)
        shard = Shard(0, self.blocks, group.rank, group.size)
        cut_parameter(self, "weight", shard)
        if self.bias is not None:
            cut_parameter(self, "bias", shard)

    def forward(self, x: Tensor) -> Tensor:
        return column_parallel_linear(x, self.weight, self.bias, self.group, in_parts=self.in_parts)


class RowParallelLinear(TensorParallelModule, nn.Linear):
    """A linear layer of which each rank has some of the inputs: `(..., I / tp)` to `(..., O)`.

    The results are summed over the group; the bias is added to the sum.
    """

    def shard(self, group: TensorGroup, *, in_parts: bool) -> None:
        super().shard(group, in_parts=in_parts)
        cut_parameter(self, "weight", Shard(1, (self.in_features,), group.rank, group.size))

    def forward(self, x: Tensor) -> Tensor:
        if self.group is None:
            return F.linear(x, self.weight, self.bias)
        partial = F.linear(x, self.weight)
        y = sum_parts_to_sequence(partial, self.group) if self.in_parts else sum_parts(partial, self.group)
        return y if self.bias is None else y + self.bias


class VocabularyParallelEmbedding(TensorParallelModule):
    """Looks token ids up, of which each rank holds some rows: `(B, S)` int64 to `(B, S, D)`.

    Args:
        vocab_size: V; need not be a multiple of the tensor-parallel degree.
        hidden_size: D.
        init_std: standard deviation of the initial weights `(V, D)`.
    """

    def __init__(self, vocab_size: int, hidden_size: int, *, init_std: float = 1.0) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        nn.init.normal_(self.weight, std=init_std)

    def shard(self, group: TensorGroup, *, in_parts: bool) -> None:
        super().shard(group, in_parts=in_parts)
        cut_parameter(self, "weight", Shard(0, (self.vocab_size,), group.rank, group.size))

    def forward(self, token_ids: Tensor) -> Tensor:
        if self.group is None:
            return F.embedding(token_ids, self.weight)
        (rows,) = Shard(0, (self.vocab_size,), self.group.rank, self.group.size).slices
        elsewhere = (token_ids < rows.start) | (token_ids >= rows.stop)
        found = F.embedding((token_ids - rows.start).masked_fill(elsewhere, 0), self.weight)
        partial = found.masked_fill(elsewhere.unsqueeze(-1), 0)
        return sum_parts_to_sequence(partial, self.group) if self.in_parts else sum_parts(partial, self.group)


def column_parallel_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, group: TensorGroup | None, *, in_parts: bool = False
) -> Tensor:
    """Return this rank's outputs `(..., O / tp)` of a linear layer.

    Args:
        x: `(..., I)`; with `in_parts` this rank's part of the sequence, `(B, S / tp, I)`.
        weight: `(O / tp, I)`.
        bias: `(O / tp)`.
        group: the tensor-parallel peers; None computes `F.linear`.
        in_parts: whether `x` is a part of the sequence.
    """
    if group is None:
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled(x.device.type):
        x = gather_sequence_for_parts(x, group) if in_parts else copy_to_parts(x, group)
        return F.linear(x, weight, bias)
    output: Tensor = _ColumnLinear.apply(x, weight, bias, group, in_parts)  # type: ignore[no-untyped-call]
    return output


class _ColumnLinear(torch.autograd.Function):
    """Joins the sequence, where it comes in parts, and computes some outputs.

    Only the part is kept for the backward, which joins it again behind the computation of the input's gradient; that
    gradient is summed behind the computation of the weight's.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: TensorGroup, in_parts: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias, ctx.group, ctx.in_parts = weight, bias, group, in_parts
        return F.linear(group.all_gather(x, SEQUENCE_DIM) if in_parts else x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,), weight, bias, group = ctx.saved_tensors, ctx.weight, ctx.bias, ctx.group
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        inputs = None
        if needs_weight:
            inputs = _Gathered(x, group) if ctx.in_parts else _Whole(x)
            if not is_deferred(weight):
                inputs.start()
        summing = None
        if needs_input:
            partial = grad.matmul(weight)
            start = group.start_reduce_scatter if ctx.in_parts else group.start_all_reduce
            summing = start(partial, SEQUENCE_DIM) if ctx.in_parts else start(partial)
        weight_gradient = bias_gradient = None
        if inputs is not None:
            weight_gradient = defer_weight_gradient(weight, OuterProduct(grad, inputs.wait))
        if needs_bias:
            bias_gradient = defer_weight_gradient(bias, SumOverRows(grad))
        return None if summing is None else summing.wait(), weight_gradient, bias_gradient, None, None


class _Whole:
    """The inputs of a linear layer, as they are."""

    def __init__(self, x: Tensor) -> None:
        self._x = x

    def start(self) -> None:
        """There is nothing to wait for."""

    def wait(self) -> Tensor:
        return self._x


class _Gathered:
    """The inputs of a linear layer, of which this rank has a part of the sequence."""

    def __init__(self, x: Tensor, group: TensorGroup) -> None:
        self._x = x
        self._group = group
        self._pending = None

    def start(self) -> None:
        self._pending = self._group.start_all_gather(self._x, SEQUENCE_DIM)  # type: ignore[assignment]

    def wait(self) -> Tensor:
        pending, self._pending = self._pending, None
        return (pending or self._group.start_all_gather(self._x, SEQUENCE_DIM)).wait()

"""Fused head and loss, a chunk of tokens at a time: the logits of a whole micro-batch never exist at once.

With large vocabularies, logits are the largest tensors of a run: fp32 logits of 4,096 tokens over 128,256 words take
2 GB, and torch's loss holds three tensors of that size in its backward. Here the forward processes the tokens in chunks
and keeps two numbers per token. The backward recomputes the logits, which adds one matrix product to three.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipekit.tensor_parallel.collectives import SEQUENCE_DIM
from pipekit.tensor_parallel.cross_entropy import (
    IGNORED_LABEL,
    Targets,
    cap_softly,
    join_sums,
    logits_gradient,
    mean_loss,
    sum_up,
)
from pipekit.tensor_parallel.group import Pending, TensorGroup
from pipekit.tensors.weight_gradients import autocasts


def chunk_limit_bytes(dtype: torch.dtype) -> int:
    """Limit of the memory of a chunk's fp32 logits, for weights of a type.

    Small chunks of 16-bit weights are slow on GPUs: the weight gradient is accumulated in fp32, which moves the whole
    gradient through memory for every chunk. A GPT-2 head on 8,192 tokens took an H200 29 ms with 64 MiB, 17 ms with
    1 GiB.

    Example:
        >>> chunk_limit_bytes(torch.bfloat16) // 2**20, chunk_limit_bytes(torch.float32) // 2**20
        (512, 64)
    """
    return (512 if dtype.itemsize == 2 else 64) * 2**20


def plan_chunk_tokens(num_tokens: int, vocab_shard_size: int, *, limit_bytes: int) -> int | None:
    """Number of tokens per chunk of the loss; None if all tokens fit in one.

    Args:
        num_tokens: tokens in a micro-batch, B * S.
        vocab_shard_size: logits per token that a rank computes, V / tp.
        limit_bytes: memory limit for the fp32 logits of a chunk, as from `chunk_limit_bytes`; a chunk of one token may
            take more.

    Returns:
        The size of chunks that are as few as the limit allows and as even as possible; the last may be smaller.

    Example:
        >>> plan_chunk_tokens(4096, 128_256, limit_bytes=64 * 2**20)
        128
        >>> plan_chunk_tokens(4096, 512, limit_bytes=64 * 2**20) is None
        True
    """
    token_bytes = vocab_shard_size * torch.float32.itemsize
    if num_tokens * token_bytes <= limit_bytes:
        return None
    num_chunks = -(-num_tokens // max(1, limit_bytes // token_bytes))
    return -(-num_tokens // num_chunks)


def chunked_head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    group: TensorGroup | None,
    *,
    sequence_parallel: bool,
    vocab_size: int,
    chunk_tokens: int,
    ignored_label: int = IGNORED_LABEL,
    soft_cap: float | None = None,
) -> Tensor:
    """Mean cross-entropy of `hidden @ weight.T` in fp32, a scalar in nats per token.

    It is equal on all tensor ranks. The forward needs one collective for all tokens. In the backward, summing the
    gradient of `hidden` overlaps with the last chunk's part of the weight gradient. The gradient of a 16-bit weight is
    accumulated in fp32.

    The weight gradient is computed in the backward even if other weight gradients are deferred
    (`pipekit.tensors.weight_gradients`): it needs the gradients of all logits, which would otherwise have to be kept or
    computed a third time.

    Args:
        hidden: `(B, S, D)`; with `sequence_parallel` this rank's shard of the sequence, `(B, S / tp, D)`.
        weight: `(V / tp, D)`: this rank's rows, by `Shard(0, (V,), rank, tp)`; `(V, D)` where `group` is None.
        labels: `(B, S)` int64, the next token of each token of the whole sequence; `ignored_label` is left out of the
            mean.
        chunk_tokens: number of tokens per chunk; see `plan_chunk_tokens`.
        soft_cap: limit that the logits approach; see `cap_softly`.

    Raises:
        DataError: if there is not one label for each token, or, on the CPU, if a label is not in the vocabulary.

    Example:
        >>> hidden, weight, labels = torch.ones(1, 5, 4), torch.ones(8, 4), torch.arange(5).reshape(1, 5)
        >>> how = {"sequence_parallel": False, "vocab_size": 8, "chunk_tokens": 2}
        >>> loss = chunked_head_loss(hidden, weight, labels, None, **how)
        >>> f"{loss:.4f} is ln 8"
        '2.0794 is ln 8'
    """
    num_tokens = hidden[..., 0].numel() * (group.size if group is not None and sequence_parallel else 1)
    targets = Targets.of(labels, group, num_tokens=num_tokens, vocab_size=vocab_size, ignored=ignored_label)
    without_autocast: AbstractContextManager[object] = nullcontext()
    if autocasts(hidden):
        # As F.linear would, once for all chunks.
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        without_autocast = torch.autocast(hidden.device.type, enabled=False)
    with without_autocast:
        loss: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
            hidden, weight, targets, group, sequence_parallel, chunk_tokens, soft_cap
        )
    return loss


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Targets,
        group: TensorGroup | None,
        sequence_parallel: bool,
        chunk_tokens: int,
        soft_cap: float | None,
    ) -> Tensor:
        x = _tokens(hidden, group, sequence_parallel)
        chunks = [
            sum_up(
                cap_softly(F.linear(x[chunk], weight), soft_cap),
                targets.narrow(chunk.start, chunk.stop - chunk.start),
            )
            for chunk in _chunks(len(x), chunk_tokens)
        ]
        sums, scores = (torch.cat(results) for results in zip(*chunks, strict=True))
        sums, scores = join_sums(sums, scores, group)
        ctx.save_for_backward(hidden, sums)
        # Not saved for the backward, where activation checkpointing would replace it by a copy.
        ctx.weight = weight
        ctx.targets, ctx.group = targets, group
        ctx.sequence_parallel, ctx.chunk_tokens, ctx.soft_cap = sequence_parallel, chunk_tokens, soft_cap
        return mean_loss(sums, scores, targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (hidden, sums), weight = ctx.saved_tensors, ctx.weight
        group, sequence_parallel = ctx.group, ctx.sequence_parallel
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        x = _tokens(hidden, group, sequence_parallel)
        partial = x.new_empty(x.shape) if needs_hidden else None
        weight_gradient = _Accumulated(weight) if needs_weight else None
        summing: Pending | None = None
        for chunk in _chunks(len(x), ctx.chunk_tokens):
            targets = ctx.targets.narrow(chunk.start, chunk.stop - chunk.start)
            logits = cap_softly(F.linear(x[chunk], weight), ctx.soft_cap)
            gradient = logits_gradient(logits, sums[chunk], targets, grad)
            if ctx.soft_cap is not None:
                gradient *= 1 - (logits / ctx.soft_cap) ** 2
            if partial is not None:
                torch.mm(gradient, weight, out=partial[chunk])
                if chunk.stop == len(x) and group is not None:
                    summing = _start_sum(partial, hidden, group, sequence_parallel)
            if weight_gradient is not None:
                weight_gradient.add(gradient, x[chunk])
        hidden_gradient = partial if summing is None else summing.wait()
        hidden_gradient = None if hidden_gradient is None else hidden_gradient.view_as(hidden)
        return hidden_gradient, None if weight_gradient is None else weight_gradient.result(), *(None,) * 5


def _tokens(hidden: Tensor, group: TensorGroup | None, sequence_parallel: bool) -> Tensor:
    """Return the activations of all tokens, `(T, D)`."""
    whole = group.all_gather(hidden, SEQUENCE_DIM) if group is not None and sequence_parallel else hidden
    return whole.flatten(0, -2)


def _chunks(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    for start in range(0, num_tokens, chunk_tokens):
        yield slice(start, min(start + chunk_tokens, num_tokens))


def _start_sum(partial: Tensor, hidden: Tensor, group: TensorGroup, sequence_parallel: bool) -> Pending:
    """Begin to sum the ranks' gradients `(T, D)` of the activations; under sequence parallelism each gets its shard."""
    if sequence_parallel:
        return group.start_reduce_scatter(partial.view(hidden.shape[0], -1, hidden.shape[-1]), SEQUENCE_DIM)
    return group.start_all_reduce(partial)


class _Accumulated:
    """The gradient of a head's weight `(V / tp, D)`, as it grows chunk by chunk, in fp32 at the least."""

    def __init__(self, weight: Tensor) -> None:
        self._dtype = weight.dtype
        self._sum: Tensor | None = None

    def add(self, grad: Tensor, inputs: Tensor) -> None:
        """Add a chunk's term, from its output gradients `(C, V / tp)` and inputs `(C, D)`."""
        if self._sum is None:
            self._sum = torch.mm(grad.t(), inputs).to(torch.promote_types(self._dtype, torch.float32))
        elif self._sum.dtype == self._dtype:
            self._sum.addmm_(grad.t(), inputs)
        else:
            self._sum.add_(torch.mm(grad.t(), inputs))

    def result(self) -> Tensor | None:
        return None if self._sum is None else self._sum.to(self._dtype)

"""Sparse attention, a chunk of queries at a time, on the gathered keys that the chunk attends to.

Neither the forward nor the backward holds a matrix of all queries and all keys. On GPUs, `flex_attention` is used
instead.

Shapes: B sequences, S tokens, H heads of queries, K heads of keys and values, E head size, L layouts, N blocks,
Q queries of a chunk, T keys that they attend to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipekit.models.sparsity import BlockLayouts
from pipekit.tensor_parallel import cap_softly

_CHUNK_TOKENS = 128


@dataclass(frozen=True)
class HeadLayouts:
    """Block layouts of the heads that a rank computes.

    Attributes:
        of_model: layouts of all heads.
        first_head: index of the rank's first head.
        num_heads: number of the rank's heads.
    """

    of_model: BlockLayouts
    first_head: int
    num_heads: int

    @property
    def block(self) -> int:
        """Number of tokens in a block."""
        return self.of_model.block

    def tables(self) -> Tensor:
        """Layouts `(L, N, N)` of the model, True if a block of queries attends to a block of keys."""
        return torch.from_numpy(self.of_model.tables())

    @property
    def places(self) -> list[int]:
        """Index of the layout of each head of the rank; one index if all heads have the same layout."""
        count = self.of_model.num_layouts
        heads = range(self.first_head, self.first_head + (self.num_heads if count > 1 else 1))
        return [head % count for head in heads]

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Mask `(..., H or 1, S, T)` for positions of queries `(..., S)` and of keys `(..., T)`."""
        places = torch.tensor(self.places, device="cpu").view(-1, 1, 1)
        rows, columns = (at.cpu().unsqueeze(-2) // self.block for at in (queries, keys))
        return self.tables()[places, rows.unsqueeze(-1), columns.unsqueeze(-2)].to(queries.device)


@dataclass(frozen=True)
class Weighing:
    """Scaling, cap, mask and dropout of attention scores, from products of queries and keys to weights.

    Attributes:
        scale: factor of the scores.
        soft_cap: limit that the scores approach before their softmax; None for no limit.
        window: number of tokens that a token attends to, including itself; None for all earlier tokens.
        dropout: probability of zeroing a weight.
        seed: seed of the dropout.
    """

    scale: float
    soft_cap: float | None = None
    window: int | None = None
    dropout: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class _Chunk:
    """Queries of some heads, and what they attend to.

    Attributes:
        index: of the chunk among all.
        heads: heads of queries.
        kv_heads: the heads of keys and values that they share.
        queries: their tokens.
        keys: tokens `(T)` that at least one of them attends to.
        mask: `(Q, T)` or `(B, 1, 1, Q, T)`, True where one does.
    """

    index: int
    heads: slice
    kv_heads: slice
    queries: slice
    keys: Tensor
    mask: Tensor


def attend_sparsely(
    q: Tensor, k: Tensor, v: Tensor, layouts: HeadLayouts, weighing: Weighing, documents: Tensor | None = None
) -> Tensor:
    """Causal attention of blocks of tokens to the blocks of a layout.

    Args:
        q: queries `(B, H, S, E)`.
        k: keys `(B, K, S, E)`, where K divides H.
        v: values, as the keys.
        layouts: layouts of the H heads.
        weighing: computes the weights from the scores.
        documents: `(B, S)`, the number of each token's document, within which it attends; None if all tokens are in
            one document.

    Returns:
        Weighted sums of the values, `(B, H, S, E)`.

    Source: Dao 2023, "FlashAttention-2", section 3.1, for the values that the backward keeps and recomputes.
    """
    y: Tensor = _SparseAttention.apply(q, k, v, documents, layouts, weighing)  # type: ignore[no-untyped-call]
    return y


class _SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, layouts: HeadLayouts, weighing: Weighing
    ) -> Tensor:
        batch, heads, length, size = q.shape
        # Joining the heads copies nothing: (B, S, H, E) seen as (B, H, S, E).
        y = q.new_empty(batch, length, heads, size).transpose(1, 2)
        sums = q.new_empty(batch, heads, length, dtype=_precise(q))
        for chunk in _chunks(layouts, weighing, documents, length, kv_heads=k.shape[1], device=q.device):
            queries, keys, values = _gather(chunk, q, k, v)
            scores, _ = _scores(chunk, queries, keys, weighing)
            total = scores.logsumexp(-1, keepdim=True)  # (B, K, H/K, Q, 1)
            weights = (scores - total).exp_()
            if (kept := _kept(chunk, weights, weighing)) is not None:
                weights *= kept
            sums[:, chunk.heads, chunk.queries] = total.squeeze(-1).flatten(1, 2)
            y[:, chunk.heads, chunk.queries] = (
                (weights.to(q.dtype).flatten(2, 3) @ values).view(queries.shape).flatten(1, 2)
            )
        ctx.save_for_backward(q, k, v, y, sums, documents)
        ctx.layouts, ctx.weighing = layouts, weighing
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, sums, documents = ctx.saved_tensors
        weighing: Weighing = ctx.weighing
        q_grad = torch.empty_like(q)
        k_grad, v_grad = (torch.zeros_like(each, dtype=_precise(each)) for each in (k, v))
        for chunk in _chunks(ctx.layouts, weighing, documents, q.shape[2], kv_heads=k.shape[1], device=q.device):
            queries, keys, values = _gather(chunk, q, k, v)
            groups = queries.shape[1:3]
            scores, slopes = _scores(chunk, queries, keys, weighing)
            own_grad, own_y = (each[:, chunk.heads, chunk.queries].unflatten(1, groups) for each in (grad, y))
            total = sums[:, chunk.heads, chunk.queries].unflatten(1, groups).unsqueeze(-1)
            weights = scores.sub_(total).exp_()  # (B, K, H/K, Q, T)
            weights_grad = (own_grad.flatten(2, 3) @ values.mT).view_as(weights).to(weights.dtype)
            dropped = weights
            if (kept := _kept(chunk, weights, weighing)) is not None:
                dropped = weights * kept
                weights_grad *= kept
            _add_at(v_grad, chunk, dropped.to(q.dtype).flatten(2, 3).mT @ own_grad.flatten(2, 3))
            common = (own_grad * own_y).sum(-1, keepdim=True, dtype=weights.dtype)
            scores_grad = weights_grad.sub_(common).mul_(weights)
            if slopes is not None:
                scores_grad *= slopes
            scores_grad = scores_grad.mul_(weighing.scale).to(q.dtype).flatten(2, 3)
            q_grad[:, chunk.heads, chunk.queries] = (scores_grad @ keys).view(queries.shape).flatten(1, 2)
            _add_at(k_grad, chunk, scores_grad.mT @ queries.flatten(2, 3))
        return q_grad, k_grad.to(k.dtype), v_grad.to(v.dtype), None, None, None


def _precise(x: Tensor) -> torch.dtype:
    """Type of scores and sums: fp32 at the least, as in a fused attention."""
    return torch.promote_types(x.dtype, torch.float32)


def _chunks(
    layouts: HeadLayouts,
    weighing: Weighing,
    documents: Tensor | None,
    length: int,
    *,
    kv_heads: int,
    device: torch.device,
) -> Iterator[_Chunk]:
    """Yield the chunks of all heads; those whose layouts are the same go together."""
    tables, block, num_blocks = layouts.tables(), layouts.block, -(-length // layouts.block)
    per_chunk = max(1, _CHUNK_TOKENS // block)
    index = 0
    for heads, own_kv_heads, place in _head_groups(layouts.places, layouts.num_heads, kv_heads):
        table = tables[place, :num_blocks, :num_blocks]
        for first in range(0, num_blocks, per_chunk):
            rows = table[first : first + per_chunk]
            begin, end = first * block, min((first + per_chunk) * block, length)
            seen = rows.any(0).nonzero()  # (number, 1)
            keys = (seen * block + torch.arange(block, device="cpu")).flatten()
            keys = keys[keys < end]
            if weighing.window is not None:
                keys = keys[keys > begin - weighing.window]
            queries = torch.arange(begin, end, device="cpu").unsqueeze(1)
            mask = rows[:, keys // block].repeat_interleave(block, 0)[: end - begin] & (keys <= queries)
            if weighing.window is not None:
                mask &= queries - keys < weighing.window
            keys, mask = keys.to(device), mask.to(device)
            if documents is not None:
                is_same = documents[:, begin:end, None] == documents[:, None, keys]  # (B, Q, T)
                mask = (mask & is_same)[:, None, None]
            yield _Chunk(index, heads, own_kv_heads, slice(begin, end), keys, mask)
            index += 1


def _head_groups(places: Sequence[int], num_heads: int, kv_heads: int) -> list[tuple[slice, slice, int]]:
    """Heads of queries, those of keys that they share, and the index of their layout."""
    if len(set(places)) == 1:
        return [(slice(0, num_heads), slice(0, kv_heads), places[0])]
    sharing = num_heads // kv_heads
    return [
        (slice(head, head + 1), slice(head // sharing, head // sharing + 1), place) for head, place in enumerate(places)
    ]


def _gather(chunk: _Chunk, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `(B, K, H/K, Q, E)`, keys and values `(B, K, T, E)` of a chunk."""
    keys, values = (each[:, chunk.kv_heads].index_select(2, chunk.keys) for each in (k, v))
    queries = q[:, chunk.heads, chunk.queries]
    shared = queries.view(len(q), keys.shape[1], -1, *queries.shape[2:])
    return shared, keys, values


def _scores(chunk: _Chunk, queries: Tensor, keys: Tensor, weighing: Weighing) -> tuple[Tensor, Tensor | None]:
    """Scores `(B, K, H/K, Q, T)`, and the slope of their soft cap, if they have one."""
    scores = (queries.flatten(2, 3) @ keys.mT).view(*queries.shape[:4], -1).to(_precise(queries)) * weighing.scale
    slopes = None
    if weighing.soft_cap is not None:
        scores = cap_softly(scores, weighing.soft_cap)
        slopes = 1 - (scores / weighing.soft_cap) ** 2
    return scores.masked_fill_(~chunk.mask, -torch.inf), slopes


def _kept(chunk: _Chunk, weights: Tensor, weighing: Weighing) -> Tensor | None:
    """Factors of weights under dropout, the same in forward and backward; None without."""
    if not weighing.dropout or weights.is_meta:
        return None
    generator = torch.Generator(weights.device).manual_seed(weighing.seed + chunk.index)
    kept = torch.empty_like(weights).bernoulli_(1 - weighing.dropout, generator=generator)
    return kept.div_(1 - weighing.dropout)


def _add_at(total: Tensor, chunk: _Chunk, part: Tensor) -> None:
    """Add to the tokens of a chunk's keys in `total` `(B, K, S, E)`."""
    total[:, chunk.kv_heads].index_add_(2, chunk.keys, part.to(total.dtype))

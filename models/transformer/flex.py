"""Attention on GPUs with torch's `flex_attention`, which skips blocks of tokens that no query attends to.

Shapes: B sequences, S tokens, H heads of queries, K heads of keys and values, E head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pipekit.models.transformer.sparse import HeadLayouts
from pipekit.tensor_parallel import cap_softly


def attend_flexibly(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    documents: Tensor | None = None,
    layouts: HeadLayouts | None = None,
    window: int,
    scale: float,
    soft_cap: float | None,
    compiles: bool = True,
) -> Tensor:
    """Causal attention within documents and to the blocks of a layout, with `flex_attention`.

    Args:
        q: queries `(B, H, S, E)`.
        k: keys `(B, K, S, E)`, where K divides H.
        v: values, as the keys.
        documents: `(B, S)`, the number of each token's document; None if all tokens are in one document.
        layouts: block layouts of the H heads; None if all blocks attend to all blocks.
        window: number of tokens that a token attends to, including itself.
        scale: factor of the scores.
        soft_cap: limit that the scores approach before their softmax; None for no limit.
        compiles: whether torch compiles the attention, which makes it fast.

    Returns:
        Weighted sums of the values, `(B, H, S, E)`.

    Source: Dong et al. 2024, "Flex Attention: A Programming Model for Generating Optimized Attention Kernels".
    """
    block, tables = 1, None
    if layouts is not None:
        block, tables = layouts.block, layouts.tables()[layouts.places].to(q.device)  # (H or 1, N, N)

    def is_seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (query >= key) & (query - key < window)
        if documents is not None:
            seen = seen & (documents[batch, query] == documents[batch, key])
        if tables is not None:
            seen = seen & tables[head if len(tables) > 1 else 0, query // block, key // block]
        return seen

    def cap(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap_softly(score, soft_cap)

    attend, build_mask = _flex_attention(compiles=compiles)
    length = q.shape[2]
    batch = None if documents is None else len(q)
    heads = None if tables is None or len(tables) == 1 else q.shape[1]
    y: Tensor = attend(
        q,
        k,
        v,
        score_mod=None if soft_cap is None else cap,
        block_mask=build_mask(is_seen, batch, heads, length, length, device=q.device),
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return y


@cache
def _flex_attention(*, compiles: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    from torch.nn.attention import flex_attention as torchs  # imports torch's compiler

    if compiles:
        return torch.compile(torchs.flex_attention), torch.compile(torchs.create_block_mask)
    return torchs.flex_attention, torchs.create_block_mask

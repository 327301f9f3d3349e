"""Documents that share a sequence: attention and positions stay within each.

The positions of the tokens, which restart at every document, say where documents begin. They enter the model beside the
token ids, and each layer passes them on beside the hidden states, so that every stage of a pipeline has them.

Shapes: B sequences, S tokens, H heads, E head size, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from pipekit.errors import ConfigError
from pipekit.layers.specs import LayerSpec, TiedLayerSpec, layer_names
from pipekit.tensor_parallel import cap_softly

Hidden = Tensor | tuple[Tensor, Tensor]
"""Hidden states between layers: `(B, S, D)`, or that and the positions `(B, S)` of its tokens in their documents."""

_Layer = TypeVar("_Layer")


def take_positions(x: Hidden) -> tuple[Tensor, Tensor | None]:
    """Split what a layer is given into hidden states and positions; without documents the latter are None."""
    if isinstance(x, Tensor):
        return x, None
    hidden, positions = x
    return hidden, positions


def passing_positions(forward: Callable[[_Layer, Tensor], Tensor]) -> Callable[[_Layer, Hidden], Any]:
    """Decorate the forward of a layer that treats every token by itself, so that it passes positions on."""

    @wraps(forward)
    def pass_on(layer: _Layer, x: Hidden) -> Hidden:
        hidden, positions = take_positions(x)
        y = forward(layer, hidden)
        return y if positions is None else (y, positions)

    return pass_on


def number_documents(positions: Tensor) -> Tensor:
    """Number of each token's document within its sequence, from 1: `(B, S)` to `(B, S)`.

    Example:
        >>> number_documents(torch.tensor([[0, 1, 0, 1, 2], [3, 4, 5, 0, 0]])).tolist()
        [[1, 1, 2, 2, 2], [0, 0, 0, 1, 2]]
    """
    return (positions == 0).cumsum(1, dtype=torch.int32)


def document_lengths(positions: Tensor) -> Tensor:
    """Length in tokens of each token's document within its sequence: `(B, S)` to `(B, S)`.

    Example:
        >>> document_lengths(torch.tensor([[0, 1, 0, 1, 2]])).tolist()
        [[2, 2, 3, 3, 3]]
    """
    # From 0 to S - 1, where a sequence begins with the first token of a document.
    documents = (number_documents(positions).long() - 1).clamp(min=0)
    return torch.zeros_like(positions).scatter_reduce(1, documents, positions + 1, "amax").gather(1, documents)


def attend_within_documents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor,
    *,
    window: int,
    scale: float,
    soft_cap: float | None,
    compiles: bool = True,
) -> Tensor:
    """Causal attention within documents by torch's `flex_attention`, which skips blocks that no query attends to.

    Args:
        q: queries `(B, H, S, E)`.
        k: keys `(B, K, S, E)`, where K divides H.
        v: values, as the keys.
        documents: `(B, S)`, the number of each token's document.
        window: tokens that a token attends to, its own included.
        scale: factor of the scores.
        soft_cap: limit that the scores approach before their softmax; None where there is none.
        compiles: whether torch compiles it, as it must to be fast.

    Returns:
        Weighted sums of the values, `(B, H, S, E)`.

    Source: Dong et al. 2024, "Flex Attention: A Programming Model for Generating Optimized Attention Kernels".
    """

    def is_seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_same = documents[batch, query] == documents[batch, key]
        return (query >= key) & (query - key < window) & is_same

    def cap(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap_softly(score, soft_cap)

    attend, build_mask = _flex_attention(compiles=compiles)
    length = q.shape[2]
    y: Tensor = attend(
        q,
        k,
        v,
        score_mod=None if soft_cap is None else cap,
        block_mask=build_mask(is_seen, len(q), None, length, length, device=q.device),
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return y


def check_takes_documents(specs: Sequence[LayerSpec]) -> None:
    """Check that every layer keeps documents apart, which it says by `takes_documents = True` in its own class.

    Raises:
        ConfigError: if one does not; it names the layer.
    """
    for spec, name in zip(specs, layer_names(specs), strict=True):
        kind: Any = spec.typename
        if isinstance(spec, TiedLayerSpec) and spec.forward_fn is not None:
            kind = spec.forward_fn if hasattr(spec.forward_fn, "__code__") else type(spec.forward_fn)
        # What a class inherits may not hold for it.
        if not vars(kind).get("takes_documents", False):
            raise ConfigError(
                f"data.document_mask=true: layer {name!r} ({spec.type_name}) does not say that it keeps documents "
                "apart; let it take and return a pair of its tensor and the positions (B, S) of the tokens, which "
                "restart at every document, and say so by takes_documents = True, or leave data.document_mask out"
            )


@cache
def _flex_attention(*, compiles: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    from torch.nn.attention import flex_attention as torchs  # imports torch's compiler

    if compiles:
        return torch.compile(torchs.flex_attention), torch.compile(torchs.create_block_mask)
    return torchs.flex_attention, torchs.create_block_mask

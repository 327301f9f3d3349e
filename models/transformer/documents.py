"""Documents that share a sequence: attention and positions stay within each document.

The positions of the tokens restart at every document, and so show where documents begin. They enter the model with the
token ids, and each layer passes them on with the hidden states, so every stage of a pipeline has them.

Shapes: B sequences, S tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from pipekit.errors import ConfigError
from pipekit.layers.specs import LayerSpec, TiedLayerSpec, layer_names

Hidden = Tensor | tuple[Tensor, Tensor]
"""Hidden states between layers: `(B, S, D)`, or that and the positions `(B, S)` of its tokens in their documents."""

_Layer = TypeVar("_Layer")


def take_positions(x: Hidden) -> tuple[Tensor, Tensor | None]:
    """Split a layer's input into hidden states and positions; without documents the positions are None."""
    if isinstance(x, Tensor):
        return x, None
    hidden, positions = x
    return hidden, positions


def passing_positions(forward: Callable[[_Layer, Tensor], Tensor]) -> Callable[[_Layer, Hidden], Any]:
    """Decorate the forward of a layer that processes every token separately, so that it passes positions on."""

    @wraps(forward)
    def pass_on(layer: _Layer, x: Hidden) -> Hidden:
        if isinstance(x, Tensor):
            return forward(layer, x)
        hidden, positions = x
        return forward(layer, hidden), positions

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


def check_takes_documents(specs: Sequence[LayerSpec]) -> None:
    """Check that every layer keeps documents apart, as it declares with `takes_documents = True` in its own class.

    Raises:
        ConfigError: if a layer does not; the message names the layer.
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

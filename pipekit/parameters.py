"""Counting parameters without allocating any: each distinct spec is built once, on torch's meta device."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from pipekit.specs import LayerSpec, TiedLayerSpec, build_on_meta, spec_key


def count_layer_parameters(specs: Sequence[LayerSpec]) -> list[int]:
    """Return the trainable parameters of each layer.

    A tied layer's count wherever it occurs, since each stage that holds it pays for a copy.

    Example:
        >>> from torch import nn
        >>> count_layer_parameters([LayerSpec(nn.Linear, 4, 2), LayerSpec(nn.GELU)])
        [10, 0]
    """
    counted: dict[Hashable, int] = {}
    return [_count(spec, layer_idx, counted) for layer_idx, spec in enumerate(specs)]


def count_parameters(specs: Sequence[LayerSpec]) -> int:
    """Return the trainable parameters of a model, tied ones once."""
    seen: set[str] = set()
    total = 0
    for spec, num_parameters in zip(specs, count_layer_parameters(specs), strict=True):
        if isinstance(spec, TiedLayerSpec):
            if spec.key in seen:
                continue
            seen.add(spec.key)
        total += num_parameters
    return total


def _count(spec: LayerSpec, layer_idx: int, counted: dict[Hashable, int]) -> int:
    key = spec_key(spec)
    if key not in counted:
        layer = build_on_meta(spec, name=spec.name or f"layers.{layer_idx}")
        counted[key] = sum(parameter.numel() for parameter in layer.parameters() if parameter.requires_grad)
    return counted[key]

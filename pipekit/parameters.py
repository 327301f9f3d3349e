"""Counting parameters without allocating any: layers are built on torch's meta device, once for each distinct spec."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pipekit.specs import LayerSpec, TiedLayerSpec


def count_layer_parameters(specs: Sequence[LayerSpec]) -> list[int]:
    """Return the trainable parameters of each layer. A tied layer's count wherever it occurs, since each stage holds a copy.

    Example:
        >>> from torch import nn
        >>> count_layer_parameters([LayerSpec(nn.Linear, 4, 2), LayerSpec(nn.GELU)])
        [10, 0]
    """
    counted: dict[Any, int] = {}
    return [_count(spec, counted) for spec in specs]


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


def _count(spec: LayerSpec, counted: dict[Any, int]) -> int:
    key = (spec.typename, repr(spec.module_args), repr(sorted(spec.module_kwargs.items())))
    if key not in counted:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            layer = spec.build()
        counted[key] = sum(parameter.numel() for parameter in layer.parameters() if parameter.requires_grad)
    return counted[key]

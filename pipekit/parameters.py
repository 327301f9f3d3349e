"""Counting parameters without allocating any: each distinct spec is built once, on torch's meta device."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from pipekit.specs import LayerSpec, TiedLayerSpec, build_on_meta


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
    key = (_frozen(spec.typename), _frozen(spec.module_args), _frozen(spec.module_kwargs))
    if key not in counted:
        layer = build_on_meta(spec, name=spec.name or f"layers.{layer_idx}")
        counted[key] = sum(parameter.numel() for parameter in layer.parameters() if parameter.requires_grad)
    return counted[key]


def _frozen(value: object) -> Hashable:
    """Return something hashable, equal for equal arguments; what cannot be hashed equals itself alone."""
    if isinstance(value, dict):
        return (dict, tuple((key, _frozen(item)) for key, item in value.items()))
    if isinstance(value, (list, tuple)):
        return (type(value), tuple(map(_frozen, value)))
    try:
        hash(value)
    except TypeError:
        return _Itself(value)
    return value


class _Itself:
    """Hashes and compares a value by identity."""

    def __init__(self, value: object) -> None:
        self.value = value  # kept, so that no other value gets its id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)

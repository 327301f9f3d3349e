"""The parameters of a model without allocating any: each distinct spec is built once, on torch's meta device."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from pipekit.planner.elements import Shape, count_elements
from pipekit.specs import LayerSpec, build_on_meta, layer_names, spec_key


def parameter_shapes(specs: Sequence[LayerSpec]) -> list[dict[str, Shape]]:
    """Return the shapes of each layer's trainable parameters by logical name; layers that are tied have the same.

    Example:
        >>> from torch import nn
        >>> parameter_shapes([LayerSpec(nn.Linear, 4, 2, name="head"), LayerSpec(nn.GELU)])
        [{'head.weight': (2, 4), 'head.bias': (2,)}, {}]
    """
    known: dict[Hashable, dict[str, Shape]] = {}
    shapes = []
    for spec, name in zip(specs, layer_names(specs), strict=True):
        key = spec_key(spec)
        if key not in known:
            named = build_on_meta(spec, name=name).named_parameters()
            known[key] = {path: tuple(parameter.shape) for path, parameter in named if parameter.requires_grad}
        shapes.append({f"{name}.{path}": shape for path, shape in known[key].items()})
    return shapes


def count_layer_parameters(specs: Sequence[LayerSpec]) -> list[int]:
    """Return the trainable parameters of each layer.

    A tied layer's count wherever it occurs, since each stage that holds it pays for a copy.

    Example:
        >>> from torch import nn
        >>> count_layer_parameters([LayerSpec(nn.Linear, 4, 2), LayerSpec(nn.GELU)])
        [10, 0]
    """
    return [count_elements(layer) for layer in parameter_shapes(specs)]


def count_parameters(specs: Sequence[LayerSpec]) -> int:
    """Return the trainable parameters of a model, tied ones once."""
    return count_elements(*parameter_shapes(specs))

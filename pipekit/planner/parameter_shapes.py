"""The shapes of each layer's parameters, without allocating any."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from pipekit.specs import LayerSpec, build_on_meta, layer_names, spec_key


def parameter_shapes(specs: Sequence[LayerSpec]) -> list[dict[str, tuple[int, ...]]]:
    """Return the shapes of each layer's trainable parameters by logical name; layers that are tied have the same.

    Example:
        >>> from torch import nn
        >>> parameter_shapes([LayerSpec(nn.Linear, 4, 2, name="head"), LayerSpec(nn.GELU)])
        [{'head.weight': (2, 4), 'head.bias': (2,)}, {}]
    """
    known: dict[Hashable, dict[str, tuple[int, ...]]] = {}
    shapes = []
    for spec, name in zip(specs, layer_names(specs), strict=True):
        key = spec_key(spec)
        if key not in known:
            named = build_on_meta(spec, name=name).named_parameters()
            known[key] = {path: tuple(parameter.shape) for path, parameter in named if parameter.requires_grad}
        shapes.append({f"{name}.{path}": shape for path, shape in known[key].items()})
    return shapes

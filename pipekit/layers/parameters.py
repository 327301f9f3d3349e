"""Parameters of a model, without allocating any: each distinct spec is built once, on torch's meta device."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from pipekit.errors import LayoutError
from pipekit.layers.specs import LayerSpec, build_on_meta, layer_names, spec_key
from pipekit.predictions.elements import Shape, count_elements
from pipekit.tensor_parallel import PlannedGroup, shard_layer


def parameter_shapes(specs: Sequence[LayerSpec], tp: int = 1) -> list[dict[str, Shape]]:
    """Shapes of each layer's trainable parameters by logical name; tied layers have the same names and shapes.

    Args:
        specs: the model.
        tp: tensor-parallel degree; the shapes are those of the first rank, whose shards are the largest.

    Raises:
        LayoutError: if a layer is too small for this number of tensor-parallel ranks; the message names the layer.

    Example:
        >>> from torch import nn
        >>> parameter_shapes([LayerSpec(nn.Linear, 4, 2, name="head"), LayerSpec(nn.GELU)])
        [{'head.weight': (2, 4), 'head.bias': (2,)}, {}]
    """
    return trained_and_frozen_shapes(specs, tp)[0]


def trained_and_frozen_shapes(
    specs: Sequence[LayerSpec], tp: int = 1
) -> tuple[list[dict[str, Shape]], list[dict[str, Shape]]]:
    """`parameter_shapes` of the trainable parameters, and the same for the frozen ones."""
    known: dict[Hashable, dict[bool, dict[str, Shape]]] = {}
    shapes: dict[bool, list[dict[str, Shape]]] = {True: [], False: []}
    for spec, name in zip(specs, layer_names(specs), strict=True):
        key = spec_key(spec)
        if key not in known:
            layer = build_on_meta(spec, name=name)
            try:
                if tp > 1:
                    shard_layer(layer, PlannedGroup(rank=0, size=tp), sequence_parallel=False)
            except LayoutError as error:
                raise LayoutError(f"layer {name!r}: {error}") from None
            known[key] = {True: {}, False: {}}
            for path, parameter in layer.named_parameters():
                known[key][parameter.requires_grad][path] = tuple(parameter.shape)
        for is_trained, layers in shapes.items():
            layers.append({f"{name}.{path}": shape for path, shape in known[key][is_trained].items()})
    return shapes[True], shapes[False]


def count_layer_parameters(specs: Sequence[LayerSpec]) -> list[int]:
    """Return the number of trainable parameters of each layer.

    The parameters of a tied layer count wherever it occurs, because each stage that holds it has a copy.

    Example:
        >>> from torch import nn
        >>> count_layer_parameters([LayerSpec(nn.Linear, 4, 2), LayerSpec(nn.GELU)])
        [10, 0]
    """
    return [count_elements(layer) for layer in parameter_shapes(specs)]


def count_parameters(specs: Sequence[LayerSpec]) -> int:
    """Return the number of trainable parameters of a model, counting tied ones once."""
    return count_elements(*parameter_shapes(specs))

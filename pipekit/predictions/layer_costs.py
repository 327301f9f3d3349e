"""Costs of layers and of a whole model for one micro-batch, and the activations of a stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise


@dataclass(frozen=True)
class LayerCosts:
    """Operations, bytes and seconds of one layer for one micro-batch.

    Attributes:
        parameters: trainable ones; a tied layer's wherever it occurs.
        forward_flops: floating-point operations of the forward; a multiplication and an addition are two.
        input_gradient_flops: of the gradient of its input.
        weight_gradient_flops: of the gradients of its parameters.
        input_bytes: of its input.
        output_bytes: of its output.
        saved_bytes: of tensors that its backward keeps beside its input and its output.
        keeps_input: whether its backward keeps its input.
        keeps_output: whether its backward keeps its output.
        forward_s: measured seconds of the forward; None where nothing was measured, as are the next two.
        input_gradient_s: of the gradient of its input.
        weight_gradient_s: of the gradients of its parameters.
    """

    parameters: int
    forward_flops: int
    input_gradient_flops: int
    weight_gradient_flops: int
    input_bytes: int
    output_bytes: int
    saved_bytes: int
    keeps_input: bool
    keeps_output: bool
    forward_s: float | None = None
    input_gradient_s: float | None = None
    weight_gradient_s: float | None = None

    @property
    def flops(self) -> int:
        """Operations of the forward and the backward."""
        return self.forward_flops + self.input_gradient_flops + self.weight_gradient_flops

    @property
    def seconds(self) -> float:
        """Measured seconds of the forward and the backward."""
        assert self.forward_s is not None, "the layer was not measured"
        return self.forward_s + (self.input_gradient_s or 0.0) + (self.weight_gradient_s or 0.0)


@dataclass(frozen=True)
class ModelCosts:
    """Costs of a model for one micro-batch.

    Attributes:
        layers: one for each layer spec, in order.
        loss: the loss function, which the last stage computes after its layers; None where the last layer returns the
            loss itself.
    """

    layers: list[LayerCosts]
    loss: LayerCosts | None = None

    def stage_extras(self, num_stages: int, cost: Callable[[LayerCosts], float]) -> list[float]:
        """Costs of each stage beside its layers: the loss on the last one."""
        return [0.0] * (num_stages - 1) + [0.0 if self.loss is None else cost(self.loss)]


def shard_layers(layers: Sequence[LayerCosts], tp: int) -> list[LayerCosts]:
    """Costs of each layer on one of `tp` tensor-parallel ranks: one part in `tp` of all operations and bytes.

    Norms and dropouts are sharded along the sequence, so that the ranks together hold every activation once.

    Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4.2.2.
    """
    shared = [field.name for field in fields(LayerCosts) if field.type == "int"]
    return [replace(layer, **{name: -(-getattr(layer, name) // tp) for name in shared}) for layer in layers]


def stage_activation_bytes(layers: Sequence[LayerCosts], *, checkpointing: bool) -> int:
    """Bytes of activations of a stage for one micro-batch, from its forward to its backward.

    These are the stage's input and output, and between them the tensors that the layers' backwards keep: each tensor
    once, though one layer keeps it as its output and the next as its input. Under activation checkpointing a layer
    keeps only its input.

    Example:
        >>> linear = LayerCosts(20, 40, 40, 40, input_bytes=16, output_bytes=20, saved_bytes=0, keeps_input=True,
        ...     keeps_output=False)
        >>> stage_activation_bytes([linear, linear], checkpointing=False)
        56
    """
    held = layers[0].input_bytes + layers[-1].output_bytes
    for layer, following in pairwise(layers):
        if checkpointing or layer.keeps_output or following.keeps_input:
            held += layer.output_bytes
    return held if checkpointing else held + sum(layer.saved_bytes for layer in layers)

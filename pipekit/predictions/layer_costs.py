"""Costs of layers and of a whole model for one micro-batch, and the activations of a stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise

from pipekit.predictions.kernels import LayerWork
from pipekit.settings.activations import ActivationCheckpointing


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
        core_bytes: of tensors that its backward recomputes from others that it keeps, such as an attention core's.
        is_recomputed: whether its backward first recomputes it, so that it keeps its input alone.
        apart_bytes: of its input that the device keeps for that where it is not kept whole; None where it is.
        host_bytes: of its input that is kept for that in host memory.
        gathered_bytes: of its input, which tensor-parallel ranks gather from their shards for that.
        fetched_bytes: of inputs that are whole on the device, or on their way to it, while it is recomputed.
        forward_s: measured seconds of the forward; None where nothing was measured, as are the next two.
        input_gradient_s: of the gradient of its input.
        weight_gradient_s: of the gradients of its parameters.
        work: its kernels; None where they are not known, as those of a layer that was measured.
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
    core_bytes: int = 0
    is_recomputed: bool = False
    apart_bytes: int | None = None
    host_bytes: int = 0
    gathered_bytes: int = 0
    fetched_bytes: int = 0
    forward_s: float | None = None
    input_gradient_s: float | None = None
    weight_gradient_s: float | None = None
    work: LayerWork | None = None

    @property
    def flops(self) -> int:
        """Operations of the forward and the backward."""
        return self.forward_flops + self.input_gradient_flops + self.weight_gradient_flops

    @property
    def recomputed_flops(self) -> int:
        """Operations of the recomputation of the layer, up to the last tensor that its backward keeps."""
        whole = self.forward_flops if self.work is None else self.work.recomputed.flops
        return whole if self.is_recomputed else 0

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


def shard_layers(layers: Sequence[LayerCosts], tp: int, *, sequence_parallel: bool = True) -> list[LayerCosts]:
    """Costs of each layer on one of `tp` tensor-parallel ranks: one part in `tp` of all operations and bytes.

    Norms and dropouts are sharded along the sequence, so that the ranks together hold every activation once. Without
    sequence parallelism each holds what passes between layers whole.

    Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4.2.2.
    """
    shared = [field.name for field in fields(LayerCosts) if field.type == "int"]
    if not sequence_parallel:
        shared = [name for name in shared if name not in ("input_bytes", "output_bytes")]
    return _each_once(layers, lambda layer: replace(layer, **{name: -(-getattr(layer, name) // tp) for name in shared}))


def _each_once(layers: Sequence[LayerCosts], change: Callable[[LayerCosts], LayerCosts]) -> list[LayerCosts]:
    """Changed costs of each layer; layers that share an object go on sharing one."""
    changed: dict[int, LayerCosts] = {}
    for layer in layers:
        if id(layer) not in changed:
            changed[id(layer)] = change(layer)
    return [changed[id(layer)] for layer in layers]


def recompute_layers(
    layers: Sequence[LayerCosts], setting: ActivationCheckpointing | None, names: Sequence[str], *, tp: int = 1
) -> list[LayerCosts]:
    """Costs of each layer under activation checkpointing, from those on one of `tp` tensor-parallel ranks.

    Costs of layers whose attention core alone is recomputed tell of that already.

    Raises:
        ConfigError: if the setting names a layer that is not there.
    """
    if setting is None or setting.only is not None:
        return list(layers)

    def mark(layer: LayerCosts) -> LayerCosts:
        whole = layer.input_bytes
        kept = -(-whole // tp) if setting.partition else whole
        recomputed = replace(layer, is_recomputed=True, gathered_bytes=whole if setting.partition else 0)
        if setting.offload:
            # On its way to the device is also the input of the layer whose turn is next.
            return replace(recomputed, apart_bytes=0, host_bytes=kept, fetched_bytes=whole + kept)
        return replace(recomputed, apart_bytes=kept, fetched_bytes=whole) if setting.partition else recomputed

    chosen = setting.chosen(names)
    marked = _each_once(layers, mark)
    return [again if is_chosen else layer for layer, again, is_chosen in zip(layers, marked, chosen, strict=True)]


def stage_activation_bytes(layers: Sequence[LayerCosts]) -> int:
    """Bytes of activations of a stage for one micro-batch, from its forward to its backward.

    These are the stage's input and output, and between them the tensors that the layers' backwards keep: each tensor
    once, though one layer keeps it as its output and the next as its input. A layer that is recomputed keeps only its
    input: whole, unless a part of it is kept apart, which the stage's own input never is.

    Example:
        >>> linear = LayerCosts(20, 40, 40, 40, input_bytes=16, output_bytes=20, saved_bytes=0, keeps_input=True,
        ...     keeps_output=False)
        >>> stage_activation_bytes([linear, linear])
        56
    """
    held = layers[0].input_bytes + layers[-1].output_bytes
    held += sum(layer.saved_bytes for layer in layers if not layer.is_recomputed)
    for layer, following in pairwise(layers):
        is_apart = following.apart_bytes is not None and _keeps(following)
        if (layer.keeps_output and not layer.is_recomputed) or (_keeps_input(following) and not is_apart):
            held += layer.output_bytes
        if is_apart:
            held += following.apart_bytes or 0
    return held


def stage_host_bytes(layers: Sequence[LayerCosts]) -> int:
    """Bytes of host memory that a stage keeps of one micro-batch, from its forward to its backward."""
    return sum(layer.host_bytes for layer in layers[1:] if _keeps(layer))


def _keeps_input(layer: LayerCosts) -> bool:
    return _keeps(layer) if layer.is_recomputed else layer.keeps_input


def _keeps(layer: LayerCosts) -> bool:
    """True if its backward keeps anything: where nothing is kept, nothing is recomputed, and no input kept for it."""
    return bool(layer.saved_bytes or layer.keeps_input or layer.keeps_output)

"""Costs of each layer from its code alone: nothing is allocated and nothing computed.

Each distinct spec runs once for each distinct shape and type of its inputs, on torch's meta device, so that a model of
any depth takes no longer than its few kinds of layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipekit.costs.trace import TracedLayer, trace_costs
from pipekit.errors import ConfigError, PipekitError
from pipekit.layers.shapes import ShapeRules
from pipekit.layers.specs import LayerSpec, TiedLayerSpec, build_on_meta, layer_names, spec_key
from pipekit.predictions.layer_costs import LayerCosts, ModelCosts
from pipekit.tensor_parallel import Logits
from pipekit.tensors.meta import NestedMeta
from pipekit.tensors.nested import Structure, unflatten

LossFn = Callable[[Any, Any], Any]


def describe_layers(
    specs: Sequence[LayerSpec],
    inputs: Any,
    *,
    dtype: torch.dtype,
    loss_fn: LossFn | None = None,
    labels: Any = None,
) -> ModelCosts:
    """Costs of each layer and of the loss for one micro-batch.

    Where the last layer returns `Logits`, from which the loss computes the scores, the loss is a part of that layer.

    Operations are those of matrix products, convolutions and attention; nothing else is counted. Attention is taken to
    be fused (see `pipekit.costs.trace`).

    Args:
        specs: the model.
        inputs: inputs of the first layer for one micro-batch: nested tensors on any device, of which only shapes and
            types count. Token ids are int64 `(B, S)`.
        dtype: of weights and floating-point activations.
        loss_fn: called as `loss_fn(outputs, labels)` behind the last layer; None where that returns the loss.
        labels: labels for the loss function: nested tensors of which only shapes and types count.

    Raises:
        ConfigError: if a layer does not fit its inputs, or cannot run without values; it names the layer.

    Example:
        >>> ids = torch.empty(2, 8, dtype=torch.int64, device="meta")
        >>> specs = [LayerSpec(nn.Embedding, 100, 4), LayerSpec(nn.Linear, 4, 100, bias=False)]
        >>> costs = describe_layers(specs, ids, dtype=torch.bfloat16)
        >>> [(layer.parameters, layer.forward_flops, layer.input_gradient_flops) for layer in costs.layers]
        [(400, 0, 0), (400, 12800, 12800)]
    """
    meta = NestedMeta.of(inputs, "the input of the first layer", dtype=dtype)
    described: dict[Hashable, TracedLayer] = {}
    layers: list[LayerCosts] = []
    for spec, name in zip(specs, layer_names(specs), strict=True):
        is_last = len(layers) == len(specs) - 1
        loss = None
        if is_last and loss_fn is not None and gives_logits(spec, meta, name=name, dtype=dtype):
            loss = take_loss(loss_fn, labels)
        key = (layer_key(spec, meta), loss is None)
        if key not in described:
            described[key] = describe_layer(spec, meta, name=name, dtype=dtype, loss=loss)
        layers.append(described[key].costs)
        meta = described[key].outputs
    return ModelCosts(layers, None if loss_fn is None or is_loss(meta) else describe_loss(loss_fn, meta, labels))


def layer_key(spec: LayerSpec, inputs: NestedMeta) -> Hashable:
    """Key that is equal for layers of equal costs."""
    forward_fn = spec.forward_fn if isinstance(spec, TiedLayerSpec) else None
    return spec_key(spec), forward_fn, inputs.key


def describe_layer(
    spec: LayerSpec, inputs: NestedMeta, *, name: str, dtype: torch.dtype, loss: Callable[[Any], Any] | None = None
) -> TracedLayer:
    """Costs of one layer, and the shapes and types of its outputs.

    Args:
        spec: the layer.
        inputs: shapes and types of its inputs.
        name: its logical name, for errors.
        dtype: of its weights.
        loss: computes the loss of the layer's outputs, if these are `Logits`.

    Raises:
        ConfigError: if it does not fit its inputs, or cannot run without values.
    """
    what = f"layer {name!r} ({spec.type_name})"
    with _failures(what, inputs, mend="the layer before it", needs="values, or tensors on a device of its own"):
        layer = build_on_meta(spec, name=name).to(device="meta", dtype=dtype).train()
        return trace_module(layer, apply_layer(layer, spec, loss), inputs.on_meta(), inputs.structure)


def trace_module(
    module: nn.Module, call: Callable[[Any], Any], leaves: Sequence[Tensor], structure: Structure
) -> TracedLayer:
    """Trace the costs of a built layer on its device.

    Args:
        module: holds the layer's parameters and buffers.
        call: the function that a stage calls with the layer's inputs.
        leaves: the input tensors.
        structure: their nesting.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    held = [parameter for parameter in module.parameters() if not parameter.requires_grad] + list(module.buffers())
    with leaves[0].device if leaves else torch.device("meta"):
        return trace_costs(call, leaves, structure, parameters=trained, held=held)


def apply_layer(layer: nn.Module, spec: LayerSpec, loss: Callable[[Any], Any] | None = None) -> Callable[[Any], Any]:
    """Function that a stage calls with a layer's inputs; for `Logits`, with the loss of these behind it."""
    forward_fn = spec.forward_fn if isinstance(spec, TiedLayerSpec) else None
    forward = layer if forward_fn is None else partial(forward_fn, layer)
    if loss is None:
        return forward

    def with_loss(inputs: Any) -> Any:
        outputs = forward(inputs)
        return loss(outputs) if isinstance(outputs, Logits) else outputs

    return with_loss


def gives_logits(spec: LayerSpec, inputs: NestedMeta, *, name: str, dtype: torch.dtype) -> bool:
    """Test if a layer returns `Logits`, as far as can be told without values."""
    try:
        layer = build_on_meta(spec, name=name).to(device="meta", dtype=dtype).train()
        with torch.no_grad(), torch.device("meta"), ShapeRules():
            return isinstance(apply_layer(layer, spec)(unflatten(inputs.on_meta(), inputs.structure)), Logits)
    except Exception:  # whoever describes or measures the layer says what is wrong
        return False


def take_loss(loss_fn: LossFn, labels: Any) -> Callable[[Any], Any]:
    """Function that computes the loss of outputs on torch's meta device."""
    meta = NestedMeta.of(labels, "the labels")
    compute = copy.deepcopy(loss_fn).to("meta") if isinstance(loss_fn, nn.Module) else loss_fn
    given = unflatten(meta.on_meta(), meta.structure)
    return lambda outputs: compute(outputs, given)


def is_loss(outputs: NestedMeta) -> bool:
    """Test if the last layer returns the loss already."""
    return [tensor.shape for tensor in outputs.tensors] == [()]


def describe_loss(loss_fn: LossFn, outputs: NestedMeta, labels: Any) -> LayerCosts:
    """Costs of the loss, as if it were a layer behind the last one.

    Args:
        loss_fn: called as `loss_fn(outputs, labels)`.
        outputs: shapes and types of the last layer's outputs.
        labels: nested tensors of which only shapes and types count.

    Raises:
        ConfigError: if the loss function does not fit what it is given, or cannot run without values.
    """
    loss_name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    given = f"{outputs} and the labels {NestedMeta.of(labels, 'the labels')}"
    what = f"the loss function {loss_name}"
    with (
        _failures(what, given, mend="the last layer or the labels", needs="values"),
        torch.device("meta"),
    ):
        return trace_costs(take_loss(loss_fn, labels), outputs.on_meta(), outputs.structure).costs


@contextmanager
def _failures(what: str, given: object, *, mend: str, needs: str) -> Iterator[None]:
    """Name the layer, its inputs and a remedy in every error."""
    try:
        yield
    except ConfigError:
        raise
    except PipekitError as error:
        raise ConfigError(f"{what}: {error}") from None
    except Exception as error:
        raise ConfigError(
            f"{what} cannot be described from {given}: {first_line(error)}; if these are not the shapes it is for, "
            f"mend {mend}; if it needs {needs}, set parallel.partition=profile, which runs it"
        ) from error


def first_line(error: Exception) -> str:
    """Type and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

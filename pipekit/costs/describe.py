"""Costs of each layer from its code alone: nothing is allocated and nothing computed.

Each distinct spec runs once for each distinct shape and type of its inputs, on torch's meta device, so that a model of
any depth takes no longer than its few kinds of layers.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipekit.costs.layer_timing import build_values
from pipekit.costs.trace import TracedLayer, trace_costs
from pipekit.errors import ConfigError, PipekitError
from pipekit.layers.shapes import ShapeRules
from pipekit.layers.specs import LayerSpec, TiedLayerSpec, build_on_meta, layer_names, spec_key
from pipekit.predictions.layer_costs import LayerCosts, ModelCosts
from pipekit.tensor_parallel import Logits
from pipekit.tensors.meta import NestedMeta
from pipekit.tensors.nested import Structure, unflatten

LossFn = Callable[[Any, Any], Any]

# What torch says of shapes that do not fit. Other errors may be those of a layer that needs values, or its own device.
_MISFIT = re.compile(
    r"shapes cannot be multiplied|must match the size of tensor|is invalid for input of size|Given normalized_shape|"
    r"have same reduction dim|Sizes of tensors must match|to have \d+ channels|must be equal to input_size|"
    r"should be broadcastable|positional argument|Invalid channel dimensions|was expecting embedding dimension|"
    r"Expected size for first two dimensions"
)

_REMEDY = (
    "if these are not the shapes it is for, mend {}; if it needs {}, set parallel.partition=profile, which runs it"
)


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

    def describe(layer_idx: int, name: str, inputs: NestedMeta, loss_fn: LossFn | None) -> TracedLayer:
        loss = None if loss_fn is None else take_loss(loss_fn, labels)
        return describe_layer(specs[layer_idx], inputs, name=name, dtype=dtype, loss=loss)

    layers, outputs = walk_layers(specs, inputs, describe, dtype=dtype, loss_fn=loss_fn)
    return ModelCosts(layers, None if loss_fn is None or is_loss(outputs) else describe_loss(loss_fn, outputs, labels))


def check_shapes(specs: Sequence[LayerSpec], inputs: Any, *, dtype: torch.dtype) -> None:
    """Run the forward of all layers without values, each kind once, and find one that does not fit its inputs.

    A layer that cannot run without values, and those behind it, are not checked.

    Args:
        specs: the model.
        inputs: see `describe_layers`.
        dtype: of weights and floating-point activations.

    Raises:
        ConfigError: if a layer does not fit its inputs; it names the layer.

    Example:
        >>> specs = [LayerSpec(nn.Linear, 4, 6), LayerSpec(nn.Linear, 5, 2)]
        >>> check_shapes(specs, torch.zeros(3, 4), dtype=torch.float32)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        pipekit.errors.ConfigError: layer 'layers.1' (Linear) does not fit its input, float32[3, 6]: ...
    """
    meta = NestedMeta.of(inputs, "the input of the first layer", dtype=dtype)
    found: dict[Hashable, NestedMeta] = {}
    for spec, name in zip(specs, layer_names(specs), strict=True):
        key = _kind_of(spec, meta)
        if key not in found:
            try:
                outputs = _run_on_meta(spec, meta, name=name, dtype=dtype)
                found[key] = NestedMeta.of(outputs, f"the output of layer {name!r}", dtype=dtype)
            except Exception as error:
                if _MISFIT.search(str(error)) is None:
                    return
                raise ConfigError(
                    f"layer {name!r} ({spec.type_name}) does not fit its input, {meta}: {first_line(error)}; mend the "
                    "layer, or the one before it"
                ) from error
        meta = found[key]


def walk_layers(
    specs: Sequence[LayerSpec],
    inputs: Any,
    find_costs: Callable[[int, str, NestedMeta, LossFn | None], TracedLayer],
    *,
    dtype: torch.dtype,
    loss_fn: LossFn | None,
) -> tuple[list[LayerCosts], NestedMeta]:
    """Costs of each layer, found once for equal layers on equal inputs, and shapes and types of the last outputs.

    Args:
        specs: the model.
        inputs: nested inputs of the first layer.
        find_costs: called with index, logical name and inputs of a layer, and with the loss if that is a part of it.
        dtype: of weights and floating-point activations.
        loss_fn: the loss function behind the last layer, if any.
    """
    meta = NestedMeta.of(inputs, "the input of the first layer", dtype=dtype)
    found: dict[Hashable, TracedLayer] = {}
    layers: list[LayerCosts] = []
    for layer_idx, (spec, name) in enumerate(zip(specs, layer_names(specs), strict=True)):
        is_last = layer_idx == len(specs) - 1
        has_loss = is_last and loss_fn is not None and _gives_logits(spec, meta, name=name, dtype=dtype)
        key = (*_kind_of(spec, meta), has_loss)
        if key not in found:
            found[key] = find_costs(layer_idx, name, meta, loss_fn if has_loss else None)
        layers.append(found[key].costs)
        meta = found[key].outputs
    return layers, meta


def _kind_of(spec: LayerSpec, inputs: NestedMeta) -> tuple[Hashable, ...]:
    """Key that is equal for equal layers on equal inputs."""
    return spec_key(spec), spec.forward_fn if isinstance(spec, TiedLayerSpec) else None, inputs.key


def _run_on_meta(spec: LayerSpec, inputs: NestedMeta, *, name: str, dtype: torch.dtype) -> Any:
    """Outputs of a layer, computed without values and without gradients."""
    layer = build_on_meta(spec, name=name).to(device="meta", dtype=dtype).train()
    with torch.no_grad(), torch.device("meta"), ShapeRules():
        return apply_layer(layer, spec)(unflatten(inputs.on_meta(), inputs.structure))


def describe_layer(
    spec: LayerSpec, inputs: NestedMeta, *, name: str, dtype: torch.dtype, loss: Callable[[Any], Any] | None = None
) -> TracedLayer:
    """Costs of one layer, with the loss of its outputs if these are `Logits`, and the shapes and types of its outputs.

    Raises:
        ConfigError: if it does not fit its inputs, or cannot run without values.
    """
    remedy = _REMEDY.format("the layer before it", "values, or tensors on a device of its own")
    with failures(f"layer {name!r} ({spec.type_name})", f"described from {inputs}", lambda error: remedy):
        layer = build_on_meta(spec, name=name).to(device="meta", dtype=dtype).train()
        traced = trace_module(layer, apply_layer(layer, spec, loss), inputs.on_meta(), inputs.structure)
    if not spec.recomputes_attention:
        return traced
    whole = describe_layer(spec.with_recomputed_attention(False), inputs, name=name, dtype=dtype, loss=loss)
    core_bytes = max(0, whole.costs.saved_bytes - traced.costs.saved_bytes)
    return replace(traced, costs=replace(traced.costs, core_bytes=core_bytes))


def trace_module(
    module: nn.Module, call: Callable[[Any], Any], leaves: Sequence[Tensor], structure: Structure
) -> TracedLayer:
    """Trace the costs of a built layer on its device; `call` is the function that a stage calls with its inputs."""
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


def _gives_logits(spec: LayerSpec, inputs: NestedMeta, *, name: str, dtype: torch.dtype) -> bool:
    """Test if a layer returns `Logits`, as far as can be told without values."""
    try:
        return isinstance(_run_on_meta(spec, inputs, name=name, dtype=dtype), Logits)
    except Exception:  # whoever describes or measures the layer says what is wrong
        return False


def take_loss(loss_fn: LossFn, labels: Any, device: torch.device | None = None) -> Callable[[Any], Any]:
    """Function that computes the loss of outputs on a device; on torch's meta device unless given."""
    meta = NestedMeta.of(labels, "the labels")
    compute = copy.deepcopy(loss_fn).to(device or "meta") if isinstance(loss_fn, nn.Module) else loss_fn
    given = unflatten(meta.on_meta() if device is None else build_values(meta, device, labels), meta.structure)
    return lambda outputs: compute(outputs, given)


def is_loss(outputs: NestedMeta) -> bool:
    """Test if the last layer returns the loss already."""
    return [tensor.shape for tensor in outputs.tensors] == [()]


def describe_loss(loss_fn: LossFn, outputs: NestedMeta, labels: Any) -> LayerCosts:
    """Costs of the loss, as if it were a layer behind the last one.

    Raises:
        ConfigError: if the loss function does not fit what it is given, or cannot run without values.
    """
    given = f"described from {outputs} and the labels {NestedMeta.of(labels, 'the labels')}"
    remedy = _REMEDY.format("the last layer or the labels", "values")
    with failures(name_of_loss(loss_fn), given, lambda error: remedy), torch.device("meta"):
        return trace_costs(take_loss(loss_fn, labels), outputs.on_meta(), outputs.structure, is_sharded=True).costs


def name_of_loss(loss_fn: LossFn) -> str:
    """Name of a loss function, for errors."""
    return f"the loss function {getattr(loss_fn, '__name__', type(loss_fn).__name__)}"


@contextmanager
def failures(what: object, tried: str, remedy_of: Callable[[Exception], str]) -> Iterator[None]:
    """Name the layer, its inputs and a remedy in every error."""
    try:
        yield
    except ConfigError:
        raise
    except PipekitError as error:
        raise ConfigError(f"{what}: {error}") from None
    except Exception as error:
        raise ConfigError(f"{what} cannot be {tried}: {first_line(error)}; {remedy_of(error)}") from error


def first_line(error: Exception) -> str:
    """Type and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

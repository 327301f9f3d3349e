"""What each layer costs, told from its code alone: nothing is allocated and nothing computed.

Each distinct spec runs once for each distinct form of its inputs, on torch's meta device, so that a model of any depth
takes no longer than its few kinds of layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipekit.costs.observe import Form, Observed, observe
from pipekit.errors import ConfigError, PipekitError
from pipekit.layers.shapes import ShapeRules
from pipekit.layers.specs import LayerSpec, TiedLayerSpec, build_on_meta, layer_names, spec_key
from pipekit.predictions.layer_costs import LayerCosts
from pipekit.predictions.model_costs import ModelCosts
from pipekit.tensor_parallel import Logits
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
    """Return what each layer costs for one micro-batch, and what the loss costs.

    Where the last layer returns `Logits`, whose scores the loss computes, the loss is a part of that layer.

    Operations are those of matrix products, convolutions and attention; nothing else is counted. Attention is taken to
    be fused (see `pipekit.costs.observe`).

    Args:
        specs: the model.
        inputs: what the first layer is given for one micro-batch: nested tensors on any device, of which shapes and
            types count alone. Token ids are int64 `(B, S)`.
        dtype: of weights and floating-point activations.
        loss_fn: called as `loss_fn(outputs, labels)` behind the last layer; None where that returns the loss.
        labels: what the loss function is given, nested tensors of which shapes and types count alone.

    Raises:
        ConfigError: if a layer does not fit its inputs, or cannot run without values; it names the layer.

    Example:
        >>> ids = torch.empty(2, 8, dtype=torch.int64, device="meta")
        >>> specs = [LayerSpec(nn.Embedding, 100, 4), LayerSpec(nn.Linear, 4, 100, bias=False)]
        >>> costs = describe_layers(specs, ids, dtype=torch.bfloat16)
        >>> [(layer.parameters, layer.forward_flops, layer.input_gradient_flops) for layer in costs.layers]
        [(400, 0, 0), (400, 12800, 12800)]
    """
    form = Form.of(inputs, "the input of the first layer", dtype=dtype)
    described: dict[Hashable, Observed] = {}
    layers: list[LayerCosts] = []
    for spec, name in zip(specs, layer_names(specs), strict=True):
        is_last = len(layers) == len(specs) - 1
        loss = None
        if is_last and loss_fn is not None and gives_logits(spec, form, name=name, dtype=dtype):
            loss = take_loss(loss_fn, labels)
        key = (layer_key(spec, form), loss is None)
        if key not in described:
            described[key] = describe_layer(spec, form, name=name, dtype=dtype, loss=loss)
        layers.append(described[key].costs)
        form = described[key].outputs
    return ModelCosts(layers, None if loss_fn is None or is_loss(form) else describe_loss(loss_fn, form, labels))


def layer_key(spec: LayerSpec, inputs: Form) -> Hashable:
    """Return what layers of equal costs have in common."""
    forward_fn = spec.forward_fn if isinstance(spec, TiedLayerSpec) else None
    return spec_key(spec), forward_fn, inputs.key


def describe_layer(
    spec: LayerSpec, inputs: Form, *, name: str, dtype: torch.dtype, loss: Callable[[Any], Any] | None = None
) -> Observed:
    """Return what one layer costs, and the form of what it returns.

    Args:
        spec: the layer.
        inputs: the form of what it is given.
        name: its logical name, for errors.
        dtype: of its weights.
        loss: computes the loss of what the layer returns, if that is `Logits`.

    Raises:
        ConfigError: if it does not fit its inputs, or cannot run without values.
    """
    what = f"layer {name!r} ({spec.type_name})"
    with _failures(what, inputs, mend="the layer before it", needs="values, or tensors on a device of its own"):
        layer = build_on_meta(spec, name=name).to(device="meta", dtype=dtype).train()
        return observe_module(layer, apply_layer(layer, spec, loss), leaves_of(inputs), inputs.structure)


def observe_module(
    module: nn.Module, call: Callable[[Any], Any], leaves: Sequence[Tensor], structure: Structure
) -> Observed:
    """Run a built layer once, on whatever device it is, and return what it costs.

    Args:
        module: holds the layer's parameters and buffers.
        call: what a stage calls with the layer's inputs.
        leaves: the tensors that enter.
        structure: how they hang together.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    held = [parameter for parameter in module.parameters() if not parameter.requires_grad] + list(module.buffers())
    with leaves[0].device if leaves else torch.device("meta"):
        return observe(call, leaves, structure, parameters=trained, held=held)


def apply_layer(layer: nn.Module, spec: LayerSpec, loss: Callable[[Any], Any] | None = None) -> Callable[[Any], Any]:
    """Return what a stage calls with a layer's inputs; for `Logits`, with the loss of these behind it."""
    forward_fn = spec.forward_fn if isinstance(spec, TiedLayerSpec) else None
    forward = layer if forward_fn is None else partial(forward_fn, layer)
    if loss is None:
        return forward

    def with_loss(inputs: Any) -> Any:
        outputs = forward(inputs)
        return loss(outputs) if isinstance(outputs, Logits) else outputs

    return with_loss


def gives_logits(spec: LayerSpec, inputs: Form, *, name: str, dtype: torch.dtype) -> bool:
    """Return whether a layer returns `Logits`, as far as can be told without values."""
    try:
        layer = build_on_meta(spec, name=name).to(device="meta", dtype=dtype).train()
        with torch.no_grad(), torch.device("meta"), ShapeRules():
            return isinstance(apply_layer(layer, spec)(unflatten(leaves_of(inputs), inputs.structure)), Logits)
    except Exception:  # whoever describes or measures the layer says what is wrong
        return False


def take_loss(loss_fn: LossFn, labels: Any) -> Callable[[Any], Any]:
    """Return what computes the loss of outputs, on torch's meta device."""
    form = Form.of(labels, "the labels")
    compute = copy.deepcopy(loss_fn).to("meta") if isinstance(loss_fn, nn.Module) else loss_fn
    given = unflatten(leaves_of(form), form.structure)
    return lambda outputs: compute(outputs, given)


def is_loss(outputs: Form) -> bool:
    """Return whether what the last layer returns is the loss already."""
    return [tensor.shape for tensor in outputs.tensors] == [()]


def describe_loss(loss_fn: LossFn, outputs: Form, labels: Any) -> LayerCosts:
    """Return what the loss costs, as if it were a layer whose input is what the last layer returns.

    Args:
        loss_fn: called as `loss_fn(outputs, labels)`.
        outputs: the form of what the last layer returns.
        labels: nested tensors of which shapes and types count alone.

    Raises:
        ConfigError: if the loss function does not fit what it is given, or cannot run without values.
    """
    label_form = Form.of(labels, "the labels")
    loss_name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    given_forms = f"{outputs} and the labels {label_form}"
    what = f"the loss function {loss_name}"
    with (
        _failures(what, given_forms, mend="the last layer or the labels", needs="values"),
        torch.device("meta"),
    ):
        return observe(take_loss(loss_fn, labels), leaves_of(outputs), outputs.structure).costs


@contextmanager
def _failures(what: str, given: object, *, mend: str, needs: str) -> Iterator[None]:
    """Say of whatever is raised what was described, from what, and what helps."""
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


def leaves_of(form: Form) -> list[Tensor]:
    """Return meta tensors of a form."""
    return [
        torch.empty(tensor.shape, dtype=tensor.dtype, device="meta", requires_grad=tensor.requires_grad)
        for tensor in form.tensors
    ]


def first_line(error: Exception) -> str:
    """Return what went wrong in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

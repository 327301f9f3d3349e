"""Costs of each layer on the device that is present, with measured seconds.

Each distinct spec runs for each distinct shape and type of its inputs, forward, input gradient and weight gradient
apart, as under a schedule that splits backwards. A layer is measured once, and read from a file afterwards.
"""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipekit.costs.describe import (
    LossFn,
    apply_layer,
    describe_layer,
    describe_loss,
    failures,
    is_loss,
    name_of_loss,
    take_loss,
    trace_module,
    walk_layers,
)
from pipekit.costs.fingerprint import Fingerprinter, Plain, UnstableError
from pipekit.costs.layer_timing import build_values, time_layer
from pipekit.costs.profile_cache import ProfileCache, plain_meta
from pipekit.costs.trace import TracedLayer
from pipekit.errors import ConfigError
from pipekit.layers.specs import LayerSpec, build_layer, build_on_meta
from pipekit.predictions.layer_costs import LayerCosts, ModelCosts
from pipekit.progress import ProgressCallback
from pipekit.tensors.fp32_products import fp32_products
from pipekit.tensors.host_memory import keep_freed_memory
from pipekit.tensors.meta import NestedMeta

logger = logging.getLogger(__name__)

_FORMAT_VERSION = 2  # raise it when the same layer would be measured in another way


def profile_layers(
    specs: Sequence[LayerSpec],
    example_inputs: Any,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    loss_fn: LossFn | None = None,
    labels: Any = None,
    tf32: bool = False,
    cache_dir: str | Path | None = None,
    repeats: int = 10,
    on_progress: ProgressCallback | None = None,
) -> ModelCosts:
    """Costs of each layer and of the loss for one micro-batch, with measured seconds.

    The seconds are medians. `weight_gradient_s` is the time of weight gradients that linear layers defer. Other layers
    compute their weight gradients together with their input gradients, in a run as here, and both count as
    `input_gradient_s`.

    After measuring on CPUs, this process keeps the memory of freed tensors, as runs do: otherwise large layers would be
    charged in every repeat for pages that a run is given once.

    Args:
        specs: the model.
        example_inputs: inputs of the first layer for one micro-batch. The layers behind it are given random numbers of
            the shapes that the layer before returns; True for booleans, and zeros for integers.
        dtype: of weights and floating-point activations.
        device: the device to measure on; on CPUs with the number of threads that this process has.
        loss_fn: called as `loss_fn(outputs, labels)` behind the last layer; None where that returns the loss.
        labels: labels for the loss function.
        tf32: whether a GPU multiplies fp32 in TF32.
        cache_dir: folder of earlier measurements; None means `~/.cache/pipekit/profiles`.
        repeats: how often each layer is run after warming up; fewer times where it takes seconds.
        on_progress: called with the layer that is about to be measured, and the share of the layers that are done.

    Raises:
        ConfigError: if a layer does not fit its inputs, or fails; it names the layer.
    """
    target = _Target(dtype, torch.device(device), Fingerprinter())
    cache = ProfileCache(Path(cache_dir or "~/.cache/pipekit/profiles").expanduser())
    with fp32_products(target.device, tf32=tf32):
        profiler = _Profiler(target, cache, repeats, on_progress)
        return _profile_layers(specs, example_inputs, profiler, loss_fn=loss_fn, labels=labels)


def _profile_layers(
    specs: Sequence[LayerSpec], example_inputs: Any, profiler: _Profiler, *, loss_fn: LossFn | None, labels: Any
) -> ModelCosts:
    target = profiler.target

    def measure(layer_idx: int, name: str, inputs: NestedMeta, loss_fn: LossFn | None) -> TracedLayer:
        loss = None if loss_fn is None else _Loss(loss_fn, labels, target)
        values = example_inputs if layer_idx == 0 else None
        return profiler.profile(_Layer(specs[layer_idx], name, loss, target), inputs, values, layer_idx / len(specs))

    layers, outputs = walk_layers(specs, example_inputs, measure, dtype=target.dtype, loss_fn=loss_fn)
    if loss_fn is None or is_loss(outputs):
        return ModelCosts(layers)
    return ModelCosts(layers, profiler.profile(_Loss(loss_fn, labels, target), outputs, None, 1.0).costs)


@dataclass(frozen=True)
class _Target:
    """Dtype and device of the measurements, and the descriptions of layers."""

    dtype: torch.dtype
    device: torch.device
    fingerprinter: Fingerprinter


@dataclass(frozen=True)
class _Loss:
    """A loss function with its labels, measured as a layer without parameters, or as a part of the last layer."""

    loss_fn: LossFn
    labels: Any
    target: _Target

    def __str__(self) -> str:
        return name_of_loss(self.loss_fn)

    def identify(self) -> Plain:
        """Describe it as plain data."""
        # A loss that is a module has the tensors that its text does not tell.
        state = self.loss_fn.state_dict() if isinstance(self.loss_fn, nn.Module) else {}
        of = self.target.fingerprinter.of
        return [of(self.loss_fn), of(dict(state)), plain_meta(NestedMeta.of(self.labels, "the labels"))]

    def build(self) -> tuple[nn.Module, Callable[[Any], Any]]:
        """Build a module without parameters, and a function of the outputs that computes the loss."""
        return nn.Module(), take_loss(self.loss_fn, self.labels, self.target.device)

    def describe(self, inputs: NestedMeta) -> LayerCosts:
        """Costs by its code alone."""
        return describe_loss(self.loss_fn, inputs, self.labels)


@dataclass(frozen=True)
class _Layer:
    """A layer to measure, with the loss behind it where it returns `Logits`."""

    spec: LayerSpec
    name: str
    loss: _Loss | None
    target: _Target

    def __str__(self) -> str:
        return f"layer {self.name!r} ({self.spec.type_name})"

    def identify(self) -> Plain:
        """Describe it as plain data."""
        layer = self.target.fingerprinter.of_layer(self.spec, build_on_meta(self.spec, name=self.name).modules())
        return layer if self.loss is None else [layer, self.loss.identify()]

    def build(self) -> tuple[nn.Module, Callable[[Any], Any]]:
        """Build the layer, and the function that a stage calls."""
        layer = build_layer(self.spec, name=self.name, seed=0).to(device=self.target.device, dtype=self.target.dtype)
        return layer.train(), apply_layer(layer, self.spec, None if self.loss is None else self.loss.build()[1])

    def describe(self, inputs: NestedMeta) -> LayerCosts:
        """Costs by its code alone."""
        loss = None if self.loss is None else take_loss(self.loss.loss_fn, self.loss.labels)
        return describe_layer(self.spec, inputs, name=self.name, dtype=self.target.dtype, loss=loss).costs


class _Profiler:
    """Measures layers on one device."""

    def __init__(
        self, target: _Target, cache: ProfileCache, repeats: int, on_progress: ProgressCallback | None
    ) -> None:
        self.target = target
        self._on_progress = on_progress
        self._cache = cache
        self._repeats = repeats
        self._machine = {
            "format": _FORMAT_VERSION,
            "dtype": str(target.dtype),
            "device": _device_name(target.device),
            "threads": torch.get_num_threads() if target.device.type == "cpu" else None,
            "torch": torch.__version__,
            "matmul": torch.get_float32_matmul_precision(),
        }

    def profile(self, layer: _Layer | _Loss, inputs: NestedMeta, values: Any, done: float) -> TracedLayer:
        """Measure a layer, unless it is in the cache.

        Args:
            layer: the layer.
            inputs: shapes and types of its inputs.
            values: the inputs; None where any values will do.
            done: the share of the layers that are done.
        """
        explain_failures = partial(failures, layer, f"measured on {inputs}", _remedy_of)
        with explain_failures():
            identity = self._identify(layer, inputs)
        stored = None if identity is None else self._cache.load(identity)
        if stored is not None:
            return stored
        if self._on_progress is not None:
            self._on_progress(f"measuring {layer} on {inputs}", done)
        with explain_failures(), _own_random_numbers(self.target.device):
            measured = self._measure(layer, inputs, values)
        if identity is not None:
            self._cache.save(identity, measured)
        return measured

    def _identify(self, layer: _Layer | _Loss, inputs: NestedMeta) -> Plain | None:
        try:
            description = layer.identify()
        except UnstableError as error:
            logger.info("%s is measured every time: %s has no description that stays", layer, error)
            return None
        identity = {**self._machine, "layer": description, "inputs": plain_meta(inputs)}
        return json.loads(json.dumps(identity))  # as it will be read: without tuples

    def _measure(self, layer: _Layer | _Loss, inputs: NestedMeta, values: Any) -> TracedLayer:
        device = self.target.device
        if device.type == "cpu":
            keep_freed_memory()
        module, call = layer.build()
        leaves = build_values(inputs, device, values)
        seconds, outputs = time_layer(call, leaves, inputs.structure, device=device, repeats=self._repeats)
        try:
            costs = layer.describe(inputs)
        except ConfigError:  # it needs values, and has just shown that it runs with these
            costs = trace_module(module, call, leaves, inputs.structure).costs
        return TracedLayer(replace(costs, **seconds, work=None), outputs)


def _remedy_of(error: Exception) -> str:
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return "lower train.micro_batch_size, or measure where there is more memory"
    return (
        "if these are not the shapes it is for, mend the layer before it; if it needs other values than random "
        "numbers and zeros, choose a parallel.partition that runs nothing"
    )


@contextmanager
def _own_random_numbers(device: torch.device) -> Iterator[None]:
    """Leave torch's generators as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(0)
        yield


def _device_name(device: torch.device) -> str:
    """Model name of the device, equal for equal ones."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else f"{platform.machine()} {platform.processor()}".strip()

"""What each layer costs on the device that is present: the costs that its code tells, and measured seconds.

Each distinct spec runs for each distinct form of its inputs, forward, input gradient and weight gradient apart, as a
schedule that splits backwards runs them. What was measured once is read from a file afterwards.
"""

from __future__ import annotations

import copy
import json
import logging
import platform
from collections.abc import Callable, Hashable, Iterator, Sequence
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
    first_line,
    gives_logits,
    is_loss,
    layer_key,
    observe_module,
    take_loss,
)
from pipekit.costs.fingerprint import Fingerprinter, Plain, UnstableError
from pipekit.costs.layer_timing import build_values, time_layer
from pipekit.costs.observe import Form, Observed
from pipekit.costs.profile_cache import ProfileCache, plain_form
from pipekit.errors import ConfigError, PipekitError
from pipekit.layers.specs import LayerSpec, build_layer, build_on_meta, layer_names
from pipekit.predictions.layer_costs import LayerCosts
from pipekit.predictions.model_costs import ModelCosts
from pipekit.progress import ProgressCallback
from pipekit.tensors.host_memory import keep_freed_memory
from pipekit.tensors.nested import unflatten

logger = logging.getLogger(__name__)

DEFAULT_PROFILE_DIR = "~/.cache/pipekit/profiles"
_FORMAT_VERSION = 2  # raise it when the same layer would be measured in another way


def profile_layers(
    specs: Sequence[LayerSpec],
    example_inputs: Any,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    loss_fn: LossFn | None = None,
    labels: Any = None,
    cache_dir: str | Path | None = None,
    repeats: int = 10,
    on_progress: ProgressCallback | None = None,
) -> ModelCosts:
    """Return what each layer costs for one micro-batch, and what the loss costs, with measured seconds.

    The seconds are medians. `weight_gradient_s` is what linear layers put off. Other layers compute their weight
    gradients together with their input gradients, in a run as here, and both count as `input_gradient_s`.

    Whoever measures on CPUs keeps the memory of freed tensors from then on, as runs do: otherwise large layers would be
    charged in every repeat for pages that a run is given once.

    Args:
        specs: the model.
        example_inputs: what the first layer is given for one micro-batch. The layers behind it are given random numbers
            in the form of what the layer before returns; True for booleans, and zeros for integers.
        dtype: of weights and floating-point activations.
        device: what to run on; on CPUs with the number of threads that this process has.
        loss_fn: called as `loss_fn(outputs, labels)` behind the last layer; None where that returns the loss.
        labels: what the loss function is given.
        cache_dir: folder of what was measured; None means `~/.cache/pipekit/profiles`.
        repeats: how often each layer is run after warming up; fewer times where it takes seconds.
        on_progress: called with what is about to be measured, and the share of the layers that are done.

    Raises:
        ConfigError: if a layer does not fit its inputs, or fails; it names the layer.
    """
    folder = Path(cache_dir or DEFAULT_PROFILE_DIR).expanduser()
    profiler = _Profiler(dtype, torch.device(device), ProfileCache(folder), repeats)
    report = on_progress or _ignore_progress
    form = Form.of(example_inputs, "the input of the first layer", dtype=dtype)
    given: Any = example_inputs
    profiled: dict[Hashable, Observed] = {}
    layers: list[LayerCosts] = []
    for layer_idx, (spec, name) in enumerate(zip(specs, layer_names(specs), strict=True)):
        is_last = layer_idx == len(specs) - 1
        loss = None
        if is_last and loss_fn is not None and gives_logits(spec, form, name=name, dtype=dtype):
            loss = profiler.loss_of(loss_fn, labels)
        key = (layer_key(spec, form), loss is None)
        if key not in profiled:
            subject = profiler.layer(spec, name, form, given, loss)
            profiled[key] = profiler.profile(subject, partial(_report, report, layer_idx / len(specs)))
        layers.append(profiled[key].costs)
        form, given = profiled[key].outputs, None
    if loss_fn is None or is_loss(form):
        return ModelCosts(layers)
    measured = profiler.profile(profiler.loss(loss_fn, form, labels), partial(_report, report, 1.0))
    return ModelCosts(layers, measured.costs)


@dataclass(frozen=True)
class _Subject:
    """What is measured: a layer, or the loss function as if it were a layer without parameters.

    Attributes:
        what: names it in messages.
        inputs: the form of what it is given.
        given: what it is given; None where any values will do.
        identify: tells what it is, as plain data.
        build: returns the module that holds its parameters, and what a stage calls.
        describe: tells its costs without running it.
    """

    what: str
    inputs: Form
    given: Any
    identify: Callable[[], Plain]
    build: Callable[[], tuple[nn.Module, Callable[[Any], Any]]]
    describe: Callable[[], LayerCosts]


class _Loss:
    """A loss function with the labels that it is given."""

    def __init__(self, loss_fn: LossFn, labels: Any, fingerprinter: Fingerprinter, device: torch.device) -> None:
        self._loss_fn = loss_fn
        self._labels = labels
        self._form = Form.of(labels, "the labels")
        self._fingerprinter = fingerprinter
        self._device = device

    def identify(self) -> Plain:
        """Tell what it is, as plain data."""
        # A loss that is a module has the tensors that its text does not tell.
        state = self._loss_fn.state_dict() if isinstance(self._loss_fn, nn.Module) else {}
        return [self._fingerprinter.of(self._loss_fn), self._fingerprinter.of(dict(state)), plain_form(self._form)]

    def build(self) -> Callable[[Any], Any]:
        """Return what computes the loss of outputs where layers are measured."""
        loss_fn = self._loss_fn
        compute = copy.deepcopy(loss_fn).to(self._device) if isinstance(loss_fn, nn.Module) else loss_fn
        given = unflatten(build_values(self._form, self._device, self._labels), self._form.structure)
        return lambda outputs: compute(outputs, given)

    def describe(self) -> Callable[[Any], Any]:
        """Return what computes it on torch's meta device."""
        return take_loss(self._loss_fn, self._labels)


class _Profiler:
    """Measures layers on one device."""

    def __init__(self, dtype: torch.dtype, device: torch.device, cache: ProfileCache, repeats: int) -> None:
        self._dtype = dtype
        self._device = device
        self._cache = cache
        self._repeats = repeats
        self._fingerprinter = Fingerprinter()
        self._machine = {
            "format": _FORMAT_VERSION,
            "dtype": str(dtype),
            "device": _device_name(device),
            "threads": torch.get_num_threads() if device.type == "cpu" else None,
            "torch": torch.__version__,
        }

    def layer(self, spec: LayerSpec, name: str, inputs: Form, given: Any, loss: _Loss | None) -> _Subject:
        def identify() -> Plain:
            layer = self._fingerprinter.of_layer(spec, build_on_meta(spec, name=name).modules())
            return layer if loss is None else [layer, loss.identify()]

        def build() -> tuple[nn.Module, Callable[[Any], Any]]:
            layer = build_layer(spec, name=name, seed=0).to(device=self._device, dtype=self._dtype).train()
            return layer, apply_layer(layer, spec, None if loss is None else loss.build())

        def describe() -> LayerCosts:
            taken = None if loss is None else loss.describe()
            return describe_layer(spec, inputs, name=name, dtype=self._dtype, loss=taken).costs

        return _Subject(f"layer {name!r} ({spec.type_name})", inputs, given, identify, build, describe)

    def loss_of(self, loss_fn: LossFn, labels: Any) -> _Loss:
        return _Loss(loss_fn, labels, self._fingerprinter, self._device)

    def loss(self, loss_fn: LossFn, inputs: Form, labels: Any) -> _Subject:
        loss = self.loss_of(loss_fn, labels)

        def describe() -> LayerCosts:
            return describe_loss(loss_fn, inputs, labels)

        name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        build = loss.build
        return _Subject(
            f"the loss function {name}", inputs, None, loss.identify, lambda: (nn.Module(), build()), describe
        )

    def profile(self, subject: _Subject, report: Callable[[str], None]) -> Observed:
        with _failures(subject):
            identity = self._identify(subject)
        stored = None if identity is None else self._cache.load(identity)
        if stored is not None:
            return stored
        report(f"measuring {subject.what} on {subject.inputs}")
        with _failures(subject), _own_random_numbers(self._device):
            measured = self._measure(subject)
        if identity is not None:
            self._cache.save(identity, measured)
        return measured

    def _identify(self, subject: _Subject) -> Plain | None:
        try:
            layer = subject.identify()
        except UnstableError as error:
            logger.info("%s is measured every time: %s has no description that stays", subject.what, error)
            return None
        identity = {**self._machine, "layer": layer, "inputs": plain_form(subject.inputs)}
        return json.loads(json.dumps(identity))  # as it will be read: without tuples

    def _measure(self, subject: _Subject) -> Observed:
        if self._device.type == "cpu":
            keep_freed_memory()
        module, call = subject.build()
        leaves = build_values(subject.inputs, self._device, subject.given)
        structure = subject.inputs.structure
        times = time_layer(call, leaves, structure, device=self._device, repeats=self._repeats)
        try:
            costs = subject.describe()
        except ConfigError:  # it needs values, and has just shown that it runs with these
            costs = observe_module(module, call, leaves, structure).costs
        measured = replace(
            costs,
            forward_s=times.forward_s,
            input_gradient_s=times.input_gradient_s,
            weight_gradient_s=times.weight_gradient_s,
        )
        return Observed(measured, times.outputs)


@contextmanager
def _failures(subject: _Subject) -> Iterator[None]:
    """Name the layer in whatever it raises."""
    try:
        yield
    except ConfigError:
        raise
    except PipekitError as error:
        raise ConfigError(f"{subject.what}: {error}") from None
    except Exception as error:
        remedy = (
            "if these are not the shapes it is for, mend the layer before it; if it needs other values than random "
            "numbers and zeros, choose a parallel.partition that runs nothing"
        )
        if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
            remedy = "lower train.micro_batch_size, or measure where there is more memory"
        raise ConfigError(
            f"{subject.what} cannot be measured on {subject.inputs}: {first_line(error)}; {remedy}"
        ) from error


@contextmanager
def _own_random_numbers(device: torch.device) -> Iterator[None]:
    """Leave torch's generators as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(0)
        yield


def _device_name(device: torch.device) -> str:
    """Return what the device is, equal for equal ones."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else f"{platform.machine()} {platform.processor()}".strip()


def _report(report: ProgressCallback, done: float, text: str) -> None:
    report(text, done)


def _ignore_progress(text: str, done: float | None) -> None:
    pass

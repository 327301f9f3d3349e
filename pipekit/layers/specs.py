"""Layer specs: a model as plain data.

A model is a list of specs. A spec names a module class and its arguments; nothing is allocated until the rank
that owns the layer calls `build`. Listing a trillion-parameter model costs nothing.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipekit.errors import ConfigError
from pipekit.layers.shapes import ShapeRules
from pipekit.rng import fold_seed
from pipekit.tensor_parallel.flow import SequenceFlow, flow_of
from pipekit.tensor_parallel.lora import LowRank, attach_adapters


@dataclass(frozen=True)
class LinearAdapter:
    """The low-rank adapters of a linear layer inside a layer, not yet built.

    Attributes:
        module: path of the linear layer in the layer.
        parts: name and number of outputs of each part of it, in order.
        adapted: the parts that have an adapter each.
        low_rank: the settings of all.
    """

    module: str
    parts: tuple[tuple[str, int], ...]
    adapted: tuple[str, ...]
    low_rank: LowRank


class LayerSpec:
    """One layer of a model, not yet built.

    Args:
        typename: an `nn.Module` class, or any callable that returns one.
        *args: positional arguments of `typename`.
        name: logical name of the layer; its parameters are called `<name>.<parameter>` in checkpoints and exports.
            Defaults to `layers.<index in the list>`.
        **kwargs: keyword arguments of `typename`.

    Attributes:
        frozen: parameters of the layer that are not trained, by their names in it.
        adapters: low-rank adapters of linear layers in it.
        recomputes_attention: whether attention cores in it are recomputed in the backward.

    Example:
        >>> from torch import nn
        >>> LayerSpec(nn.Linear, 4, 2, name="head")
        LayerSpec(Linear, 4, 2, name='head')
    """

    frozen: frozenset[str] = frozenset()
    adapters: tuple[LinearAdapter, ...] = ()
    recomputes_attention: bool = False

    def __init__(self, typename: Callable[..., nn.Module], *args: Any, name: str | None = None, **kwargs: Any) -> None:
        if not callable(typename):
            raise ConfigError(f"LayerSpec takes an nn.Module class, not {typename!r}; write LayerSpec(nn.Linear, 4, 2)")
        if isinstance(typename, nn.Module):
            own = type(typename).__name__
            rule = f"LayerSpec takes an nn.Module class and its arguments, and {own}(...) is built already"
            raise ConfigError(f"{rule}; write LayerSpec({own}, ...)")
        self.typename = typename
        self.module_args = args
        self.module_kwargs = kwargs
        self.name = name

    @property
    def type_name(self) -> str:
        """The class name of the layer, which partitioners match (`type:<regex>`)."""
        return getattr(self.typename, "__name__", type(self.typename).__name__)

    def build(self) -> nn.Module:
        """Allocate the layer on the current default device."""
        return self.typename(*self.module_args, **self.module_kwargs)

    def with_frozen(self, names: Iterable[str]) -> LayerSpec:
        """Copy of the spec with parameters of the layer frozen beside those that are already."""
        changed = copy.copy(self)
        changed.frozen = self.frozen | frozenset(names)
        return changed

    def with_adapters(self, adapters: Iterable[LinearAdapter]) -> LayerSpec:
        """Copy of the spec with low-rank adapters of linear layers in it."""
        changed = copy.copy(self)
        changed.adapters = tuple(adapters)
        return changed

    def with_recomputed_attention(self, recomputed: bool) -> LayerSpec:
        """Copy of the spec whose attention cores are recomputed in the backward, or are not."""
        changed = copy.copy(self)
        changed.recomputes_attention = recomputed
        return changed

    def __repr__(self) -> str:
        arguments = [self.type_name, *map(repr, self.module_args)]
        arguments += [f"{key}={value!r}" for key, value in self.module_kwargs.items()]
        if self.name is not None:
            arguments.append(f"name={self.name!r}")
        return f"{type(self).__name__}({', '.join(arguments)})"


class TiedLayerSpec(LayerSpec):
    """A layer that shares its module with every other spec of the same `key`.

    Stages that hold the same key keep one copy each, with equal weights: their gradients are summed before every step.

    Args:
        key: names the shared module.
        typename: an `nn.Module` class, or any callable that returns one; `*args` and `**kwargs` are its arguments.
        forward_fn: called as `forward_fn(module, inputs)` in place of `module(inputs)`.
        tied_weight_attr: the shared parameters, as attribute paths; everything else of the module must not be
            trained by more than one stage.
        name: logical name of the shared module; defaults to the one that another spec of the key gives, or `key`.
    """

    def __init__(
        self,
        key: str,
        typename: Callable[..., nn.Module],
        *args: Any,
        forward_fn: Callable[[Any, Any], Any] | None = None,
        tied_weight_attr: str | Sequence[str] = "weight",
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(typename, *args, name=name, **kwargs)
        self.key = key
        self.forward_fn = forward_fn
        self.tied_weight_attr = [tied_weight_attr] if isinstance(tied_weight_attr, str) else list(tied_weight_attr)


def build_layer(spec: LayerSpec, *, name: str, seed: int) -> nn.Module:
    """Allocate a layer on the CPU, with initial weights that depend on `seed` and `name` alone.

    Torch's generators are left as they were.

    Raises:
        ConfigError: if the spec's arguments do not fit its class, or it builds something that is not a module.
    """
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed the GPUs' generators too, and those are not forked.
        torch.default_generator.manual_seed(fold_seed(seed, "init", name))
        return _build(spec, name)


def build_on_meta(spec: LayerSpec, *, name: str) -> nn.Module:
    """Return a layer that has shapes and no storage, to be counted or described.

    A layer that cannot be built so, because its constructor reads tensor values, is built on the CPU.

    Raises:
        ConfigError: if the spec's arguments do not fit its class, or it builds something that is not a module.
    """
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]), ShapeRules():
            return _build(spec, name)
    except (RuntimeError, TypeError):
        return build_layer(spec, name=name, seed=0)


def _build(spec: LayerSpec, name: str) -> nn.Module:
    try:
        layer = spec.build()
    except TypeError as error:
        if _accepts(spec):
            raise
        raise ConfigError(f"layer {name!r} cannot be built from {spec!r}: {error}") from None
    if not isinstance(layer, nn.Module):
        raise ConfigError(
            f"layer {name!r}: {spec!r} built {type(layer).__name__}, which is not an nn.Module; wrap it in one"
        )
    for adapter in spec.adapters:
        linear = layer.get_submodule(adapter.module)
        assert isinstance(linear, nn.Linear)
        attach_adapters(linear, dict(adapter.parts), adapter.adapted, adapter.low_rank)
    for core in attention_cores(layer) if spec.recomputes_attention else ():
        core.recomputes_attention = True  # type: ignore[assignment]
    for frozen in spec.frozen:
        layer.get_parameter(frozen).requires_grad_(False)
    return layer


def attention_cores(layer: nn.Module) -> list[nn.Module]:
    """Modules in a layer that can recompute their attention core: those with an attribute `recomputes_attention`."""
    return [module for module in layer.modules() if hasattr(module, "recomputes_attention")]


def _accepts(spec: LayerSpec) -> bool:
    """True if the arguments fit the signature, so that a TypeError comes from further inside."""
    try:
        with suppress(ValueError):  # a class of an extension module, which has no signature
            inspect.signature(spec.typename).bind(*spec.module_args, **spec.module_kwargs)
    except TypeError:
        return False
    return True


def flow_of_spec(spec: LayerSpec) -> SequenceFlow:
    """Return the sequence flow of a layer, without allocating the layer."""
    if isinstance(spec, TiedLayerSpec) and spec.forward_fn is not None:
        return flow_of(spec.forward_fn)
    return flow_of(spec.typename if isinstance(spec.typename, type) else build_on_meta(spec, name=spec.type_name))


def spec_key(spec: LayerSpec) -> Hashable:
    """Key that is equal for specs which build equal layers, apart from their weights.

    Example:
        >>> from torch import nn
        >>> spec_key(LayerSpec(nn.Linear, 4, 2, name="a")) == spec_key(LayerSpec(nn.Linear, 4, 2, name="b"))
        True
    """
    arguments = (_hashable(spec.module_args), _hashable(spec.module_kwargs))
    return _hashable(spec.typename), *arguments, spec.frozen, spec.adapters, spec.recomputes_attention


def _hashable(value: object) -> Hashable:
    """Hashable form of an argument, equal for equal arguments; an unhashable value equals itself alone."""
    if isinstance(value, dict):
        return (dict, tuple((key, _hashable(item)) for key, item in value.items()))
    if isinstance(value, (list, tuple)):
        return (type(value), tuple(map(_hashable, value)))
    try:
        hash(value)
    except TypeError:
        return _ById(value)
    return value


class _ById:
    """Hashes and compares a value by identity."""

    def __init__(self, value: object) -> None:
        self.value = value  # kept alive, so that no other value gets its id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def layer_names(specs: Sequence[LayerSpec]) -> list[str]:
    """Return the logical name of each layer: its own, a tied layer's key, or `layers.<index>`.

    Raises:
        ConfigError: if two layers that are not tied share a name, or two of one tied key differ.

    Example:
        >>> layer_names([LayerSpec(nn.Linear, 4, 4), LayerSpec(nn.Linear, 4, 2, name="head")])
        ['layers.0', 'head']
    """
    tied_names = _tied_names(specs)
    names: list[str] = []
    owner: dict[str, int | str] = {}
    for layer_idx, spec in enumerate(specs):
        key = spec.key if isinstance(spec, TiedLayerSpec) else None
        name = tied_names[key] if key is not None else spec.name or f"layers.{layer_idx}"
        identity = f"tied:{key}" if key is not None else layer_idx
        if owner.setdefault(name, identity) != identity:
            raise ConfigError(
                f"layer {layer_idx} ({spec.type_name}) is named {name!r}, and so is another layer; names must differ, "
                f"since checkpoints are keyed by them; pass another name=... to its {type(spec).__name__}"
            )
        names.append(name)
    return names


def _tied_names(specs: Sequence[LayerSpec]) -> dict[str, str]:
    """Return the logical name of each tied key, which is the same on every stage that holds it."""
    first: dict[str, TiedLayerSpec] = {}
    given: dict[str, str] = {}
    for layer_idx, spec in enumerate(specs):
        if not isinstance(spec, TiedLayerSpec):
            continue
        earlier = first.setdefault(spec.key, spec)
        place, other = f"layer {layer_idx} is tied by key={spec.key!r} and", "and an earlier layer of that key"
        if isinstance(spec.typename, type) and earlier.typename is not spec.typename:
            raise ConfigError(
                f"{place} builds {spec.type_name}, {other} builds {earlier.type_name}; layers of one key share one "
                "module: give both the same class and arguments, and tell them apart by forward_fn"
            )
        arguments = [_comparable((each.module_args, each.module_kwargs)) for each in (spec, earlier)]
        if arguments[0] != arguments[1]:
            raise ConfigError(
                f"{place} is {spec!r}, {other} is {earlier!r}; layers of one key share one module: give both the same "
                "arguments, written in the same way, and tell them apart by forward_fn"
            )
        if set(spec.tied_weight_attr) != set(earlier.tied_weight_attr):
            raise ConfigError(
                f"{place} shares {', '.join(spec.tied_weight_attr)}, {other} shares "
                f"{', '.join(earlier.tied_weight_attr)}; give both the same tied_weight_attr"
            )
        if spec.name is not None and given.setdefault(spec.key, spec.name) != spec.name:
            raise ConfigError(
                f"{place} named {spec.name!r}, {other} is named {given[spec.key]!r}; they share one module, which has "
                "one name: give it once"
            )
    return {key: given.get(key, key) for key in first}


def _comparable(value: object) -> object:
    """Form of an argument for comparing: numbers, text and containers of them as they are, anything else as equal."""
    if isinstance(value, dict):
        return {key: _comparable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_comparable(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else ...

"""Layer specs: a model as plain data.

A model is a list of specs. Each spec names a module class and its arguments; no weight is allocated until the rank
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
    """Low-rank adapters of a linear layer inside a layer, not yet built.

    Attributes:
        module: path of the linear layer inside the layer.
        parts: name and number of outputs of each part of the linear layer, in order.
        adapted: names of the parts that have an adapter.
        low_rank: settings of all adapters.
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
        frozen: names, inside the layer, of parameters that are not trained.
        adapters: low-rank adapters of linear layers inside the layer.
        recomputes_attention: whether the layer's attention cores are recomputed in the backward.

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
        """Copy of the spec with further parameters of the layer frozen."""
        changed = copy.copy(self)
        changed.frozen = self.frozen | frozenset(names)
        return changed

    def with_adapters(self, adapters: Iterable[LinearAdapter]) -> LayerSpec:
        """Copy of the spec with low-rank adapters for linear layers inside the layer."""
        changed = copy.copy(self)
        changed.adapters = tuple(adapters)
        return changed

    def with_recomputed_attention(self, recomputed: bool) -> LayerSpec:
        """Copy of the spec whose attention cores are recomputed in the backward, or not if `recomputed` is False."""
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

    Each stage that holds the key keeps one copy. The weights of the copies stay equal, because their gradients are
    summed before every step.

    Args:
        key: identifies the shared module.
        typename: an `nn.Module` class, or any callable that returns one; `*args` and `**kwargs` are its arguments.
        forward_fn: called as `forward_fn(module, inputs)` in place of `module(inputs)`.
        tied_weight_attr: attribute paths of the shared parameters; at most one stage may train the module's other
            parameters.
        name: logical name of the shared module; defaults to the name given by another spec with the key, or else `key`.
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
    """Allocate a layer on the CPU, with initial weights that depend only on `seed` and `name`.

    The state of torch's generators is unchanged.

    Raises:
        ConfigError: if the spec's arguments do not fit its class, or it builds something that is not a module.
    """
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed the GPUs' generators too, and those are not forked.
        torch.default_generator.manual_seed(fold_seed(seed, "init", name))
        return _build(spec, name)


def build_on_meta(spec: LayerSpec, *, name: str) -> nn.Module:
    """Build a layer on the meta device, with shapes but no storage, to count or describe it.

    A layer whose constructor reads tensor values cannot be built there, and is built on the CPU.

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
    """True if the arguments fit the signature, so a TypeError comes from inside the constructor."""
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
    """Key that is equal for specs that build equal layers, apart from their weights.

    Example:
        >>> from torch import nn
        >>> spec_key(LayerSpec(nn.Linear, 4, 2, name="a")) == spec_key(LayerSpec(nn.Linear, 4, 2, name="b"))
        True
    """
    arguments = (_hashable(spec.module_args), _hashable(spec.module_kwargs))
    return _hashable(spec.typename), *arguments, spec.frozen, spec.adapters, spec.recomputes_attention


def _hashable(value: object) -> Hashable:
    """Hashable form of an argument, equal for equal arguments; an unhashable value equals only itself."""
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
    """Return the logical name of each layer: its given name, a tied layer's key, or `layers.<index>`.

    Raises:
        ConfigError: if two untied layers share a name, or two layers of one tied key differ.

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
    """Comparable form of an argument: numbers, text and containers of them unchanged; all other values are equal."""
    if isinstance(value, dict):
        return {key: _comparable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_comparable(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else ...

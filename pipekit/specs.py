"""Layer specs: a model as plain data.

A model is a list of specs. A spec names a module class and its arguments; nothing is allocated until the rank that owns the
layer calls `build`. Listing a trillion-parameter model costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipekit.errors import ConfigError
from pipekit.rng import fold_seed


class LayerSpec:
    """One layer of a model, not yet built.

    Args:
        typename: an `nn.Module` class, or any callable that returns one.
        *args: positional arguments of `typename`.
        name: logical name of the layer; its parameters are called `<name>.<parameter>` in checkpoints and exports.
            Defaults to `layers.<index in the list>`.
        **kwargs: keyword arguments of `typename`.

    Example:
        >>> from torch import nn
        >>> LayerSpec(nn.Linear, 4, 2, name="head")
        LayerSpec(Linear, 4, 2, name='head')
    """

    def __init__(
        self, typename: Callable[..., nn.Module], *args: Any, name: str | None = None, **kwargs: Any
    ) -> None:
        if not callable(typename):
            raise ConfigError(f"LayerSpec takes an nn.Module class, not {typename!r}; write LayerSpec(nn.Linear, 4, 2)")
        self.typename = typename
        self.module_args = args
        self.module_kwargs = kwargs
        self.name = name

    @property
    def type_name(self) -> str:
        """The class name of the layer, as partitioners match it (`type:<regex>`)."""
        return getattr(self.typename, "__name__", type(self.typename).__name__)

    def build(self) -> nn.Module:
        """Allocate the layer on the current default device."""
        return self.typename(*self.module_args, **self.module_kwargs)

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
        typename: an `nn.Module` class, or any callable that returns one.
        *args: positional arguments of `typename`.
        forward_fn: called as `forward_fn(module, inputs)` in place of `module(inputs)`.
        tied_weight_attr: the shared parameters, as attribute paths; everything else of the module must not be trained by
            more than one stage.
        name: logical name of the shared module; defaults to `key`.
        **kwargs: keyword arguments of `typename`.
    """

    def __init__(
        self,
        key: str,
        typename: Callable[..., nn.Module],
        *args: Any,
        forward_fn: Callable[[Any, Any], Tensor] | None = None,
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

    The generators' state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold_seed(seed, "init", name))
        return spec.build()


def layer_names(specs: Sequence[LayerSpec]) -> list[str]:
    """Return the logical name of each layer: its own, a tied layer's key, or `layers.<index>`.

    Raises:
        ConfigError: if two layers that are not tied share a name.

    Example:
        >>> layer_names([LayerSpec(nn.Linear, 4, 4), LayerSpec(nn.Linear, 4, 2, name="head")])
        ['layers.0', 'head']
    """
    names: list[str] = []
    owner: dict[str, int | str] = {}
    for layer_idx, spec in enumerate(specs):
        tied = isinstance(spec, TiedLayerSpec)
        name = spec.name or (spec.key if isinstance(spec, TiedLayerSpec) else f"layers.{layer_idx}")
        identity: int | str = f"tied:{spec.key}" if isinstance(spec, TiedLayerSpec) else layer_idx
        if owner.setdefault(name, identity) != identity:
            raise ConfigError(
                f"layer {layer_idx} ({spec.type_name}) is named {name!r}, and so is another layer; names must differ, "
                f"since checkpoints are keyed by them; pass another name=... to its {'Tied' if tied else ''}LayerSpec"
            )
        names.append(name)
    return names

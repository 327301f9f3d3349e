"""LoRA: low-rank adapters of the linear layers that patterns name, trained while the model's parameters are frozen.

One linear layer here may be several in `transformers`, such as queries, keys and values; each of these is a separate
target with a separate adapter.
"""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import nn

from pipekit.errors import ConfigError
from pipekit.layers.specs import LayerSpec, LinearAdapter, TiedLayerSpec, build_on_meta, layer_names, spec_key
from pipekit.tensor_parallel import ColumnParallelLinear, KeyValueLinear, LowRank, RowParallelLinear

if TYPE_CHECKING:
    from pipekit.models.family import TensorRename

_KINDS = (nn.Linear, ColumnParallelLinear, RowParallelLinear, KeyValueLinear)
_MARK = ".lora."


@dataclass(frozen=True)
class LoraTarget:
    """Target of an adapter: a linear layer, or some rows of its weight.

    Attributes:
        module: logical name of the linear layer.
        part: name of these rows within the layer, and of the adapter.
        first_row: index of the first row.
        end_row: index after the last row.
        theirs: name of the linear layer in `transformers`; None if `transformers` has no such layer.
        unknown_kind: class of a linear layer that may not compute the same as torch's; None if it is known.

    Example:
        >>> LoraTarget("blocks.0.attention.qkv", "k_proj", 64, 128, "model.layers.0.self_attn.k_proj").adapter
        'blocks.0.attention.qkv.lora.k_proj'
    """

    module: str
    part: str
    first_row: int
    end_row: int
    theirs: str | None = None
    unknown_kind: str | None = None

    @property
    def adapter(self) -> str:
        """Logical name of the target's adapter, whose parameters are `a` and `b`."""
        return f"{self.module}{_MARK}{self.part}"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the target that a pattern can match."""
        return (self.module,) if self.theirs is None else (self.module, self.theirs)

    def is_meant(self, pattern: str) -> bool:
        """True if a pattern matches one of the target's names, or the part of a name after a dot.

        Example:
            >>> target = LoraTarget("blocks.0.mlp.contract", "down_proj", 0, 64, "model.layers.0.mlp.down_proj")
            >>> [target.is_meant(pattern) for pattern in ("down_proj", "blocks.*.contract", "*", "proj")]
            [True, True, True, False]
        """
        return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}") for name in self.names)


def is_adapter(name: str) -> bool:
    """True if a logical name is that of an adapter's parameter.

    Example:
        >>> is_adapter("blocks.0.attention.qkv.lora.k_proj.a"), is_adapter("blocks.0.attention.qkv.weight")
        (True, False)
    """
    return _MARK in name


def find_targets(specs: Sequence[LayerSpec], renames: Sequence[TensorRename] = ()) -> list[list[LoraTarget]]:
    """Targets in each layer of a model; none in tied layers, because every stage would train a separate adapter.

    Args:
        specs: the model.
        renames: names of its tensors in `transformers`; a linear layer with several names is several targets.

    Raises:
        ConfigError: if a parameter has the name of an adapter's parameter.
    """
    theirs = {rename.ours: rename for rename in renames}
    known: dict[Hashable, tuple[list[str], dict[str, nn.Linear]]] = {}
    found = []
    for spec, layer_name in zip(specs, layer_names(specs), strict=True):
        if (key := spec_key(spec)) not in known:
            layer = build_on_meta(spec, name=layer_name)
            linears = {path: module for path, module in layer.named_modules() if isinstance(module, nn.Linear)}
            known[key] = [name for name, _ in layer.named_parameters()], linears
        names, linears = known[key]
        if taken := [name for name in names if is_adapter(f"{layer_name}.{name}")]:
            raise ConfigError(
                f"lora: layer {layer_name!r} has a parameter {taken[0]!r}, and adapters have such names; give its "
                "module another name than 'lora'"
            )
        targets = []
        for path, linear in linears.items() if not isinstance(spec, TiedLayerSpec) else ():
            module = f"{layer_name}.{path}" if path else layer_name
            rename, end = theirs.get(f"{module}.weight"), 0
            if rename is not None and rename.rows and rename.pattern is not None:
                rename = None  # their rows lie among each other here
            rows = {} if rename is None else dict(rename.rows) or {rename.theirs: linear.out_features}
            for name, length in (rows or {module: linear.out_features}).items():
                bare, first, end = name.removesuffix(".weight"), end, end + length
                kind = None if type(linear) in _KINDS else type(linear).__name__
                part = bare.rpartition(".")[2]
                targets.append(LoraTarget(module, part, first, end, bare if rows else None, kind))
        found.append(targets)
    return found


def add_lora(
    specs: Sequence[LayerSpec],
    patterns: Sequence[str],
    low_rank: LowRank,
    renames: Sequence[TensorRename] = (),
    *,
    key: str = "lora.targets",
) -> list[LayerSpec]:
    """Copy a model's specs with adapters added, and with all of the model's own parameters frozen.

    Args:
        specs: the model.
        patterns: names of linear layers here or in `transformers`, or the parts of names after a dot, in which `*`
            stands for any text, `?` for one character and `[...]` for one of several characters.
        low_rank: settings of the adapters.
        renames: as in `find_targets`.
        key: name of the setting with the patterns, for messages.

    Raises:
        ConfigError: if a pattern matches no linear layer, or one that cannot have an adapter.

    Example:
        >>> specs = [LayerSpec(nn.Linear, 4, 4, name="body"), LayerSpec(nn.Linear, 4, 2, name="head")]
        >>> body, head = add_lora(specs, ["body"], LowRank(rank=2, scale=1.0))
        >>> body.adapters[0].adapted, head.adapters, sorted(head.frozen)
        (('body',), (), ['bias', 'weight'])
    """
    found = find_targets(specs, renames)
    unmatched = set(patterns)
    changed = []
    for spec, layer_name, targets in zip(specs, layer_names(specs), found, strict=True):
        adapted: dict[str, list[str]] = {}
        for target in targets:
            matching = {pattern for pattern in patterns if target.is_meant(pattern)}
            unmatched -= matching
            if matching:
                adapted.setdefault(target.module, []).append(target.part)
                if target.unknown_kind is not None:
                    raise ConfigError(
                        f"{key}: {target.module} is a {target.unknown_kind}, which may compute otherwise than "
                        "nn.Linear, so that no adapter can be added to it; give patterns that leave it out"
                    )
        adapters = []
        for module, parts in adapted.items():
            sizes = tuple((each.part, each.end_row - each.first_row) for each in targets if each.module == module)
            path = module.removeprefix(layer_name).removeprefix(".")
            adapters.append(LinearAdapter(path, sizes, tuple(parts), low_rank))
        frozen = [name for name, _ in build_on_meta(spec, name=layer_name).named_parameters()]
        changed.append(spec.with_frozen(frozen).with_adapters(adapters))
    for pattern in patterns:
        if pattern in unmatched:
            every = [name for targets in found for target in targets for name in target.names[::-1]]
            ends = list(dict.fromkeys(name.rpartition(".")[2] for name in every))
            if not ends:
                raise ConfigError(f"{key}: the model has no nn.Linear outside of tied layers, to which LoRA could add")
            close = difflib.get_close_matches(pattern, ends, n=1)
            remedy = f"try {close[0]!r}" if close else f"names end with {', '.join(ends[:8])}"
            raise ConfigError(f"{key}: {pattern!r} matches none of the model's linear layers; {remedy}")
    return changed

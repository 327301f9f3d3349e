"""Freezing of parameters by name or pattern."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Sequence
from fnmatch import fnmatchcase

from pipekit.errors import ConfigError
from pipekit.layers.specs import LayerSpec, build_on_meta, layer_names, spec_key


def freeze(specs: Sequence[LayerSpec], patterns: Sequence[str], *, key: str = "train.freeze") -> list[LayerSpec]:
    """Freeze some parameters of a model: they get no gradient, no update and no decay.

    Args:
        specs: the model.
        patterns: logical names of parameters, in which `*` stands for any text, `?` for one character and `[...]` for
            one of several characters.
        key: name of the setting with the patterns, for messages.

    Returns:
        Copies of the specs with the parameters frozen.

    Raises:
        ConfigError: if a pattern matches no parameter, or no parameter is left to train.

    Example:
        >>> from torch import nn
        >>> specs = [LayerSpec(nn.Linear, 4, 4, name="body"), LayerSpec(nn.Linear, 4, 2, name="head")]
        >>> [sorted(spec.frozen) for spec in freeze(specs, ["body.*", "head.bias"])]
        [['bias', 'weight'], ['bias']]
    """
    if not patterns:
        return list(specs)
    known: dict[Hashable, dict[str, bool]] = {}
    unmatched, names, frozen_specs, is_trained = set(patterns), list[str](), list[LayerSpec](), False
    for spec, layer_name in zip(specs, layer_names(specs), strict=True):
        if spec_key(spec) not in known:
            layer = build_on_meta(spec, name=layer_name)
            known[spec_key(spec)] = {name: each.requires_grad for name, each in layer.named_parameters()}
        frozen = set()
        for name, requires_grad in known[spec_key(spec)].items():
            names.append(f"{layer_name}.{name}")
            matching = {pattern for pattern in patterns if fnmatchcase(names[-1], pattern)}
            unmatched -= matching
            if matching:
                frozen.add(name)
            else:
                is_trained |= requires_grad
        frozen_specs.append(spec.with_frozen(frozen))
    for pattern in patterns:
        if pattern in unmatched:
            close = difflib.get_close_matches(pattern, [*names, *(f"{name}.*" for name in layer_names(specs))], n=1)
            remedy = f"try {close[0]!r}" if close else f"names are such as {', '.join(map(repr, names[:3]))}"
            raise ConfigError(f"{key}: {pattern!r} matches none of the model's {len(names)} parameters; {remedy}")
    if not is_trained:
        raise ConfigError(
            f"{key}={list(patterns)} freezes every parameter, so that nothing is left to train; leave a pattern out"
        )
    return frozen_specs

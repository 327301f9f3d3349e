"""Selective activation checkpointing: attention cores that are recomputed in the backward.

Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pipekit.errors import ConfigError
from pipekit.layers.specs import LayerSpec, attention_cores, build_on_meta, layer_names, spec_key
from pipekit.settings.activations import KEY, ActivationCheckpointing


def recompute_attention(specs: Sequence[LayerSpec], setting: ActivationCheckpointing | None) -> list[LayerSpec]:
    """Copy a model's specs so that attention cores are recomputed in the layers that `only: attention` chooses.

    A module supports this if it has a class attribute `recomputes_attention = False`, and calls its core with
    `recompute_core` when the attribute is True.

    Raises:
        ConfigError: if a pattern matches no layer, or none of the layers has an attention core to recompute.
    """
    if setting is None:
        return list(specs)
    chosen = setting.chosen(layer_names(specs))
    if setting.only is None:
        return list(specs)
    has_core: dict[Hashable, bool] = {}
    for spec, name, is_chosen in zip(specs, layer_names(specs), chosen, strict=True):
        if is_chosen and spec_key(spec) not in has_core:
            has_core[spec_key(spec)] = bool(attention_cores(build_on_meta(spec, name=name)))
    if not any(has_core.values()):
        raise ConfigError(
            f"{KEY}.only=attention: none of the {sum(chosen)} layers that it chooses has an attention core that can "
            "be recomputed by itself, a module with the attribute recomputes_attention; try "
            f"{KEY}=true, which recomputes layers whole"
        )
    return [
        spec.with_recomputed_attention(is_chosen and has_core[spec_key(spec)])
        for spec, is_chosen in zip(specs, chosen, strict=True)
    ]


def recompute_core(core: Callable[..., Tensor], *tensors: Tensor | None, draws: bool) -> Tensor:
    """Call an attention core whose backward recomputes it; only its arguments are kept.

    Args:
        core: the function that computes the attention core.
        *tensors: its arguments, such as queries, keys and values.
        draws: whether it draws random numbers, which are then drawn again.
    """
    result: Any = checkpoint(core, *tensors, use_reentrant=False, preserve_rng_state=draws)
    assert isinstance(result, Tensor)
    return result

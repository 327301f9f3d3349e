"""Direct calls between the modules of a model for inference, without what `nn.Module` does around a forward."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipekit.tensor_parallel import ColumnParallelLinear, RowParallelLinear


def call_directly(model: nn.Module) -> None:
    """Let modules call the functions of those in them at once, and find their parameters without a search.

    A token of a small model takes as long as its calls do: with the shipped example, this saves a quarter. Modules with
    hooks, such as linear layers with adapters, are called as before. The model trains no more, and its parameters are
    seen as inference tensors, on the same memory.

    Args:
        model: a model in evaluation mode, whose parameters stay where they are.
    """
    for module in list(model.modules()):
        module.__dict__.update({name: _inference_tensor(value) for name, value in module._parameters.items()})
    for module in list(model.modules()):
        for name, child in module._modules.items():
            module.__dict__[name] = child if child is None or _has_hooks(child) else _callable_of(child)
        if not _has_hooks(module):
            module._compiled_call_impl = module.forward


@torch.inference_mode()
def _inference_tensor(parameter: Tensor | None) -> Tensor | None:
    """Tensor on the same memory, of whose views torch keeps no account."""
    if parameter is None:
        return None
    tensor = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
    place = parameter.storage_offset(), parameter.shape, parameter.stride()
    return tensor.set_(parameter.untyped_storage(), *place)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _callable_of(module: nn.Module) -> Any:
    """Function of torch that a module calls with its parameters, which are its attributes too; or the module."""
    call: partial[Tensor]
    is_plain = type(module) in (nn.Linear, ColumnParallelLinear, RowParallelLinear)
    if isinstance(module, nn.Linear) and is_plain and getattr(module, "group", None) is None:
        call = partial(F.linear, weight=module.weight, bias=module.bias)
    elif type(module) is nn.LayerNorm:
        sizes: Any = {"normalized_shape": module.normalized_shape, "eps": module.eps}
        call = partial(torch.layer_norm, weight=module.weight, bias=module.bias, **sizes)
    elif type(module) is nn.RMSNorm:
        sizes = {"normalized_shape": module.normalized_shape, "eps": module.eps}
        call = partial(torch.rms_norm, weight=module.weight, **sizes)
    else:
        return module
    # What has the module's place may be asked for its parameters too.
    call.__dict__.update({name: module.__dict__[name] for name in module._parameters})
    return call

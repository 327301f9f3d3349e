"""Checks of a plain module, its configuration, optimizer and mpu, before an engine is built of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipekit.deepspeed.optimizer_view import whole_shape
from pipekit.distributed.mpu import ModelParallelUnit
from pipekit.distributed.processes import gather_objects
from pipekit.engine.logical_model import persistent_buffers
from pipekit.errors import ConfigError

GIVE_OPTIMIZER = (
    'give optimizer=torch.optim.AdamW(model.parameters()), or "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}} '
    "in the configuration"
)
"""Remedy where there is no optimizer, for errors."""


def check_plain_module(module: nn.Module, parameters: Iterable[Any], optimizer: Any) -> None:
    """Raise a ConfigError where a module and an optimizer cannot run, or could not be saved.

    Args:
        module: the model.
        parameters: the parameters to train, or groups of them.
        optimizer: a torch optimizer, a function that returns one, or None.

    Example:
        >>> check_plain_module(nn.Linear(1, 1).double(), [], None)
        Traceback (most recent call last):
        ...
        pipekit.errors.ConfigError: weight is float64, and checkpoints hold fp32; try model.float()
    """
    named = dict(module.named_parameters())
    for name, parameter in named.items():
        if parameter.dtype == torch.float64 or parameter.is_complex():
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise ConfigError(f"{name} is {dtype}, and checkpoints hold fp32; try model.float()")
        if not getattr(parameter, "allreduce", True):
            raise ConfigError(f"{name} belongs to an expert, and expert parallelism is not available yet")
    for name, buffer in persistent_buffers(module):
        if not isinstance(buffer, Tensor):
            raise ConfigError(
                f"{name} is {type(buffer).__name__} and not a tensor, so no checkpoint can hold it; register it as a "
                "buffer, or keep it in client_state"
            )
    groups = [*parameters, *(optimizer.param_groups if isinstance(optimizer, torch.optim.Optimizer) else ())]
    known = set(named.values())
    for group in groups:
        for parameter in group["params"] if isinstance(group, dict) else [group]:
            if parameter not in known:
                raise ConfigError(
                    f"the optimizer updates a tensor of shape {tuple(parameter.shape)} that is no parameter of the "
                    f"{type(module).__name__}; register it there, or give it an optimizer of its own"
                )


def check_evaluation(settings: Mapping[str, Any]) -> None:
    """Raise a ConfigError where a configuration needs an optimizer, and there is none.

    Example:
        >>> check_evaluation({"zero_optimization": {"stage": 1}})
        Traceback (most recent call last):
        ...
        pipekit.errors.ConfigError: zero_optimization.stage=1 shards an optimizer, and there is none; give optimizer=...
    """
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    if stage in (1, 2):
        raise ConfigError(
            f"zero_optimization.stage={stage} shards an optimizer, and there is none; {GIVE_OPTIMIZER}; to evaluate "
            "only, try stage 0 or 3"
        )
    if not stage and settings.get("bf16", settings.get("bfloat16", {})).get("enabled"):
        raise ConfigError(
            "bf16 without an optimizer needs zero_optimization.stage=3; or evaluate model.bfloat16() without bf16"
        )


def check_mpu_of_replicas(mpu: Any) -> None:
    """Raise a ConfigError unless all ranks of an mpu are replicas of a plain module."""
    if isinstance(mpu, ModelParallelUnit):
        num_replicas = mpu.layout.dp
    elif mpu is not None:
        num_replicas = mpu.get_data_parallel_world_size()
    else:
        return
    if num_replicas != dist.get_world_size():
        raise ConfigError(
            f"the mpu has {num_replicas} replicas on {dist.get_world_size()} ranks, but each rank holds a plain "
            "module whole; cut the model with pipekit.PipelineModule, or use ModelParallelUnit(Layout(dp="
            f"{dist.get_world_size()}))"
        )


def check_same_on_all_ranks(module: nn.Module, settings: Mapping[str, Any]) -> None:
    """Compare the parameters and the configuration of all ranks, which call this together.

    Raises:
        ConfigError: on every rank, with the first parameter or key that differs from rank 0's.
    """
    mine = {f"parameter {name}": _describe(parameter) for name, parameter in module.named_parameters()}
    mine.update({f"configuration key {key}": str(value) for key, value in settings.items()})
    everyones = gather_objects(mine)
    first = everyones[0]
    for rank, theirs in enumerate(everyones):
        differing = [name for name in {**first, **theirs} if first.get(name) != theirs.get(name)]
        if differing:
            name = differing[0]
            raise ConfigError(
                f"{name} is {first.get(name, 'missing')} on rank 0 and {theirs.get(name, 'missing')} on rank {rank}; "
                "give all ranks the same model and the same configuration"
            )


def _describe(parameter: nn.Parameter) -> str:
    trains = "trained" if parameter.requires_grad else "frozen"
    return f"{str(parameter.dtype).removeprefix('torch.')} {whole_shape(parameter)}, {trains}"

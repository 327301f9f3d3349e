"""The optimizer of masters and moments that live in host memory: DeepSpeed's vectorized Adam where it can be built."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import CPUAdamBuilder

from pipekit.distributed.processes import gather_objects

_logger = logging.getLogger(__name__)

# What DeepSpeed's Adam takes for each group; of what else torch's has, it must have the defaults.
_TAKEN = ("params", "lr", "lr_scale", "betas", "eps", "weight_decay")
_UNSUPPORTED = ("amsgrad", "maximize", "capturable", "differentiable")


def offloads_optimizer(deepspeed_config: Mapping[str, Any]) -> bool:
    """True if a configuration of DeepSpeed keeps masters and moments in host memory.

    Example:
        >>> offloads_optimizer({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
        True
        >>> offloads_optimizer({"zero_optimization": {"stage": 2}})
        False
    """
    section = deepspeed_config.get("zero_optimization", {}).get("offload_optimizer") or {}
    return bool(section.get("device", "none") != "none")


def with_cpu_adam(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return DeepSpeed's Adam for host memory with the groups of `optimizer`, or `optimizer` where that cannot be.

    It makes the updates of torch's Adam and AdamW several times as fast. It is C++ that is compiled at first use; where
    any rank cannot, all of them keep torch's. All ranks call this together.

    Args:
        optimizer: has made no update yet.
    """
    decouples = {torch.optim.AdamW: True, torch.optim.Adam: False}.get(type(optimizer))
    if decouples is None or any(group.get(key) for group in optimizer.param_groups for key in _UNSUPPORTED):
        return optimizer
    first = next((reason for reason in gather_objects(_reason_against_building()) if reason is not None), None)
    if first is not None:
        if dist.get_rank() == 0:
            _logger.warning(
                "parallel.offload: DeepSpeed's Adam for CPUs cannot be compiled here (%s), so torch's makes the "
                "updates, which takes longer; install a C++ compiler and ninja to have it",
                first,
            )
        return optimizer
    groups = [{key: group[key] for key in _TAKEN if key in group} for group in optimizer.param_groups]
    adam: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, adamw_mode=decouples)
    return adam


@cache
def _reason_against_building() -> str | None:
    """Reason why the C++ of DeepSpeed's Adam cannot be compiled and loaded; None if it can."""
    try:
        CPUAdamBuilder().load(verbose=False)
    except Exception as error:  # A compiler fails in many ways.
        lines = f"{error}".strip().splitlines() or [type(error).__name__]
        return lines[0]
    return None

"""Partitioning of ZeRO-3 weights layer by layer, as they are built: no rank ever holds the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.runtime.zero.partition_parameters import Init
from torch import nn

from pipekit.deepspeed.mpu import DeepSpeedMPU
from pipekit.deepspeed.optimizer_view import whole_shape
from pipekit.deepspeed.patches import linear_function, number_from_zero, use_joined_processes
from pipekit.deepspeed.state_files import take_nvme_path
from pipekit.distributed.mpu import ModelParallelUnit
from pipekit.errors import ConfigError


class WeightPartitioner:
    """Cuts the weights of one layer after the other into a piece for each replica, as DeepSpeed's `zero.Init` does.

    What it has cut keeps its shape, without its elements, until the engine is built: optimizers look at it. All
    replicas call this together, with the same layers in the same order.

    Args:
        deepspeed_config: that of the engine, with ZeRO stage 3.
        mpu: the process groups.
    """

    def __init__(self, deepspeed_config: Mapping[str, Any], mpu: ModelParallelUnit) -> None:
        self.config, _ = take_nvme_path(deepspeed_config)
        self._mpu = DeepSpeedMPU(mpu)
        self._dtype = _weight_dtype(self.config)
        self._first: Any = None  # a parameter that knows how to cut others
        self.linear = F.linear
        use_joined_processes()
        number_from_zero()

    def partition(self, module: nn.Module) -> None:
        """Cut the weights of a module that are still whole."""
        whole = [parameter for parameter in module.parameters() if not hasattr(parameter, "ds_tensor")]
        for parameter in whole:
            parameter.data = parameter.data.to(self._dtype)
        if not whole:
            return
        if self._first is not None:
            self._first.convert_to_zero_parameters(param_list=whole)
        else:
            with linear_function(F.linear):
                Init(
                    module=module,
                    data_parallel_group=self._mpu.get_data_parallel_group(),  # type: ignore[attr-defined]
                    dtype=self._dtype,
                    config_dict_or_path=self.config,
                    mpu=self._mpu,
                )
                # A function of DeepSpeed's own, which keeps no whole weight for the backward.
                self.linear = F.linear
            self._first = whole[0]
        for parameter in whole:
            parameter.data = parameter.data.new_empty(1).expand(whole_shape(parameter))


def check_same_partition(cut: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Check that an engine's configuration cuts weights as the one with which they were cut.

    Raises:
        ConfigError: if it has another ZeRO stage, another type of weights, or keeps them elsewhere.
    """
    before, now = (_describe(take_nvme_path(config)[0]) for config in (cut, given))
    if before != now:
        raise ConfigError(
            f"PipelineModule(deepspeed_config=...) has cut the weights for {before}, and the engine's configuration "
            f"asks for {now}; give both the same configuration"
        )


def free_shapes(module: nn.Module) -> None:
    """Give what a `WeightPartitioner` has cut back the empty tensors that DeepSpeed expects in the place of weights."""
    for parameter in module.parameters():
        if hasattr(parameter, "ds_tensor") and parameter.untyped_storage().nbytes() == parameter.element_size():
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)


def _describe(config: Mapping[str, Any]) -> str:
    zero = config.get("zero_optimization") or {}
    device = (zero.get("offload_param") or {}).get("device", "none")
    where = "" if device == "none" else f" with weights on {device}"
    return f"ZeRO {zero.get('stage', 0)} in {str(_weight_dtype(config)).removeprefix('torch.')}{where}"


def _weight_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Type of the weights of an engine.

    Example:
        >>> _weight_dtype({"bf16": {"enabled": True}})
        torch.bfloat16
    """
    sections = {"fp16": torch.float16, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}
    found = (dtype for key, dtype in sections.items() if (config.get(key) or {}).get("enabled"))
    return next(found, torch.float32)

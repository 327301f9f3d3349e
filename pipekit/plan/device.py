"""The device of a run: its kind, its number format, and the memory of a rank on it."""

from __future__ import annotations

import torch

from pipekit.config import Config
from pipekit.errors import ConfigError
from pipekit.plan.plan import Device
from pipekit.plan.resources import Resources
from pipekit.predictions import devices
from pipekit.predictions.elements import Precision


def plan_device(config: Config, num_gpus: int | None) -> Device:
    """The kind of device that a run computes on.

    Raises:
        ConfigError: if the configuration asks for GPUs and there are none.
    """
    if config.run.device == "auto":
        return "cuda" if num_gpus else "cpu"
    if config.run.device == "cuda" and not num_gpus:
        raise ConfigError("run.device=cuda: no GPU is present; use run.device=auto or run.device=cpu")
    return config.run.device


def plan_precision(config: Config, device: Device) -> Precision:
    """The number format of a run: what is configured, or bf16 on GPUs and fp32 on CPUs.

    Raises:
        ConfigError: if the device cannot compute in it.
    """
    precision = config.train.precision
    if precision == "auto":
        return "bf16" if device == "cuda" else "fp32"
    if precision == "fp16" and device == "cpu" and not _cpu_has_fp16():
        raise ConfigError(
            "train.precision=fp16: this CPU does not compute in fp16, and no GPU is used; try train.precision=bf16 or "
            "fp32"
        )
    return precision


def _cpu_has_fp16() -> bool:
    mkldnn = torch.ops.mkldnn
    return hasattr(mkldnn, "_is_mkldnn_fp16_supported") and bool(mkldnn._is_mkldnn_fp16_supported())


def rank_memory(config: Config, device: Device, resources: Resources, num_local_ranks: int) -> int:
    """The bytes that a rank may hold: the configured number, the GPU's for tensors, or its share of the machine's."""
    if config.parallel.memory_limit_gb is not None:
        return int(config.parallel.memory_limit_gb * 1e9)
    if device == "cuda":
        assert resources.gpu_memory_bytes is not None, "the launcher asks for it where a decision needs it"
        return max(1, resources.gpu_memory_bytes - devices.gpu_reserve_bytes(resources.gpu_memory_bytes))
    return resources.memory_bytes // num_local_ranks


def present_device(resources: Resources, num_processes: int) -> devices.Device:
    """The device of each process of a run on this machine, as predictions take it; of a CPU, a share.

    Raises:
        ConfigError: if the GPU is not in the table of devices.
    """
    if not resources.num_gpus:
        return devices.find_device("cpu").model_copy(update={"memory_bytes": resources.memory_bytes // num_processes})
    name = resources.gpu_name or "without a name"
    try:
        return devices.find_device(name)
    except ConfigError:
        raise ConfigError(
            f"the GPU {name} is not among the devices that are known; describe it in a YAML file for pipekit plan "
            "--device-file, and write the layout that it finds into the parallel section"
        ) from None

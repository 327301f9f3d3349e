"""DeepSpeed's configuration, made from pipekit's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pipekit.deepspeed.overwrite import merge_sections
from pipekit.predictions.elements import Precision

Offload = Literal["none", "optimizer", "parameters", "nvme"]


_OFFLOADED: dict[Offload, tuple[str, ...]] = {
    "none": (),
    "optimizer": ("offload_optimizer",),
    "parameters": ("offload_optimizer", "offload_param"),
    "nvme": ("offload_optimizer", "offload_param"),
}


def plan_deepspeed_config(
    *,
    micro_batch_size: int,
    num_micro_batches: int,
    precision: Precision,
    zero: int,
    gradient_clipping: float,
    extra: Mapping[str, Any],
    offload: Offload = "none",
    nvme_dir: str | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
) -> dict[str, Any]:
    """Configuration of DeepSpeed's engine.

    Args:
        micro_batch_size: sequences of one micro-batch.
        num_micro_batches: micro-batches of one step on one pipeline.
        precision: of weights and activations.
        zero: ZeRO stage. Under 16-bit precision DeepSpeed's optimizers always shard the fp32 masters and the moments
            over the data-parallel ranks, so 0 is 1 there.
        gradient_clipping: largest gradient norm; 0 does not clip.
        extra: the user's `deepspeed` section, merged over the defaults.
        offload: what is kept in host memory: `optimizer` the fp32 masters and the moments, `parameters` these and,
            with ZeRO-3, the weights; `nvme` keeps these in files.
        nvme_dir: folder of the files.
        device: kind of device that computes; what GPUs exchange with host memory is pinned there.

    Example:
        >>> config = plan_deepspeed_config(micro_batch_size=2, num_micro_batches=4, precision="fp32", zero=1,
        ...     gradient_clipping=1.0, extra={"zero_optimization": {"reduce_bucket_size": 1000}})
        >>> config["zero_optimization"]["stage"], config["zero_optimization"]["reduce_bucket_size"]
        (1, 1000)
    """
    target: dict[str, Any] = {"device": "cpu", "pin_memory": device == "cuda"}
    if offload == "nvme":
        target = {"device": "nvme", "nvme_path": nvme_dir}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": num_micro_batches,
        "gradient_clipping": gradient_clipping,
        "steps_per_print": None,
        "zero_optimization": {
            "stage": zero,
            **{key: target for key in _OFFLOADED[offload] if zero == 3 or key == "offload_optimizer"},
        },
    }
    if precision != "fp32":
        config[precision] = {"enabled": True}
    return complete_deepspeed_config(merge_sections(config, extra))


def complete_deepspeed_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration of DeepSpeed with what pipekit needs, where it does not say otherwise.

    Example:
        >>> complete_deepspeed_config({"bf16": {"enabled": True}})["zero_optimization"]["stage"]
        1
        >>> complete_deepspeed_config({"timers": {"throughput": {"enabled": True}}})["timers"]
        {'throughput': {'enabled': True}}
    """
    zero: dict[str, Any] = {
        # The default of 5e8 elements allocates gigabytes in every step; this is as fast.
        "reduce_bucket_size": 50_000_000,
        "contiguous_gradients": False,
    }
    defaults = {
        "zero_allow_untested_optimizer": True,
        # Where DeepSpeed's Adam for CPUs cannot be compiled, and for any other optimizer, torch's makes the updates.
        "zero_force_ds_cpu_optimizer": False,
        # DeepSpeed's own count of samples a second waits for the device twice in every micro-batch.
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": zero,
    }
    completed = merge_sections(defaults, config)
    if any(completed.get(precision, {}).get("enabled") for precision in ("fp16", "bf16", "bfloat16")):
        # Gradients of many micro-batches are lost in 16 bits, accumulated or summed over replicas.
        low_precision = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
        completed = merge_sections(low_precision, completed)
        stage = completed["zero_optimization"].get("stage", 0)
        completed["zero_optimization"]["stage"] = max(stage, 1)
    return completed

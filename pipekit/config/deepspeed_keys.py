"""The configuration keys of DeepSpeed 0.19, so that a misspelt one is refused: DeepSpeed itself ignores it.

The table holds names alone; `pipekit.config.deepspeed_values` has the values. A test compares it with the installed
DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipekit.settings.base import Fault, alternatives, show
from pipekit.settings.suggest import closest

KeyTree = dict[str, "KeyTree | None"]
"""Keys of a section; None means that whatever stands under the key is taken as it is."""


def _keys(names: str, **sections: KeyTree) -> KeyTree:
    return {**dict.fromkeys(names.split()), **sections}


DEEPSPEED_KEYS: KeyTree = _keys(
    # Batch, optimizer, precision: pipekit sets these (see OWNED_KEYS).
    "bfloat16 train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps "
    "managed_gradient_accumulation optimizer scheduler gradient_clipping steps_per_print pipeline "
    "tensor_parallel expert_parallel wandb tensorboard "
    # Plain values.
    "dump_state disable_python_gc disable_allgather communication_data_type "
    "seq_parallel_communication_data_type prescale_gradients gradient_predivide_factor "
    "gradient_allreduce_op zero_allow_untested_optimizer zero_force_ds_cpu_optimizer wall_clock_breakdown "
    "memory_breakdown use_data_before_expert_parallelism dataloader_drop_last log_level vocabulary_size "
    # Sections that are taken as they are.
    "data_efficiency weight_quantization datastates_ckpt autotuning hybrid_engine",
    zero_optimization=_keys(
        "stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce "
        "allgather_partitions allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights "
        "elastic_checkpoint sub_group_size cpu_offload_param cpu_offload_use_pin_memory cpu_offload "
        "stage3_prefetch_bucket_size stage3_param_persistence_threshold stage3_model_persistence_threshold "
        "stage3_max_live_parameters stage3_max_reuse_distance stage3_gather_16bit_weights_on_model_save "
        "stage3_module_granularity_threshold stage3_use_all_reduce_for_fetch_params "
        "stage3_allgather_sequential stage3_gather_fp16_weights_on_model_save ignore_unused_parameters "
        "legacy_stage1 round_robin_gradients parameter_alignment zero_hpz_partition_size "
        "zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients "
        "memory_efficient_linear pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings "
        "enable_sanity_checks save_muon_momentum_buffer_in_memory",
        offload_param=_keys("device nvme_path buffer_count buffer_size max_in_cpu pin_memory"),
        offload_optimizer=_keys(
            "device nvme_path buffer_count pin_memory pipeline_read pipeline_write fast_init ratio "
            "super_offload cpuadam_cores_perc"
        ),
        zenflow=_keys(
            "topk_ratio select_strategy select_interval update_interval overlap_step offload auto_ratio "
            "full_warm_up_rounds pt_reserved_cores_perc steps_per_epoch"
        ),
        leaf_module=_keys("classes names name_suffixes"),
    ),
    fp16=_keys(
        "enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis "
        "consecutive_hysteresis min_loss_scale fp16_master_weights_and_grads"
    ),
    bf16=_keys("enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states"),
    torch_autocast=_keys("enabled dtype lower_precision_safe_modules"),
    data_types=_keys("grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules"),
    activation_checkpointing=_keys(
        "partition_activations contiguous_memory_optimization cpu_checkpointing number_checkpoints "
        "synchronize_checkpoint_boundary profile"
    ),
    comms_logger=_keys("enabled prof_all prof_ops verbose debug"),
    flops_profiler=_keys("enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file"),
    csv_monitor=_keys("enabled output_path job_name"),
    comet=_keys("enabled samples_log_interval project workspace api_key experiment_name experiment_key online mode"),
    checkpoint=_keys(
        "tag_validation checkpoint_serialization writer load_universal use_node_local_storage parallel_write"
    ),
    aio=_keys("block_size queue_depth intra_op_parallelism single_submit overlap_events use_gds"),
    timers=_keys("", throughput=_keys("enabled synchronized")),
    compile=_keys(
        "deepcompile autoep_non_moe free_activation free_activation_threshold offload_activation "
        "offload_activation_pin_memory offload_opt_states double_buffer symmetric_memory debug_log "
        "offload_parameters sync_before_reduce sync_after_reduce sync_before_allgather sync_after_allgather "
        "keep_int_input_tensors keep_all_input_tensors passes"
    ),
)
"""Every key that DeepSpeed 0.19 reads."""

OWNED_KEYS: dict[str, str] = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "managed_gradient_accumulation": "train.global_batch_size and train.micro_batch_size",
    "optimizer": "the optimizer section",
    "scheduler": "the scheduler section",
    "gradient_clipping": "train.gradient_clipping",
    "steps_per_print": "logging.interval",
    "pipeline": "parallel.pp, parallel.partition and train.activation_checkpointing",
    "tensor_parallel": "parallel.tp",
    "wandb": "logging.wandb",
    "tensorboard": "logging.tensorboard",
    "zero_optimization.stage": "parallel.zero",
    "zero_optimization.cpu_offload": "parallel.offload=optimizer",
    "zero_optimization.cpu_offload_param": "parallel.offload=parameters",
    "zero_optimization.offload_optimizer.device": "parallel.offload",
    "zero_optimization.offload_param.device": "parallel.offload",
    "bfloat16": "train.precision=bf16",
    "fp16.enabled": "train.precision=fp16",
    "bf16.enabled": "train.precision=bf16",
    "torch_autocast": "train.precision",
    "checkpoint": "the checkpoint section",
}
"""Keys that pipekit sets, and where in a pipekit configuration they are set."""

UNSUPPORTED_KEYS: dict[str, str] = {
    "expert_parallel": "expert parallelism is not available yet",
    "autotuning": "DeepSpeed's autotuner starts runs of its own",
    "hybrid_engine": "pipekit trains with its own pipeline engine",
    "data_efficiency": "pipekit reads the data itself",
    "zero_optimization.zenflow": "ZenFlow brings optimizers of its own",
    "zero_optimization.offload_optimizer.super_offload": "SuperOffload brings an optimizer of its own",
    "zero_optimization.offload_optimizer.ratio": "all of the optimizer is offloaded, or nothing",
    "zero_optimization.offload_optimizer.nvme_path": "host memory is what parallel.offload means",
    "zero_optimization.offload_param.nvme_path": "host memory is what parallel.offload means",
}
"""Keys that cannot take effect under pipekit, and why."""


def check_deepspeed_keys(section: dict[str, Any]) -> Iterator[Fault]:
    """Return a fault for each key that DeepSpeed does not know, or that pipekit sets itself."""
    return _check(section, DEEPSPEED_KEYS, (), owner="deepspeed.")


def unknown_deepspeed_keys(config: dict[str, Any]) -> Iterator[str]:
    """Return a message for each unknown key in a configuration file of DeepSpeed's own.

    Example:
        >>> list(unknown_deepspeed_keys({"zero_optimisation": {"stage": 1}}))
        ["zero_optimisation: unknown key; did you mean 'zero_optimization'?"]
    """
    return (fault.message for fault in _check(config, DEEPSPEED_KEYS, (), owner=""))


def _check(section: dict[str, Any], known: KeyTree, parents: tuple[str, ...], *, owner: str) -> Iterator[Fault]:
    """Yield the faults of a section; `owner` stands before its keys where they are part of pipekit's configuration."""
    owned, unsupported = (OWNED_KEYS, UNSUPPORTED_KEYS) if owner else ({}, {})
    for key, value in section.items():
        path = (*parents, key)
        name = ".".join(path)
        shown = f"{owner}{name}"
        place = ("deepspeed", *path)
        if name in owned:
            yield Fault(place, f"{shown}: pipekit sets this itself; use {owned[name]} instead")
        elif name in unsupported:
            yield Fault(place, f"{shown}: has no effect here, since {unsupported[name]}; remove it")
        elif key not in known:
            match = closest(key, known)
            meant = ".".join((*parents, match or ""))
            if meant in owned:
                remedy = f"use {owned[meant]} instead"
            elif match:
                remedy = f"did you mean '{owner}{meant}'?"
            elif parents:
                remedy = f"{owner}{'.'.join(parents)} has {alternatives(sorted(known), last='and')}"
            else:
                remedy = "see https://www.deepspeed.ai/docs/config-json/ for the keys of DeepSpeed"
            yield Fault(place, f"{shown}: unknown key; {remedy}")
        elif (below := known[key]) is not None:
            if isinstance(value, dict):
                yield from _check(value, below, path, owner=owner)
            elif value is not None:
                example = next(k for k in sorted(below) if f"{name}.{k}" not in owned)
                yield Fault(place, f"{shown}={show(value)}: must be a mapping; for example {key}: {{{example}: ...}}")

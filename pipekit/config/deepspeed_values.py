"""The values that DeepSpeed 0.19 takes for its configuration keys, so that a wrong one is refused at the start.

Where DeepSpeed checks a value with pydantic, the type here is its own, and a test compares them; where it takes
whatever stands there, and fails later or never, it is the type of the default.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from pipekit.settings.base import Fault, show
from pipekit.settings.faults import rule_of

_ZERO = "zero_optimization."
_DTYPE = Literal["fp32", "fp16", "bf16", "int8", "int32"]
_SIZE = Annotated[int, Field(ge=0)]


def _refuse_switch(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


_NO_SWITCH = BeforeValidator(_refuse_switch)

_TYPES: tuple[tuple[Any, str, str], ...] = (
    (
        bool,
        "",
        "dump_state disable_python_gc disable_allgather prescale_gradients zero_allow_untested_optimizer "
        "zero_force_ds_cpu_optimizer wall_clock_breakdown memory_breakdown use_data_before_expert_parallelism "
        "dataloader_drop_last timers.throughput.enabled timers.throughput.synchronized csv_monitor.enabled "
        "comet.enabled comms_logger.enabled comms_logger.prof_all comms_logger.verbose comms_logger.debug "
        "flops_profiler.enabled flops_profiler.detailed aio.single_submit aio.overlap_events aio.use_gds",
    ),
    (
        bool,
        "activation_checkpointing.",
        "partition_activations contiguous_memory_optimization cpu_checkpointing synchronize_checkpoint_boundary "
        "profile",
    ),
    (
        bool,
        _ZERO,
        "contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions compute_grad_norm "
        "load_from_fp32_weights elastic_checkpoint stage3_gather_16bit_weights_on_model_save "
        "stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential stage3_gather_fp16_weights_on_model_save "
        "ignore_unused_parameters legacy_stage1 round_robin_gradients parameter_alignment zero_quantized_weights "
        "zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear "
        "pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings enable_sanity_checks "
        "save_muon_momentum_buffer_in_memory offload_param.pin_memory offload_optimizer.pin_memory "
        "offload_optimizer.pipeline_read offload_optimizer.pipeline_write offload_optimizer.fast_init",
    ),
    (bool | None, _ZERO, "overlap_comm cpu_offload_use_pin_memory"),
    (Annotated[int, Field(gt=0)], _ZERO, "reduce_bucket_size"),
    (
        _SIZE,
        _ZERO,
        "allgather_bucket_size sub_group_size stage3_prefetch_bucket_size stage3_param_persistence_threshold "
        "stage3_model_persistence_threshold stage3_max_live_parameters stage3_max_reuse_distance "
        "zero_hpz_partition_size offload_param.buffer_count offload_param.buffer_size offload_param.max_in_cpu "
        "offload_optimizer.buffer_count",
    ),
    (int, _ZERO, "stage3_module_granularity_threshold"),
    (Annotated[float, Field(ge=0, le=1)], _ZERO, "offload_optimizer.cpuadam_cores_perc"),
    (bool, "fp16.", "auto_cast consecutive_hysteresis fp16_master_weights_and_grads"),
    (Annotated[float, _NO_SWITCH, Field(ge=0)], "fp16.", "loss_scale"),
    (Annotated[int, _NO_SWITCH], "fp16.", "loss_scale_window min_loss_scale"),
    (int, "fp16.", "initial_scale_power hysteresis"),
    (
        bool,
        "bf16.",
        "immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states",
    ),
    (
        bool,
        "compile.",
        "deepcompile autoep_non_moe free_activation offload_activation offload_activation_pin_memory "
        "offload_opt_states double_buffer symmetric_memory debug_log offload_parameters sync_before_reduce "
        "sync_after_reduce sync_before_allgather sync_after_allgather keep_int_input_tensors keep_all_input_tensors",
    ),
    (int, "compile.", "free_activation_threshold"),
    (int, "comet.", "samples_log_interval"),
    (str, "csv_monitor.", "output_path job_name"),
    (list, "comms_logger.", "prof_ops"),
    (_SIZE, "flops_profiler.", "profile_step top_modules"),
    (int, "flops_profiler.", "module_depth"),
    (float, "flops_profiler.", "recompute_fwd_factor"),
    (str | None, "flops_profiler.", "output_file"),
    (Annotated[int, Field(gt=0)], "aio.", "block_size queue_depth intra_op_parallelism"),
    (Annotated[int, Field(gt=0)] | None, "activation_checkpointing.", "number_checkpoints"),
    (Annotated[float, Field(gt=0)], "", "gradient_predivide_factor"),
    (_DTYPE | None, "", "communication_data_type seq_parallel_communication_data_type"),
    (_DTYPE | None, "data_types.", "grad_accum_dtype param_dtype buffer_dtype"),
)

VALUE_TYPES: dict[str, Any] = {f"{prefix}{key}": kind for kind, prefix, keys in _TYPES for key in keys.split()}
"""Type of the value of each key, by its path with dots."""


@cache
def _adapter(key: str) -> TypeAdapter[Any]:
    return TypeAdapter(VALUE_TYPES[key])


def check_deepspeed_values(section: dict[str, Any]) -> Iterator[Fault]:
    """Return a fault for each value that DeepSpeed does not take.

    Example:
        >>> [fault.message for fault in check_deepspeed_values({"wall_clock_breakdown": "maybe"})]
        ['deepspeed.wall_clock_breakdown=maybe: must be true or false']
    """
    return _check(section, ())


def _check(section: dict[str, Any], parents: tuple[str, ...]) -> Iterator[Fault]:
    for key, value in section.items():
        path = (*parents, key)
        name = ".".join(path)
        if isinstance(value, dict) and name not in VALUE_TYPES:
            yield from _check(value, path)
        elif name in VALUE_TYPES and value != "auto":  # which DeepSpeed takes for leaving a key out
            try:
                _adapter(name).validate_python(value)
            except ValidationError:
                yield Fault(
                    ("deepspeed", *path), f"deepspeed.{name}={show(value)}: must be {rule_of(VALUE_TYPES[name])}"
                )

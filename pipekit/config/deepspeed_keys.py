"""The configuration keys of DeepSpeed 0.19: the type of each value, and what pipekit does with it.

Every key is honoured, passed on to DeepSpeed, or refused with the reason. DeepSpeed itself ignores a misspelt key, and
many a value that cannot take effect. Tests compare the keys and the types with the installed DeepSpeed, and the table
in `docs/deepspeed.md` with the one that `key_table` makes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

Caller = Literal["run", "pipeline", "module"]
"""The user of a configuration of DeepSpeed's: a run from a YAML file, or `pipekit.initialize` with a `PipelineModule`
or with any other module."""

KeyTree = dict[str, "KeyTree | None"]
"""Keys of a section; None means that whatever stands under the key is taken as it is."""

_PIPELINES: tuple[Caller, ...] = ("run", "pipeline")
_ALL: tuple[Caller, ...] = ("run", "pipeline", "module")


@dataclass(frozen=True)
class Treatment:
    """Treatment of a key: passed on to DeepSpeed, unless `ours` or `refusal` say otherwise.

    Attributes:
        ours: the key of pipekit's that a run takes the value for.
        refusal: the reason why the key cannot take effect, as the end of a sentence.
        callers: those who are refused.
        unless: values that are taken all the same, since they say what holds anyway.
    """

    ours: str = ""
    refusal: str = ""
    callers: tuple[Caller, ...] = ()
    unless: tuple[Any, ...] = ()


PASSED = Treatment()


def _ours(key: str) -> Treatment:
    return Treatment(ours=key)


def _refused(refusal: str, *unless: Any, callers: tuple[Caller, ...] = _PIPELINES, ours: str = "") -> Treatment:
    return Treatment(ours, refusal, callers, unless)


def _refuse_switch(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


_NO_SWITCH = BeforeValidator(_refuse_switch)
_DTYPE = Literal["fp32", "fp16", "bf16", "int8", "int32"] | None
_COUNT = Annotated[int, Field(gt=0)]
_SIZE = Annotated[int, Field(ge=0)]
_DEVICE = Literal["none", "cpu", "nvme"]

_ZERO = "zero_optimization."
_CHECKPOINTING = "activation_checkpointing."
_OWN_CHECKPOINTS = "pipekit writes checkpoints of its own, which any layout reads"
_UNREAD = "DeepSpeed reads it and does nothing with it"
_AVERAGED = "the gradients of replicas are summed in fp32 and averaged"
_REMOVED = "DeepSpeed has removed it"
_AIO = "files are mapped into memory, without DeepSpeed's asynchronous I/O"
_ONE_STAGE = "a plain module has neither stages nor shards"
_COMPILE = "DeepCompile rewrites a whole module, but a pipeline runs single layers; see train.compile"
_OWN_PROFILER = "profile.steps writes the operations of every layer and the FLOP/s of each rank"
_OWN_TENSORS = "pipekit shards the layers itself; set parallel.tp, or give a topology"

_ROWS: tuple[tuple[str, str, Any, Treatment], ...] = (
    # Batch.
    ("", "train_batch_size", _COUNT, _ours("train.global_batch_size")),
    ("", "train_micro_batch_size_per_gpu", _COUNT, _ours("train.micro_batch_size")),
    ("", "gradient_accumulation_steps", _COUNT,
     _ours("train.global_batch_size / (train.micro_batch_size * parallel.dp)")),
    ("", "managed_gradient_accumulation", bool, _refused("the engine counts the micro-batches of a step", True)),
    ("", "dataloader_drop_last", bool, _refused("the data section decides how data are read", False, callers=("run",))),
    ("", "data_efficiency", Any, _refused(
        "pipekit reads the data of a pipeline itself", callers=("pipeline",), ours="train.curriculum")),
    ("", "curriculum_learning", Any, _refused(_REMOVED, callers=("pipeline", "module"), ours="train.curriculum")),
    ("", "progressive_layer_drop", Any, _refused(_REMOVED, callers=("pipeline", "module"), ours="train.layer_drop")),
    # Optimizer.
    ("", "optimizer", dict, _ours("optimizer")),
    ("", "scheduler", dict, _ours("scheduler")),
    ("", "gradient_clipping", Annotated[float, Field(ge=0)], _ours("train.gradient_clipping")),
    ("", "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer", bool, PASSED),
    # Layout.
    ("pipeline.", "stages", _COUNT, _refused(_ONE_STAGE, 1, callers=("module",), ours="parallel.pp")),
    ("pipeline.", "partition", str, _refused(
        "DeepSpeed never reads it; give PipelineModule(partition_method=...)", "best", callers=("pipeline", "module"),
        ours="parallel.partition")),
    ("pipeline.", "seed_layers", bool, _refused("every layer has a seed of its own", True, callers=_ALL)),
    ("pipeline.", "activation_checkpoint_interval", _SIZE,
     _refused(_ONE_STAGE, 0, callers=("module",), ours="train.activation_checkpointing")),
    ("pipeline.", "pipe_partitioned grad_partitioned", bool, _refused(
        "messages between stages are sharded where parallel.sequence_parallel shards the activations", callers=_ALL)),
    ("pipeline.", "use_reentrant", bool,
     _refused("torch.utils.checkpoint runs in its non-reentrant form", False, callers=_ALL)),
    ("tensor_parallel.", "autotp_size", _SIZE, _refused(_ONE_STAGE, 0, 1, callers=("module",), ours="parallel.tp")),
    ("tensor_parallel.", "dtype tp_overlap_comm vocab_parallel_lm_head vocab_parallel_ce_backend tp "
     "injection_policy_tuple partition_config preset_model keep_module_on_host kernel_inject", Any,
     _refused(_OWN_TENSORS, callers=_ALL)),
    ("", "expert_parallel", Any, _refused("expert parallelism is not available yet", callers=_ALL)),
    ("", "use_data_before_expert_parallelism", bool,
     _refused("expert parallelism is not available yet", False, callers=_ALL)),
    # Precision.
    ("", "bfloat16", dict, _ours("the section bf16")),
    ("fp16.", "enabled", bool, _ours("train.precision=fp16")),
    ("fp16.", "auto_cast", bool, _refused("the first layer gets its inputs unconverted", False)),
    ("fp16.", "consecutive_hysteresis fp16_master_weights_and_grads", bool, PASSED),
    ("fp16.", "loss_scale", Annotated[float, _NO_SWITCH, Field(ge=0)], PASSED),
    ("fp16.", "loss_scale_window min_loss_scale", Annotated[int, _NO_SWITCH], PASSED),
    ("fp16.", "initial_scale_power hysteresis", int, PASSED),
    ("bf16.", "enabled", bool, _ours("train.precision=bf16")),
    ("bf16.", "immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states", bool,
     PASSED),
    ("torch_autocast.", "enabled dtype lower_precision_safe_modules", Any, _refused(
        "layers run in the precision of their weights; see train.precision")),
    ("data_types.", "grad_accum_dtype param_dtype buffer_dtype", _DTYPE, PASSED),
    ("data_types.", "keep_in_fp32_modules", Any, PASSED),
    # Gradients of replicas.
    ("", "communication_data_type", _DTYPE, PASSED),
    ("", "seq_parallel_communication_data_type", _DTYPE, _refused("DeepSpeed's sequence parallelism is not used")),
    ("", "prescale_gradients", bool, _refused(_AVERAGED, False)),
    ("", "gradient_predivide_factor", Annotated[float, Field(gt=0)], _refused(_AVERAGED, 1)),
    ("", "gradient_allreduce_op", Literal["mean", "sum"], _refused(_AVERAGED, "mean")),
    ("", "disable_allgather", bool, _refused(_UNREAD, False, callers=_ALL)),
    # ZeRO.
    (_ZERO, "stage", Annotated[int, Field(ge=0, le=3)], _ours("parallel.zero")),
    (_ZERO, "cpu_offload", bool | None, _ours("parallel.offload=optimizer")),
    (_ZERO, "cpu_offload_param", bool | None, _ours("parallel.offload=parameters")),
    (_ZERO, "cpu_offload_use_pin_memory", bool | None, _refused(
        "it is an old name of offload_optimizer.pin_memory and offload_param.pin_memory")),
    (_ZERO, "contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce "
     "stage3_gather_16bit_weights_on_model_save stage3_use_all_reduce_for_fetch_params "
     "stage3_allgather_sequential stage3_gather_fp16_weights_on_model_save "
     "ignore_unused_parameters round_robin_gradients parameter_alignment zero_quantized_weights "
     "zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear override_module_apply "
     "log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory", bool, PASSED),
    (_ZERO, "allgather_partitions", bool, _refused(_UNREAD, True, callers=_ALL)),
    (_ZERO, "compute_grad_norm", bool, _refused("every step reports the norm of its gradient", True)),
    (_ZERO, "load_from_fp32_weights", bool, _refused(_OWN_CHECKPOINTS, True, callers=_ALL)),
    (_ZERO, "elastic_checkpoint pipeline_loading_checkpoint", bool, _refused(_OWN_CHECKPOINTS, False, callers=_ALL)),
    (_ZERO, "legacy_stage1", bool, _refused(_REMOVED, False, callers=_ALL)),
    (_ZERO, "overlap_comm", bool | None, PASSED),
    (_ZERO, "reduce_bucket_size", _COUNT, PASSED),
    (_ZERO, "allgather_bucket_size sub_group_size stage3_prefetch_bucket_size stage3_param_persistence_threshold "
     "stage3_model_persistence_threshold stage3_max_live_parameters stage3_max_reuse_distance "
     "zero_hpz_partition_size", _SIZE, PASSED),
    (_ZERO, "stage3_module_granularity_threshold", int, PASSED),
    (_ZERO, "leaf_module.classes leaf_module.names leaf_module.name_suffixes", list, PASSED),
    (_ZERO, "zenflow", Any, _refused("ZenFlow brings optimizers of its own", callers=_ALL)),
    (_ZERO, "mics_shard_size mics_hierarchical_params_gather zeropp_loco_param", Any, _refused(_REMOVED, callers=_ALL)),
    (f"{_ZERO}offload_optimizer.", "device", _DEVICE, _ours("parallel.offload=optimizer")),
    (f"{_ZERO}offload_optimizer.", "nvme_path", str | None, _ours("parallel.nvme_dir")),
    (f"{_ZERO}offload_optimizer.", "buffer_count", _SIZE, _refused(_AIO)),
    (f"{_ZERO}offload_optimizer.", "pipeline_read pipeline_write fast_init", bool, _refused(_AIO, False)),
    (f"{_ZERO}offload_optimizer.", "pin_memory", bool, PASSED),
    (f"{_ZERO}offload_optimizer.", "cpuadam_cores_perc", Annotated[float, Field(ge=0, le=1)], PASSED),
    (f"{_ZERO}offload_optimizer.", "ratio", Annotated[float, Field(ge=0, le=1)],
     _refused("the optimizer is offloaded as a whole, or not at all", 1)),
    (f"{_ZERO}offload_optimizer.", "super_offload", bool,
     _refused("SuperOffload brings an optimizer of its own", False)),
    (f"{_ZERO}offload_param.", "device", _DEVICE, _ours("parallel.offload=parameters")),
    (f"{_ZERO}offload_param.", "nvme_path", str | None, _ours("parallel.nvme_dir")),
    (f"{_ZERO}offload_param.", "buffer_count buffer_size max_in_cpu", _SIZE, _refused(_AIO)),
    (f"{_ZERO}offload_param.", "pin_memory", bool, PASSED),
    ("aio.", "block_size queue_depth intra_op_parallelism", _COUNT, _refused(_AIO)),
    ("aio.", "single_submit overlap_events use_gds", bool, _refused(_AIO)),
    ("", "weight_quantization", Any, _refused("layers are built without deepspeed.zero.Init, which quantizes them")),
    # Activations and compilation.
    (_CHECKPOINTING, "partition_activations", bool, _ours("train.activation_checkpointing.partition")),
    (_CHECKPOINTING, "cpu_checkpointing", bool, _ours("train.activation_checkpointing.offload")),
    (_CHECKPOINTING, "number_checkpoints", _COUNT | None,
     _refused("it follows from the layers; see train.activation_checkpointing.every")),
    (_CHECKPOINTING, "contiguous_memory_optimization", bool,
     _refused("torch's allocator gives each stored input its own memory", False)),
    (_CHECKPOINTING, "synchronize_checkpoint_boundary", bool,
     _refused("no stream needs to wait for a recomputation", False)),
    (_CHECKPOINTING, "profile", bool,
     _refused("profile.steps times each backward with its recomputation", False)),
    ("compile.", "deepcompile autoep_non_moe", bool, _refused(_COMPILE, False)),
    ("compile.", "free_activation offload_activation offload_activation_pin_memory offload_opt_states double_buffer "
     "symmetric_memory debug_log offload_parameters sync_before_reduce sync_after_reduce sync_before_allgather "
     "sync_after_allgather keep_int_input_tensors keep_all_input_tensors", bool, _refused(_COMPILE)),
    ("compile.", "free_activation_threshold", int, _refused(_COMPILE)),
    ("compile.", "passes", Any, _refused(_COMPILE)),
    # Logs.
    ("", "steps_per_print", _COUNT | None, _ours("logging.interval")),
    ("", "wall_clock_breakdown memory_breakdown dump_state disable_python_gc", bool, PASSED),
    ("", "log_level vocabulary_size", Any, PASSED),
    ("tensorboard.", "enabled", bool, _ours("logging.tensorboard")),
    ("tensorboard.", "output_path job_name", str, _refused("event files go into the run folder", callers=("run",))),
    ("wandb.", "enabled", bool, _ours("logging.wandb")),
    ("wandb.", "project", str, _ours("logging.wandb.project")),
    ("wandb.", "team", str | None, _ours("logging.wandb.entity")),
    ("wandb.", "group", str | None, _refused("a run is one run of Weights & Biases", callers=("run",))),
    ("csv_monitor.", "enabled", bool, PASSED),
    ("csv_monitor.", "output_path job_name", str, PASSED),
    ("comet.", "enabled", bool, PASSED),
    ("comet.", "samples_log_interval", int, PASSED),
    ("comet.", "project workspace api_key experiment_name experiment_key online mode", Any, PASSED),
    ("comms_logger.", "enabled prof_all verbose debug", bool, PASSED),
    ("comms_logger.", "prof_ops", list, PASSED),
    ("flops_profiler.", "enabled", bool, PASSED),
    ("flops_profiler.", "profile_step", _SIZE, PASSED),
    ("flops_profiler.", "recompute_fwd_factor", float, _refused(_OWN_PROFILER, 0)),
    ("flops_profiler.", "module_depth", int, _refused(_OWN_PROFILER, -1)),
    ("flops_profiler.", "top_modules", _SIZE, _refused(_OWN_PROFILER, 1)),
    ("flops_profiler.", "detailed", bool, _refused(_OWN_PROFILER, True)),
    ("flops_profiler.", "output_file", str | None, _refused(_OWN_PROFILER)),
    ("timers.", "throughput.enabled", bool, _refused("metrics.jsonl has the throughput", False)),
    ("timers.", "throughput.synchronized", bool, _refused("metrics.jsonl has the throughput")),
    # Checkpoints.
    ("checkpoint.", "use_node_local_storage", bool, _refused(
        _OWN_CHECKPOINTS, False, callers=("pipeline", "module"), ours="checkpoint.storage=local")),
    ("checkpoint.", "load_universal", bool, _refused(_OWN_CHECKPOINTS, False, callers=_ALL)),
    ("checkpoint.", "tag_validation checkpoint_serialization writer parallel_write", Any,
     _refused(_OWN_CHECKPOINTS, callers=_ALL)),
    ("", "datastates_ckpt", Any, _refused(_OWN_CHECKPOINTS, callers=_ALL)),
    # Programs around the training.
    ("", "autotuning", Any, _refused("DeepSpeed's autotuner starts runs of its own; see pipekit tune", callers=_ALL)),
    ("", "hybrid_engine", Any, _refused("pipekit trains with engines of its own", callers=_ALL)),
    ("", "nebula compression_training amp quantize_training sparse_gradients eigenvalue sparse_attention elasticity "
     "graph_harvesting", Any, _refused(_REMOVED, callers=_ALL)),
)  # fmt: skip

VALUE_TYPES: dict[str, Any] = {f"{prefix}{key}": kind for prefix, keys, kind, _ in _ROWS for key in keys.split()}
"""Type of the value of each key, by its path with dots. Where DeepSpeed checks a value with pydantic, it is that of
DeepSpeed; where DeepSpeed takes whatever stands there, and fails later or never, it is that of the default."""

TREATMENTS: dict[str, Treatment] = {
    f"{prefix}{key}": treatment for prefix, keys, _, treatment in _ROWS for key in keys.split()
}
"""Treatment of each key, by its path with dots."""


def _tree() -> KeyTree:
    tree: KeyTree = {}
    for path in TREATMENTS:
        *sections, key = path.split(".")
        below = tree
        for section in sections:
            found = below.setdefault(section, {})
            assert found is not None, path
            below = found
        below[key] = None
    return tree


DEEPSPEED_KEYS: KeyTree = _tree()
"""Every key that DeepSpeed 0.19 reads, as a tree."""


def is_refused(path: str, value: Any, caller: Caller) -> bool:
    """True if a key with a value cannot take effect for a caller.

    Example:
        >>> is_refused("prescale_gradients", True, "run"), is_refused("prescale_gradients", False, "run")
        (True, False)
        >>> is_refused("prescale_gradients", True, "module")
        False
    """
    treatment = TREATMENTS[path]
    is_off = isinstance(value, dict) and value.get("enabled") is False
    return caller in treatment.callers and not is_off and value not in treatment.unless


def key_table() -> str:
    """Markdown table of all keys, with what a run from YAML and `initialize` do with them."""
    rows = ["| DeepSpeed's key | in a run | in `initialize` |", "|---|---|---|"]
    for prefix, keys, _, treatment in _ROWS:
        names = ", ".join(f"`{prefix}{key}`" for key in keys.split())
        cells = [_cell(treatment, ("run",)), _cell(treatment, ("pipeline", "module"))]
        rows.append(f"| {names} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _cell(treatment: Treatment, callers: tuple[Caller, ...]) -> str:
    refused = [caller for caller in callers if caller in treatment.callers]
    ours = f"`{treatment.ours}`" if callers == ("run",) and treatment.ours else ""
    if not refused:
        return ours or "passed on"
    kept = " or ".join(f"`{str(value).lower()}`" for value in treatment.unless)
    whom = {"pipeline": " for a pipeline", "module": " for a plain module"}.get(" ".join(refused), "")
    return f"{ours}{'; ' if ours else ''}refused{whom}{f' unless {kept}' if kept else ''}: {treatment.refusal}"

"""The plan of a run: everything that is decided before any process starts."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch

from pipekit.config import BatchPlan, Config, plan_batch, resolve_layout
from pipekit.costs.model import ExampleBuilder, Measuring, describe_model
from pipekit.costs.profiling import ProgressCallback
from pipekit.errors import ConfigError
from pipekit.layers.specs import LayerSpec, TiedLayerSpec, build_on_meta, layer_names
from pipekit.layout import Layout
from pipekit.partitioners import PartitionInputs, partition
from pipekit.predictions.elements import Precision
from pipekit.predictions.parallel_plan import ParallelPlan
from pipekit.predictions.partition_inputs import partition_inputs
from pipekit.predictions.prediction import PlannedModel
from pipekit.schedules import Schedule, plan_schedule
from pipekit.tensors.host_memory import share_of_memory

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Plan:
    """What a run will do, the same on every rank.

    Attributes:
        config: the resolved configuration.
        device: what it computes on.
        precision: of weights and activations.
        layout: the grid of ranks.
        batch: how a step's sequences are shared out.
        layer_names: logical name of each layer.
        layer_parameters: trainable parameters of each layer; a tied layer's wherever it occurs.
        num_parameters: trainable parameters of the model, tied ones once.
        boundaries: stage `s` holds layers `boundaries[s]` to `boundaries[s + 1] - 1`.
        schedule: the pipeline's table; under `auto` the one for equal costs, with which a run begins.
        model: what predictions need of the model.
        parallel_plan: the layout, as predictions take it.
        partition_inputs: the layers, as partitioners take them.
        chosen: under `parallel: auto`, what was chosen and why.
    """

    config: Config
    device: Device
    precision: Precision
    layout: Layout
    batch: BatchPlan
    layer_names: Sequence[str]
    layer_parameters: Sequence[int]
    num_parameters: int
    boundaries: Sequence[int]
    schedule: Schedule
    model: PlannedModel
    parallel_plan: ParallelPlan
    partition_inputs: PartitionInputs
    chosen: str | None = None

    @property
    def placement(self) -> tuple[int, ...]:
        """The pipeline rank of each stage."""
        return self.schedule.placement

    @property
    def stages(self) -> list[range]:
        """The layers of each stage."""
        return [range(start, end) for start, end in pairwise(self.boundaries)]


def plan_run(
    config: Config,
    specs: Sequence[LayerSpec],
    *,
    world_size: int | None,
    num_devices: int | None,
    example: ExampleBuilder = lambda size: None,
    measure: bool = True,
    num_threads: int | None = None,
    on_progress: ProgressCallback | None = None,
    memory_bytes: int | None = None,
) -> Plan:
    """Decide everything that can be decided without a process group.

    Args:
        config: the configuration, with every size known.
        specs: the model.
        world_size: the number of processes, where a launcher has already started them.
        num_devices: the number of GPUs present; None where there are none.
        example: returns a micro-batch of so many sequences; asked for by partitions by cost alone.
        measure: whether layers may be timed; if not, `profile` cuts by their number, for the caller to replace.
        num_threads: CPU threads of a process of the run, with which layers are timed.
        on_progress: called with what is being timed.
        memory_bytes: what a rank may hold under `partition: memory`, where the configuration does not say; what the
            devices present have, unless given.

    Raises:
        PipekitError: if something does not fit; it says what to type instead.
    """
    names = layer_names(specs)
    check_tied_parameters(specs, names)
    device = plan_device(config, num_devices)
    layout = resolve_layout(config, world_size=world_size, num_devices=num_devices if device == "cuda" else None)
    batch = plan_batch(config, layout.dp)
    parallel = config.parallel
    schedule = plan_schedule(
        parallel.schedule,
        pp=layout.pp,
        num_micro_batches=batch.num_micro_batches,
        stages_per_rank=parallel.stages_per_rank,
        max_in_flight=parallel.max_in_flight,
    )
    precision = plan_precision(config, device)
    measuring = None
    if measure and parallel.partition == "profile":
        measuring = Measuring(device, num_threads, on_progress)
    model = describe_model(config, specs, example, precision=precision, measuring=measuring)
    # What cannot be cut is refused here, by all ranks alike.
    model.shapes_of(layout.tp)
    parallel_plan = ParallelPlan(
        layout,
        zero=parallel.zero,
        schedule=parallel.schedule,
        stages_per_rank=schedule.num_stages // layout.pp,
        micro_batch_size=batch.micro_batch_size,
        num_micro_batches=batch.num_micro_batches,
        checkpointing=config.train.activation_checkpointing,
        max_in_flight=parallel.max_in_flight,
    )
    inputs = partition_inputs(
        model,
        parallel_plan,
        schedule,
        type_names=[spec.type_name for spec in specs],
        limit_bytes=lambda: plan_memory(config, device, layout.world_size, memory_bytes),
    )
    # A rank that does not measure is told the boundaries by the one that does. It describes nothing meanwhile, since
    # layers that need values run nowhere but where they are measured.
    method = parallel.partition if measure or parallel.partition != "profile" else "uniform"
    boundaries = partition(method, inputs, schedule.num_stages, boundaries=parallel.boundaries)
    return Plan(
        config=config,
        device=device,
        precision=precision,
        layout=layout,
        batch=batch,
        layer_names=names,
        layer_parameters=model.layer_parameters,
        num_parameters=model.num_parameters,
        boundaries=boundaries,
        schedule=schedule,
        model=model,
        parallel_plan=parallel_plan,
        partition_inputs=inputs,
    )


def check_tied_parameters(specs: Sequence[LayerSpec], names: Sequence[str]) -> None:
    """Check that what tied layers say they share is there.

    Raises:
        ConfigError: if a `tied_weight_attr` is no parameter of its layer.
    """
    seen: set[str] = set()
    for spec, name in zip(specs, names, strict=True):
        if not isinstance(spec, TiedLayerSpec) or spec.key in seen:
            continue
        seen.add(spec.key)
        parameters = [parameter for parameter, _ in build_on_meta(spec, name=name).named_parameters()]
        for attr in spec.tied_weight_attr:
            if attr not in parameters:
                close = difflib.get_close_matches(attr, parameters, n=1) or parameters[:1]
                raise ConfigError(
                    f"layer {name!r} is tied by {attr!r}, and {spec.type_name} has no such parameter; it has "
                    f"{', '.join(parameters) or 'none'}" + (f"; try tied_weight_attr={close[0]!r}" if close else "")
                )


def plan_device(config: Config, num_devices: int | None) -> Device:
    """Return what a run computes on.

    Raises:
        ConfigError: if the configuration asks for GPUs and there are none.
    """
    if config.run.device == "auto":
        return "cuda" if num_devices else "cpu"
    if config.run.device == "cuda" and not num_devices:
        raise ConfigError("run.device=cuda: no GPU is present; use run.device=auto or run.device=cpu")
    return config.run.device


def plan_precision(config: Config, device: Device) -> Precision:
    """Return the number format: what is configured, or bf16 on GPUs and fp32 on CPUs.

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


def plan_memory(config: Config, device: Device, num_local_ranks: int, memory_bytes: int | None = None) -> int:
    """Return the bytes that a rank may hold: what is configured, the GPU's memory, or its share of the machine's.

    Args:
        config: the configuration.
        device: what the run computes on.
        num_local_ranks: processes on this machine.
        memory_bytes: memory of the device, where it is another than the one that is present.
    """
    if config.parallel.memory_limit_gb is not None:
        return int(config.parallel.memory_limit_gb * 1e9)
    if memory_bytes is not None:
        return memory_bytes
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    return share_of_memory(num_local_ranks)


def _cpu_has_fp16() -> bool:
    mkldnn = torch.ops.mkldnn
    return hasattr(mkldnn, "_is_mkldnn_fp16_supported") and bool(mkldnn._is_mkldnn_fp16_supported())

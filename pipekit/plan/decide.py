"""The decision of a run: from a configuration, a trial and the resources to the plan."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

from pipekit.config import Config, plan_batch, resolve_layout
from pipekit.costs.example import Example
from pipekit.costs.model import describe_model
from pipekit.errors import ConfigError
from pipekit.layers.attention_core import recompute_attention
from pipekit.layers.freezing import freeze
from pipekit.layers.layer_drop import number_blocks
from pipekit.layers.specs import LayerSpec, TiedLayerSpec, build_on_meta, layer_names
from pipekit.models import adapted_layers
from pipekit.models.custom import check_specs
from pipekit.partitioners import PartitionInputs, partition
from pipekit.plan.device import plan_device, plan_precision, rank_memory
from pipekit.plan.plan import Plan, StartPoint
from pipekit.plan.resources import Resources, threads_per_process
from pipekit.plan.search import choose_layout
from pipekit.predictions.elements import count_elements
from pipekit.predictions.parallel_plan import ParallelPlan
from pipekit.predictions.partition_inputs import partition_inputs
from pipekit.predictions.prediction import PlannedModel
from pipekit.predictions.search import SearchResult
from pipekit.progress import ProgressCallback
from pipekit.schedules import plan_schedule, validate


class TrialType(Protocol):
    """The class of a trial, as far as planning needs it; see `pipekit.LayersTrial`."""

    def resolve(self, config: Config, prepared: Mapping[str, Any]) -> Config:
        """Return the configuration with the sizes that follow from the data."""

    def build_layers(self, config: Config) -> list[LayerSpec]:
        """Return the model."""

    def example(self, config: Config, micro_batch_size: int) -> Example | None:
        """Example inputs and labels of one micro-batch; None where there are none."""


@dataclass(frozen=True)
class Decision:
    """A plan, and the objects in memory that it was made from.

    Attributes:
        plan: the plan.
        specs: the model.
        model: the model as predictions take it.
        parallel_plan: the layout as predictions take it.
        partition_inputs: the layers as partitioners take them.
        search: under `parallel: auto`, the layouts that were compared.
    """

    plan: Plan
    specs: Sequence[LayerSpec]
    model: PlannedModel
    parallel_plan: ParallelPlan
    partition_inputs: PartitionInputs
    search: SearchResult | None = None


def decide_run(
    config: Config,
    trial: TrialType,
    resources: Resources,
    *,
    prepared: Mapping[str, Any] | None = None,
    start: StartPoint | None = None,
    on_progress: ProgressCallback | None = None,
) -> Decision:
    """Decide everything about a run that can be decided without a process group.

    Data are prepared before, by the trial's `prepare`. Nothing is computed but the layers' seconds, under
    `partition: profile`.

    Args:
        config: the configuration.
        trial: the trial's class.
        resources: processes, cores, memory and GPUs.
        prepared: what the trial has prepared; None where every size of the model is known without.
        start: the checkpoint to go on from.
        on_progress: called with the layer that is being timed.

    Raises:
        PipekitError: if something does not fit; it says what to type instead.
    """
    config, specs = build_specs(config, trial, prepared)
    names = layer_names(specs)
    check_tied_parameters(specs, names)
    device = plan_device(config, resources.num_gpus)
    chosen = search = None
    if config.parallel.auto:
        config, chosen, search = choose_layout(config, specs, trial, resources)
    parallel = config.parallel
    layout = resolve_layout(
        config, world_size=resources.world_size, num_devices=resources.num_gpus if device == "cuda" else None
    )
    batch = plan_batch(config, layout.dp)
    schedule = plan_schedule(
        parallel.schedule,
        pp=layout.pp,
        num_micro_batches=batch.num_micro_batches,
        stages_per_rank=parallel.stages_per_rank,
        max_in_flight=parallel.max_in_flight,
    )
    if device == "cuda":
        validate(schedule, channels="nccl")
    precision = plan_precision(config, device)
    num_threads = threads_per_process(
        config.run.threads_per_process, resources.local_world_size or layout.world_size, resources.num_cpus
    )
    model = describe_model(
        config,
        specs,
        partial(trial.example, config),
        precision=precision,
        device=device,
        time_on=device if parallel.partition == "profile" else None,
        num_threads=num_threads,
        on_progress=on_progress,
    )
    # What cannot be cut is refused here.
    shapes = model.shapes_of(layout.tp)
    parallel_plan = ParallelPlan(
        layout,
        zero=parallel.zero,
        schedule=parallel.schedule,
        stages_per_rank=schedule.num_stages // layout.pp,
        micro_batch_size=batch.micro_batch_size,
        num_micro_batches=batch.num_micro_batches,
        checkpointing=config.train.activation_checkpointing,
        max_in_flight=parallel.max_in_flight,
        sequence_parallel=parallel.sequence_parallel,
    )
    inputs = partition_inputs(
        model,
        parallel_plan,
        schedule,
        type_names=[spec.type_name for spec in specs],
        limit_bytes=lambda: rank_memory(config, device, resources, layout.world_size),
    )
    boundaries = tuple(partition(parallel.partition, inputs, schedule.num_stages, boundaries=parallel.boundaries))
    plan = Plan(
        # Trained again, the stored configuration goes on from the newest checkpoint.
        config=config.updated({"checkpoint.resume": "auto"}),
        device=device,
        precision=precision,
        layout=layout,
        batch=batch,
        layer_names=tuple(names),
        layer_parameters=tuple(model.layer_parameters),
        num_parameters=model.num_parameters,
        stage_parameters=tuple(count_elements(*shapes[first:end]) for first, end in pairwise(boundaries)),
        boundaries=boundaries,
        schedule=schedule,
        num_threads=num_threads,
        start=start,
        chosen=chosen,
        prepared=dict(prepared or {}),
    )
    return Decision(plan, specs, model, parallel_plan, inputs, search)


def build_specs(config: Config, trial: TrialType, prepared: Mapping[str, Any] | None) -> tuple[Config, list[LayerSpec]]:
    """The configuration with every size known, and the model; `prepared` is None where sizes are known without.

    Raises:
        PipekitError: if the sizes do not fit what was prepared, the model is no list of layer specs, or `train.freeze`
            does not fit it, or nothing tells how many steps `train.epochs` are.
    """
    if prepared is not None:
        config = trial.resolve(config, prepared)
        if not config.train.has_steps:
            raise ConfigError(
                f"train.epochs={config.train.epochs:g}: {getattr(trial, '__name__', 'the trial')} does not tell how "
                "many samples an epoch has; give train.steps or train.tokens, or return a configuration with "
                "train.steps from its resolve"
            )
    return config, build_trained_layers(config, trial)


def build_trained_layers(config: Config, trial: TrialType) -> list[LayerSpec]:
    """The model of a trial as a run trains it: with the adapters of `lora`, and frozen as `train.freeze` says.

    Raises:
        PipekitError: if the trial returns no list of layer specs, or one of these sections, or
            `train.activation_checkpointing`, does not fit it.
    """
    specs = trial.build_layers(config)
    if config.train.layer_drop is not None:
        number_blocks(specs)
    check_specs(specs, where=f"{getattr(trial, '__name__', 'trial')}.build_layers")
    specs = freeze(adapted_layers(config, specs), config.train.freeze)
    specs = recompute_attention(specs, config.train.activation_checkpointing)
    frozen = [pattern for group in config.optimizer.groups if group.frozen for pattern in group.patterns]
    return freeze(specs, frozen, key="optimizer.groups")


def check_tied_parameters(specs: Sequence[LayerSpec], names: Sequence[str]) -> None:
    """Check that tied layers have the parameters that they say they share.

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

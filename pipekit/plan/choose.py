"""From a configuration to the plan of its trial, before any process starts and without deepspeed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from pipekit.config import Config
from pipekit.costs.model import describe_model
from pipekit.errors import ConfigError, LayoutError
from pipekit.layers.specs import LayerSpec
from pipekit.models.custom import check_specs, load_object
from pipekit.plan.plan import Plan, plan_memory, plan_precision, plan_run
from pipekit.predictions.devices import Device, find_device
from pipekit.predictions.prediction import PlannedModel, Prediction
from pipekit.predictions.search import SearchResult, SearchSpace, search_layouts
from pipekit.tensors.host_memory import share_of_memory
from pipekit.training.language_model import LanguageModelTrial
from pipekit.training.trial import ProgressCallback, Trial


def load_trial(config: Config) -> type[Trial]:
    """Return the trial that the configuration names, or the shipped one.

    Raises:
        ConfigError: if it cannot be imported, or is no `Trial`.
    """
    if config.run.trial is None:
        return LanguageModelTrial
    trial = load_object(config.run.trial, key="run.trial")
    if not (isinstance(trial, type) and issubclass(trial, Trial)):
        raise ConfigError(f"run.trial={config.run.trial}: must be a subclass of pipekit.Trial")
    return trial


def plan_specs(
    config: Config, on_progress: ProgressCallback | None = None, *, prepare: bool = True
) -> tuple[Config, list[LayerSpec], type[Trial]]:
    """Return a configuration whose sizes are known, its model, and its trial.

    Args:
        config: the configuration.
        on_progress: called with what is being done.
        prepare: whether to do what the trial does once before training.

    Raises:
        PipekitError: if the trial or its model cannot be built.
    """
    trial = load_trial(config)
    if prepare:
        config = trial.resolve(config, on_progress)
    specs = trial.build_layers(config)
    check_specs(specs, where=f"{trial.__name__}.build_layers")
    return config, specs, trial


def plan_trial(
    config: Config,
    *,
    world_size: int | None,
    num_devices: int | None,
    on_progress: ProgressCallback | None = None,
    measure: bool = True,
    num_threads: int | None = None,
    num_cpus: int = 1,
) -> Plan:
    """Return the plan of a configuration's trial, after doing what the trial does once before training.

    Args:
        config: the configuration.
        world_size: the number of processes, where a launcher has already started them.
        num_devices: the number of GPUs present; None where there are none.
        on_progress: called with what is being done.
        measure: whether layers may be timed; if not, `profile` cuts by their number, for the caller to replace.
        num_threads: CPU threads of a process of the run.
        num_cpus: cores, which `parallel: auto` takes for devices where there is no GPU.

    Raises:
        PipekitError: if something does not fit.
    """
    config, specs, trial = plan_specs(config, on_progress)
    chosen = None
    if config.parallel.auto:
        number = world_size or num_devices or num_cpus
        config, chosen = choose_layout(config, specs, trial, number, num_gpus=num_devices)
    plan = plan_run(
        config,
        specs,
        world_size=world_size,
        num_devices=num_devices,
        example=partial(trial.example, config),
        measure=measure,
        num_threads=num_threads,
        on_progress=on_progress,
    )
    return replace(plan, chosen=chosen)


@dataclass(frozen=True)
class Search:
    """A search, with the model and the batch that it was made for."""

    model: PlannedModel
    result: SearchResult
    global_batch_size: int


def search(
    config: Config,
    specs: Sequence[LayerSpec],
    trial: type[Trial],
    *,
    num_devices: int,
    device: Device,
    is_gpu: bool,
    max_tp: int = 1,
) -> Search:
    """Compare every layout of a configuration's model over some devices.

    Args:
        config: the configuration; of its parallel section the precision alone counts.
        specs: the model.
        trial: the trial.
        num_devices: devices to fill.
        device: what each rank computes on.
        is_gpu: whether that is a GPU, which computes in bf16 where the configuration does not say.
        max_tp: largest tensor-parallel degree.

    Raises:
        ConfigError: if it is not known what the layers cost.
    """
    kind: Literal["cpu", "cuda"] = "cuda" if is_gpu else "cpu"
    device = device.model_copy(update={"memory_bytes": plan_memory(config, kind, num_devices, device.memory_bytes)})
    precision = plan_precision(config, kind)
    model = describe_model(config, specs, partial(trial.example, config), precision=precision)
    degrees, heads = [1], config.model.attention_heads
    while heads is not None and 2 * degrees[-1] <= min(max_tp, device.devices_per_node):
        if heads.fault(2 * degrees[-1]):
            break
        degrees.append(2 * degrees[-1])
    space = SearchSpace(
        num_devices,
        config.train.global_batch_size,
        tp=degrees,
        checkpointing=(True,) if config.train.activation_checkpointing else (False, True),
    )
    return Search(model, search_layouts(model, space, device), space.global_batch_size)


def best_layout(found: Search, num_devices: int, device: Device) -> Prediction:
    """Return the fastest layout of a search.

    Raises:
        LayoutError: if none fits; it says how much the nearest lacks.
    """
    if found.result.ranked:
        return found.result.ranked[0]
    over = f"{num_devices} x {device.name}"
    rejected = found.result.rejected
    if not rejected:
        raise LayoutError(
            f"no layout over {over} shares out the train.global_batch_size of {found.global_batch_size}: pp * tp * dp "
            f"must be {num_devices}, pp at most the {len(found.model.layer_names)} layers, and dp must divide the "
            "batch; try a multiple of the devices, or fewer of them"
        )
    plan, reason = rejected[0]
    raise LayoutError(
        f"none of {len(rejected):,} layouts over {over} can run; the nearest is {plan}, which {reason}; try "
        "more devices, or a smaller train.sequence_length"
        + (", or compare tensor parallelism (pipekit plan --max-tp 8)" if plan.layout.tp == 1 else "")
    )


def choose_layout(
    config: Config, specs: Sequence[LayerSpec], trial: type[Trial], num_devices: int, *, num_gpus: int | None
) -> tuple[Config, str]:
    """Return the configuration with the best layout for the devices present in place of `parallel: auto`, and why.

    Every rank chooses the same: nothing is timed.

    Args:
        config: the configuration.
        specs: the model.
        trial: the trial.
        num_devices: processes to lay out.
        num_gpus: GPUs present; None where there are none.

    Raises:
        PipekitError: if no layout fits, the GPU is unknown, or it is not known what the layers cost.
    """
    device = present_device(num_gpus, num_devices)
    found = search(config, specs, trial, num_devices=num_devices, device=device, is_gpu=bool(num_gpus))
    best = best_layout(found, num_devices, device).plan
    resolved = config.updated(
        {
            "parallel.auto": False,
            "parallel.pp": best.layout.pp,
            "parallel.dp": best.layout.dp,
            "parallel.zero": best.zero,
            "parallel.schedule": best.schedule,
            "parallel.partition": "flops",
            "train.micro_batch_size": best.micro_batch_size,
            "train.activation_checkpointing": best.checkpointing,
        }
    )
    return resolved, reason_of_choice(found.result)


def reason_of_choice(result: SearchResult) -> str:
    """Return in one line what a search chose, and by how much it is ahead of the next."""
    best, *others = result.ranked
    if not others:
        return f"{best.plan}: the only layout that fits, of {1 + len(result.rejected):,}"
    which = f"{result.num_fitting:,} layouts that " + ("were simulated" if result.num_open else "fit")
    ahead = others[0].step_time_s / best.step_time_s
    lead = f"{ahead:.2f}x the next" if ahead >= 1.005 else "as fast as the next"
    return f"{best.plan}: the fastest of {which}, {lead} ({others[0].plan})"


def present_device(num_gpus: int | None, num_processes: int) -> Device:
    """Return what each process of a run on this machine computes on; of a CPU, its share.

    Raises:
        ConfigError: if the GPU is not in the table.
    """
    if num_gpus:
        name = torch.cuda.get_device_name(0)
        try:
            return find_device(name)
        except ConfigError:
            raise ConfigError(
                f"the GPU {name} is not among the devices that are known; describe it in a YAML file for pipekit plan "
                "--device-file, and write the layout that it finds into the parallel section"
            ) from None
    return find_device("cpu").model_copy(update={"memory_bytes": share_of_memory(num_processes)})


def resumable(config: Config) -> Config:
    """Return the configuration as its run folder stores it: trained again, it goes on from the newest checkpoint."""
    return config.updated({"checkpoint.resume": "auto"})

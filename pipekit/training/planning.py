"""From a configuration to the plan of its trial, before any process starts and without deepspeed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from pipekit.config import Config, GPTConfig
from pipekit.errors import ConfigError, LayoutError
from pipekit.models import load_object
from pipekit.models.custom import check_specs
from pipekit.plan import Plan, plan_precision, plan_run
from pipekit.planner.devices import Device, find_device
from pipekit.planner.model import describe_model
from pipekit.planner.prediction import PlannedModel, Prediction
from pipekit.planner.search import SearchResult, SearchSpace, search_layouts
from pipekit.specs import LayerSpec
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
        measure: whether layers may be timed; if not, stages are cut by operations in place of seconds.
        num_threads: CPU threads of a process of the run.
        num_cpus: cores, which `parallel: auto` takes for devices where there is no GPU.

    Raises:
        PipekitError: if something does not fit.
    """
    config, specs, trial = plan_specs(config, on_progress)
    if config.parallel.auto:
        number = world_size or num_devices or num_cpus
        config = choose_layout(config, specs, trial, number, num_gpus=num_devices)
    return plan_run(
        config,
        specs,
        world_size=world_size,
        num_devices=num_devices,
        example=partial(trial.example, config),
        measure=measure,
        num_threads=num_threads,
        on_progress=on_progress,
    )


@dataclass(frozen=True)
class Search:
    """A search, and the model that it was made for."""

    model: PlannedModel
    result: SearchResult


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
    """
    precision = plan_precision(config, "cuda" if is_gpu else "cpu")
    model = describe_model(config, specs, partial(trial.example, config), precision=precision)
    degrees = [1]
    while isinstance(config.model, GPTConfig) and 2 * degrees[-1] <= min(max_tp, device.devices_per_node):
        if config.model.num_heads % (2 * degrees[-1]):
            break
        degrees.append(2 * degrees[-1])
    space = SearchSpace(
        num_devices,
        config.train.global_batch_size,
        tp=degrees,
        checkpointing=(True,) if config.train.activation_checkpointing else (False, True),
    )
    return Search(model, search_layouts(model, space, device))


def best_layout(found: Search, num_devices: int, device: Device) -> Prediction:
    """Return the fastest layout of a search.

    Raises:
        LayoutError: if none fits; it says why the smallest does not.
    """
    if found.result.ranked:
        return found.result.ranked[0]
    reasons = "; ".join(f"{choice}: {reason}" for choice, reason in found.result.rejected[-1:])
    raise LayoutError(
        f"none of {len(found.result.rejected):,} layouts over {num_devices} x {device.name} can run"
        + (f", such as {reasons}" if reasons else f": no micro-batch size divides the batch over {num_devices}")
        + "; try more devices, a tensor-parallel degree (--max-tp 8), or another train.global_batch_size"
    )


def choose_layout(
    config: Config, specs: Sequence[LayerSpec], trial: type[Trial], num_devices: int, *, num_gpus: int | None
) -> Config:
    """Return the configuration with the best layout for the devices present in place of `parallel: auto`.

    Every rank chooses the same: nothing is timed.

    Args:
        config: the configuration.
        specs: the model.
        trial: the trial.
        num_devices: processes to lay out.
        num_gpus: GPUs present; None where there are none.
    """
    device = present_device(num_gpus, num_devices)
    found = search(config, specs, trial, num_devices=num_devices, device=device, is_gpu=bool(num_gpus))
    best = best_layout(found, num_devices, device).choice
    return config.updated(
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


def present_device(num_gpus: int | None, num_processes: int) -> Device:
    """Return what each process of a run on this machine computes on; of a CPU, its share."""
    if num_gpus:
        return find_device(torch.cuda.get_device_name(0))
    cpu = find_device("cpu")
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // num_processes
    return cpu.model_copy(update={"memory_bytes": memory_bytes})


def resumable(config: Config) -> Config:
    """Return the configuration as its run folder stores it: trained again, it goes on from the newest checkpoint."""
    return config.updated({"checkpoint.resume": "auto"})

"""The layouts that a run could have on some devices, compared; `parallel: auto` takes the fastest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from pipekit.config import Config
from pipekit.costs.model import describe_model
from pipekit.errors import LayoutError
from pipekit.layers.specs import LayerSpec
from pipekit.plan.device import plan_precision, present_device
from pipekit.plan.resources import Resources
from pipekit.predictions.devices import Device
from pipekit.predictions.prediction import PlannedModel, Prediction
from pipekit.predictions.search import SearchResult, SearchSpace, search_layouts

if TYPE_CHECKING:
    from pipekit.plan.decide import TrialType


@dataclass(frozen=True)
class Search:
    """A search, with the model and the batch that it was made for."""

    model: PlannedModel
    result: SearchResult
    global_batch_size: int


def search(
    config: Config,
    specs: Sequence[LayerSpec],
    trial: TrialType,
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
    if config.parallel.memory_limit_gb is not None:
        device = device.model_copy(update={"memory_bytes": int(config.parallel.memory_limit_gb * 1e9)})
    precision = plan_precision(config, "cuda" if is_gpu else "cpu")
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
    config: Config, specs: Sequence[LayerSpec], trial: TrialType, resources: Resources
) -> tuple[Config, str, SearchResult]:
    """Choose the fastest layout for the devices present, in place of `parallel: auto`. Nothing is timed.

    Args:
        config: the configuration.
        specs: the model.
        trial: the trial's class.
        resources: the devices.

    Returns:
        The configuration with the layout, the choice in one line, and the layouts that were compared.

    Raises:
        PipekitError: if no layout fits, the GPU is unknown, or it is not known what the layers cost.
    """
    number = resources.num_devices
    device = present_device(resources, number)
    found = search(config, specs, trial, num_devices=number, device=device, is_gpu=bool(resources.num_gpus))
    best = best_layout(found, number, device).plan
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
    return resolved, reason_of_choice(found.result), found.result


def reason_of_choice(result: SearchResult) -> str:
    """Return in one line what a search chose, and by how much it is ahead of the next."""
    best, *others = result.ranked
    if not others:
        return f"{best.plan}: the only layout that fits, of {1 + len(result.rejected):,}"
    which = f"{result.num_fitting:,} layouts that " + ("were simulated" if result.num_open else "fit")
    ahead = others[0].step_time_s / best.step_time_s
    lead = f"{ahead:.2f}x the next" if ahead >= 1.005 else "as fast as the next"
    return f"{best.plan}: the fastest of {which}, {lead} ({others[0].plan})"

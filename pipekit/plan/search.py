"""The layouts that a run could have on some devices, compared; `parallel: auto` takes the fastest."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

from pipekit.config import Config
from pipekit.costs.model import describe_model
from pipekit.errors import ConfigError, LayoutError
from pipekit.layers.specs import LayerSpec
from pipekit.plan.device import plan_precision, present_device
from pipekit.plan.resources import Resources
from pipekit.predictions.devices import Device
from pipekit.predictions.prediction import PlannedModel
from pipekit.predictions.search import SearchResult, SearchSpace, search_layouts
from pipekit.settings.activations import ActivationCheckpointing

if TYPE_CHECKING:
    from pipekit.plan.decide import TrialType


def tp_degrees(largest: int, device: Device) -> list[int]:
    """Tensor-parallel degrees to compare: powers of 2 up to a largest one, within a node.

    Example:
        >>> from pipekit.predictions.devices import find_device
        >>> tp_degrees(16, find_device("h100")), tp_degrees(3, find_device("h100"))
        ([1, 2, 4, 8], [1, 2])
    """
    return [2**power for power in range(min(largest, device.devices_per_node).bit_length())]


def search(
    config: Config,
    specs: Sequence[LayerSpec],
    trial: TrialType,
    *,
    num_devices: int,
    device: Device,
    is_gpu: bool,
    tp: Sequence[int] = (1,),
    zero: Sequence[int] | None = None,
    num_ranked: int = 10,
) -> tuple[PlannedModel, SearchResult]:
    """Compare every layout of a configuration's model over some devices.

    Args:
        config: the configuration; of its parallel section the memory limit alone counts.
        specs: its layers.
        trial: describes their inputs.
        num_devices: devices to fill.
        device: what each rank computes on.
        is_gpu: whether that is a GPU, which computes in bf16 where the configuration does not say.
        tp: tensor-parallel degrees; those that cannot share out the heads are left out.
        zero: ZeRO stages; unless given 0 and 1, and on GPUs also 2 and 3, which are for layouts without a pipeline, as
            far as the rules of the configuration let them.
        num_ranked: how many of the best to return.

    Raises:
        ConfigError: if it is not known what the layers cost.
        LayoutError: if no layout fits; it says how much the nearest lacks.
    """
    if config.parallel.memory_limit_gb is not None:
        limit_bytes = int(config.parallel.memory_limit_gb * 1e9)
        device = device.model_copy(update={"memory_bytes": limit_bytes, "reserve_bytes": 0})
    kind: Literal["cpu", "cuda"] = "cuda" if is_gpu else "cpu"
    precision = plan_precision(config, kind)
    model = describe_model(config, specs, partial(trial.example, config), precision=precision, device=kind)
    least_zero = {"none": 0, "parameters": 3}.get(config.parallel.offload, 1)
    if zero is None:
        zero = _zero_stages(config) if is_gpu else (0, 1)
    stages = [each for each in zero if each >= least_zero]
    heads = config.model.attention_heads
    degrees = [each for each in tp if each == 1 or (heads is not None and not heads.fault(each))] or [1]
    batch_size = config.train.global_batch_size
    given = config.train.activation_checkpointing
    checkpointing = (None, ActivationCheckpointing()) if given is None else (given,)
    space = SearchSpace(num_devices, batch_size, tp=degrees, zero=stages, checkpointing=checkpointing)
    result = search_layouts(model, space, device, num_ranked=num_ranked)
    if result.ranked:
        return model, result
    over = f"{num_devices} x {device.name}"
    if not result.rejected:
        raise LayoutError(
            f"no layout over {over} shares out the train.global_batch_size of {batch_size}: pp * tp * dp must be "
            f"{num_devices}, pp at most the {len(model.layer_names)} layers, and dp must divide the batch; try a "
            "multiple of the devices, or fewer of them"
        )
    plan, reason = result.rejected[0]
    raise LayoutError(
        f"none of {len(result.rejected):,} layouts over {over} can run; the nearest is {plan}, which {reason}; try "
        "more devices, or a smaller train.sequence_length"
        + (", or compare tensor parallelism (pipekit plan --max-tp 8)" if plan.layout.tp == 1 else "")
    )


def _zero_stages(config: Config) -> list[int]:
    """ZeRO stages of layouts on GPUs: 2 and 3 too, where no rule refuses them beside the rest of the configuration."""
    alone = {"pp": 1, "tp": 1, "schedule": "1f1b", "partition": "flops", "auto": False}
    alone |= dict.fromkeys(("boundaries", "stages_per_rank", "max_in_flight"))
    stages = [0, 1]
    for stage in (2, 3):
        try:
            config.updated({f"parallel.{key}": value for key, value in (*alone.items(), ("zero", stage))})
        except ConfigError:
            continue
        stages.append(stage)
    return stages


def choose_layout(
    config: Config, specs: Sequence[LayerSpec], trial: TrialType, resources: Resources
) -> tuple[Config, str, SearchResult]:
    """Choose the fastest layout for the devices present, in place of `parallel: auto`. Nothing is timed.

    Returns:
        The configuration with the layout, the choice in one line, and the layouts that were compared.

    Raises:
        PipekitError: if no layout fits, the GPU is unknown, or it is not known what the layers cost.
    """
    number = resources.num_devices
    device = present_device(resources, number)
    _, result = search(config, specs, trial, num_devices=number, device=device, is_gpu=bool(resources.num_gpus))
    best = result.ranked[0].plan
    resolved = config.updated({"parallel.auto": False, "parallel.partition": "flops", **best.written()})
    return resolved, reason_of_choice(result), result


def reason_of_choice(result: SearchResult) -> str:
    """Return in one line what a search chose, and by how much it is ahead of the next."""
    best, *others = result.ranked
    if not others:
        return f"{best.plan}: the only layout that fits, of {1 + len(result.rejected):,}"
    which = f"{result.num_fitting:,} layouts that " + ("were simulated" if result.num_open else "fit")
    ahead = others[0].step_time_s / best.step_time_s
    lead = f"{ahead:.2f}x the next" if ahead >= 1.005 else "as fast as the next"
    return f"{best.plan}: the fastest of {which}, {lead} ({others[0].plan})"

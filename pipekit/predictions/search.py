"""Every way to lay a run out over some devices, the fastest first, and why the others cannot be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import inf

from pipekit.layout import Layout
from pipekit.predictions.devices import Device
from pipekit.predictions.prediction import Choice, PlannedModel, Prediction, actions_of_micro_batch, predict
from pipekit.predictions.rejections import NotDivisible, OutOfMemory, Rejection, TooMany
from pipekit.predictions.rough import Estimator, Rough
from pipekit.predictions.timing import Cluster

# Actions that are simulated in all, some seconds' worth.
_MOST_SIMULATED = 150_000

MICRO_BATCH_SIZES = (1, 2, 4, 8, 16)
SCHEDULES = {"1f1b": 1, "zb-h1": 1, "interleaved-1f1b": 2, "zb-v": 2}
"""The schedules that are compared, and how many stages each puts on a rank."""


@dataclass(frozen=True)
class SearchSpace:
    """What may be chosen.

    Attributes:
        num_devices: devices to fill.
        global_batch_size: sequences of a step.
        tp: tensor-parallel degrees.
        zero: ZeRO stages.
        schedules: names, of those in `SCHEDULES`.
        micro_batch_sizes: sequences that one rank computes at a time.
        checkpointing: whether activations are checkpointed.
    """

    num_devices: int
    global_batch_size: int
    tp: Sequence[int] = (1,)
    zero: Sequence[int] = (0, 1)
    schedules: Sequence[str] = tuple(SCHEDULES)
    micro_batch_sizes: Sequence[int] = MICRO_BATCH_SIZES
    checkpointing: Sequence[bool] = (False, True)


@dataclass(frozen=True)
class SearchResult:
    """What was found.

    Attributes:
        ranked: the best layouts, the one with the most tokens a second first.
        rejected: layouts that cannot run, each with the reason; what lacks the least memory comes first.
        num_fitting: how many were simulated and fit.
        num_open: how many were estimated alone, since others are faster by the estimates; not all of them may fit.
    """

    ranked: tuple[Prediction, ...]
    rejected: tuple[tuple[Choice, Rejection], ...]
    num_fitting: int
    num_open: int = 0


def search_layouts(model: PlannedModel, space: SearchSpace, device: Device, *, num_ranked: int = 10) -> SearchResult:
    """Compare every layout.

    All are estimated, and simulated in the order of the estimates: all of them where they are few and small, and the
    first ones otherwise. The same arguments give the same result on every machine.

    Args:
        model: what is trained.
        space: what may be chosen.
        device: what each rank computes on.
        num_ranked: how many of the best to return.
    """
    rejected: list[tuple[float, Choice, Rejection]] = []
    possible: list[tuple[Rough, Choice]] = []
    estimator = Estimator(model)
    for choice in choices(model, space):
        reason = impossible(model, choice, device)
        if reason is not None:
            rejected.append((inf, choice, reason))
            continue
        estimate = estimator.estimate(choice, Cluster(device, choice.layout))
        least = OutOfMemory(estimate.least_bytes, device.memory_bytes, is_lower_bound=True)
        if least.lacking_bytes > 0:
            rejected.append((estimate.memory_bytes, choice, least))
        else:
            possible.append((estimate, choice))
    # Those that hardly fit come last.
    possible.sort(key=lambda item: (item[0].memory_bytes > device.memory_bytes, item[0].step_time_s))
    fitting: list[Prediction] = []
    actions = num_tried = 0
    for _, choice in possible:
        if fitting and actions > _MOST_SIMULATED:
            break
        num_tried += 1
        actions += min(choice.num_micro_batches, 5 * choice.layout.pp) * actions_of_micro_batch(choice)
        prediction = predict(model, choice, device, boundaries=estimator.boundaries(choice))
        need = OutOfMemory(prediction.memory_bytes, device.memory_bytes)
        if need.lacking_bytes > 0:
            rejected.append((need.needed_bytes, choice, need))
        else:
            fitting.append(prediction)
    fitting.sort(key=lambda prediction: (prediction.step_time_s, prediction.memory_bytes))
    rejected.sort(key=lambda item: item[0])
    reasons = tuple((choice, reason) for _, choice, reason in rejected)
    return SearchResult(tuple(fitting[:num_ranked]), reasons, len(fitting), len(possible) - num_tried)


def choices(model: PlannedModel, space: SearchSpace) -> Iterator[Choice]:
    """Return every combination of what may be chosen that fills the devices with the batch."""
    num_layers = len(model.layer_names)
    # In 16 bits the optimizer's states are always shared out: there is no ZeRO 0.
    stages = space.zero if model.precision == "fp32" else sorted({max(zero, 1) for zero in space.zero})
    for tp in space.tp:
        if space.num_devices % tp:
            continue
        over = space.num_devices // tp
        for pp in (degree for degree in range(1, min(over, num_layers) + 1) if over % degree == 0):
            layout = Layout(pp=pp, dp=over // pp, tp=tp)
            schedules = space.schedules if pp > 1 else ("1f1b",)
            for size, schedule, zero, checkpointing in product(
                space.micro_batch_sizes, schedules, stages, space.checkpointing
            ):
                num_micro_batches, rest = divmod(space.global_batch_size, size * layout.dp)
                if rest or (layout.dp == 1 and zero != min(stages)):
                    continue
                yield Choice(layout, zero, schedule, SCHEDULES[schedule], size, num_micro_batches, checkpointing)


def impossible(model: PlannedModel, choice: Choice, device: Device) -> Rejection | None:
    """Reason why a layout cannot be built, memory left aside; None where it can."""
    pp, tp = choice.layout.pp, choice.layout.tp
    num_layers, num_stages = len(model.layer_names), pp * choice.stages_per_rank
    if num_stages > num_layers:
        return TooMany("stages", num_stages, limit=num_layers, of="layers")
    if tp > device.devices_per_node:
        return TooMany("tensor-parallel ranks", tp, limit=device.devices_per_node, of="devices of a node")
    if choice.schedule == "interleaved-1f1b" and choice.num_micro_batches % pp:
        return NotDivisible("micro-batches under interleaved-1f1b", choice.num_micro_batches, divisor="pp", by=pp)
    return None

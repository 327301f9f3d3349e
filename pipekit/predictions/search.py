"""Search over the layouts of a run on some devices: the fastest ones, and why the others cannot run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import inf

from pipekit.layout import Layout
from pipekit.predictions.devices import Device
from pipekit.predictions.estimate import Estimate, Estimator
from pipekit.predictions.parallel_plan import ParallelPlan
from pipekit.predictions.prediction import PlannedModel, Prediction, predict
from pipekit.predictions.timing import Cluster
from pipekit.settings.activations import ActivationCheckpointing

HEADROOM = 0.05
"""Share of the memory for tensors that a layout leaves free which is recommended."""

# Actions that are simulated in all, some seconds' worth.
_MOST_SIMULATED = 100_000

SCHEDULES = {"1f1b": 1, "zb-h1": 1, "interleaved-1f1b": 2, "zb-v": 2}
"""Schedules to compare, with the stages that each puts on a rank."""


@dataclass(frozen=True)
class OutOfMemory:
    """Memory that the fullest rank lacks.

    Attributes:
        needed_bytes: bytes that it needs at its peak.
        available_bytes: bytes that its device has.
        is_lower_bound: whether `needed_bytes` is an estimate that the true need is not below.

    Example:
        >>> str(OutOfMemory(16.15e9, 16e9)), OutOfMemory(18e9, 16e9).lacking_bytes
        ('needs 16.15 GB of 16.00 GB', 2000000000.0)
    """

    needed_bytes: float
    available_bytes: float
    is_lower_bound: bool = False

    @property
    def lacking_bytes(self) -> float:
        """Bytes that are missing."""
        return self.needed_bytes - self.available_bytes

    def __str__(self) -> str:
        needs = "needs at least" if self.is_lower_bound else "needs"
        return f"{needs} {self.needed_bytes / 1e9:,.2f} GB of {self.available_bytes / 1e9:,.2f} GB"


Rejection = OutOfMemory | str
"""Reason why a layout cannot run; as text, it goes on after "a layout that"."""


@dataclass(frozen=True)
class SearchSpace:
    """Options of the layouts to compare.

    Attributes:
        num_devices: devices to fill.
        global_batch_size: sequences of a step.
        tp: tensor-parallel degrees.
        zero: ZeRO stages; those above 1 are for layouts without a pipeline, and 3 for those without tensor parallelism.
        schedules: names, of those in `SCHEDULES`.
        micro_batch_sizes: sequences that one rank computes at a time.
        checkpointing: of activations; None keeps them.
    """

    num_devices: int
    global_batch_size: int
    tp: Sequence[int] = (1,)
    zero: Sequence[int] = (0, 1)
    schedules: Sequence[str] = tuple(SCHEDULES)
    micro_batch_sizes: Sequence[int] = (1, 2, 4, 8, 16)
    checkpointing: Sequence[ActivationCheckpointing | None] = (None, ActivationCheckpointing())


@dataclass(frozen=True)
class SearchResult:
    """Layouts that were compared.

    Attributes:
        ranked: the best layouts, the one with the most tokens a second first.
        rejected: layouts that cannot run, each with the reason; that which lacks the least memory comes first.
        num_fitting: how many were simulated and fit.
        num_open: how many were only estimated, since others are faster by the estimates; some of them may not fit.
    """

    ranked: tuple[Prediction, ...]
    rejected: tuple[tuple[ParallelPlan, Rejection], ...]
    num_fitting: int
    num_open: int = 0


def search_layouts(model: PlannedModel, space: SearchSpace, device: Device, *, num_ranked: int = 10) -> SearchResult:
    """Compare every layout.

    All are estimated, and simulated in the order of the estimates: all of them if they are few and small, the fastest
    ones otherwise. Those that leave less than `HEADROOM` of the memory free come behind all others. The same arguments
    give the same result on every machine.

    Args:
        model: the model.
        space: options of the layouts.
        device: the device of each rank.
        num_ranked: how many of the best to return.
    """
    rejected: list[tuple[float, ParallelPlan, Rejection]] = []
    possible: list[tuple[Estimate, ParallelPlan]] = []
    estimator = Estimator(model)
    for plan in parallel_plans(model, space):
        reason = why_impossible(model, plan, device)
        if reason is not None:
            rejected.append((inf, plan, reason))
            continue
        estimate = estimator.estimate(plan, Cluster(device, plan.layout))
        least = OutOfMemory(estimate.least_bytes, device.usable_bytes, is_lower_bound=True)
        if least.lacking_bytes > 0:
            rejected.append((estimate.memory_bytes, plan, least))
        else:
            possible.append((estimate, plan))
    roomy_bytes = (1 - HEADROOM) * device.usable_bytes

    def fullness(memory_bytes: float) -> int:
        return (memory_bytes > roomy_bytes) + (memory_bytes > device.usable_bytes)

    # Those that hardly fit come last.
    possible.sort(key=lambda item: (fullness(item[0].memory_bytes), item[0].step_time_s))
    fitting: list[Prediction] = []
    actions = num_tried = num_roomy = 0
    for _, plan in possible:
        if num_roomy and actions > _MOST_SIMULATED:
            break
        num_tried += 1
        actions += min(plan.num_micro_batches, 5 * plan.layout.pp) * plan.actions_per_micro_batch
        prediction = predict(model, plan, device, estimator.boundaries(plan))
        need = OutOfMemory(prediction.memory_bytes, device.usable_bytes)
        if need.lacking_bytes > 0:
            rejected.append((need.needed_bytes, plan, need))
        else:
            fitting.append(prediction)
            num_roomy += not fullness(prediction.memory_bytes)
    fitting.sort(key=lambda each: (fullness(each.memory_bytes), each.step_time_s, each.memory_bytes))
    rejected.sort(key=lambda item: item[0])
    reasons = tuple((plan, reason) for _, plan, reason in rejected)
    return SearchResult(tuple(fitting[:num_ranked]), reasons, len(fitting), len(possible) - num_tried)


def parallel_plans(model: PlannedModel, space: SearchSpace) -> Iterator[ParallelPlan]:
    """Every combination of options that fills the devices and divides the batch."""
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
                if rest or (layout.dp == 1 and zero != min(stages)) or (pp > 1 and zero > 1) or (tp > 1 and zero == 3):
                    continue
                yield ParallelPlan(layout, zero, schedule, SCHEDULES[schedule], size, num_micro_batches, checkpointing)


def why_impossible(model: PlannedModel, plan: ParallelPlan, device: Device) -> str | None:
    """Reason why a layout cannot be built, memory left aside; None where it can."""
    pp, tp, num_layers = plan.layout.pp, plan.layout.tp, len(model.layer_names)
    if plan.num_stages > num_layers:
        return f"has {plan.num_stages:,} stages, more than the {num_layers:,} layers"
    if tp > device.devices_per_node:
        return f"has {tp:,} tensor-parallel ranks, more than the {device.devices_per_node:,} devices of a node"
    if plan.schedule == "interleaved-1f1b" and plan.num_micro_batches % pp:
        return f"has {plan.num_micro_batches:,} micro-batches under interleaved-1f1b, which pp={pp} does not divide"
    return None

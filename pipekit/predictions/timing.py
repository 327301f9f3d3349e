"""Time of a step: computation of each stage, communication between ranks, and the simulated schedule of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from pipekit.layout import Axis, Layout
from pipekit.predictions.devices import Device, Link, MatmulFormat
from pipekit.predictions.elements import BYTES_PER_ELEMENT, Precision
from pipekit.predictions.layer_costs import ModelCosts
from pipekit.predictions.model_states import Offload
from pipekit.schedules import Costs, Schedule, Timeline, simulate

# Gradients are accumulated, and so reduced, in fp32 under every precision.
_REDUCED_BYTES = 4

BUCKET_ELEMENTS = 10_000_000
"""Gradients that are reduced in one message, as soon as the last backward of a stage has computed them."""

SHARE_ELEMENTS_PER_REPLICA = 100_000
"""Gradients that a replica must update, for each replica, to be sent their sums alone.

A reduction to one replica passes through all others in turn, at about 20 us each. It takes half the time of an
all-reduce where that is little beside the transfer, at tens of gigabytes a second.
"""

# What AdamW moves to and from memory for a parameter: gradient, master weight and both moments read, the last three
# written, and the weight itself written in its own format.
_UPDATE_BYTES = 28

# What it reads and writes of a parameter in files: the same without the weight, and the gradient once more, which is
# written before.
_FILE_BYTES = 32


def all_reduce_s(num_bytes: float, size: int, link: Link) -> float:
    """Seconds of an all-reduce over a ring: every byte passes each link twice, but for one part in `size`.

    Source: Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations".

    Example:
        >>> all_reduce_s(800, 4, Link(bandwidth=100.0, latency_s=0.0))
        12.0
    """
    if size == 1:
        return 0.0
    return 2 * (size - 1) * (link.latency_s + num_bytes / size / link.bandwidth)


@dataclass(frozen=True)
class Cluster:
    """The devices of a run, and the place of each rank.

    Attributes:
        device: the device of each rank.
        layout: the grid of ranks; nodes are filled in the order of ranks, so that the order of its axes decides which
            groups lie within one.
    """

    device: Device
    layout: Layout

    def link(self, axis: Axis) -> Link:
        """Slowest link that a group along an axis needs.

        Groups fill blocks of consecutive ranks. Where a block lies on two nodes, the group of its first rank, or of one
        a little behind it, does too.
        """
        per_node = self.device.devices_per_node
        is_one_node = self.layout.world_size <= per_node or self.layout.degree(axis) == 1
        is_near = is_one_node or per_node % self.layout.span(axis) == 0
        return self.device.intra_node if is_near else self.device.inter_node


def reduction_s(parameters: int, cluster: Cluster, *, precision: Precision, zero: int) -> float:
    """Seconds in which the replicas sum the gradients of so many parameters.

    Where each updates a share of the weights, and that is large, it receives the sums of its share alone.
    """
    dp = cluster.layout.dp
    whole_s = all_reduce_s(_REDUCED_BYTES * parameters, dp, cluster.link("data"))
    return whole_s / 2 if _is_shared(precision, zero) and parameters >= dp**2 * SHARE_ELEMENTS_PER_REPLICA else whole_s


def _is_shared(precision: Precision, zero: int) -> bool:
    """True if each replica updates a share of the weights, as always in 16 bits."""
    return zero > 0 or precision != "fp32"


def update_s(parameters: int, cluster: Cluster, *, precision: Precision, zero: int, offload: Offload = "none") -> float:
    """Seconds in which a rank with so many parameters updates its shard, and gathers the others'.

    Where its states are offloaded, the host updates them, from the gradients and into the weights of the device.
    """
    weight_bytes = BYTES_PER_ELEMENT[precision]
    is_shared = _is_shared(precision, zero)
    shard = parameters / cluster.layout.dp if is_shared else parameters
    device = cluster.device
    if offload == "none":
        moved_s = shard * (_UPDATE_BYTES + weight_bytes) / device.memory_bandwidth
    else:
        moved_s = shard * (_UPDATE_BYTES + weight_bytes) / device.host_memory_bandwidth
        moved_s += shard * 2 * weight_bytes / device.host_link
    if offload == "nvme":
        moved_s += shard * _FILE_BYTES / device.nvme_bandwidth
    # An all-gather passes each link once, where an all-reduce does so twice.
    gather_s = all_reduce_s(parameters * weight_bytes, cluster.layout.dp, cluster.link("data")) / 2
    return moved_s + (gather_s if is_shared else 0)


def action_costs(
    costs: ModelCosts, boundaries: Sequence[int], cluster: Cluster, *, matmul_format: MatmulFormat
) -> Costs:
    """Seconds of each stage's actions: forward, input gradient and weight gradient.

    Measured seconds are taken as they are; other layers take their operations over what the device reaches in large
    matmuls, and no less than it takes to start their kernels. Of tensor-parallel layers each rank does its share, with
    an all-reduce of each output in the forward, and of each input gradient in the backward.

    Args:
        costs: of the model for one micro-batch.
        boundaries: stage `s` holds layers `boundaries[s]` to `boundaries[s + 1] - 1`.
        cluster: devices and layout.
        matmul_format: of matrix products.
    """
    tp, layers = cluster.layout.tp, costs.layers
    flops_per_s = cluster.device.matmul_flops(matmul_format) * tp
    forward_s, input_gradient_s, weight_gradient_s = [], [], []
    for start, end in pairwise(boundaries):
        stage = layers[start:end]
        if costs.loss is not None and end == len(layers):
            stage = [*stage, costs.loss]
        link, least_s = cluster.link("tensor"), cluster.device.launch_s
        messages_s = [
            all_reduce_s(min(layer.input_bytes, layer.output_bytes), tp, link) if layer.forward_flops else 0.0
            for layer in stage
        ]
        forwards = [
            message_s + _seconds(layer.forward_s, layer.forward_flops, flops_per_s, least_s)
            for layer, message_s in zip(stage, messages_s, strict=True)
        ]
        inputs = sum(messages_s) + sum(
            _seconds(layer.input_gradient_s, layer.input_gradient_flops, flops_per_s, least_s) for layer in stage
        )
        inputs += sum(seconds for layer, seconds in zip(stage, forwards, strict=True) if layer.is_recomputed)
        # An all-gather passes each link once, where an all-reduce does so twice.
        inputs += sum(all_reduce_s(layer.gathered_bytes, tp, link) / 2 for layer in stage[1:])
        weights = sum(_seconds(layer.weight_gradient_s, layer.weight_gradient_flops, flops_per_s) for layer in stage)
        forward_s.append(sum(forwards))
        input_gradient_s.append(inputs)
        weight_gradient_s.append(weights)
    passed_on = [layers[boundary - 1].output_bytes for boundary in boundaries[1:-1]]
    transfer_s = cluster.link("pipe").transfer_s(max(passed_on) / tp) if passed_on else 0.0
    return Costs(forward_s, input_gradient_s, weight_gradient_s, transfer_s=transfer_s)


def _seconds(measured_s: float | None, flops: int, flops_per_s: float, least_s: float = 0.0) -> float:
    return max(flops / flops_per_s, least_s) if measured_s is None else measured_s


@dataclass(frozen=True)
class StepTimes:
    """Time of a step and its parts.

    Attributes:
        timeline: of the schedule, simulated; of as many micro-batches as were simulated.
        compute_s: seconds from the first action to the last.
        reduction_s: seconds for which the step then still waits for the data-parallel reduction.
        update_s: seconds of the optimizer's update, with the gathering of the updated weights.
        busy_s: seconds of computation of each rank.
    """

    timeline: Timeline
    compute_s: float
    reduction_s: float
    update_s: float
    busy_s: tuple[float, ...]

    @property
    def step_time_s(self) -> float:
        """Seconds of the whole step."""
        return self.compute_s + self.reduction_s + self.update_s

    @property
    def bubble_fraction(self) -> float:
        """Share of the ranks' time between the first action and the last in which they are idle."""
        return 1 - sum(self.busy_s) / (len(self.busy_s) * self.compute_s) if self.compute_s else 0.0


def step_times(
    schedule: Schedule,
    num_micro_batches: int,
    costs: Costs,
    cluster: Cluster,
    *,
    stage_parameters: Sequence[int],
    precision: Precision,
    zero: int,
    offload: Offload = "none",
    shorter: Schedule | None = None,
) -> StepTimes:
    """Time of a step.

    The gradients of a stage are reduced while its last backward runs, but for the last message, one stage after another
    on each rank.

    Args:
        schedule: the table; of a step with many micro-batches it may be that of fewer, three for each pipeline rank or
            more.
        num_micro_batches: micro-batches of the step.
        costs: of the stages.
        cluster: devices and layout.
        stage_parameters: of each stage, on one tensor-parallel rank.
        precision: of weights and activations.
        zero: ZeRO stage.
        offload: the states that are kept off the device.
        shorter: where `schedule` leaves micro-batches out, the table with one fewer for each pipeline rank: a step
            grows by what lies between the two.
    """
    timeline = simulate(schedule, costs)
    more = num_micro_batches - schedule.num_micro_batches
    busy = [sum(span.end_s - span.start_s for span in spans) for spans in timeline.spans]
    per_micro_batch = [seconds / schedule.num_micro_batches for seconds in busy]
    longer_s = more * max(max(per_micro_batch), _growth_s(timeline, shorter, costs))
    done_s = longest_update_s = 0.0
    for rank, spans in enumerate(timeline.spans):
        last = {span.action.stage: span for span in spans}
        free_s = 0.0
        for stage, span in sorted(last.items(), key=lambda item: item[1].end_s):
            parameters = stage_parameters[stage]
            seconds = reduction_s(parameters, cluster, precision=precision, zero=zero)
            last_message_s = seconds * min(1.0, BUCKET_ELEMENTS / max(1, parameters))
            free_s = max(max(free_s, span.start_s) + seconds, max(free_s, span.end_s) + last_message_s)
        done_s = max(done_s, free_s)
        parameters = sum(stage_parameters[stage] for stage in schedule.stages_of(rank))
        seconds = update_s(parameters, cluster, precision=precision, zero=zero, offload=offload)
        longest_update_s = max(longest_update_s, seconds)
    return StepTimes(
        timeline=timeline,
        compute_s=timeline.step_time_s + longer_s,
        reduction_s=max(0.0, done_s - timeline.step_time_s),
        update_s=longest_update_s,
        busy_s=tuple(seconds + more * one for seconds, one in zip(busy, per_micro_batch, strict=True)),
    )


def _growth_s(timeline: Timeline, shorter: Schedule | None, costs: Costs) -> float:
    """Seconds by which a step grows with each micro-batch: under 1F1B, messages make that more than the computation."""
    if shorter is None:
        return 0.0
    fewer = timeline.schedule.num_micro_batches - shorter.num_micro_batches
    return (timeline.step_time_s - simulate(shorter, costs).step_time_s) / fewer

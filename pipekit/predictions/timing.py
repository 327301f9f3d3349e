"""Time of a step: computation of each stage, communication between ranks, and the simulated schedule of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from pipekit.layout import Axis, Layout
from pipekit.predictions.devices import Device, Link, MatmulFormat
from pipekit.predictions.elements import BYTES_PER_ELEMENT, Precision
from pipekit.predictions.kernels import LayerWork, memory_s, work_s
from pipekit.predictions.layer_costs import LayerCosts, ModelCosts
from pipekit.predictions.model_states import Offload, offloads_weights
from pipekit.schedules import Costs, Schedule, Timeline, simulate

Pass = Literal["forward", "input_gradient", "weight_gradient", "recomputed"]
"""One pass over a layer."""

# Share of a layer's weight gradient that is computed while the gradient of its input is summed: that of the first
# product, which has three quarters of the weights in attention, and half or two thirds in a feed-forward layer.
_BESIDE = 0.5

# Share of the time of a message between pipeline stages for which each of the two ranks waits.
_WAITING = 0.75

# Time of a reduce-scatter and an all-gather over that of the all-reduce that they replace. Source: Korthikanti et al.
# 2022, section 6.1, which says that they take longer, and table 5, on which the factor is fitted.
_SCATTER_AND_GATHER = 1.2

# Gradients are accumulated, and so reduced, in fp32 under every precision.
_REDUCED_BYTES = 4

BUCKET_ELEMENTS = 10_000_000
"""Gradients that are reduced in one message, as soon as the last backward of a stage has computed them."""

SHARE_ELEMENTS_PER_REPLICA = 100_000
"""Gradients that a replica must update, for each replica, to be sent their sums alone.

A reduction to one replica passes through all others in turn, at about 20 us each. It takes half the time of an
all-reduce where that is little beside the transfer, at tens of gigabytes a second.
"""

# What adding a gradient in 16 bits to those accumulated in fp32 moves.
_ACCUMULATED_BYTES = 10

# What an update by AdamW moves to and from memory for a parameter: the gradient is read for the norm, read and written
# when it is clipped, and cleared; gradient, master weight and both moments are read, the last three written, and the
# weight itself is written in its own format.
_UPDATE_BYTES = 4 + 8 + 4 + 28

# What it reads and writes of a parameter in files: gradient, master weight and both moments, each of them both ways.
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
    return link.start_s + 2 * (size - 1) * (link.latency_s + num_bytes / size / link.bandwidth)


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

    def ring(self, axis: Axis) -> Link:
        """Link of a ring through a group along an axis, at the mean of its latencies.

        Between nodes, the rings of a group use the network cards of all its members on a node.

        Source: `src/graph/search.cc` and `src/graph/tuning.cc` of NCCL 2.19.
        """
        link, near = self.link(axis), self.device.intra_node
        stride = self.layout.span(axis) // self.layout.degree(axis)
        members = min(self.layout.degree(axis), max(1, self.device.devices_per_node // stride))
        if link == near or members == 1:
            return link
        bandwidth = min(near.bandwidth, members * link.bandwidth)
        latency_s = (link.latency_s + (members - 1) * near.latency_s) / members
        return Link(bandwidth=bandwidth, latency_s=latency_s, start_s=link.start_s)


def reduction_s(parameters: int, cluster: Cluster, *, precision: Precision, zero: int) -> float:
    """Seconds in which the replicas sum the gradients of so many parameters.

    Where each updates a share of the weights, and that is large, it receives the sums of its share alone.
    """
    dp = cluster.layout.dp
    whole_s = all_reduce_s(_REDUCED_BYTES * parameters, dp, cluster.ring("data"))
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
        moved_s = memory_s(shard * (_UPDATE_BYTES + weight_bytes), device)
    else:
        moved_s = shard * (_UPDATE_BYTES + weight_bytes) / device.host_memory_bandwidth
        moved_s += shard * 2 * weight_bytes / device.host_link
    if offload == "nvme":
        moved_s += shard * _FILE_BYTES / device.nvme_bandwidth
    # Under ZeRO-3 weights stay in shards.
    return moved_s + (_gather_s(parameters * weight_bytes, cluster) if is_shared and zero < 3 else 0)


def _gather_s(num_bytes: float, cluster: Cluster) -> float:
    """Seconds in which replicas gather shards: each passes each link once, where an all-reduce does so twice."""
    return all_reduce_s(num_bytes, cluster.layout.dp, cluster.ring("data")) / 2


def sharding_s(
    parameters: int,
    costs: Costs,
    num_micro_batches: int,
    cluster: Cluster,
    *,
    precision: Precision,
    zero: int,
    offload: Offload = "none",
) -> float:
    """Seconds of a step in which a rank without a pipeline waits for what ZeRO 2 and 3 send in every micro-batch.

    Both reduce the gradients of every micro-batch while its backward runs; the last reduction is `reduction_s`. ZeRO-3
    also gathers the weights for the forward and again for the backward, a message at a time: it fetches those of a
    layer when the layer is about to run, and how much of that it hides is not known, so all of it is waited for.
    Offloaded weights come from the host, or from files, before that.
    """
    if zero < 2:
        return 0.0
    backward_s = sum(costs.input_gradient_s) + sum(costs.weight_gradient_s)
    reduced_s = reduction_s(parameters, cluster, precision=precision, zero=zero)
    gathered_s = 0.0
    if zero == 3:
        number = max(1, -(-parameters // BUCKET_ELEMENTS))
        gathered_s = number * _gather_s(parameters * BYTES_PER_ELEMENT[precision] / number, cluster)
        shard_bytes = parameters * BYTES_PER_ELEMENT[precision] / cluster.layout.dp
        if offloads_weights(offload, zero):
            gathered_s += shard_bytes / cluster.device.host_link
        if offload == "nvme":
            gathered_s += shard_bytes / cluster.device.nvme_bandwidth
    return 2 * num_micro_batches * gathered_s + (num_micro_batches - 1) * max(0.0, reduced_s - backward_s)


def action_costs(
    costs: ModelCosts,
    boundaries: Sequence[int],
    cluster: Cluster,
    *,
    matmul_format: MatmulFormat,
    placement: Sequence[int] | None = None,
    sequence_parallel: bool = True,
    splits_backwards: bool = False,
) -> Costs:
    """Seconds of each stage's actions: forward, input gradient and weight gradient.

    Measured seconds are taken as they are. On a device that says how many processors it has, other layers take the time
    of their kernels; elsewhere their operations over what it reaches in large matmuls. Neither takes less than it takes
    to start their kernels. Of tensor-parallel layers each rank does its share, and waits for an all-reduce of each
    output in the forward, and in the backward for the part of one that it does not hide.

    Args:
        costs: of the model for one micro-batch.
        boundaries: stage `s` holds layers `boundaries[s]` to `boundaries[s + 1] - 1`.
        cluster: devices and layout.
        matmul_format: of matrix products.
        placement: pipeline rank of each stage; each stage has one of its own unless given.
        sequence_parallel: whether tensor-parallel ranks hold shards of what passes between layers.
        splits_backwards: whether the schedule splits backwards: then layers keep their inputs only when they have
            computed their outputs, and their recomputation does so too.
    """
    tp, layers = cluster.layout.tp, costs.layers
    layer_s = _LayerTimes(cluster.device, matmul_format, tp, sequence_parallel)
    ring, least_s = cluster.ring("tensor"), cluster.device.launch_s
    slower = _SCATTER_AND_GATHER if sequence_parallel else 1.0
    # A schedule that splits backwards computes the weight gradient later, and on a CPU both take the same cores.
    beside = 0.0 if splits_backwards or cluster.device.processors is None else _BESIDE
    forward_s, input_gradient_s, weight_gradient_s = [], [], []
    for start, end in pairwise(boundaries):
        stage = layers[start:end]
        if costs.loss is not None and end == len(layers):
            stage = [*stage, costs.loss]
        messages_s = [
            slower * all_reduce_s(min(layer.input_bytes, layer.output_bytes), tp, ring) if layer.forward_flops else 0.0
            for layer in stage
        ]
        forwards = [
            message_s + layer_s.of(layer, "forward", least_s)
            for layer, message_s in zip(stage, messages_s, strict=True)
        ]
        weights = [layer_s.of(layer, "weight_gradient") for layer in stage]
        inputs = sum(layer_s.of(layer, "input_gradient", least_s) for layer in stage)
        for message_s, gradient_s in zip(messages_s, weights, strict=True):
            inputs += backward_waits_s(message_s, beside * gradient_s, sequence_parallel=sequence_parallel)
        for layer, message_s, whole_s in zip(stage, messages_s, forwards, strict=True):
            if layer.is_recomputed:
                ends_early = not splits_backwards and layer.forward_s is None and _ends_early(layer)
                # Without its output, it needs no all-reduce, or of one in two parts the gathering of its input alone.
                part = 0.5 if sequence_parallel else 0.0
                early_s = part * message_s + layer_s.of(layer, "recomputed", least_s) if ends_early else whole_s
                inputs += min(whole_s, early_s)
        # An all-gather passes each link once, where an all-reduce does so twice.
        inputs += sum(all_reduce_s(layer.gathered_bytes, tp, ring) / 2 for layer in stage[1:])
        forward_s.append(sum(forwards))
        input_gradient_s.append(inputs)
        weight_gradient_s.append(sum(weights))
    passed_on = [layers[boundary - 1].output_bytes for boundary in boundaries[1:-1]]
    transfer_s = cluster.link("pipe").transfer_s(max(passed_on) / tp) if passed_on else 0.0
    found = Costs(forward_s, input_gradient_s, weight_gradient_s, transfer_s=transfer_s)
    if cluster.device.processors is None:
        return found
    return with_waiting(found, range(found.num_stages) if placement is None else placement)


def backward_waits_s(message_s: float, beside_s: float, *, sequence_parallel: bool) -> float:
    """Seconds for which the backward of a tensor-parallel layer waits for messages.

    The gradient of its input is summed while that of a weight is computed. With sequence parallelism that sum is half
    of a message, a reduce-scatter, and the gradient of its output is gathered before, by the other half.

    Args:
        message_s: seconds of an all-reduce of its input.
        beside_s: seconds of what is computed while the sum is under way.
        sequence_parallel: whether ranks hold shards of what passes between layers.

    Example:
        >>> backward_waits_s(4.0, 3.0, sequence_parallel=False), backward_waits_s(4.0, 3.0, sequence_parallel=True)
        (1.0, 2.0)
    """
    gathered_s = message_s / 2 if sequence_parallel else 0.0
    return gathered_s + max(0.0, message_s - gathered_s - beside_s)


def with_waiting(costs: Costs, placement: Sequence[int]) -> Costs:
    """Costs of stages whose ranks both wait for a part of each message between them, in place of its transfer.

    Source: the runs of Qi et al. 2024, "Zero Bubble Pipeline Parallelism", table 4, on which that part is fitted.
    """
    forward_s, input_gradient_s = list(costs.forward_s), list(costs.input_gradient_s)
    for stage, (before, after) in enumerate(pairwise(placement)):
        if before != after:
            # An activation goes from one stage to the other, and a gradient back.
            for seconds in (forward_s, input_gradient_s):
                seconds[stage] += _WAITING * costs.transfer_s
                seconds[stage + 1] += _WAITING * costs.transfer_s
    return replace(costs, forward_s=forward_s, input_gradient_s=input_gradient_s, transfer_s=0.0)


def _ends_early(layer: LayerCosts) -> bool:
    return layer.work is not None and layer.work.recomputed != layer.work.forward


class _LayerTimes:
    """Seconds of the passes of layers on one tensor-parallel rank; those of equal layers are computed once."""

    def __init__(self, device: Device, matmul_format: MatmulFormat, tp: int, sequence_parallel: bool) -> None:
        self._device, self._format, self._tp = device, matmul_format, tp
        self._sequence_parallel = sequence_parallel
        self._flops_per_s = device.matmul_flops(matmul_format) * tp
        self._found: dict[int, dict[Pass, float]] = {}

    def of(self, layer: LayerCosts, name: Pass, least_s: float = 0.0) -> float:
        """Seconds of a pass: measured, or those of its kernels or its operations, and `least_s` at the least."""
        measured_s: float | None = getattr(layer, f"{name}_s", None)
        if measured_s is not None:
            return measured_s
        if layer.work is None or self._device.processors is None:
            flops: int = getattr(layer, f"{name}_flops")
            return max(flops / self._flops_per_s, least_s)
        if id(layer.work) not in self._found:
            self._found[id(layer.work)] = self._kernels_s(layer, layer.work)
        return max(self._found[id(layer.work)][name], least_s)

    def _kernels_s(self, layer: LayerCosts, work: LayerWork) -> dict[Pass, float]:
        own = work.shared(self._tp, sequence_parallel=self._sequence_parallel)
        forward_s, inputs_s, weights_s, again_s = (
            work_s(each, self._device, self._format)
            for each in (own.forward, own.input_gradient, own.weight_gradient, own.recomputed)
        )
        weights_s += memory_s(_ACCUMULATED_BYTES * layer.parameters / self._tp, self._device)
        return {"forward": forward_s, "input_gradient": inputs_s, "weight_gradient": weights_s, "recomputed": again_s}


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
    longer_s += sharding_s(
        sum(stage_parameters), costs, num_micro_batches, cluster, precision=precision, zero=zero, offload=offload
    )
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

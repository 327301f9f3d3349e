"""The time of a step, against what can be worked out by hand and against whole simulations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipekit.layout import Axis, Layout
from pipekit.predictions.devices import Link, find_device
from pipekit.predictions.elements import Precision
from pipekit.predictions.kernels import LayerWork, Product, Work, memory_s, work_s
from pipekit.predictions.layer_costs import ModelCosts
from pipekit.predictions.model_states import Offload
from pipekit.predictions.timing import (
    Cluster,
    StepTimes,
    action_costs,
    all_reduce_s,
    sharding_s,
    step_times,
    update_s,
)
from pipekit.schedules import Costs, Schedule, plan_1f1b, plan_schedule, plan_zb_v
from predictions.planned import device, layer, model

FAST = {"bandwidth": 1000.0, "latency_s": 0.0}
SLOW = {"bandwidth": 10.0, "latency_s": 0.0}
# A reduce-scatter and an all-gather, over the all-reduce that they take the place of.
HALVES = 1.2


def times(schedule: Schedule, costs: Costs, *, parameters: list[int], dp: int = 1, **changes: object) -> StepTimes:
    """Return the time of a step in fp32 on plain devices."""
    pp = len(schedule.ranks)
    settings = {"precision": "fp32", "zero": 0, **changes}
    cluster = Cluster(device(), Layout(pp=pp, dp=dp))
    return step_times(
        schedule,
        schedule.num_micro_batches,
        costs,
        cluster,
        stage_parameters=parameters,
        **settings,  # type: ignore[arg-type]
    )


def test_an_all_reduce_sends_every_share_around_the_ring_twice() -> None:
    link = Link(bandwidth=100.0, latency_s=0.5, start_s=0.25)
    assert all_reduce_s(800, 4, link) == 0.25 + 6 * (0.5 + 200 / 100)
    assert all_reduce_s(800, 1, link) == 0


@pytest.mark.parametrize(
    ("layout", "tensor", "data", "pipe"),
    [
        ({"pp": 2, "dp": 2, "tp": 2}, "intra", "intra", "intra"),
        ({"pp": 4, "dp": 2, "tp": 2}, "intra", "intra", "inter"),  # ranks 4 and 8 are neighbours
        ({"pp": 2, "dp": 4, "tp": 4}, "intra", "inter", "inter"),
        ({"pp": 4, "dp": 6, "tp": 1}, "intra", "inter", "inter"),  # ranks 6 to 11 lie on two nodes
        ({"pp": 1, "dp": 6, "tp": 1}, "intra", "intra", "intra"),
        ({"pp": 2, "dp": 4, "tp": 4, "order": ("tensor", "data", "pipe")}, "inter", "intra", "intra"),
        ({"pp": 2, "dp": 4, "tp": 4, "order": ("data", "tensor", "pipe")}, "intra", "inter", "intra"),
    ],
)
def test_groups_use_the_slowest_link_that_they_need(layout: dict[str, Any], tensor: str, data: str, pipe: str) -> None:
    cluster = Cluster(device(intra_node=FAST, inter_node=SLOW), Layout(**layout))
    links = {"intra": cluster.device.intra_node, "inter": cluster.device.inter_node}
    expected: dict[Axis, Link] = {"tensor": links[tensor], "data": links[data], "pipe": links[pipe]}
    assert {axis: cluster.link(axis) for axis in expected} == expected


@settings(max_examples=300)
@given(
    degrees=st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6)),
    order=st.permutations(["pipe", "data", "tensor"]),
    per_node=st.integers(1, 16),
)
def test_a_link_is_slow_where_a_group_lies_on_two_nodes(
    degrees: tuple[int, int, int], order: list[Axis], per_node: int
) -> None:
    layout = Layout(*degrees, order=tuple(order))  # type: ignore[arg-type]
    cluster = Cluster(device(intra_node=FAST, inter_node=SLOW, devices_per_node=per_node), layout)
    for axis in order:
        is_slow = any(len({rank // per_node for rank in ranks}) > 1 for ranks in layout.groups(axis))
        assert (cluster.link(axis) == cluster.device.inter_node) == is_slow


def test_a_ring_between_nodes_has_the_network_cards_of_all_its_members_on_a_node() -> None:
    near = {"bandwidth": 60.0, "latency_s": 1.0}
    far = {"bandwidth": 10.0, "latency_s": 5.0, "start_s": 2.0}
    on = device(intra_node=near, inter_node=far, devices_per_node=8)
    # Four of 16 replicas lie on a node of pairs of tensor-parallel ranks.
    assert Cluster(on, Layout(dp=16, tp=2)).ring("data") == Link(bandwidth=40.0, latency_s=2.0, start_s=2.0)
    assert Cluster(on, Layout(dp=16)).ring("data").bandwidth == 60
    assert Cluster(on, Layout(dp=16, tp=8)).ring("data") == on.inter_node
    assert Cluster(on, Layout(dp=16, tp=8)).ring("tensor") == on.intra_node


def test_a_device_that_knows_its_processors_takes_the_time_of_kernels_and_waits_for_messages() -> None:
    on = find_device("h100")
    work = LayerWork(Work((Product(1, 64, 64, 64),)), Work(moved_bytes=10**9), Work(), Work())
    layers = [replace(layer(passed_bytes=10**6), work=work)] * 4
    cluster = Cluster(on, Layout(pp=2))
    costs = action_costs(ModelCosts(layers), [0, 1, 3, 4], cluster, matmul_format="bf16", placement=[0, 1, 1])
    # Of each message, both ranks wait for three quarters.
    forward_s, message_s = work_s(work.forward, on, "bf16"), 0.75 * on.intra_node.transfer_s(10**6)
    # A layer takes no less than it takes to start its kernels.
    assert forward_s < on.launch_s
    assert costs.forward_s == pytest.approx([on.launch_s + message_s, 2 * on.launch_s + message_s, on.launch_s])
    inputs_s = memory_s(10**9, on)
    assert costs.input_gradient_s == pytest.approx([inputs_s + message_s, 2 * inputs_s + message_s, inputs_s])
    # A gradient in 16 bits is read, and a sum in 32 bits read and written.
    assert costs.weight_gradient_s == pytest.approx([memory_s(100, on), memory_s(200, on), memory_s(100, on)])
    assert costs.transfer_s == 0


@pytest.mark.parametrize(
    ("zero", "waits_s"),
    # Two reductions last longer than the backward beside them, and six gathers are waited for.
    [(1, 0), (2, 2 * (40 - 34)), (3, 6 * 20 + 2 * (40 - 34))],
)
def test_zero_2_and_3_wait_for_what_is_sent_in_every_micro_batch(zero: int, waits_s: float) -> None:
    # Over two replicas, the gradients of 1,000 parameters are summed in 40 s, and their weights gathered in 20.
    costs = Costs.uniform(1, forward_s=12, input_gradient_s=17, weight_gradient_s=17)
    found = sharding_s(1000, costs, 3, Cluster(device(), Layout(dp=2)), precision="fp32", zero=zero)
    assert found == pytest.approx(waits_s)


@pytest.mark.parametrize(
    ("offload", "each_s"), [("optimizer", 0), ("parameters", 2000 / 500), ("nvme", 2000 / 500 + 2000 / 250)]
)
def test_offloaded_weights_are_fetched_for_every_forward_and_backward(offload: Offload, each_s: float) -> None:
    costs = Costs.uniform(1, forward_s=12, input_gradient_s=17, weight_gradient_s=17)
    cluster = Cluster(device(host_link=500, nvme_bandwidth=250), Layout(dp=2))
    kept, fetched = (
        sharding_s(1000, costs, 3, cluster, precision="fp32", zero=3, offload=place) for place in ("none", offload)
    )
    assert fetched - kept == pytest.approx(6 * each_s)


def test_stages_take_their_operations_or_what_was_measured() -> None:
    layers = [layer(100), layer(300, passed_bytes=40), replace(layer(), forward_s=5.0)]
    cluster = Cluster(device(), Layout(pp=2))
    costs = action_costs(ModelCosts(layers, layer(50)), [0, 2, 3], cluster, matmul_format="fp32")
    assert costs.forward_s == [4.0, 5.5]
    assert costs.input_gradient_s == [4.0, 1.5]
    assert costs.weight_gradient_s == [4.0, 1.5]
    assert costs.transfer_s == 0.4


@pytest.mark.parametrize(
    ("precision", "tf32", "expected"), [("fp32", True, "tf32"), ("fp32", False, "fp32"), ("bf16", True, "bf16")]
)
def test_products_of_fp32_take_tf32_where_the_run_does(precision: Precision, tf32: bool, expected: str) -> None:
    assert replace(model([layer(1)], precision=precision), tf32=tf32).matmul_format == expected


def test_checkpointing_repeats_the_forward() -> None:
    cluster = Cluster(device(), Layout())
    costs = action_costs(ModelCosts([replace(layer(100), is_recomputed=True)]), [0, 1], cluster, matmul_format="fp32")
    assert (costs.forward_s, costs.input_gradient_s, costs.weight_gradient_s) == ([1.0], [2.0], [1.0])
    assert costs.transfer_s == 0


def test_recomputation_that_ends_early_leaves_out_the_last_product_and_its_messages() -> None:
    product = Product(1, 4096, 4096, 4096)
    work = LayerWork(Work((product,) * 2), Work(), Work(), recomputed=Work((product,)))
    layers = [replace(layer(passed_bytes=10**8), work=work, is_recomputed=True)]
    cluster = Cluster(find_device("h100"), Layout(tp=2))

    def recomputation_s(**options: bool) -> float:
        again, once = (
            action_costs(ModelCosts(each), [0, 1], cluster, matmul_format="bf16", **options).input_gradient_s[0]
            for each in (layers, [replace(layers[0], is_recomputed=False)])
        )
        return again - once

    message_s = HALVES * all_reduce_s(10**8, 2, cluster.device.intra_node)
    one_s, both_s = (work_s(Work((replace(product, k=2048),) * n), cluster.device, "bf16") for n in (1, 2))
    assert recomputation_s() == pytest.approx(message_s / 2 + one_s)
    assert recomputation_s(sequence_parallel=False) == pytest.approx(one_s)
    assert recomputation_s(splits_backwards=True) == pytest.approx(message_s + both_s)


@pytest.mark.parametrize("parameters", [10, 10**9, 10**10])
def test_on_a_gpu_the_gradient_of_an_input_is_summed_behind_half_the_gradient_of_the_weights(parameters: int) -> None:
    layers = [replace(layer(parameters=parameters, passed_bytes=10**9), work=LayerWork(Work(), Work(), Work(), Work()))]
    on = find_device("h100")
    cluster = Cluster(on, Layout(tp=2))

    def waits_s(**options: bool) -> float:
        costs = action_costs(ModelCosts(layers), [0, 1], cluster, matmul_format="bf16", **options)
        beside_s.append(costs.weight_gradient_s[0] / 2)
        return costs.input_gradient_s[0] - on.launch_s

    beside_s: list[float] = []
    message_s = all_reduce_s(10**9, 2, on.intra_node)
    assert waits_s(sequence_parallel=False) == pytest.approx(max(0.0, message_s - beside_s[0]))
    assert (beside_s[0] > message_s) == (parameters == 10**10)
    # A shard of the gradient of the output is gathered before.
    half_s = HALVES * message_s / 2
    assert waits_s() == pytest.approx(half_s + max(0.0, half_s - beside_s[0]))
    assert waits_s(splits_backwards=True) == pytest.approx(2 * half_s)


def test_layers_that_are_recomputed_repeat_their_forward_and_gather_their_inputs() -> None:
    cluster = Cluster(device(), Layout(tp=2))
    shared = replace(layer(200), is_recomputed=True, gathered_bytes=8)
    costs = action_costs(ModelCosts([layer(200), shared, layer(200)]), [0, 3], cluster, matmul_format="fp32")
    message_s = all_reduce_s(8, 2, device().intra_node)
    assert costs.forward_s == [pytest.approx(3 + 3 * HALVES * message_s)]
    # An all-gather passes each link once, where an all-reduce does so twice.
    assert costs.input_gradient_s == [pytest.approx(4 + (4 * HALVES + 0.5) * message_s)]


def test_tensor_parallel_ranks_share_the_operations_and_sum_what_they_pass_on() -> None:
    layers = [layer(100, passed_bytes=8), layer(0, passed_bytes=8), replace(layer(100), output_bytes=1000)]
    cluster = Cluster(device(), Layout(tp=4))
    costs = action_costs(ModelCosts(layers), [0, 3], cluster, matmul_format="fp32")
    message_s = HALVES * all_reduce_s(8, 4, device().intra_node)
    assert costs.forward_s == [pytest.approx(2 * 0.25 + 2 * message_s)]
    assert costs.input_gradient_s == costs.forward_s
    assert costs.weight_gradient_s == [0.5]


def test_without_a_pipeline_a_reduction_stands_behind_the_step() -> None:
    alone = times(plan_1f1b(num_stages=1, num_micro_batches=2), Costs.uniform(1), parameters=[100], dp=2)
    assert (alone.compute_s, alone.reduction_s, alone.bubble_fraction) == (6, 4, 0)
    assert alone.step_time_s == 6 + 4 + alone.update_s


def test_a_reduction_that_others_compute_behind_is_hidden() -> None:
    schedule = plan_1f1b(num_stages=2, num_micro_batches=2)
    # The last stage is done at 7, and the first at 9; a reduction of 100 parameters takes 4.
    assert times(schedule, Costs.uniform(2), parameters=[0, 100], dp=2).reduction_s == 2
    assert times(schedule, Costs.uniform(2), parameters=[100, 0], dp=2).reduction_s == 4
    assert times(schedule, Costs.uniform(2), parameters=[0, 50], dp=2).reduction_s == 0


def test_the_stages_of_a_rank_are_reduced_one_after_the_other() -> None:
    schedule = plan_zb_v(pp=1, num_micro_batches=2)
    one = times(schedule, Costs.uniform(2), parameters=[100, 0], dp=2).reduction_s
    both = times(schedule, Costs.uniform(2), parameters=[100, 1000], dp=2).reduction_s
    assert one == 4
    assert both > 40


@pytest.mark.parametrize(
    ("precision", "zero", "update_s"),
    # An update moves 48 bytes of a parameter in fp32, and 46 in bf16, at 0.85 of the bandwidth.
    [("fp32", 0, 48 * 1000 / 0.85e6), ("fp32", 1, 48 * 500 / 0.85e6 + 20), ("bf16", 0, 46 * 500 / 0.85e6 + 10)],
)
def test_shared_optimizer_states_are_updated_in_shares_and_weights_gathered(
    precision: str, zero: int, update_s: float
) -> None:
    schedule = plan_1f1b(num_stages=1, num_micro_batches=1)
    found = times(schedule, Costs.uniform(1), parameters=[1000], dp=2, precision=precision, zero=zero)
    assert found.update_s == pytest.approx(update_s)


@pytest.mark.parametrize(("offload", "files_s"), [("optimizer", 0), ("parameters", 0), ("nvme", 32 * 500 / 64e3)])
def test_offloaded_states_are_updated_by_the_host(offload: Offload, files_s: float) -> None:
    speeds = {"host_memory_bandwidth": 128e3, "host_link": 8e3, "nvme_bandwidth": 64e3}
    cluster = Cluster(device(**speeds), Layout(dp=2))
    plain_s = update_s(1000, cluster, precision="bf16", zero=1)
    found_s = update_s(1000, cluster, precision="bf16", zero=1, offload=offload)
    # Gradients come to the host, and weights go back, in 16 bits.
    moved_s = 46 * 500 / 128e3 + 2 * 2 * 500 / 8e3 + files_s
    assert found_s == pytest.approx(plain_s - memory_s(46 * 500, cluster.device) + moved_s)


STAGES = {"1f1b": 1, "zb-h1": 1, "interleaved-1f1b": 2, "zb-v": 2}


@settings(max_examples=60)
@given(
    name=st.sampled_from(sorted(STAGES)),
    pp=st.integers(2, 5),
    rounds=st.integers(4, 9),
    seconds=st.lists(st.floats(1, 1.3), min_size=30, max_size=30),
    transfer_s=st.sampled_from([0.0, 0.05, 0.3]),
)
def test_a_long_step_is_told_from_a_shorter_one(
    name: str, pp: int, rounds: int, seconds: list[float], transfer_s: float
) -> None:
    num_stages, num_micro_batches = pp * STAGES[name], pp * rounds
    costs = Costs(
        seconds[:num_stages], seconds[10 : 10 + num_stages], seconds[20 : 20 + num_stages], transfer_s=transfer_s
    )

    def table(number: int) -> Schedule:
        return plan_schedule(name, pp=pp, num_micro_batches=number, stages_per_rank=STAGES[name])

    def step(schedule: Schedule, shorter: Schedule | None) -> StepTimes:
        return step_times(
            schedule,
            num_micro_batches,
            costs,
            Cluster(device(), Layout(pp=pp)),
            stage_parameters=[10] * num_stages,
            precision="fp32",
            zero=0,
            shorter=shorter,
        )

    whole, told = step(table(num_micro_batches), None), step(table(3 * pp), table(2 * pp))
    assert told.compute_s == pytest.approx(whole.compute_s, rel=0.025)
    assert told.busy_s == pytest.approx(whole.busy_s)
    assert told.bubble_fraction == pytest.approx(whole.bubble_fraction, abs=0.025)


def test_messages_that_hold_1f1b_up_make_every_micro_batch_longer() -> None:
    costs = Costs.uniform(4, transfer_s=0.5)
    cluster = Cluster(device(), Layout(pp=4))

    def compute_s(number: int, shorter: int | None) -> float:
        return step_times(
            plan_1f1b(num_stages=4, num_micro_batches=number),
            64,
            costs,
            cluster,
            stage_parameters=[0] * 4,
            precision="fp32",
            zero=0,
            shorter=shorter and plan_1f1b(num_stages=4, num_micro_batches=shorter),  # type: ignore[arg-type]
        ).compute_s

    assert compute_s(12, 8) == pytest.approx(compute_s(64, None))
    assert compute_s(12, None) < 0.9 * compute_s(64, None)


def test_large_shares_are_reduced_to_those_who_update_them_behind_the_last_backward() -> None:
    # 100 million parameters take 4e6 seconds in an all-reduce over two, and half of that to one each.
    large, costs = 10**8, Costs.uniform(1, forward_s=1.0, input_gradient_s=1e6, weight_gradient_s=1e6)
    schedule = plan_1f1b(num_stages=1, num_micro_batches=1)
    whole, shared = (times(schedule, costs, parameters=[large], dp=2, zero=zero).reduction_s for zero in (0, 1))
    assert (whole, shared) == (2e6, 2e6 / 10)
    # As long as the backward lasts, all but the last of ten messages is hidden behind it.
    assert times(schedule, costs, parameters=[10**5], dp=2, zero=1).reduction_s == 4000

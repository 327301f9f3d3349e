"""Gradients that accumulate in flat buffers, and are reduced there while the last backward runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine_jobs import (
    VOCAB,
    Case,
    assert_trained_as_one_process,
    build_engine,
    micro_batches,
    show,
    train,
)
from gloo_workers import GlooWorkers
from pipekit.layers.specs import LayerSpec

pytestmark = pytest.mark.distributed


def share_out(bucket_elements: int = 1500) -> None:
    """Cut buckets as small as parameters are here, and reduce each to the replicas that update it."""
    from pipekit.engine import reduction

    reduction.SHARE_ELEMENTS_PER_REPLICA, reduction.BUCKET_ELEMENTS = 0, bucket_elements  # type: ignore[misc]


def train_in_pieces(rank: int, case: Case) -> dict[str, Any]:
    share_out()
    return train(rank, case)


SHARED_OUT = [
    Case(dp=2, zero=1),
    Case(dp=4, zero=1, micro_batch_size=2, optimizer="sgd"),
    Case(pp=2, dp=2, zero=1, schedule="zb-v"),
    Case(dp=2, tp=2, zero=1),
    Case(dp=2, zero=0),
]


@pytest.mark.parametrize("case", SHARED_OUT, ids=show)
def test_each_replica_gets_the_means_that_it_updates(gloo: GlooWorkers, case: Case) -> None:
    assert_trained_as_one_process(gloo.run(case.world_size, train_in_pieces, case), case)


def losses_and_norms(rank: int, case: Case, in_pieces: bool) -> tuple[list[float], list[float]]:
    if in_pieces:
        share_out()
    result = train(rank, case)
    return result["losses"], result["norms"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bits_get_what_an_all_reduce_gives_them(gloo: GlooWorkers, precision: str) -> None:
    case = Case(pp=2, dp=2, precision=precision, steps=4)
    (losses, norms), (same_losses, same_norms) = (
        gloo.run(4, losses_and_norms, case, in_pieces)[3] for in_pieces in (True, False)
    )
    assert losses == same_losses
    assert norms == pytest.approx(same_norms, rel=1e-6)


def order_of_reductions(rank: int, in_order: bool) -> tuple[list[int], list[Tensor]]:
    """Let gradients come in another order on each rank; return where what is reduced begins, and the means."""
    from pipekit.deepspeed.gradient_buffers import GradientBuffers, flat_gradients
    from pipekit.distributed.mpu import RankGroup
    from pipekit.engine.reduction import GradientReducer

    class View:
        def __init__(self, parameters: list[nn.Parameter]) -> None:
            self.buffers = GradientBuffers(flat_gradients(parameters))
            self.gradient_or_zeros = self.buffers.gradient_or_zeros

    share_out(bucket_elements=1)
    parameters = [nn.Parameter(torch.zeros(number)) for number in (3, 5, 7, 2)]
    view: Any = View(parameters)
    group = dist.group.WORLD
    assert group is not None
    reducer = GradientReducer(view, RankGroup([0, 1], group))
    with reducer.reducing(parameters):
        for index in [3, 1, 2] if rank == 0 and not in_order else [3, 2, 1]:
            gradient = torch.full_like(parameters[index], 1.0 + index + rank)
            view.buffers.add(parameters[index], gradient.clone)
        early = len(reducer._begun)
    # The last bucket has no gradient, and waits for the end.
    assert early == 3
    starts = [piece.storage_offset() for _, piece, _ in reducer._begun]
    reducer.finish()
    return starts, [view.buffers.gradient(parameter).clone() for parameter in parameters]


@pytest.mark.parametrize("in_order", [True, False])
def test_replicas_reduce_in_one_order_whatever_order_gradients_come_in(gloo: GlooWorkers, in_order: bool) -> None:
    for starts, means in gloo.run(2, order_of_reductions, in_order):
        assert starts == [15, 8, 3, 0]
        assert [mean.unique().tolist() for mean in means] == [[0.0], [2.5], [3.5], [4.5]]


class Noted(nn.Module):
    """A linear layer that notes when its backward begins."""

    events: ClassVar[list[str]] = []

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        y.register_hook(lambda gradient: self.events.append(self.name))  # type: ignore[no-untyped-call]
        return y


def events_of_a_step(rank: int, schedule: str) -> list[str]:
    """Return the order of layers' backwards and reductions after the first of these."""
    share_out(bucket_elements=1000)
    case = Case(pp=1 if schedule == "1f1b" else 2, dp=2, schedule=schedule)
    specs = [
        LayerSpec(nn.Embedding, VOCAB, 32),
        *(LayerSpec(Noted, name) for name in "abcde"),
        LayerSpec(nn.Linear, 32, VOCAB),
    ]
    engine = build_engine(case, specs=specs)
    begin = engine._reducer._begin

    def note(bucket: Any) -> None:
        Noted.events.append("reduce")
        begin(bucket)

    engine._reducer._begin = note
    engine.train_batch(micro_batches(0, case, engine.mpu.data_parallel_rank))
    return Noted.events[Noted.events.index("reduce") :]


def test_a_layer_is_reduced_while_the_backward_of_those_below_it_runs(gloo: GlooWorkers) -> None:
    for events in gloo.run(2, events_of_a_step, "1f1b"):
        # The head, and then each layer as soon as its weight's gradient is there; biases and embedding come last.
        assert events == ["reduce", "e", "reduce", "d", "reduce", "c", "reduce", "b", "reduce", "a", *["reduce"] * 3]


def order_of_events(rank: int) -> tuple[list[tuple[int, int]], int]:
    """Return for each reduction its stage's last layer and how many actions were left, and the actions of all."""
    case = Case(pp=2, dp=2, schedule="zb-v", zero=1, tied=False)
    engine = build_engine(case)
    row = engine.schedule.ranks[engine.mpu.pipe_rank]
    begun, done, begin = [], [], engine._reducer._begin

    class Counter:
        def begin(self) -> None:
            done.clear()

        def start(self, action: Any) -> None:
            done.append(action)

        def stop(self, action: Any) -> None:
            pass

    def note(bucket: Any) -> None:
        begun.append((done[-1].stage, len(row) - len(done)))
        begin(bucket)

    engine.executor.stopwatch = Counter()
    engine._reducer._begin = note
    engine.train_batch(micro_batches(0, case, engine.mpu.data_parallel_rank))
    return begun, len(row)


def test_a_stages_reduction_begins_with_its_last_gradient(gloo: GlooWorkers) -> None:
    for begun, num_actions in gloo.run(4, order_of_events):
        left = dict(begun)
        assert sorted(left) in ([0, 3], [1, 2])
        assert sorted(left.values())[0] == 0
        assert 0 < sorted(left.values())[1] < num_actions


class Reentrant(nn.Module):
    """A layer that is used twice, each time checkpointed in torch's old way."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = checkpoint(self.linear, x, use_reentrant=True)
        return x


def train_reentrant(rank: int) -> str:
    share_out(bucket_elements=1)
    case = Case(dp=2)
    specs = [LayerSpec(nn.Embedding, VOCAB, 32), LayerSpec(Reentrant), LayerSpec(nn.Linear, 32, VOCAB)]
    engine = build_engine(case, specs=specs)
    with pytest.raises(Exception, match="got a second gradient in one backward") as caught:
        engine.train_batch(micro_batches(0, case, rank))
    return f"{type(caught.value).__name__}: {caught.value}"


def test_a_second_gradient_of_one_backward_is_refused(gloo: GlooWorkers) -> None:
    for message in gloo.run(2, train_reentrant):
        assert message.startswith("PipekitError: a parameter of shape (32,")
        assert message.endswith("use use_reentrant=False")


def buffers_of_a_step(rank: int, case: Case) -> list[tuple[str, bool]]:
    """Return for each parameter whether what the optimizer updates with is its part of the buffer, not a copy."""
    engine = build_engine(case)
    engine.train_batch(micro_batches(0, case, rank))
    buffers = {group.flat.untyped_storage().data_ptr() for group in engine.view.buffers.groups}
    used: list[tuple[str, bool]] = []
    step = engine.view.torch_optimizer.step

    def note(*args: Any, **kwargs: Any) -> Any:
        for group in engine.view.torch_optimizer.param_groups:
            for each in group["params"]:
                used.append((str(tuple(each.shape)), each.grad.untyped_storage().data_ptr() in buffers))
        return step(*args, **kwargs)

    engine.view.torch_optimizer.step = note
    engine.train_batch(micro_batches(1, case, rank))
    return used


@pytest.mark.parametrize(("precision", "zero"), [("fp32", 0), ("fp32", 1), ("fp16", 1), ("bf16", 1)])
def test_the_optimizer_reads_the_buffers_in_place(gloo: GlooWorkers, precision: str, zero: int) -> None:
    for used in gloo.run(2, buffers_of_a_step, Case(dp=2, precision=precision, zero=zero)):
        assert used
        assert all(is_in_place for _, is_in_place in used)


def train_with_other_kernels(rank: int) -> None:
    """Train where one tensor-parallel rank's gradients are off by rounding."""
    case = Case(tp=2, sequence_parallel=False)
    engine = build_engine(case)
    if rank:
        for name, parameter in engine.module.named_parameters():
            if name.endswith("norm.weight"):
                parameter.register_hook(lambda gradient: gradient * (1 + 1e-5))
    for step in range(2):
        engine.train_batch(micro_batches(step, case, 0))
        engine.check_replicas()


def test_what_tensor_parallel_ranks_hold_in_common_stays_the_same(gloo: GlooWorkers) -> None:
    gloo.run(2, train_with_other_kernels)


def train_some_weights(rank: int, case: Case) -> list[float]:
    """Train with an optimizer of matrices alone."""
    import engine_jobs

    make_optimizer = engine_jobs.make_optimizer
    engine_jobs.make_optimizer = lambda case, parameters: make_optimizer(case, [p for p in parameters if p.ndim > 1])
    engine = build_engine(case)
    return [float(engine.train_batch(micro_batches(step, case, rank))) for step in range(case.steps)]


def test_parameters_without_an_optimizer_are_let_alone(gloo: GlooWorkers) -> None:
    case = Case(steps=3, clip=0.0)
    one, two = (gloo.run(each.world_size, train_some_weights, each)[0] for each in (case, replace(case, dp=2)))
    assert two == pytest.approx(one, rel=1e-5)


def train_with_muon(rank: int, case: Case) -> list[float]:
    """Train with an optimizer that makes the update of a whole matrix, which lies on two replicas."""
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    import engine_jobs

    def make_optimizer(case: Case, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        for parameter in parameters:
            parameter.use_muon = parameter.ndim > 1  # type: ignore[attr-defined]
        muon = {"params": [p for p in parameters if p.ndim > 1], "use_muon": True, "lr": 0.01, "momentum": 0.9}
        adam = {"params": [p for p in parameters if p.ndim < 2], "use_muon": False, "lr": 0.01}
        return MuonWithAuxAdam([muon, adam])

    engine_jobs.make_optimizer = make_optimizer
    share_out()
    losses: list[float] = train(rank, case)["losses"]
    return losses


def test_muon_gets_whole_gradients(gloo: GlooWorkers) -> None:
    case = Case(steps=3, clip=0.0, zero=1)
    one, two = (gloo.run(each.world_size, train_with_muon, each)[0] for each in (case, replace(case, dp=2)))
    assert two == pytest.approx(one, rel=1e-4)

"""Every schedule against one process that uses nothing but torch: losses, gradients, masks, and memory."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from engine_jobs import VOCAB, Case, batch, build_engine, micro_batches, model_specs
from gloo_workers import GlooWorkers
from pipekit.layers.sequential import SequentialModel
from pipekit.layers.specs import LayerSpec
from pipekit.schedules import Action, Schedule, plan_schedule, write_csv
from pipekit.tensors.weight_gradients import defer_weight_gradient

pytestmark = pytest.mark.distributed

SCHEDULES = ["gpipe", "1f1b", "interleaved-1f1b", "zb-h1", "zb-v", "auto"]
STEPS = 5


def gradients_of_each_step(rank: int, case: Case) -> dict[str, Any]:
    """Train, and return each step's loss and the gradient of every parameter, over all micro-batches and replicas."""
    engine = build_engine(case)
    steps: list[dict[str, Tensor]] = []

    def record(gradient_of: Any) -> None:
        gradients = engine.module.named_logical_parameters()
        scale = engine.view.loss_scale
        steps.append({name: gradient_of(parameter).float() / scale for name, parameter, _ in gradients})

    engine.on_gradients = record
    losses = [
        float(engine.train_batch(micro_batches(step, case, engine.mpu.data_parallel_rank)))
        for step in range(case.steps)
    ]
    return {"losses": losses, "gradients": steps, "schedule": str(engine.schedule), "costs": engine._costs}


def run(gloo: GlooWorkers, case: Case, *, nccl: bool = False) -> dict[str, Any]:
    """Return the losses of rank 0 and the gradients of the whole model; those that two ranks hold must agree."""
    results = gloo.run(case.world_size, gradients_of_each_step, case, nccl=nccl)
    merged: list[dict[str, Tensor]] = [{} for _ in range(case.steps)]
    for result in results:
        assert result["losses"] == results[0]["losses"]
        for step, gradients in enumerate(result["gradients"]):
            for name, gradient in gradients.items():
                if name in merged[step]:
                    assert torch.equal(merged[step][name], gradient)
                merged[step][name] = gradient
    return {**results[0], "gradients": merged}


@cache
def reference(tied: bool) -> dict[str, Any]:
    """The first step in one process with nothing but torch: the whole batch at once."""
    model = SequentialModel(model_specs(Case(tied=tied)), seed=1)
    inputs, labels = batch(0)
    loss = F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten())
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.logical_tensors().items()}
    return {"losses": [loss.item()], "gradients": [gradients]}


def assert_same(found: dict[str, Any], expected: dict[str, Any], *, rel: float = 1e-5) -> None:
    """Compare as many steps as are expected."""
    num_steps = len(expected["losses"])
    assert found["losses"][:num_steps] == pytest.approx(expected["losses"], rel=rel)
    for ours, theirs in zip(found["gradients"], expected["gradients"], strict=False):
        assert ours.keys() == theirs.keys()
        for name, gradient in theirs.items():
            difference = (ours[name] - gradient).norm() / gradient.norm()
            assert difference <= rel, f"{name} differs by {difference:.1e}"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("pp", [2, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_loss_and_every_gradient_are_those_of_one_process(
    gloo: GlooWorkers, schedule: str, pp: int, tied: bool
) -> None:
    case = Case(pp=pp, schedule=schedule, tied=tied, steps=1)
    assert_same(run(gloo, case), reference(tied))


@pytest.mark.parametrize(
    "schedule",
    [pytest.param(name, marks=pytest.mark.slow if name not in ("zb-v", "auto") else ()) for name in SCHEDULES],
)
def test_checkpointing_and_dropout_change_nothing(gloo: GlooWorkers, schedule: str) -> None:
    assert_same(run(gloo, Case(pp=2, schedule=schedule, steps=1, checkpointing=True)), reference(True))
    steps = STEPS if schedule == "auto" else 2
    alone = run(gloo, Case(pp=1, dropout=0.2, steps=steps))
    assert abs(alone["losses"][0] / reference(True)["losses"][0] - 1) > 1e-3
    for pp in (2, 4):
        case = Case(pp=pp, schedule=schedule, dropout=0.2, steps=steps, checkpointing=pp == 4)
        found = run(gloo, case)
        assert_same(found, {**alone, "losses": alone["losses"][:1], "gradients": alone["gradients"][:1]})
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-4)


@pytest.mark.parametrize("case", [
    Case(pp=2, dp=2, schedule="zb-v", zero=1),
    Case(pp=2, dp=2, schedule="zb-h1", zero=0),
    Case(pp=2, dp=2, schedule="interleaved-1f1b", zero=1),
    Case(pp=2, dp=2, schedule="zb-v", zero=1, tied=False),
], ids=lambda case: f"{case.schedule}-zero{case.zero}-{'tied' if case.tied else 'untied'}")  # fmt: skip
def test_replicas_average_their_gradients(gloo: GlooWorkers, case: Case) -> None:
    assert_same(run(gloo, replace(case, steps=1)), reference(case.tied))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("schedule", ["zb-h1", "zb-v", "interleaved-1f1b"])
def test_16_bits_are_those_of_one_process_in_16_bits(gloo: GlooWorkers, schedule: str, precision: str) -> None:
    alone = run(gloo, Case(pp=1, precision=precision, steps=3))
    found = run(gloo, Case(pp=2, schedule=schedule, precision=precision, steps=3))
    assert found["losses"] == pytest.approx(alone["losses"], rel=2e-3)
    for name, gradient in alone["gradients"][0].items():
        difference = (found["gradients"][0][name] - gradient).norm() / gradient.norm()
        assert difference < 0.02, name


def test_a_measured_schedule_is_planned_after_three_steps(gloo: GlooWorkers) -> None:
    case = Case(pp=2, schedule="auto", steps=STEPS)
    results = gloo.run(2, gradients_of_each_step, case)
    costs = results[0]["costs"]
    planned = plan_schedule("auto", pp=2, num_micro_batches=8, costs=costs)
    assert [(result["costs"], result["schedule"]) for result in results] == [(costs, str(planned))] * 2
    assert costs is not None
    # What the layers cost here is far from equal: the planner has something to do.
    assert_same(run(gloo, case), reference(True))


def test_a_table_of_ones_own_may_split_some_backwards_and_not_others(gloo: GlooWorkers, tmp_path: Any) -> None:
    mixed = plan_schedule("1f1b", pp=2, num_micro_batches=8)
    rows = []
    for actions in mixed.ranks:
        row: list[Action] = []
        for action in actions:
            split = action.kind == "B" and action.micro_batch % 2 == action.stage
            row += [replace(action, kind="I"), replace(action, kind="W")] if split else [action]
        rows.append(tuple(row))
    path = tmp_path / "mixed.csv"
    write_csv(Schedule("mixed", 8, tuple(rows)), path)
    assert_same(run(gloo, Case(pp=2, schedule=str(path), steps=1)), reference(True))


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        return grad * weight, defer_weight_gradient(weight, lambda: (grad * x).flatten(0, -2).sum(0))


class Scaled(nn.Module):
    """A user's own autograd function, which hands its weight gradient over."""

    handed_over = 0

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 32))

    def forward(self, x: Tensor) -> Tensor:
        return _Scaled.apply(x, self.weight)


def own_specs() -> list[LayerSpec]:
    layer = nn.TransformerEncoderLayer
    options = {"d_model": 32, "nhead": 4, "dim_feedforward": 64, "dropout": 0.0, "batch_first": True}
    return [
        LayerSpec(nn.Embedding, VOCAB, 32),
        LayerSpec(Scaled),
        LayerSpec(nn.Linear, 32, 32),
        LayerSpec(layer, **options),
        LayerSpec(Scaled),
        LayerSpec(nn.Linear, 32, VOCAB),
    ]


def train_own(rank: int, schedule: str, pp: int) -> tuple[list[float], list[int]]:
    case = Case(pp=pp, schedule=schedule)
    engine = build_engine(case, specs=own_specs())
    handed: list[int] = []
    if schedule == "zb-h1":
        from pipekit.tensors.weight_gradients import WeightGradients

        compute = WeightGradients.compute

        def counted(self: WeightGradients, add: Any) -> None:
            handed.append(len(self))
            compute(self, add)

        WeightGradients.compute = counted  # type: ignore[method-assign]
        try:
            return [float(engine.train_batch(micro_batches(step, case, 0))) for step in range(3)], handed
        finally:
            WeightGradients.compute = compute  # type: ignore[method-assign]
    return [float(engine.train_batch(micro_batches(step, case, 0))) for step in range(3)], handed


def test_plain_modules_and_ones_own_functions_put_their_weight_gradients_off(gloo: GlooWorkers) -> None:
    alone, _ = gloo.run(1, train_own, "1f1b", 1)[0]
    for rank, (losses, handed) in enumerate(gloo.run(2, train_own, "zb-h1", 2)):
        assert losses == pytest.approx(alone, rel=1e-5)
        # Rank 0: the scale, and weight and bias of the linear layer. Rank 1: those of three linear layers (attention
        # computes its first by itself, in an operator of its own), and the scale.
        assert min(handed) >= (3 if rank == 0 else 5)


class Probe:
    """Stands in for the stopwatch: counts the micro-batches of which saved tensors are alive after every forward."""

    def __init__(self, parameters: set[int]) -> None:
        self._parameters = parameters
        self._saved: dict[tuple[int, int], list[StorageWeakRef]] = {}
        self._current: tuple[int, int] | None = None
        self.peak = 0

    def begin(self) -> None:
        self._saved = {}

    def start(self, action: Action) -> None:
        self._current = (action.stage, action.micro_batch) if action.kind == "F" else None

    def stop(self, action: Action) -> None:
        self._current = None
        if action.kind == "F":
            alive = [key for key, storages in self._saved.items() if not all(ref.expired() for ref in storages)]
            self.peak = max(self.peak, len(alive))

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if self._current and tensor.is_floating_point() and storage.data_ptr() not in self._parameters:
            self._saved.setdefault(self._current, []).append(StorageWeakRef(storage))
        return tensor


class EmbeddedLinear(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Embedding(VOCAB, 32), nn.Linear(32, 32))


def linear_specs() -> list[LayerSpec]:
    """Eight layers of which each keeps an activation."""
    return [
        LayerSpec(EmbeddedLinear),
        *(LayerSpec(nn.Linear, 32, 32) for _ in range(6)),
        LayerSpec(nn.Linear, 32, VOCAB),
    ]


def measure_peak(rank: int, schedule: str, pp: int) -> tuple[int, int]:
    case = Case(pp=pp, schedule=schedule)
    engine = build_engine(case, specs=linear_specs())
    probe = Probe({parameter.untyped_storage().data_ptr() for parameter in engine.module.parameters()})
    with ExitStack() as stack:
        # Not in the first step, which allocates what stays.
        for step in range(2):
            if step == 1:
                engine.executor.stopwatch = probe
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(probe.pack, lambda tensor: tensor))
            engine.train_batch(micro_batches(step, case, 0))
    return probe.peak, engine.schedule.peak_in_flight(rank)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved-1f1b", "zb-h1", "zb-v"])
@pytest.mark.parametrize("pp", [2, 4])
def test_as_many_micro_batches_are_in_flight_as_the_schedule_says(gloo: GlooWorkers, schedule: str, pp: int) -> None:
    for measured, claimed in gloo.run(pp, measure_peak, schedule, pp):
        assert measured == claimed

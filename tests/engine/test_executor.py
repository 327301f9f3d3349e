"""Values that the executor passes between stages, and its failures."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine_jobs import GLOBAL_BATCH, SEQUENCE, VOCAB, Case, build_engine, micro_batches
from gloo_workers import GlooWorkers, RankError
from pipekit.errors import CommunicationError, PipekitError
from pipekit.layers.specs import LayerSpec, TiedLayerSpec

pytestmark = pytest.mark.distributed

WIDTH = 16


class EmbedWithMask(nn.Module):
    """Returns activations, an integer mask and a float scale that needs no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)

    def forward(self, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.embedding(token_ids), (token_ids % 2), torch.full((1,), 0.5)


class MaskedLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        x, mask, scale = inputs
        assert mask.dtype == torch.int64
        return x + scale * torch.tanh(self.linear(x)) * mask.unsqueeze(-1), mask, scale


class MaskedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, VOCAB)

    def forward(self, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return self.linear(inputs[0].transpose(0, 1).transpose(0, 1))


def tuple_specs() -> list[LayerSpec]:
    return [LayerSpec(EmbedWithMask), LayerSpec(MaskedLinear), LayerSpec(MaskedLinear), LayerSpec(MaskedHead)]


def train_tuples(rank: int, pp: int) -> list[float]:
    case = Case(pp=pp, zero=0, steps=5)
    engine = build_engine(case, specs=tuple_specs())
    return [float(engine.train_batch(micro_batches(step, case, 0))) for step in range(5)]


def test_tuples_with_masks_pass_through_middle_stages(gloo: GlooWorkers) -> None:
    alone = gloo.run(1, train_tuples, 1)[0]
    assert alone[-1] < alone[0]
    for losses in gloo.run(4, train_tuples, 4):
        assert losses == pytest.approx(alone, rel=1e-5)


class NonContiguous(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SEQUENCE, SEQUENCE)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.transpose(1, 2)).transpose(1, 2)


def train_non_contiguous(rank: int, pp: int) -> list[float]:
    case = Case(pp=pp, zero=0)
    specs = [LayerSpec(nn.Embedding, VOCAB, WIDTH), LayerSpec(NonContiguous), LayerSpec(nn.Linear, WIDTH, VOCAB)]
    engine = build_engine(case, specs=specs)
    return [float(engine.train_batch(micro_batches(step, case, 0))) for step in range(3)]


def test_non_contiguous_outputs_pass(gloo: GlooWorkers) -> None:
    alone = gloo.run(1, train_non_contiguous, 1)[0]
    assert gloo.run(3, train_non_contiguous, 3)[1] == pytest.approx(alone, rel=1e-5)


class Parameterless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


def train_with_idle_stage(rank: int, zero: int, precision: str) -> list[float]:
    case = Case(pp=3, zero=zero, precision=precision)
    specs = [LayerSpec(nn.Embedding, VOCAB, WIDTH), LayerSpec(Parameterless), LayerSpec(nn.Linear, WIDTH, VOCAB)]
    engine = build_engine(case, specs=specs)
    return [float(engine.train_batch(micro_batches(step, case, 0))) for step in range(3)]


@pytest.mark.parametrize(("zero", "precision"), [(0, "fp32"), (1, "fp32"), (1, "bf16")])
def test_a_stage_without_parameters_trains_along(gloo: GlooWorkers, zero: int, precision: str) -> None:
    losses = gloo.run(3, train_with_idle_stage, zero, precision)[0]
    assert losses[2] < losses[0]


def test_data_that_end_too_soon_are_named(gloo: GlooWorkers) -> None:
    messages = gloo.run(1, end_of_data_alone)
    assert f"micro-batch 3 of {GLOBAL_BATCH}" in messages[0]


def end_of_data_alone(rank: int) -> str:
    engine = build_engine(Case(pp=1))
    data = list(micro_batches(0, Case(pp=1), 0))[:3]
    with pytest.raises(PipekitError) as caught:
        engine.train_batch(iter(data))
    return str(caught.value)


def vector_loss(rank: int) -> str:
    engine = build_engine(Case(pp=1), loss_fn=lambda outputs, labels: outputs.mean(dim=(0, 1)))
    with pytest.raises(PipekitError) as caught:
        engine.train_batch(micro_batches(0, Case(pp=1), 0))
    return str(caught.value)


def test_a_loss_that_is_no_scalar_is_refused(gloo: GlooWorkers) -> None:
    assert f"({VOCAB},)" in gloo.run(1, vector_loss)[0]


class ListOutput(nn.Module):
    def forward(self, x: Any) -> Any:
        return [x]


def list_output(rank: int) -> str:
    engine = build_engine(
        Case(pp=1), specs=[LayerSpec(nn.Embedding, VOCAB, VOCAB), LayerSpec(ListOutput)], loss_fn=None
    )
    with pytest.raises(PipekitError) as caught:
        engine.train_batch(micro_batches(0, Case(pp=1), 0))
    return str(caught.value)


def test_what_is_no_tensor_is_refused(gloo: GlooWorkers) -> None:
    assert "list" in gloo.run(1, list_output)[0]


class Exploding(nn.Module):
    """Makes the gradient infinite in the second step."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(VOCAB))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        second_step = GLOBAL_BATCH < self.calls <= 2 * GLOBAL_BATCH
        return x * self.scale * (float("inf") if second_step else 1.0)


def skip_a_step(rank: int, zero: int, precision: str) -> tuple[list[float], int, bool]:
    case = Case(pp=2, zero=zero, precision=precision, optimizer="sgd")
    specs = [LayerSpec(nn.Embedding, VOCAB, VOCAB), LayerSpec(Exploding)]
    engine = build_engine(case, specs=specs)
    norms, weights = [], []
    for step in range(3):
        engine.train_batch(micro_batches(step, case, 0))
        norms.append(engine.grad_norm)
        weights.append(next(engine.module.parameters()).detach().clone())
    return norms, engine.skipped_steps, torch.equal(weights[0], weights[1])


@pytest.mark.parametrize(("zero", "precision"), [(0, "fp32"), (1, "fp32"), (1, "bf16")])
def test_a_step_with_infinite_gradients_is_skipped_on_every_stage(gloo: GlooWorkers, zero: int, precision: str) -> None:
    for norms, skipped, unchanged in gloo.run(2, skip_a_step, zero, precision):
        assert skipped == 1
        assert norms[1] == float("inf")
        assert 0 < norms[0] < float("inf")
        assert 0 < norms[2] < float("inf")
        assert unchanged


class UnusedTie(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(VOCAB, VOCAB))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.embedding(x, self.weight)


def unused_tie(rank: int) -> None:
    specs = [
        TiedLayerSpec("shared", UnusedTie),
        TiedLayerSpec("shared", UnusedTie, forward_fn=lambda module, x: x * 1.0),
    ]
    build_engine(Case(pp=2, zero=0), specs=specs).train_batch(micro_batches(0, Case(pp=2), 0))


def test_a_tied_layer_that_leaves_its_weight_unused_is_named(gloo: GlooWorkers) -> None:
    with pytest.raises(RankError, match="tied parameter received no gradient"):
        gloo.run(2, unused_tie)


def wait_in_vain(rank: int) -> str:
    from torch.distributed.distributed_c10d import _get_default_store

    from pipekit.distributed.mpu import ModelParallelUnit
    from pipekit.layout import Layout

    case = Case(pp=2)
    unit = ModelParallelUnit(Layout(pp=2), timeout_s=2.0)
    engine = build_engine(case, unit=unit)
    if rank == 0:
        _get_default_store().wait(["has waited"], timedelta(seconds=120))
        return ""
    with pytest.raises(CommunicationError) as caught:
        engine.train_batch(micro_batches(0, case, 0))
    _get_default_store().set("has waited", "")
    return str(caught.value)


def test_a_wait_for_another_stage_ends_at_the_limit_and_says_what_for(gloo: GlooWorkers) -> None:
    message = gloo.run(2, wait_in_vain)[1]
    assert message.startswith("rank 1 failed while waiting for the other stages to begin the step: ")
    assert "2000ms" in message

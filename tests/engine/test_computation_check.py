"""A step computed twice: a rank that computes another bit the second time is named, and no other is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine_jobs import Case, build_engine, micro_batches, show
from gloo_workers import GlooWorkers
from pipekit.errors import NumbersError

pytestmark = pytest.mark.distributed


class _FlipGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, flip: Any) -> Tensor:
        ctx.flip = flip
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.flip(gradient), None


def flip_bit(tensor: Tensor) -> Tensor:
    """Flip the lowest bit of the first number, whatever its format."""
    flipped = tensor.detach().clone()
    flipped.view(-1).view(torch.int16)[0] ^= 1
    return tensor + (flipped - tensor).detach()


def flip(rank: int, case: Case, culprit: int, kind: str) -> tuple[str, str, bool]:
    """Flip a bit of the second computation of step 2 on one rank; return the error, what is true, and whether anything
    has changed."""
    from pipekit.engine.computation_check import train_batch_checked

    engine = build_engine(case)
    data = lambda step: micro_batches(step, case, engine.mpu.data_parallel_rank)  # noqa: E731
    train_batch_checked(engine, data(0))
    layer_idx = engine.module.layer_indices[1]
    calls = [0]

    def hook(part: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        calls[0] += 1
        # Also called as checkpointed activations are recomputed.
        per_step = engine.micro_batches * (2 if case.checkpointing else 1)
        if calls[0] != per_step + 1:
            return None
        return flip_bit(output) if kind == "activation" else _FlipGradient.apply(output, flip_bit)

    if rank == culprit:
        engine.module.module_of(layer_idx).register_forward_hook(hook)
    weights = [parameter.detach().clone() for parameter in engine.module.parameters()]
    with pytest.raises(NumbersError) as caught:
        train_batch_checked(engine, data(1))
    unchanged = all(map(torch.equal, weights, engine.module.parameters()))
    return str(caught.value), engine.module.layer_names[layer_idx], unchanged


CASES = [
    (Case(pp=2, micro_batch_size=2), 1, "activation"),
    *(
        pytest.param(case, culprit, kind, marks=pytest.mark.slow)
        for case, culprit, kind in [
            (Case(pp=2, schedule="zb-h1", precision="bf16", micro_batch_size=2), 0, "gradient"),
            (Case(dp=2, zero=2, micro_batch_size=2), 1, "gradient"),
            (Case(tp=2, micro_batch_size=4), 0, "activation"),
            (Case(dp=2, micro_batch_size=2), 1, "gradient"),
        ]
    ),
]


@pytest.mark.parametrize(("case", "culprit", "kind"), CASES, ids=str)
def test_a_bit_that_differs_is_named_before_the_update(gloo: GlooWorkers, case: Case, culprit: int, kind: str) -> None:
    results = gloo.run(case.world_size, flip, case, culprit, kind)
    for message, _, unchanged in results:
        assert message.startswith("step 2, computed twice from the same state, differs: first in the ")
        assert f"{results[culprit][1]}" in message.split(", on rank")[0]
        assert f", on rank {culprit} (stage " in message
        assert "in micro-batch 0, on host " in message
        assert unchanged


def compare_losses(rank: int, case: Case) -> tuple[list[Any], list[Any], int]:
    from pipekit.engine.computation_check import train_batch_checked

    losses: list[list[Any]] = []
    for check in (False, True):
        engine = build_engine(case)
        losses.append([])
        for step in range(3):
            data = micro_batches(step, case, engine.mpu.data_parallel_rank)
            loss = train_batch_checked(engine, data) if check else engine.train_batch(data)
            losses[-1].append((float(loss), engine.view.loss_scaler_state()))
        steps = engine.global_steps
        engine.destroy()
    return losses[0], losses[1], steps


@pytest.mark.parametrize(
    "case",
    [
        Case(pp=2, dropout=0.1, micro_batch_size=2),
        *(
            pytest.param(case, marks=pytest.mark.slow)
            for case in [
                Case(dp=2, zero=3, micro_batch_size=2),
                Case(dp=2, zero=2, precision="bf16", micro_batch_size=2),
                Case(pp=2, precision="bf16", checkpointing=True, schedule="interleaved-1f1b", micro_batch_size=2),
                Case(tp=2, micro_batch_size=4),
                Case(precision="fp16", micro_batch_size=4),
            ]
        ),
    ],
    ids=show,
)
def test_checked_steps_train_as_unchecked_ones_to_the_bit(gloo: GlooWorkers, case: Case) -> None:
    for unchecked, checked, steps in gloo.run(case.world_size, compare_losses, case):
        assert checked == unchecked
        assert steps == 3

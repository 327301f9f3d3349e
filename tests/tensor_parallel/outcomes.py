"""Logits, loss and gradients of a language model whose layers a tensor group has sharded: for tests."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipekit.layers.specs import LayerSpec
from pipekit.models.transformer import language_model_loss
from pipekit.tensor_parallel import TensorGroup, whole_outputs
from pipekit.tensors.weight_gradients import Compute, add_gradient, deferring, split_linear
from tensor_parallel.sharded_model import CutModel, assert_all_close, join_gradients
from tensor_parallel.threads import run_ranks

LABELS_LEFT_OUT, VOCAB = 3, 23


def tokens_and_labels() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    tokens, labels = torch.randint(VOCAB, (2, 2, 8), generator=generator)
    labels[0, :LABELS_LEFT_OUT] = -100
    return tokens, labels


class Outcome(NamedTuple):
    """Results of one micro-batch."""

    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


def random_weights(specs: list[LayerSpec]) -> dict[str, Tensor]:
    """Return logical tensors of which none is zero or one, as initial biases and norms are."""
    generator = torch.Generator().manual_seed(9)
    model = CutModel(specs, None, sequence_parallel=False)
    return {
        # What is float32 exactly, so that it may be loaded before it is made float64.
        name: torch.randn(parameter.shape, generator=generator).mul(0.3).add("norm.weight" in name).double()
        for name, parameter in model.parameters().items()
    }


def assert_same(actual: Outcome, expected: Outcome, *, tolerance: float = 1e-10) -> None:
    """Check logits to a tolerance, and what is computed in fp32, which are the loss and with it every gradient."""
    torch.testing.assert_close(actual.logits, expected.logits, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(actual.loss.double(), expected.loss, rtol=1e-6, atol=1e-6)
    assert_all_close(actual.gradients, expected.gradients, tolerance=max(2e-6, tolerance))


def run_sharded(
    size: int,
    specs: list[LayerSpec],
    weights: dict[str, Tensor],
    sequence_parallel: bool,
    *,
    defer: bool = False,
) -> Outcome:
    """Run one micro-batch on ranks that are threads.

    Args:
        size: tensor-parallel degree.
        specs: the model.
        weights: its logical tensors.
        sequence_parallel: whether layers that can do so work on their shard of the sequence.
        defer: whether weight gradients are computed after the backward, as zero-bubble schedules do.
    """
    tokens, labels = tokens_and_labels()

    def run(group: TensorGroup) -> tuple[Tensor, Tensor, dict[str, nn.Parameter]]:
        model = CutModel(specs, group, sequence_parallel=sequence_parallel, weights=weights)
        with split_linear() if defer else nullcontext():
            outputs = model(tokens)
        loss = language_model_loss(outputs, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return whole_outputs(outputs).detach(), loss.detach(), model.parameters()

    pieces: list[tuple[Tensor, Compute]] = []
    with deferring() if defer else nullcontext() as later:
        logits, losses, parameters = zip(*run_ranks(size, run), strict=True)
    if later is not None:
        later.compute(lambda weight, compute: pieces.append((weight, compute)))
        assert len(pieces) >= 8 * size, "nothing was put off"

    def catch_up(group: TensorGroup) -> None:
        own = {id(parameter) for parameter in parameters[group.rank].values()}
        for weight, compute in pieces:
            if id(weight) in own:
                add_gradient(weight, compute)

    run_ranks(size, catch_up)
    for rank in range(size):
        assert torch.equal(logits[rank], logits[0])
        assert torch.equal(losses[rank], losses[0])
    return Outcome(logits[0], losses[0], join_gradients(parameters))

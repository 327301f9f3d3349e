"""Stand-ins of logits, which give their loss, and the logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipekit.models.transformer import language_model_loss
from pipekit.tensor_parallel import Logits, PlannedGroup, Shard, TensorGroup, whole_outputs
from tensor_parallel.threads import run_ranks

B, S, D = 2, 12, 6


def make_logits(
    group: TensorGroup | None, vocab_size: int, *, sequence_parallel: bool = False, chunk_tokens: int | None = None
) -> Logits:
    """Return a rank's part of one and the same model's logits; its parts of the sequence where they are in parts."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, S, D, generator=generator)
    weight = torch.randn(vocab_size, D, generator=generator)
    if group is not None:
        weight = Shard(0, (vocab_size,), group.rank, group.size).take(weight)
        if sequence_parallel:
            hidden = Shard(1, (S,), group.rank, group.size).take(hidden)
    return Logits(
        hidden.requires_grad_(),
        nn.Parameter(weight),
        group,
        sequence_parallel=sequence_parallel,
        vocab_size=vocab_size,
        chunk_tokens=chunk_tokens,
    )


def make_labels(vocab_size: int) -> Tensor:
    labels = torch.randint(vocab_size, (B, S), generator=torch.Generator().manual_seed(1))
    labels[0, :3] = -100
    return labels


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("tp", [1, 2, 3, 4])
@pytest.mark.parametrize("vocab_size", [12, 13, 23])
def test_whole_logits_are_those_of_the_whole_head(tp: int, vocab_size: int, sequence_parallel: bool) -> None:
    alone = make_logits(None, vocab_size)
    expected = F.linear(alone.hidden, alone.weight).detach()
    torch.testing.assert_close(alone.whole(), expected)
    assert not alone.whole().requires_grad
    for logits in run_ranks(
        tp, lambda group: make_logits(group, vocab_size, sequence_parallel=sequence_parallel).whole()
    ):
        assert not logits.requires_grad
        assert logits.shape == (B, S, vocab_size)
        torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("chunk_tokens", [None, 5])
@pytest.mark.parametrize("tp", [0, 2, 3])
def test_the_loss_and_its_gradients_are_those_of_torch(
    tp: int, chunk_tokens: int | None, sequence_parallel: bool
) -> None:
    labels = make_labels(23)
    alone = make_logits(None, 23)
    expected = F.cross_entropy(F.linear(alone.hidden, alone.weight).flatten(0, 1), labels.flatten())
    expected.backward()  # type: ignore[no-untyped-call]
    assert alone.hidden.grad is not None

    def compute(group: TensorGroup | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        logits = make_logits(group, 23, sequence_parallel=sequence_parallel, chunk_tokens=chunk_tokens)
        loss = language_model_loss(logits, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), logits.hidden.grad, logits.weight.grad

    losses, hidden, weight = zip(*([compute(None)] if tp == 0 else run_ranks(tp, compute)), strict=True)
    for loss in losses:
        torch.testing.assert_close(loss, expected.detach())
    parts = sequence_parallel and tp > 0
    torch.testing.assert_close(torch.cat(hidden, 1) if parts else hidden[0], alone.hidden.grad)
    torch.testing.assert_close(torch.cat(weight), alone.weight.grad)


def test_tensors_have_the_same_loss() -> None:
    labels, logits = make_labels(23), make_logits(None, 23, chunk_tokens=5)
    torch.testing.assert_close(language_model_loss(logits.whole(), labels), logits.cross_entropy(labels))


def test_another_label_can_be_ignored() -> None:
    labels = make_labels(23).clamp(min=0)
    for chunk_tokens in (None, 5):
        logits = make_logits(None, 23, chunk_tokens=chunk_tokens)
        expected = F.cross_entropy(logits.whole().flatten(0, 1), labels.flatten(), ignore_index=0)
        torch.testing.assert_close(logits.cross_entropy(labels, ignored_label=0), expected)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_shape_is_that_of_the_whole(sequence_parallel: bool) -> None:
    assert make_logits(PlannedGroup(1, 3), 23, sequence_parallel=sequence_parallel).shape == (B, S, 23)
    assert make_logits(None, 23, sequence_parallel=sequence_parallel).shape == (B, S, 23)


def test_shapes_alone_are_enough() -> None:
    logits = Logits(
        torch.empty(2, 3, 4, device="meta"),
        torch.empty(8, 4, device="meta"),
        PlannedGroup(0, 3),
        sequence_parallel=True,
        vocab_size=23,
    )
    assert logits.whole().shape == logits.shape == (2, 9, 23)


def test_tensors_take_the_place_of_logits_wherever_they_are() -> None:
    logits, mask = make_logits(None, 23), torch.ones(2)
    whole = logits.whole()
    assert whole_outputs(mask) is mask
    assert whole_outputs(None) is None
    assert torch.equal(whole_outputs(logits), whole)
    nested = whole_outputs({"a": (logits, mask), "b": [3, logits]})
    assert torch.equal(nested["a"][0], whole)
    assert nested["a"][1] is mask
    assert nested["b"][0] == 3
    assert torch.equal(nested["b"][1], whole)

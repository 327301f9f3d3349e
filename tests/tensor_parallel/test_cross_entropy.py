"""The loss over a vocabulary in parts is torch's over the whole one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipekit.errors import DataError
from pipekit.tensor_parallel import PlannedGroup, Shard, TensorGroup, vocabulary_parallel_cross_entropy
from tensor_parallel.live_memory import LiveMemory
from tensor_parallel.threads import run_ranks

SCALE = 3.0
"""Factor of the loss, so that its gradient is not one."""


def reference(logits: Tensor, labels: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return torch's loss and the gradient of the logits."""
    whole = logits.detach().to(dtype).requires_grad_()
    loss = F.cross_entropy(whole.flatten(0, 1), labels.flatten())
    (loss * SCALE).backward()  # type: ignore[no-untyped-call]
    assert whole.grad is not None
    return loss.detach(), whole.grad


def sequence_parallel(logits: Tensor, labels: Tensor, tp: int) -> tuple[list[Tensor], Tensor]:
    """Return the loss of each rank, and the gradient of the logits, joined."""
    vocab_size = logits.shape[-1]

    def compute(group: TensorGroup) -> tuple[Tensor, Tensor]:
        own = Shard(2, (vocab_size,), group.rank, group.size).take(logits.detach()).requires_grad_()
        loss = vocabulary_parallel_cross_entropy(own, labels, group, vocab_size=vocab_size)
        (loss * SCALE).backward()  # type: ignore[no-untyped-call]
        assert own.grad is not None
        assert own.grad.dtype == own.dtype
        return loss.detach(), own.grad

    losses, gradients = zip(*run_ranks(tp, compute), strict=True)
    return list(losses), Shard(2, (vocab_size,), 0, tp).join(gradients)


def scores(shape: tuple[int, ...], seed: int = 0, spread: float = 3.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
@pytest.mark.parametrize("vocab_size", [12, 13, 23])
def test_the_sharded_cross_entropy_is_that_of_torch(tp: int, vocab_size: int) -> None:
    logits = scores((2, 5, vocab_size))
    labels = torch.randint(vocab_size, (2, 5), generator=torch.Generator().manual_seed(1))
    labels[0, 1] = labels[1, 4] = -100
    expected, expected_gradient = reference(logits, labels)
    losses, gradient = sequence_parallel(logits, labels, tp)
    assert all(loss.dtype == torch.float32 and torch.equal(loss, losses[0]) for loss in losses)
    torch.testing.assert_close(losses[0].double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, atol=1e-6, rtol=1e-5)
    assert not gradient[0, 1].any()
    assert not gradient[1, 4].any()


@given(
    vocab_size=st.integers(4, 40),
    tp=st.integers(1, 4),
    num_tokens=st.integers(1, 6),
    seed=st.integers(0, 2**16),
    ignored=st.floats(0, 0.9),
    spread=st.sampled_from([0.0, 1.0, 50.0]),
)
@settings(max_examples=40, deadline=None)
def test_the_sharded_cross_entropy_is_that_of_torch_for_any_shape(
    vocab_size: int, tp: int, num_tokens: int, seed: int, ignored: float, spread: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = scores((1, num_tokens, vocab_size), seed, spread)
    labels = torch.randint(vocab_size, (1, num_tokens), generator=generator)
    labels[torch.rand(1, num_tokens, generator=generator) < ignored] = -100
    expected, expected_gradient = reference(logits, labels)
    losses, gradient = sequence_parallel(logits, labels, tp)
    torch.testing.assert_close(losses[0].double(), expected, atol=1e-5, rtol=1e-5, equal_nan=True)
    torch.testing.assert_close(gradient.double(), expected_gradient, atol=1e-5, rtol=1e-5, equal_nan=True)


def test_labels_at_the_borders_of_parts_are_found() -> None:
    vocab_size, tp = 11, 3  # parts of 4, 4 and 3
    borders = torch.tensor([[0, 3, 4, 7, 8, 10]])
    logits = scores((1, 6, vocab_size))
    for column in range(6):
        label = torch.full((1, 6), -100)
        label[0, column] = borders[0, column]
        losses, gradient = sequence_parallel(logits, label, tp)
        torch.testing.assert_close(losses[0].double(), reference(logits, label)[0])
        assert gradient[0, column].argmin() == borders[0, column]


def test_the_mean_of_no_token_is_nan_as_in_torch() -> None:
    logits, labels = scores((1, 3, 8)), torch.full((1, 3), -100)
    expected, expected_gradient = reference(logits, labels, torch.float32)
    losses, gradient = sequence_parallel(logits, labels, 2)
    assert expected.isnan()
    assert all(loss.isnan() for loss in losses)
    torch.testing.assert_close(gradient, expected_gradient, equal_nan=True)


def test_another_label_can_be_ignored() -> None:
    logits, labels = scores((1, 3, 8)), torch.tensor([[0, 3, 7]])
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=0)

    def compute(group: TensorGroup | None) -> Tensor:
        own = logits if group is None else Shard(2, (8,), group.rank, group.size).take(logits)
        return vocabulary_parallel_cross_entropy(own, labels, group, vocab_size=8, ignored_label=0)

    torch.testing.assert_close(run_ranks(2, compute)[1], expected)
    torch.testing.assert_close(compute(None), expected)


def test_without_a_group_it_is_torch_itself() -> None:
    logits = scores((2, 3, 9)).bfloat16()
    labels = torch.tensor([[0, 8, -100], [1, 2, 3]])
    loss = vocabulary_parallel_cross_entropy(logits, labels, None, vocab_size=9)
    assert torch.equal(loss, F.cross_entropy(logits.float().flatten(0, 1), labels.flatten()))


def test_half_precision_logits_are_summed_in_fp32() -> None:
    logits = scores((2, 4, 5000)).bfloat16()
    labels = torch.randint(5000, (2, 4), generator=torch.Generator().manual_seed(1))
    expected, expected_gradient = reference(logits, labels)
    losses, gradient = sequence_parallel(logits, labels, 2)
    torch.testing.assert_close(losses[0].double(), expected, atol=1e-5, rtol=0)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.double(), expected_gradient, atol=1e-8, rtol=2**-8)


def test_large_scores_do_not_overflow() -> None:
    logits = torch.tensor([[[3e4, -3e4, 3e4, 1.0]]])
    losses, gradient = sequence_parallel(logits, torch.tensor([[0]]), 2)
    assert abs(losses[0].item() - 0.6931472) < 1e-6
    torch.testing.assert_close(gradient, SCALE * torch.tensor([[[-0.5, 0, 0.5, 0]]]))


def test_a_rank_whose_part_of_the_vocabulary_is_masked_out_adds_nothing() -> None:
    logits = scores((1, 2, 8))
    logits[..., 4:] = -torch.inf
    labels = torch.tensor([[1, 2]])
    expected, expected_gradient = reference(logits, labels)
    losses, gradient = sequence_parallel(logits, labels, 2)
    torch.testing.assert_close(losses[0].double(), expected)
    torch.testing.assert_close(gradient.double(), expected_gradient)


def test_one_collective_serves_all_tokens() -> None:
    calls = []

    class Counted(PlannedGroup):
        def start_all_gather(self, tensor, dim):  # type: ignore[no-untyped-def]
            calls.append(tuple(tensor.shape))
            return super().start_all_gather(tensor, dim)

        def start_all_reduce(self, tensor):  # type: ignore[no-untyped-def]
            raise AssertionError("a second collective")

    logits = scores((2, 3, 4)).requires_grad_()
    loss = vocabulary_parallel_cross_entropy(logits, torch.ones(2, 3).long(), Counted(0, 2), vocab_size=8)
    loss.backward()  # type: ignore[no-untyped-call]
    assert calls == [(6, 1, 3)]


def test_shapes_alone_are_enough() -> None:
    logits = torch.empty(2, 3, 4, device="meta", requires_grad=True)
    labels = torch.empty(2, 3, dtype=torch.int64, device="meta")
    loss = vocabulary_parallel_cross_entropy(logits, labels, PlannedGroup(0, 2), vocab_size=8)
    loss.backward()  # type: ignore[no-untyped-call]
    assert (loss.shape, logits.grad is not None) == ((), True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_fp32_copy_of_the_logits_is_made_at_a_time(dtype: torch.dtype) -> None:
    logits = scores((1, 64, 4096)).to(dtype).requires_grad_()
    labels = torch.zeros(1, 64, dtype=torch.int64)
    copy_bytes = logits.numel() * 4
    with LiveMemory() as forward:
        loss = vocabulary_parallel_cross_entropy(logits, labels, PlannedGroup(0, 2), vocab_size=8192)
    with LiveMemory() as backward:
        loss.backward()  # type: ignore[no-untyped-call]
    gradient_bytes = logits.numel() * logits.element_size() if dtype != torch.float32 else 0
    assert copy_bytes <= forward.peak_bytes < 1.05 * copy_bytes
    assert copy_bytes <= backward.peak_bytes < 1.05 * copy_bytes + gradient_bytes


@pytest.mark.parametrize("label", [8, -1, 1000])
def test_a_label_outside_of_the_vocabulary_is_an_error(label: int) -> None:
    labels = torch.tensor([[0, label]])
    with pytest.raises(DataError, match=rf"label {label} is not in a vocabulary of 8; set model\.vocab_size"):
        sequence_parallel(torch.zeros(1, 2, 8), labels, 2)
    with pytest.raises(DataError, match=f"label {label} is not in"):
        vocabulary_parallel_cross_entropy(torch.zeros(1, 2, 8), labels, None, vocab_size=8)


def test_there_is_a_label_for_each_token() -> None:
    with pytest.raises(DataError, match=r"labels of shape \(1, 2\) are for 2 tokens, and the model has scored 4"):
        vocabulary_parallel_cross_entropy(
            torch.zeros(1, 4, 4), torch.zeros(1, 2).long(), PlannedGroup(0, 2), vocab_size=8
        )

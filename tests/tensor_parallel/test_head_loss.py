"""Head and loss by the chunk are torch's at once, in a third of the memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from pipekit.errors import DataError
from pipekit.tensor_parallel import PlannedGroup, Shard, TensorGroup, chunked_head_loss, plan_chunk_tokens
from pipekit.tensor_parallel.group import Pending
from pipekit.tensors.weight_gradients import deferring
from tensor_parallel.live_memory import LiveMemory
from tensor_parallel.threads import run_ranks

SCALE = 3.0
"""Factor of the loss, so that its gradient is not one."""


class Case(NamedTuple):
    """A micro-batch at the head."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor

    @property
    def vocab_size(self) -> int:
        return len(self.weight)


class Outcome(NamedTuple):
    """The loss, and the gradients of all activations and of all of the weight."""

    loss: Tensor
    hidden: Tensor
    weight: Tensor


def make_case(
    vocab_size: int = 23, shape: tuple[int, int] = (2, 12), width: int = 6, *, seed: int = 0, ignored: float = 0.2
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(vocab_size, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < ignored] = -100
    return Case(
        torch.randn(*shape, width, generator=generator), torch.randn(vocab_size, width, generator=generator), labels
    )


def reference(case: Case, dtype: torch.dtype = torch.float64) -> Outcome:
    """Return what torch computes, at once, the loss in fp32 at the least."""
    hidden, weight = (tensor.detach().to(dtype).requires_grad_() for tensor in (case.hidden, case.weight))
    logits = F.linear(hidden, weight).to(torch.promote_types(dtype, torch.float32))
    loss = F.cross_entropy(logits.flatten(0, 1), case.labels.flatten())
    (loss * SCALE).backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert weight.grad is not None
    return Outcome(loss.detach(), hidden.grad, weight.grad)


def chunked(case: Case, tp: int, chunk_tokens: int, *, sequence_parallel: bool = False) -> Outcome:
    """Return what the ranks compute, joined; `tp=0` goes without a group."""
    vocab_size = case.vocab_size

    def compute(group: TensorGroup | None) -> Outcome:
        hidden, weight = case.hidden.detach(), case.weight.detach()
        if group is not None:
            weight = Shard(0, (vocab_size,), group.rank, group.size).take(weight)
            if sequence_parallel:
                hidden = Shard(1, (hidden.shape[1],), group.rank, group.size).take(hidden)
        hidden, weight = hidden.clone().requires_grad_(), nn.Parameter(weight.clone())
        loss = chunked_head_loss(
            hidden,
            weight,
            case.labels,
            group,
            sequence_parallel=sequence_parallel,
            vocab_size=vocab_size,
            chunk_tokens=chunk_tokens,
        )
        (loss * SCALE).backward()  # type: ignore[no-untyped-call]
        assert hidden.grad is not None
        assert weight.grad is not None
        assert (loss.dtype, hidden.grad.dtype, weight.grad.dtype) == (torch.float32, hidden.dtype, weight.dtype)
        return Outcome(loss.detach(), hidden.grad, weight.grad)

    outcomes = [compute(None)] if tp == 0 else run_ranks(tp, compute)
    for other in outcomes[1:]:
        assert torch.equal(other.loss.nan_to_num(), outcomes[0].loss.nan_to_num())
        assert sequence_parallel or torch.equal(other.hidden, outcomes[0].hidden)
    return Outcome(
        outcomes[0].loss,
        torch.cat([outcome.hidden for outcome in outcomes], 1) if sequence_parallel else outcomes[0].hidden,
        torch.cat([outcome.weight for outcome in outcomes]),
    )


def assert_close(actual: Outcome, expected: Outcome, *, tolerance: float) -> None:
    for name, ours, theirs in zip(Outcome._fields, actual, expected, strict=True):
        largest = theirs.double().nan_to_num().abs().max().item()
        torch.testing.assert_close(
            ours.double(),
            theirs.double(),
            atol=tolerance * max(largest, 1e-30),
            rtol=tolerance,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("tp", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 24, 100])
def test_the_chunked_head_loss_is_that_of_torch(tp: int, chunk_tokens: int, sequence_parallel: bool) -> None:
    case = make_case()
    assert_close(chunked(case, tp, chunk_tokens, sequence_parallel=sequence_parallel), reference(case), tolerance=3e-6)


@given(
    vocab_size=st.integers(4, 40),
    tp=st.integers(0, 4),
    tokens=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    chunk_tokens=st.integers(1, 40),
    sequence_parallel=st.booleans(),
    ignored=st.floats(0, 1),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_the_chunked_head_loss_is_that_of_torch_for_any_shape(
    vocab_size: int,
    tp: int,
    tokens: tuple[int, int],
    chunk_tokens: int,
    sequence_parallel: bool,
    ignored: float,
    seed: int,
) -> None:
    batch, length = tokens
    case = make_case(vocab_size, (batch, length * max(tp, 1)), seed=seed, ignored=ignored)
    assert_close(chunked(case, tp, chunk_tokens, sequence_parallel=sequence_parallel), reference(case), tolerance=1e-5)


def test_in_double_precision_only_the_loss_is_rounded() -> None:
    case = make_case()
    case = case._replace(hidden=case.hidden.double(), weight=case.weight.double())
    actual, expected = chunked(case, 3, 5), reference(case)
    torch.testing.assert_close(actual.hidden, expected.hidden, atol=1e-14, rtol=1e-12)
    torch.testing.assert_close(actual.weight, expected.weight, atol=1e-14, rtol=1e-12)


def test_labels_at_the_borders_of_parts_are_found() -> None:
    borders = [0, 3, 4, 7, 8, 10]  # of parts of 4, 4 and 3
    case = make_case(11, (1, 6))
    for token, label in enumerate(borders):
        labels = torch.full((1, 6), -100)
        labels[0, token] = label
        actual = chunked(case._replace(labels=labels), 3, 2)
        assert_close(actual, reference(case._replace(labels=labels)), tolerance=3e-6)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("tp", [0, 2, 3])
def test_bf16_is_as_exact_as_at_once(tp: int, sequence_parallel: bool) -> None:
    case = make_case(501, (2, 48), 32)
    case = case._replace(hidden=case.hidden.bfloat16(), weight=case.weight.bfloat16() / 4)
    exact, at_once = reference(case), reference(case, torch.bfloat16)
    actual = chunked(case, tp, 7, sequence_parallel=sequence_parallel)
    assert_close(actual, at_once, tolerance=2**-6)
    # The logits of both are rounded to bf16, so neither is exact.
    for ours, theirs, truth in zip(actual, at_once, exact, strict=True):
        error = (ours.double() - truth).norm() / truth.norm()
        assert error <= 1.5 * (theirs.double() - truth).norm() / truth.norm() + 2**-9


def test_many_chunks_lose_nothing_in_bf16() -> None:
    # Each adds the same to the gradient; accumulated in bf16, it would stop growing at a quarter of what it should be.
    case = Case(torch.ones(1, 1024, 2).bfloat16(), torch.zeros(8, 2).bfloat16(), torch.zeros(1, 1024).long())
    actual, expected = chunked(case, 2, 1), reference(case)
    torch.testing.assert_close(actual.weight.double(), expected.weight, rtol=2**-7, atol=2**-7)


def test_the_mean_of_no_token_is_nan_as_in_torch() -> None:
    case = make_case()
    case = case._replace(labels=torch.full_like(case.labels, -100))
    actual, expected = chunked(case, 2, 5), reference(case, torch.float32)
    assert actual.loss.isnan()
    assert_close(actual, expected, tolerance=1e-6)


def test_a_tied_weight_gets_both_gradients() -> None:
    case = make_case(10, (1, 8))
    tokens = torch.arange(8).reshape(1, 8)

    def gradient(loss_of: Callable[[Tensor, nn.Parameter], Tensor]) -> Tensor:
        weight = nn.Parameter(case.weight.clone())
        loss_of(F.embedding(tokens, weight) * 2, weight).backward()  # type: ignore[no-untyped-call]
        assert weight.grad is not None
        return weight.grad

    ours = gradient(
        lambda hidden, weight: chunked_head_loss(
            hidden, weight, case.labels, None, sequence_parallel=False, vocab_size=10, chunk_tokens=3
        )
    )
    theirs = gradient(
        lambda hidden, weight: F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), case.labels.flatten())
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_head_loss_runs_under_activation_checkpointing(use_reentrant: bool, sequence_parallel: bool) -> None:
    case = make_case()
    expected = reference(case)

    def compute(group: TensorGroup) -> Outcome:
        hidden = Shard(1, (12,), group.rank, 2).take(case.hidden) if sequence_parallel else case.hidden.clone()
        hidden.requires_grad_()
        weight = nn.Parameter(Shard(0, (23,), group.rank, 2).take(case.weight))

        def head(x: Tensor) -> Tensor:
            return chunked_head_loss(
                x * 1, weight, case.labels, group, sequence_parallel=sequence_parallel, vocab_size=23, chunk_tokens=5
            )

        loss: Any = checkpoint(head, hidden, use_reentrant=use_reentrant, preserve_rng_state=False)
        (loss * SCALE).backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        return Outcome(loss.detach(), hidden.grad, weight.grad)

    first, second = run_ranks(2, compute)
    hidden = torch.cat([first.hidden, second.hidden], 1) if sequence_parallel else first.hidden
    actual = Outcome(first.loss, hidden, torch.cat([first.weight, second.weight]))
    assert_close(actual, expected, tolerance=3e-6)


def test_the_weight_gradient_is_not_put_off() -> None:
    case = make_case()
    with deferring() as later:
        actual = chunked(case, 2, 5)
    assert len(later) == 0
    assert_close(actual, reference(case), tolerance=3e-6)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_tensors_get_no_gradient(frozen: str) -> None:
    case, expected = make_case(), reference(make_case())
    hidden = case.hidden.clone().requires_grad_(frozen != "hidden")
    weight = case.weight.clone().requires_grad_(frozen != "weight")
    loss = chunked_head_loss(hidden, weight, case.labels, None, sequence_parallel=False, vocab_size=23, chunk_tokens=5)
    (loss * SCALE).backward()  # type: ignore[no-untyped-call]
    trained, untrained = (hidden, weight) if frozen == "weight" else (weight, hidden)
    assert untrained.grad is None
    assert trained.grad is not None
    wanted = expected.hidden if frozen == "weight" else expected.weight
    torch.testing.assert_close(trained.grad.double(), wanted, atol=1e-6, rtol=1e-5)


def test_the_gradient_of_frozen_activations_is_not_summed() -> None:
    events: list[str] = []
    hidden, weight, labels = torch.ones(1, 6, 5), nn.Parameter(torch.ones(4, 5)), torch.arange(6).reshape(1, 6)
    loss = chunked_head_loss(
        hidden, weight, labels, RecordingGroup(events), sequence_parallel=False, vocab_size=8, chunk_tokens=3
    )
    events.clear()
    loss.backward()  # type: ignore[no-untyped-call]
    assert (events, weight.grad is None) == ([], False)


@pytest.mark.parametrize("order", [(2, 1, 0), (1, 2, 0)])
def test_activations_need_not_be_contiguous(order: tuple[int, int, int]) -> None:
    class Alone(PlannedGroup):
        def start_all_reduce(self, tensor: Tensor) -> Pending:
            assert tensor.is_contiguous(), "which process groups ask for"
            return super().start_all_reduce(tensor)

    case = make_case()
    back = [order.index(dim) for dim in range(3)]
    hidden = case.hidden.permute(*back).contiguous().permute(*order).detach().requires_grad_()
    assert not hidden.is_contiguous()
    loss = chunked_head_loss(
        hidden, case.weight, case.labels, Alone(0, 1), sequence_parallel=False, vocab_size=23, chunk_tokens=5
    )
    (loss * SCALE).backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad.double(), reference(case).hidden, atol=1e-6, rtol=1e-5)


def test_autocast_computes_the_logits_in_its_type() -> None:
    case = make_case(101, (2, 12), 16)
    hidden, weight = case.hidden.clone().requires_grad_(), nn.Parameter(case.weight.clone())
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_head_loss(
            hidden, weight, case.labels, None, sequence_parallel=False, vocab_size=101, chunk_tokens=5
        )
    (loss * SCALE).backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert weight.grad is not None
    assert (loss.dtype, hidden.grad.dtype, weight.grad.dtype) == (torch.float32,) * 3
    at_once = reference(case._replace(hidden=case.hidden.bfloat16(), weight=case.weight.bfloat16()), torch.bfloat16)
    assert_close(Outcome(loss.detach(), hidden.grad, weight.grad), at_once, tolerance=2**-6)


# What ranks say to each other


class _Recorded:
    def __init__(self, pending: Pending, name: str, events: list[str]) -> None:
        self._pending, self._name, self._events = pending, name, events

    def wait(self) -> Tensor:
        self._events.append(f"{self._name} is waited for")
        return self._pending.wait()


class RecordingGroup(PlannedGroup):
    """Notes what is begun and what is waited for."""

    def __init__(self, events: list[str]) -> None:
        super().__init__(rank=0, size=2)
        self._events = events

    def _note(self, name: str, pending: Pending) -> Pending:
        self._events.append(f"{name} begins")
        return _Recorded(pending, name, self._events)

    def start_all_reduce(self, tensor: Tensor) -> Pending:
        return self._note("sum", super().start_all_reduce(tensor))

    def start_all_gather(self, tensor: Tensor, dim: int) -> Pending:
        return self._note(f"gathering of {tuple(tensor.shape)}", super().start_all_gather(tensor, dim))

    def start_reduce_scatter(self, tensor: Tensor, dim: int) -> Pending:
        return self._note("sum", super().start_reduce_scatter(tensor, dim))


class RecordWeightGradient(TorchDispatchMode):
    """Notes the matrix products of a shape."""

    def __init__(self, shape: tuple[int, int], events: list[str]) -> None:
        super().__init__()
        self._shape, self._events = shape, events

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "mm" in str(func) and result.shape == self._shape:
            self._events.append("weight gradient")
        return result


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_activations_gradient_is_summed_behind_the_weights(sequence_parallel: bool, dtype: torch.dtype) -> None:
    events: list[str] = []
    hidden = torch.randn(1, 3 if sequence_parallel else 6, 5, dtype=dtype, requires_grad=True)
    weight = nn.Parameter(torch.randn(4, 5, dtype=dtype))
    labels = torch.arange(6).reshape(1, 6)
    loss = chunked_head_loss(
        hidden,
        weight,
        labels,
        RecordingGroup(events),
        sequence_parallel=sequence_parallel,
        vocab_size=8,
        chunk_tokens=3,
    )
    gathering = ["gathering of (1, 3, 5) begins", "gathering of (1, 3, 5) is waited for"] if sequence_parallel else []
    # One collective for all tokens.
    assert events == [*gathering, "gathering of (6, 1, 3) begins", "gathering of (6, 1, 3) is waited for"]
    events.clear()
    with RecordWeightGradient((4, 5), events):
        loss.backward()  # type: ignore[no-untyped-call]
    assert events == [*gathering, "weight gradient", "sum begins", "weight gradient", "sum is waited for"]
    assert hidden.grad is not None
    assert hidden.grad.shape == hidden.shape


def test_shapes_alone_are_enough() -> None:
    hidden = torch.empty(2, 3, 4, device="meta", dtype=torch.bfloat16, requires_grad=True)
    weight = nn.Parameter(torch.empty(5, 4, device="meta", dtype=torch.bfloat16))
    labels = torch.empty(2, 6, dtype=torch.int64, device="meta")
    loss = chunked_head_loss(
        hidden, weight, labels, PlannedGroup(0, 2), sequence_parallel=True, vocab_size=9, chunk_tokens=5
    )
    loss.backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert weight.grad is not None
    assert (loss.shape, hidden.grad.shape, weight.grad.shape) == ((), hidden.shape, weight.shape)


# Memory

VOCAB_SIZE = 128_256
NUM_TOKENS, WIDTH = 128, 16
# As many chunks as 4,096 tokens would be cut into by the limit that is the default.
LIMIT_BYTES = 64 * 2**20 * NUM_TOKENS // 4096


def peak_bytes(hidden: Tensor, weight: Tensor, loss_of: Callable[[Tensor, Tensor], Tensor]) -> int:
    """Return the most that forward and backward hold beside their inputs, gradients included."""
    hidden, weight = hidden.requires_grad_(), nn.Parameter(weight)
    with LiveMemory() as memory:
        loss_of(hidden, weight).backward()  # type: ignore[no-untyped-call]
    return memory.peak_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_vocabulary_takes_at_most_a_third_of_the_memory(dtype: torch.dtype) -> None:
    def make(vocab_shard_size: int) -> tuple[Tensor, Tensor]:
        return torch.randn(1, NUM_TOKENS, WIDTH).to(dtype), torch.randn(vocab_shard_size, WIDTH).to(dtype)

    labels = torch.arange(NUM_TOKENS).reshape(1, NUM_TOKENS) * 1000
    plain_bytes = peak_bytes(
        *make(VOCAB_SIZE),
        lambda hidden, weight: F.cross_entropy(F.linear(hidden, weight).float().flatten(0, 1), labels.flatten()),
    )
    logits_bytes = NUM_TOKENS * VOCAB_SIZE * 4
    # torch holds the log-probabilities, their gradient and that of the logits.
    assert 3 * logits_bytes <= plain_bytes < 3.5 * logits_bytes

    chunk_tokens = plan_chunk_tokens(NUM_TOKENS, VOCAB_SIZE // 2, limit_bytes=LIMIT_BYTES)
    assert chunk_tokens is not None

    def compute(group: TensorGroup) -> int:
        return peak_bytes(
            *make(VOCAB_SIZE // 2),
            lambda hidden, weight: chunked_head_loss(
                hidden,
                weight,
                labels,
                group,
                sequence_parallel=False,
                vocab_size=VOCAB_SIZE,
                chunk_tokens=chunk_tokens,
            ),
        )

    for chunked_bytes in run_ranks(2, compute):
        assert chunked_bytes <= 0.35 * plain_bytes
        # Beside the gradients of the weight, in both types, there are a few chunks.
        assert chunked_bytes < VOCAB_SIZE // 2 * WIDTH * 8 + 4 * LIMIT_BYTES


def test_only_two_numbers_for_each_token_outlive_the_forward() -> None:
    case = make_case(4096, (1, 64))
    hidden, weight = case.hidden.requires_grad_(), nn.Parameter(case.weight)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        chunked_head_loss(hidden, weight, case.labels, None, sequence_parallel=False, vocab_size=4096, chunk_tokens=8)
    assert sorted(tuple(tensor.shape) for tensor in kept) == [(1, 64, 6), (64, 2)]


# Planning the chunks


@given(num_tokens=st.integers(1, 10**5), vocab_shard_size=st.integers(1, 10**6), limit_bytes=st.integers(4, 10**9))
def test_chunks_are_as_few_and_as_even_as_the_limit_allows(
    num_tokens: int, vocab_shard_size: int, limit_bytes: int
) -> None:
    chunk_tokens = plan_chunk_tokens(num_tokens, vocab_shard_size, limit_bytes=limit_bytes)
    at_once = max(1, limit_bytes // (4 * vocab_shard_size))
    if num_tokens <= limit_bytes // (4 * vocab_shard_size):
        assert chunk_tokens is None
        return
    assert chunk_tokens is not None
    assert 1 <= chunk_tokens <= at_once
    num_chunks = -(-num_tokens // chunk_tokens)
    assert num_chunks == -(-num_tokens // at_once)
    assert chunk_tokens == -(-num_tokens // num_chunks)


def test_a_label_outside_of_the_vocabulary_is_an_error() -> None:
    case = make_case(8, (1, 2))
    with pytest.raises(DataError, match="label 8 is not in a vocabulary of 8"):
        chunked(case._replace(labels=torch.tensor([[0, 8]])), 2, 1)


def test_there_is_a_label_for_each_token_of_the_whole_sequence() -> None:
    case = make_case(8, (1, 4))
    with pytest.raises(DataError, match=r"labels of shape \(1, 2\) are for 2 tokens, and the model has scored 4"):
        chunked(case._replace(labels=torch.tensor([[0, 1]])), 2, 1, sequence_parallel=True)

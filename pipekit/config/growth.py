"""Sizes of each step of a run whose sequences and batches grow, and the samples and tokens of many steps together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipekit.config.schema import TrainConfig


def batch_size_at(train: TrainConfig, position: int) -> int:
    """Sequences of the step that begins after `position` samples, over all ranks."""
    largest = train.global_batch_size
    return largest if train.batch_warmup is None else train.batch_warmup.size_at(position, largest)


def sequence_length_at(train: TrainConfig, step: int) -> int:
    """Tokens of each sequence that is trained on in a step, counted from 1."""
    return (
        train.sequence_length if train.curriculum is None else train.curriculum.length_at(step, train.sequence_length)
    )


def batch_sizes(train: TrainConfig) -> list[int]:
    """All sizes that the batches of a run can have, in growing order."""
    warmup, largest = train.batch_warmup, train.global_batch_size
    return [largest] if warmup is None else [*range(warmup.start, largest, warmup.increment), largest]


def describe_batch(train: TrainConfig) -> str:
    """Sequences and tokens of a step in words, such as `up to 16 sequences of 128 tokens`."""
    batch, sequence = ("" if each is None else "up to " for each in (train.batch_warmup, train.curriculum))
    return f"{batch}{train.global_batch_size:,} sequences of {sequence}{train.sequence_length:,} tokens"


def samples_of_steps(train: TrainConfig, num_steps: int, *, position: int = 0) -> int:
    """Samples that `num_steps` steps consume, the first of which begins after `position` samples."""
    begin = position
    while num_steps > 0:
        size = batch_size_at(train, position)
        same = num_steps
        if train.batch_warmup is not None and size < train.global_batch_size:
            end = train.batch_warmup.end_of_size(position, train.global_batch_size)
            same = min(num_steps, -(-(end - position) // size))
        position += same * size
        num_steps -= same
    return position - begin


def tokens_of_steps(train: TrainConfig, num_steps: int) -> int:
    """Tokens that the first `num_steps` steps of a run are trained on."""
    total = 0
    for first, count, tokens in _stretches(train):
        total += int(min(count, num_steps - first)) * tokens
        if first + count >= num_steps:
            break
    return total


def steps_of_tokens(num_tokens: int | None, train: TrainConfig) -> int | None:
    """Steps that so many tokens take, the last of which may have more than are left; None for None."""
    if num_tokens is None:
        return None
    for first, count, tokens in _stretches(train):
        if num_tokens <= count * tokens:
            return first + -(-num_tokens // tokens)
        num_tokens -= int(count) * tokens
    raise AssertionError("the last stretch has no end")


def steps_of_samples(num_samples: int, train: TrainConfig) -> int:
    """Steps that so many samples take, the last of which may read some more."""
    steps = position = 0
    while position < num_samples:
        size, end = batch_size_at(train, position), num_samples
        if train.batch_warmup is not None and size < train.global_batch_size:
            end = min(end, train.batch_warmup.end_of_size(position, train.global_batch_size))
        count = -(-(end - position) // size)
        steps, position = steps + count, position + count * size
    return steps


def _stretches(train: TrainConfig) -> Iterator[tuple[int, float, int]]:
    """Yield the steps before each stretch of equal steps, their number, and the tokens of each; the last is endless."""
    step = position = 0
    while True:
        size, length = batch_size_at(train, position), sequence_length_at(train, step + 1)
        count = _steps_of_length(train, step + 1)
        if train.batch_warmup is not None and size < train.global_batch_size:
            end = train.batch_warmup.end_of_size(position, train.global_batch_size)
            count = min(count, -(-(end - position) // size))
        yield step, count, size * length
        if count == math.inf:
            return
        step += int(count)
        position += int(count) * size


def _steps_of_length(train: TrainConfig, step: int) -> float:
    """Steps from `step` on that have the same length."""
    curriculum = train.curriculum
    if curriculum is None:
        return math.inf
    length = sequence_length_at(train, step)
    if length == (curriculum.difficulty or (curriculum.max_difficulty or train.sequence_length,))[-1]:
        return math.inf
    reach = 1
    while sequence_length_at(train, step + reach) == length:
        reach *= 2
    low, high = reach // 2, reach  # the last that is known to have it, and the first that is known not to
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if sequence_length_at(train, step + middle) == length else (low, middle)
    return high

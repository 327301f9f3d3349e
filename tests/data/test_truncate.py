"""Truncation of the sequences of a micro-batch."""

from __future__ import annotations

import pytest
import torch

from pipekit.data.truncate import truncate_sequences
from pipekit.errors import DataError


def test_tokens_positions_and_labels_are_cut_and_nothing_else() -> None:
    tokens, positions, labels = torch.arange(24).view(3, 8).unbind()
    batch = (tokens[None], positions[None]), {"labels": labels[None], "weight": torch.ones(1, 3)}
    (first, second), others = truncate_sequences(batch, 5, longest=8)
    assert first.tolist() == [[0, 1, 2, 3, 4]]
    assert second.tolist() == [[8, 9, 10, 11, 12]]
    assert others["labels"].tolist() == [[16, 17, 18, 19, 20]]
    assert others["weight"].shape == (1, 3)
    assert truncate_sequences(batch, 8, longest=8) is batch


def test_a_batch_without_sequences_of_the_length_is_refused() -> None:
    with pytest.raises(DataError, match=r"cuts the tensors .* to 5 of S = 9 .*train.sequence_length to the S of your"):
        truncate_sequences((torch.ones(2, 8), torch.ones(2)), 5, longest=9)

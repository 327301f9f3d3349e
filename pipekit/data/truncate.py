"""Truncation of sequences: their first tokens, in the inputs, labels and positions of a micro-batch alike."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pipekit.errors import DataError
from pipekit.tensors.nested import map_tensors


def truncate_sequences(batch: Any, length: int, *, longest: int) -> Any:
    """Return a micro-batch whose sequences of `longest` tokens are cut to their first `length`.

    Args:
        batch: tensors `(B, longest, ...)` in tuples, lists and dicts, which become `(B, length, ...)`; others stay.
        length: tokens to keep.
        longest: tokens of a whole sequence.

    Raises:
        DataError: if no tensor has sequences of `longest` tokens.

    Source: Megatron-DeepSpeed, `pretrain_gpt.py` (truncation of tokens, labels and masks).

    Example:
        >>> import torch
        >>> truncate_sequences((torch.arange(8).view(2, 4), torch.ones(2)), 2, longest=4)
        (tensor([[0, 1],
                [4, 5]]), tensor([1., 1.]))
    """
    if length == longest:
        return batch
    num_cut = 0

    def cut(tensor: Tensor) -> Tensor:
        nonlocal num_cut
        if tensor.ndim < 2 or tensor.shape[1] != longest:
            return tensor
        num_cut += 1
        return tensor[:, :length]

    truncated = map_tensors(cut, batch)
    if not num_cut:
        raise DataError(
            f"train.curriculum cuts the tensors (B, S, ...) of a micro-batch to {length} of S = {longest} "
            "(train.sequence_length), and none has this shape; set train.sequence_length to the S of your samples, or "
            "leave train.curriculum out"
        )
    return truncated

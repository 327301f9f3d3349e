"""Samples of `train.sequence_length` tokens, made of the documents of a token file, a file for each kind of packing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pipekit.data.samples.counts import SampleCounts
from pipekit.data.samples.packed import PackedDataset
from pipekit.data.samples.windows import TokenDataset

if TYPE_CHECKING:
    from pipekit.config import DataConfig
    from pipekit.data.megatron import TokenSlice

__all__ = ["PackedDataset", "SampleCounts", "TokenDataset", "build_samples", "choose_packing"]


def choose_packing(config: DataConfig, *, has_loss_mask: bool) -> Literal["concat", "best-fit", "none"]:
    """Return `data.packing`, or what its null means for a source, which has a loss mask if it holds conversations."""
    if config.packing is not None or not has_loss_mask:
        return config.packing or "concat"
    return "best-fit" if config.document_mask else "none"


def build_samples(
    token_slice: TokenSlice, sequence_length: int, *, config: DataConfig, has_loss_mask: bool
) -> TokenDataset | PackedDataset:
    """Return the samples of a slice of a token file.

    Args:
        token_slice: the documents.
        sequence_length: S, tokens of a sample.
        config: says how to pack them, and whether inputs are pairs of token ids and positions.
        has_loss_mask: whether a loss mask is beside the token file.

    Raises:
        DataError: if the file is broken or holds not even one sample.
    """
    packing, masks = choose_packing(config, has_loss_mask=has_loss_mask), config.document_mask
    if packing == "concat":
        return TokenDataset(token_slice, sequence_length, document_mask=masks, has_loss_mask=has_loss_mask)
    packs = packing == "best-fit"
    return PackedDataset(
        token_slice, sequence_length, packs=packs, document_mask=masks and packs, has_loss_mask=has_loss_mask
    )

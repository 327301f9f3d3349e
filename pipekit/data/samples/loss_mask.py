"""Loss masks: a file of one byte for each token beside a token file, 1 where the token counts in the loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipekit.data.megatron import IndexedTokens, TokenSlice
from pipekit.errors import DataError

MASK_SUFFIX = ".mask"
IGNORED_LABEL = -100


def load_loss_mask(token_slice: TokenSlice) -> npt.NDArray[np.uint8]:
    """Return the loss mask `(num_tokens,)` of a slice, memory-mapped.

    Raises:
        DataError: if it is missing, or the mask of another file.
    """
    path = mask_path(token_slice.path)
    if not path.is_file():
        raise DataError(f"{path}: no such file, and it says which tokens of {token_slice.path.name} count in the loss")
    file = IndexedTokens(token_slice.path)
    if path.stat().st_size != len(file.tokens):
        raise DataError(
            f"{path}: {path.stat().st_size:,} bytes, and {token_slice.path.name} has {len(file.tokens):,} tokens, of "
            "which each has one; one of the two was cut off, or belongs to another file"
        )
    if not token_slice.num_tokens:
        return np.empty(0, np.uint8)
    begin = file.begin(token_slice.first_document)
    return np.memmap(path, np.uint8, "r")[begin : begin + token_slice.num_tokens]


def mask_path(tokens_path: Path) -> Path:
    """Path of the loss mask of a token file."""
    return tokens_path.with_suffix(MASK_SUFFIX)

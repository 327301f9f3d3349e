"""Loss masks: a file of one byte for each token beside a token file, 1 where the token counts in the loss."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from pipekit.data.megatron import IndexedTokens, IndexedTokensWriter, TokenArray, TokenSlice, WriterState
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


class MaskedTokensWriter(IndexedTokensWriter):
    """Write a token file as `IndexedTokensWriter` does, and its loss mask; another can go on with both.

    `fingerprint` is the hash of both. Tokens that are written without a mask count in the loss.
    """

    def __init__(self, path: str | Path, *, vocab_size: int, state: WriterState | None = None) -> None:
        super().__init__(path, vocab_size=vocab_size, state=state)
        self._mask_path = self.path.with_name(f".{self.path.stem}.mask.tmp")
        self._temporary.append(self._mask_path)
        self._mask_hash = hashlib.blake2b(digest_size=16)

    def __enter__(self) -> MaskedTokensWriter:
        try:
            self._mask = self._mask_path.open("wb" if self._state is None else "r+b")
        except FileNotFoundError as error:
            raise DataError(f"{error.filename}: is missing, and was there when the state was saved") from error
        try:
            super().__enter__()
        except BaseException:
            self._mask.close()
            raise
        return self

    def _go_on(self, state: WriterState) -> None:
        self._mask.truncate(state.num_tokens)
        while data := self._mask.read(1 << 20):
            self._mask_hash.update(data)
        super()._go_on(state)  # compares the fingerprint

    def write(self, token_ids: TokenArray, is_learned: npt.NDArray[np.bool_] | None = None) -> None:
        """Append token ids to the document that is open, and whether each counts in the loss: both `(N,)`."""
        super().write(token_ids)
        data = b"\1" * token_ids.size if is_learned is None else is_learned.astype(np.uint8).tobytes()
        self._mask_hash.update(data)
        self._mask.write(data)

    @property
    def fingerprint(self) -> str:
        return f"{super().fingerprint}{self._mask_hash.hexdigest()}"

    def save_state(self) -> WriterState:
        self._sync_mask()
        return super().save_state()

    def _sync_mask(self) -> None:
        self._mask.flush()
        os.fsync(self._mask.fileno())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._mask:
            if kind is None:
                self._sync_mask()
                self._mask_path.replace(mask_path(self.path))  # before the tokens, which are read without one
        super().__exit__(kind, error, traceback)


def mask_path(tokens_path: Path) -> Path:
    """Path of the loss mask of a token file."""
    return tokens_path.with_suffix(MASK_SUFFIX)

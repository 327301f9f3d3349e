"""Prepared data: the token files of each source of a run."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from pipekit.data.megatron import TokenSlice
from pipekit.errors import StorageError
from pipekit.files import LATE_S, wait_until_seen


class PreparedSource(BaseModel, frozen=True):
    """The tokens of one source, for training and held out.

    `fingerprint` is the hash of all tokens of the source in their order, which is the same on every machine that sees
    the same data, and `validation_fingerprint` that of a held-out text of its own, or empty. `validation` is None where
    nothing is held out. `has_loss_mask` is True for conversations.
    """

    name: str
    train: TokenSlice
    validation: TokenSlice | None
    fingerprint: str
    validation_fingerprint: str = ""
    has_loss_mask: bool = False

    @property
    def slices(self) -> tuple[TokenSlice, ...]:
        """The training tokens, and those that are held out where there are any."""
        return (self.train,) if self.validation is None else (self.train, self.validation)


class PreparedData(BaseModel, frozen=True):
    """The tokens of all sources, ready for `TokenDataset`.

    `fingerprint` is a hash over those of the sources.
    """

    tokenizer_path: Path
    vocab_size: int
    sources: tuple[PreparedSource, ...]
    fingerprint: str

    def is_here(self, *, limit_s: float = LATE_S) -> bool:
        """True if this machine sees the files; those of another in a shared folder are waited for, for `limit_s`."""
        sizes: dict[Path, int | None] = {self.tokenizer_path: None}
        for source in self.sources:
            for token_slice in source.slices:
                sizes |= token_slice.file_sizes
        try:
            wait_until_seen(sizes, limit_s=limit_s)
        except StorageError:
            return False
        return True

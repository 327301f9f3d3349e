"""Statistics of token files: lengths of documents, duplicates, and documents to look at."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import xxhash
from pydantic import BaseModel

from pipekit.data.megatron import IndexedTokens, TokenSlice


class Bin(BaseModel, frozen=True):
    """Documents of `low` to `high` tokens."""

    low: int
    high: int
    num_documents: int


class Lengths(BaseModel, frozen=True):
    """Lengths of documents, in tokens, with the token that ends each."""

    shortest: int
    median: float
    mean: float
    percentile_90: float
    longest: int
    histogram: tuple[Bin, ...]
    """By powers of two."""


class Duplicates(BaseModel, frozen=True):
    """Documents that have the tokens of an earlier one."""

    num_documents: int
    num_tokens: int
    most_repeated: int
    """Number of times that the most frequent document is there."""

    most_repeated_document: int
    """Its index."""

    num_held_out_in_training: int
    """Documents that are held out, and are among the training documents as well."""


class Excerpt(BaseModel, frozen=True):
    """The beginning of a document."""

    document: int
    num_tokens: int
    token_ids: tuple[int, ...]


def measure_lengths(tokens: TokenSlice) -> Lengths | None:
    """Return the lengths of the documents of a slice; None if there is none.

    Example:
        >>> import tempfile
        >>> from pipekit.data.megatron import IndexedTokensWriter, take_documents
        >>> folder = tempfile.TemporaryDirectory()
        >>> with IndexedTokensWriter(folder.name + "/a.bin", vocab_size=9) as writer:
        ...     for length in (1, 2, 3, 6):
        ...         writer.write(np.zeros(length, np.int64))
        ...         writer.end_document()
        >>> lengths = measure_lengths(take_documents(folder.name + "/a.bin"))
        >>> lengths.median, lengths.mean, [(bin.low, bin.high, bin.num_documents) for bin in lengths.histogram]
        (2.5, 3.0, [(1, 1, 1), (2, 3, 2), (4, 7, 1)])
        >>> folder.cleanup()
    """
    lengths = np.diff(tokens.load_bounds())
    if not len(lengths):
        return None
    # Powers of two: 0, 1, 2 to 3, 4 to 7, ...
    edges = [0, *(1 << power for power in range(int(lengths.max()).bit_length() + 1))]
    counts, _ = np.histogram(lengths, [*edges[:-1], edges[-1] - 0.5])
    bins = [
        Bin(low=low, high=high - 1, num_documents=n) for (low, high), n in zip(pairwise(edges), counts, strict=True)
    ]
    kept = [index for index, bin in enumerate(bins) if bin.num_documents]
    return Lengths(
        shortest=int(lengths.min()),
        median=float(np.median(lengths)),
        mean=float(lengths.mean()),
        percentile_90=float(np.percentile(lengths, 90)),
        longest=int(lengths.max()),
        histogram=tuple(bins[kept[0] : kept[-1] + 1]),
    )


def find_duplicates(train: TokenSlice, held_out: TokenSlice | None) -> Duplicates:
    """Compare all documents by a hash of their tokens, which takes 8 bytes of memory for each."""
    hashes, lengths = _hash_documents(train), np.diff(train.load_bounds())
    _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    is_first = np.zeros(len(hashes), bool)
    is_first[first] = True
    most = int(np.argmax(counts)) if len(counts) else 0
    return Duplicates(
        num_documents=int((~is_first).sum()),
        num_tokens=int(lengths[~is_first].sum()),
        most_repeated=int(counts[most]) if len(counts) else 0,
        most_repeated_document=int(first[most]) if len(counts) else 0,
        num_held_out_in_training=0 if held_out is None else int(np.isin(_hash_documents(held_out), hashes).sum()),
    )


def take_excerpts(tokens: TokenSlice, num_documents: int, max_tokens: int) -> list[Excerpt]:
    """Return the beginnings of documents that stand evenly spread over a slice."""
    token_ids, bounds = tokens.load_tokens(), tokens.load_bounds()
    places = np.linspace(0, tokens.num_documents, num_documents, endpoint=False).astype(int)
    chosen = np.unique(places).tolist() if tokens.num_documents else []
    return [
        Excerpt(
            document=index,
            num_tokens=int(bounds[index + 1] - bounds[index]),
            token_ids=tuple(token_ids[bounds[index] : min(bounds[index + 1], bounds[index] + max_tokens)].tolist()),
        )
        for index in chosen
    ]


def _hash_documents(tokens: TokenSlice) -> npt.NDArray[np.uint64]:
    documents = IndexedTokens(tokens.path).documents(tokens.first_document, tokens.num_documents)
    return np.fromiter(
        (xxhash.xxh3_64_intdigest(each.tobytes()) for each in documents), np.uint64, tokens.num_documents
    )

"""The documents of a source, as tests compare them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipekit.data.corpus import find_corpus, read_passages


def read_texts(source: str | Path | Sequence[str], **options: object) -> list[str]:
    """Return the documents of a source, passages joined."""
    documents, parts = [], []
    corpus = find_corpus(str(source) if isinstance(source, Path) else source)
    for passage in read_passages(corpus, **options):  # type: ignore[arg-type]
        parts.append(passage.text)
        if passage.ends_document:
            documents.append("".join(parts))
            parts = []
    assert parts == [], "the last document has no end"
    return documents

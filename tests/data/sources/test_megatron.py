from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipekit.data.corpus import find_corpus, read_token_ids
from pipekit.data.megatron import IndexedTokensWriter
from pipekit.errors import DataError

DOCUMENTS = [[1, 2, 3], [4], [5, 6]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with IndexedTokensWriter(tmp_path / "tokens.bin", vocab_size=100) as writer:
        for document in DOCUMENTS:
            writer.write(np.array(document))
            writer.end_document()
    return tmp_path / "tokens.bin"


@pytest.mark.parametrize("named", ["tokens.bin", "tokens.idx", "tokens", "."])
def test_both_files_are_one_source_whichever_is_named(path: Path, named: str) -> None:
    corpus = find_corpus(str(path.parent / named))
    assert [file.path for file in corpus.token_files] == [path]
    assert [ids.tolist() for ids in read_token_ids(corpus)] == DOCUMENTS


def test_another_index_makes_another_source(path: Path) -> None:
    before = find_corpus(str(path)).identity
    index = path.with_suffix(".idx")
    index.write_bytes(index.read_bytes())
    assert find_corpus(str(path)).identity != before


def test_one_without_the_other_is_refused(path: Path) -> None:
    index = path.with_suffix(".idx")
    path.rename(path.with_suffix(".moved"))
    with pytest.raises(DataError, match=r"there is no tokens\.bin beside .*tokens\.idx; give both files"):
        find_corpus(str(index))
    path.with_suffix(".moved").rename(path)
    index.unlink()
    with pytest.raises(DataError, match=r"tokens\.bin'.*neither UTF-8 text nor a format that is known"):
        find_corpus(str(path))


def test_text_and_token_ids_are_no_single_source(path: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(DataError, match=r"tokens\.bin holds token ids, and .*a\.txt text; .* entries of data\.mixture"):
        find_corpus([str(tmp_path / "a.txt"), str(path)])

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipekit.data.corpus import find_corpus, read_token_ids
from pipekit.errors import DataError

DOCUMENTS = [[1, 2, 3], [40_000], [], [5, 6]]


def write(folder: Path, dtype: str) -> Path:
    """Write the files that datatrove writes: ids, ends of documents, and the name of the tokenizer."""
    path = folder / "00000_tokens.ds"
    np.array([token_id for document in DOCUMENTS for token_id in document], dtype).tofile(path)
    np.cumsum([len(document) for document in DOCUMENTS]).astype("<u8").tofile(f"{path}.index")
    Path(f"{path}.metadata").write_text("gpt2|2\n6\n6 T")
    return path


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize("named", ["00000_tokens.ds", "."])
def test_documents_have_the_ids_that_were_written(tmp_path: Path, dtype: str, named: str) -> None:
    write(tmp_path, dtype)
    corpus = find_corpus(str(tmp_path / named))
    assert len(corpus.token_files) == 1
    assert [ids.tolist() for ids in read_token_ids(corpus)] == DOCUMENTS


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "<u2")
    whole = path.read_bytes()
    for data in (whole[:-1], whole[:-2], whole + b"\0\0", b""):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"tokens\.ds: has .* bytes, and .*\.ds\.index tells of 6 tokens in 4 doc"):
            list(read_token_ids(find_corpus(str(path))))

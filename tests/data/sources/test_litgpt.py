from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipekit.data.corpus import find_corpus, read_token_ids
from pipekit.errors import DataError

CHUNKS = [[[1, 2, 3], [70_000]], [[5, 6]]]


def write(folder: Path, dim: int | None = 4, **config: Any) -> Path:
    """Write the folder that litdata writes: chunks with a header of the places of their documents, and the index."""
    names = []
    for number, documents in enumerate(CHUNKS):
        items = [np.array(document, "<i4").tobytes() for document in documents]
        places = np.cumsum([4 * (len(items) + 2), *map(len, items)]).astype("<u4")
        names.append(f"chunk-0-{number}.bin")
        (folder / names[-1]).write_bytes(np.array([len(items)], "<u4").tobytes() + places.tobytes() + b"".join(items))
    chunks = [{"filename": name, "dim": dim} for name in names]
    described = {"data_format": ["no_header_tensor:16"], "compression": None, "encryption": None, **config}
    (folder / "index.json").write_text(json.dumps({"chunks": chunks, "config": described}))
    return folder


def test_documents_have_the_ids_that_were_written(tmp_path: Path) -> None:
    corpus = find_corpus(str(write(tmp_path)))
    assert len(corpus.token_files) == 2
    assert [ids.tolist() for ids in read_token_ids(corpus)] == [*CHUNKS[0], *CHUNKS[1]]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"data_format": ["jpeg"]}, r"index\.json: the items are of jpeg, not tensors of token ids"),
        ({"data_format": ["no_header_tensor:0"]}, "not tensors of token ids"),
        ({"compression": "zstd"}, "compressed or encrypted"),
        ({"dim": None}, "its items have headers; prepare them again with litdata's TokensLoader"),
    ],
)
def test_other_items_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_corpus(str(write(tmp_path, **config)))


def test_an_index_of_another_kind_is_no_litgpt_folder(tmp_path: Path) -> None:
    index = {"chunks": [{"filename": 5, "dim": 4}], "config": {"data_format": ["no_header_tensor:16"]}}
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="the folder holds no"):
        find_corpus(str(tmp_path))


def test_a_chunk_that_is_missing_or_cut_short_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    chunk = tmp_path / "chunk-0-1.bin"
    whole = chunk.read_bytes()
    for data in (whole[:-1], whole[:8], whole[:2], b""):
        chunk.write_bytes(data)
        with pytest.raises(DataError, match=r"chunk-0-1\.bin: is broken or was cut short"):
            list(read_token_ids(find_corpus(str(tmp_path))))
    chunk.unlink()
    with pytest.raises(DataError, match=r"chunk-0-1\.bin: is missing, and index\.json names it"):
        find_corpus(str(tmp_path))

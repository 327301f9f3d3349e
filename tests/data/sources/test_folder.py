from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from pipekit.data.corpus import find_corpus
from pipekit.errors import DataError
from source_texts import read_texts


def write(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def row(text: str) -> str:
    return json.dumps({"text": text}) + "\n"


def test_folder_is_read_recursively_in_sorted_order(tmp_path: Path) -> None:
    names = ("b/two.md", "a.txt", "b/one.py", "c.csv", "d.log", ".git/hidden.txt", "b/.hidden.md", "e.json")
    write(tmp_path, {name: name if name != "e.json" else '{\n "a": 1\n}' for name in names})
    assert read_texts(tmp_path) == ["a.txt", "b/one.py", "b/two.md"]


def test_records_go_before_the_texts_that_describe_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, {"README.md": "card", "LICENSE.txt": "terms", "info.json": '{"a": 1}', "b/2.JSONL": row("two")})
    (tmp_path / "b/1.json.gz").write_bytes(gzip.compress((row("one") + row("more")).encode()))
    assert read_texts(tmp_path) == ["one", "more", "two"]
    assert "text files beside the data are left out: LICENSE.txt, README.md" in caplog.text


def test_what_programs_leave_beside_the_data_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, {"part-0.jsonl": row("data"), "_delta_log/0.json": '{"commit": 1}\n{"add": 2}\n', "_SUCCESS": ""})
    (tmp_path / "backup.tar.gz").write_bytes(b"\x1f\x8b is broken")
    assert read_texts(tmp_path) == ["data"]
    (tmp_path / "part-1.jsonl.gz").write_bytes(b"\x1f\x8b is broken")
    with pytest.raises(DataError, match=r"part-1\.jsonl\.gz: the gzip file is broken"):
        read_texts(tmp_path)


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (("train-00000.jsonl", "test-00000.jsonl", "validation.jsonl"), ["train-00000.jsonl"]),
        (("train/0.jsonl", "dev/0.jsonl"), ["train/0.jsonl"]),
        (("wiki.train.txt", "wiki.valid.txt", "wiki.test.txt"), ["wiki.train.txt"]),
        # Not every file is one of a split, or none is for training: nothing is left out.
        (("model.py", "test.py", "train.py"), ["model.py", "test.py", "train.py"]),
        (("dev.jsonl", "test.jsonl"), ["dev.jsonl", "test.jsonl"]),
        (("contest.txt", "training.txt"), ["contest.txt", "training.txt"]),
    ],
)
def test_of_files_named_for_splits_those_for_training_are_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, names: tuple[str, ...], read: list[str]
) -> None:
    write(tmp_path, {name: row(name) if name.endswith(".jsonl") else name for name in names})
    assert read_texts(tmp_path) == read
    assert ("files that are not for training are left out" in caplog.text) == (len(read) < len(names))


def test_a_folder_of_two_formats_or_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("1,2")
    with pytest.raises(DataError, match=r"holds no \.txt, \.md, \.py file, and none of another format that is read"):
        find_corpus(str(tmp_path))
    write(tmp_path, {"a.jsonl": row("a"), "b.jsonl": row("b")})
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"the folder holds JSON lines \(2\) and Parquet \(1\); name the files"):
        find_corpus(str(tmp_path))
    assert read_texts(str(tmp_path / "*.jsonl")) == ["a", "b"]

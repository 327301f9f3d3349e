"""Folders of safetensors files: what is read is what was written, and an index that is wrong is one error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pipekit.checkpoint.stored_tensors import read_header
from pipekit.errors import CheckpointError
from pipekit.inference.safetensors_folder import SafetensorsFolder, exported_dtype, find_changed, write_shards

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.tensor(3)}


def write(folder: Path, *, shard_bytes: int = 30) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    return write_shards(folder, TENSORS, read=TENSORS.__getitem__, shard_bytes=shard_bytes)


@pytest.mark.parametrize(("shard_bytes", "num_files"), [(1, 3), (24, 2), (33, 2), (34, 2), (42, 1)])
def test_files_are_filled_in_order_up_to_their_size(tmp_path: Path, shard_bytes: int, num_files: int) -> None:
    # 24, 10 and 8 bytes.
    write(tmp_path, shard_bytes=shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == num_files
    assert [name for file in files for name in sorted(read_header(file))] == ["a", "b", "c"]
    stored = SafetensorsFolder(tmp_path)
    assert all(torch.equal(stored[name], tensor) for name, tensor in TENSORS.items())
    assert stored.keys() == TENSORS.keys()
    assert stored.read("b", torch.float32).dtype == torch.float32
    assert (stored.described("a").shape, stored.described("b").dtype) == ((2, 3), torch.bfloat16)


def test_a_tensor_that_changed_is_found(tmp_path: Path) -> None:
    checksums = write(tmp_path)
    assert find_changed(tmp_path, checksums) is None
    assert find_changed(tmp_path, {**checksums, "d": ""}) == "d"
    assert find_changed(tmp_path, {name: checksums[name] for name in "ab"}) == "c"
    save_file({"b": torch.ones(5, dtype=torch.bfloat16) * 2, "c": TENSORS["c"]}, tmp_path / files_of(tmp_path)["b"])
    assert find_changed(tmp_path, checksums) == "b"


def files_of(folder: Path) -> dict[str, str]:
    files: dict[str, str] = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return files


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "index.json: cannot be read"),
        ({}, "index.json: cannot be read"),
        ({"weight_map": {"a": 3}}, "index.json: cannot be read"),
        ({"weight_map": {"a": "../model.safetensors"}}, r"names '../model\.safetensors', which is outside"),
        ({"weight_map": {"a": "/etc/passwd"}}, "names '/etc/passwd', which is outside"),
        ({"weight_map": {"a": "other.safetensors"}}, r"other\.safetensors: is missing, and .*index\.json names it"),
        ({"weight_map": {"z": "model-00001-of-00002.safetensors"}}, r"00001-of-00002.*: holds no z, and .*names it"),
    ],
)
def test_an_index_that_is_wrong_is_refused(tmp_path: Path, index: Any, message: str) -> None:
    write(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index if isinstance(index, str) else json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFolder(tmp_path)


def test_integers_keep_their_format() -> None:
    assert exported_dtype(torch.float32, "bfloat16") == torch.bfloat16
    assert exported_dtype(torch.int64, "bfloat16") == torch.int64

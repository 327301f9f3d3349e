"""The table of contents of a checkpoint, and finding the right one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipekit.checkpoint.manifest import (
    Manifest,
    TensorEntry,
    TrainingState,
    checkpoint_name,
    find_latest,
    list_checkpoints,
    load_manifest,
    resolve_checkpoint,
)
from pipekit.errors import CheckpointError
from pipekit.files import write_atomically

ENTRY = TensorEntry(
    (2, 3), "float32", {"weights": "weights-0000.safetensors"}, trainable=False, checksums={"weights": "0"}
)


def write_checkpoint(folder: Path, step: int, content: bytes = b"12345678") -> Path:
    checkpoint = folder / checkpoint_name(step)
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights-0000.safetensors").write_bytes(content)
    manifest = Manifest(
        training=TrainingState(step=step, consumed_samples=8 * step, seed=1, lr=0.1, optimizer={"states": ["exp_avg"]}),
        tensors={"a.weight": ENTRY},
        file_bytes={"weights-0000.safetensors": 8},
        written_by={"torch": "0"},
    )
    (checkpoint / "manifest.json").write_text(manifest.to_json())
    return checkpoint


def test_a_manifest_reads_back_as_written(tmp_path: Path) -> None:
    manifest = load_manifest(write_checkpoint(tmp_path, 7))
    assert manifest.training.step == 7
    assert manifest.training.consumed_samples == 56
    assert manifest.tensors["a.weight"] == ENTRY
    assert Manifest.from_json(manifest.to_json(), where="x") == manifest


def test_a_cut_or_missing_file_is_named_with_what_to_use_instead(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1)
    newest = write_checkpoint(tmp_path, 2, content=b"123")
    with pytest.raises(CheckpointError, match=r"has 3 bytes of 8: .*checkpoint\.resume=.*step-00000001"):
        load_manifest(newest)
    (newest / "weights-0000.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        load_manifest(newest)


def test_another_cut_checkpoint_is_not_suggested(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1, content=b"1")
    with pytest.raises(CheckpointError, match=r"is damaged$"):
        load_manifest(write_checkpoint(tmp_path, 2, content=b"123"))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "pipekit-checkpoint", "version": 2}'])
def test_a_damaged_manifest(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"m\.json: cut short or damaged"):
        Manifest.from_json(text, where="m.json")


def test_another_format_and_a_newer_version(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a pipekit checkpoint"):
        Manifest.from_json('{"format": "other"}', where="m.json")
    stored = json.loads((write_checkpoint(tmp_path, 1) / "manifest.json").read_text())
    stored["version"] = 99
    with pytest.raises(CheckpointError, match=r"version 99, and this pipekit reads version 2"):
        Manifest.from_json(json.dumps(stored), where="m.json")


def test_the_latest_is_the_one_that_is_named(tmp_path: Path) -> None:
    assert find_latest(tmp_path) is None
    first, second = write_checkpoint(tmp_path, 1), write_checkpoint(tmp_path, 2)
    assert find_latest(tmp_path) == second
    write_atomically(tmp_path / "latest", first.name + "\n")
    assert find_latest(tmp_path) == first
    write_atomically(tmp_path / "latest", "step-00000009\n")
    with pytest.raises(CheckpointError, match=r"step-00000009.*not there.*resume=.*step-00000002"):
        find_latest(tmp_path)


def test_one_that_is_being_written_does_not_count(tmp_path: Path) -> None:
    whole = write_checkpoint(tmp_path, 1)
    write_checkpoint(tmp_path, 2).rename(tmp_path / ".step-00000002.tmp")
    assert list_checkpoints(tmp_path) == [whole]


def test_a_run_its_checkpoints_and_a_checkpoint_all_name_it(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoints", 3)
    for path in (tmp_path, tmp_path / "checkpoints", checkpoint):
        assert resolve_checkpoint(path) == checkpoint
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve_checkpoint(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        resolve_checkpoint(tmp_path / "empty")


def test_everything_comes_back(tmp_path: Path) -> None:
    training = TrainingState(
        step=3,
        consumed_samples=24,
        seed=9,
        lr=1e-5,
        optimizer={"type": "AdamW", "step": 3, "states": ["exp_avg", "exp_avg_sq"]},
        loss_scaler={"cur_scale": 65536.0},
        data_fingerprint="f00d",
        metrics={"loss": 1.25},
    )
    entry = TensorEntry((), "int64", {"weights": "w"}, trainable=False)
    manifest = Manifest(training, {"ü": entry}, {"w": 2**40}, written_by={"torch": "2"})
    assert Manifest.from_json(manifest.to_json(), where="x") == manifest
    stored = json.loads(manifest.to_json())
    assert (stored["format"], stored["version"]) == ("pipekit-checkpoint", 2)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\x00" * 100, b""])
def test_a_manifest_that_is_no_text(tmp_path: Path, content: bytes) -> None:
    write_checkpoint(tmp_path, 1)
    damaged = write_checkpoint(tmp_path, 2)
    (damaged / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step-00000002/manifest\.json: cut short or damaged"):
        load_manifest(damaged)
    cut = write_checkpoint(tmp_path, 3, content=b"1")
    with pytest.raises(CheckpointError, match=r"resume=.*step-00000001$"):
        load_manifest(cut)


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no manifest\.json, so it is not a checkpoint"):
        load_manifest(tmp_path)


def test_the_newest_whole_one_is_suggested_wherever_it_stands(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1)
    cut = write_checkpoint(tmp_path, 2, content=b"123")
    write_checkpoint(tmp_path, 3)
    with pytest.raises(CheckpointError, match=r"has 3 bytes of 8: .*one that is whole with .*step-00000003$"):
        load_manifest(cut)


def test_without_any_other_the_latest_file_is_the_one_to_remove(tmp_path: Path) -> None:
    write_atomically(tmp_path / "latest", "step-00000009\n")
    with pytest.raises(CheckpointError, match=r"names 'step-00000009', which is not there; remove .*latest to start"):
        find_latest(tmp_path)


def test_names_sort_as_steps_do(tmp_path: Path) -> None:
    written = [write_checkpoint(tmp_path, step) for step in (100, 9, 99_999_999, 10)]
    assert list_checkpoints(tmp_path) == [written[1], written[3], written[0], written[2]]

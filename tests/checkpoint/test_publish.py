"""A checkpoint has no name until it is whole, and then knows every file in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipekit.checkpoint.manifest import TrainingState, find_latest, list_checkpoints, load_manifest
from pipekit.checkpoint.publish import begin_checkpoint, hidden_folder, publish_checkpoint, write_manifest
from pipekit.checkpoint.retention import Retention
from pipekit.errors import DamagedCheckpointError


def write(final: Path, step: int) -> None:
    begin_checkpoint(final)
    (hidden_folder(final) / "own.bin").write_bytes(b"own" * step)
    training = TrainingState(step, 4 * step, 1, 0.0, {})
    write_manifest(final, training, {"config.yaml": b"a: 1\n"}, tensors={}, tensor_bytes={})


def test_a_checkpoint_appears_when_it_is_published_and_those_that_are_not_kept_go(tmp_path: Path) -> None:
    finals = [tmp_path / f"step-{step:08d}" for step in (1, 2, 3)]
    for step, final in enumerate(finals, 1):
        write(final, step)
        assert final not in list_checkpoints(tmp_path)
        publish_checkpoint(final, retention=Retention(2))
        assert find_latest(tmp_path) == final
    assert list_checkpoints(tmp_path) == finals[1:]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_an_interrupted_save_has_left_is_removed_by_the_next(tmp_path: Path) -> None:
    write(tmp_path / "step-00000001", 1)
    begin_checkpoint(tmp_path / "step-00000002")
    assert [path.name for path in tmp_path.iterdir()] == [".step-00000002.tmp"]


def test_the_manifest_knows_files_of_ones_own(tmp_path: Path) -> None:
    final = tmp_path / "step-00000002"
    write(final, 2)
    publish_checkpoint(final, retention=Retention(), update_latest=False)
    assert not (tmp_path / "latest").exists()
    assert load_manifest(final).file_bytes == {"config.yaml": 5, "own.bin": 6}
    (final / "own.bin").write_bytes(b"cut")
    with pytest.raises(DamagedCheckpointError, match=r"own\.bin"):
        load_manifest(final)

"""The checkpoints that a run keeps, against rules worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from hand_made import write_manifest
from pipekit.checkpoint import retention
from pipekit.checkpoint.manifest import TrainingState, list_checkpoints
from pipekit.checkpoint.retention import Retention, list_surplus, remove_checkpoint, remove_leftovers

LOSSES = {10: 5.0, 20: 3.0, 30: None, 40: 4.0, 50: 4.5}


def write_run(folder: Path, losses: Mapping[int, float | None] = LOSSES, *, latest: int = 50) -> Path:
    for step, loss in losses.items():
        checkpoint = folder / f"step-{step:08d}"
        checkpoint.mkdir()
        metrics = {} if loss is None else {"val_loss": loss}
        write_manifest(checkpoint, {}, TrainingState(step, step, 1, 0.1, {}, metrics=metrics))
    (folder / "latest").write_text(f"step-{latest:08d}\n")
    return folder


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        (Retention(), [10, 20, 30, 40, 50]),
        (Retention(1), [50]),
        (Retention(2), [40, 50]),
        (Retention(9), [10, 20, 30, 40, 50]),
        (Retention(1, every=20), [20, 40, 50]),
        (Retention(1, best="val_loss"), [20, 50]),
        (Retention(2, best="val_loss", best_is="highest"), [10, 40, 50]),
        (Retention(1, best="no_such_metric"), [50]),
        (Retention(1, every=30, best="val_loss"), [20, 30, 50]),
    ],
    ids=str,
)
def test_each_part_of_a_rule_keeps_what_it_asks_for(tmp_path: Path, rule: Retention, kept: list[int]) -> None:
    surplus = list_surplus(write_run(tmp_path), rule)
    assert [step for step in LOSSES if tmp_path / f"step-{step:08d}" not in surplus] == kept


def test_later_steps_of_a_run_that_was_set_back_stay(tmp_path: Path) -> None:
    write_run(tmp_path, latest=30)
    assert [path.name for path in list_surplus(tmp_path, Retention(1))] == ["step-00000010", "step-00000020"]


def test_what_cannot_be_read_is_not_removed(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "step-00000010/manifest.json").write_text("{")
    assert [path.name for path in list_surplus(tmp_path, Retention(2))] == ["step-00000020", "step-00000030"]


def test_what_another_process_removes_meanwhile_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path)
    listed = [tmp_path / "step-00000005", *list_checkpoints(tmp_path)]
    monkeypatch.setattr(retention, "list_checkpoints", lambda folder: listed)
    assert [path.name for path in list_surplus(tmp_path, Retention(4))] == ["step-00000010"]


def test_removed_ones_and_leftovers_are_gone_and_nothing_else(tmp_path: Path) -> None:
    write_run(tmp_path)
    remove_checkpoint(tmp_path / "step-00000010")
    for name in (".step-00000060.tmp", ".step-00000020.0f.old"):
        (tmp_path / name).mkdir()
    (tmp_path / ".latest.0f.tmp").touch()
    remove_leftovers(tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step-{step:08d}" for step in (20, 30, 40, 50)]
    assert sorted(path.name for path in tmp_path.glob(".*")) == [".latest.0f.tmp"]

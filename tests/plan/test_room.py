"""A run that cannot save is told so before it starts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pipekit.checkpoint.manifest import checkpoint_name
from pipekit.config import parse_config
from pipekit.errors import StorageError
from pipekit.plan import room
from pipekit.plan.decide import decide_run
from pipekit.plan.plan import Plan
from pipekit.plan.resources import Resources
from pipekit.plan.room import check_room, checkpoint_bytes
from pipekit.training.language_model import LanguageModelTrial


def made(folder: Path, **sections: dict[str, object]) -> Plan:
    values = {
        "model": {"preset": "tiny", "vocab_size": 500},
        "train": {"steps": 10, "global_batch_size": 16, "micro_batch_size": 2},
        "run": {"dir": str(folder)},
    }
    return decide_run(parse_config({**values, **sections}), LanguageModelTrial, Resources(world_size=1)).plan


def test_a_checkpoint_holds_weights_and_states_in_fp32(tmp_path: Path) -> None:
    plan = made(tmp_path)
    assert checkpoint_bytes(plan) == 12 * plan.num_parameters
    without_states = made(tmp_path, optimizer={"type": "sgd", "momentum": 0.0})
    assert checkpoint_bytes(without_states) == 4 * plan.num_parameters


@pytest.mark.parametrize(
    ("room_for", "keep", "held", "warns"),
    [
        (3.0, 2, 0, False),
        (2.9, 2, 0, True),
        (2.0, 2, 1, False),
        (1.0, 2, 3, False),
        (1.0, 1, 0, True),
        (1.9, None, 0, True),
    ],
)
def test_a_warning_where_not_all_that_are_kept_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room_for: float, keep: int | None, held: int, warns: bool
) -> None:
    plan = made(tmp_path, checkpoint={"keep": keep})
    for step in range(held):
        folder = tmp_path / "checkpoints" / checkpoint_name(step)
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
    monkeypatch.setattr(room, "free_bytes", lambda path: math.ceil(room_for * checkpoint_bytes(plan)))
    warning = check_room(plan)
    assert (warning is not None) == warns
    if warning:
        assert f"run.dir={tmp_path}: has room for {int(room_for)} of the" in warning


def test_an_error_where_not_even_one_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = made(tmp_path)
    monkeypatch.setattr(room, "free_bytes", lambda path: checkpoint_bytes(plan) - 1)
    with pytest.raises(StorageError, match=r"run\.dir=.*: has no room for a checkpoint, which takes 1\d\.\d MB"):
        check_room(plan)

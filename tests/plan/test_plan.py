"""A plan as a JSON file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipekit.config import load_config, parse_config
from pipekit.errors import ConfigError, PipekitError
from pipekit.layout import Layout
from pipekit.plan.decide import decide_run
from pipekit.plan.plan import Plan, StartPoint
from pipekit.plan.resources import Resources
from pipekit.plan.run_folder import read_plan, write_plan
from pipekit.schedules import read_csv
from pipekit.training.language_model import LanguageModelTrial


def made(**sections: Any) -> Plan:
    values = {
        "model": {"preset": "tiny", "vocab_size": 500},
        "train": {"steps": 10, "global_batch_size": 16, "micro_batch_size": 2},
        "parallel": {"pp": 2, "schedule": "zb-v", "order": ["data", "pipe", "tensor"]},
    }
    return decide_run(parse_config({**values, **sections}), LanguageModelTrial, Resources(world_size=4)).plan


def test_a_plan_reads_back_equal() -> None:
    plan = made()
    assert plan.layout == Layout(pp=2, dp=2, order=("data", "pipe", "tensor"))
    assert len(plan.placement) == 4
    for variant in (
        plan,
        replace(plan, start=StartPoint(Path("runs/a/checkpoints/step-00000003"), 3), chosen="pp=2: the only one"),
        replace(plan, prepared={"paths": ["a", "b"], "fingerprint": "é", "validation": None, "share": 0.5}),
        made(model={"preset": "gpt2", "vocab_size": 300, "num_layers": 2, "tied_embedding": False}),
        made(deepspeed={"wall_clock_breakdown": True}, optimizer={"betas": [0.8, 0.9]}, data={"source": ["a", "b"]}),
    ):
        assert Plan.from_json(variant.to_json()) == variant


def test_the_file_is_plain_json_that_one_can_read(tmp_path: Path) -> None:
    plan = made(run={"dir": str(tmp_path / "deep" / "run")})
    folder = write_plan(plan)
    assert sorted(path.name for path in folder.path.iterdir()) == ["config.yaml", "plan.json", "schedule.csv"]
    assert read_plan(folder.plan) == plan
    assert load_config(folder.config) == plan.config
    stored = json.loads(folder.plan.read_text())
    assert stored["config"]["train"]["global_batch_size"] == 16
    assert stored["layout"] == {"pp": 2, "dp": 2, "tp": 1, "order": ["data", "pipe", "tensor"]}
    assert stored["batch"] == {"micro_batch_size": 2, "num_micro_batches": 4, "dp": 2}
    assert stored["layer_names"][:2] == ["embed", "position"]
    assert sum(stored["stage_parameters"]) == plan.num_parameters + 500 * 128, "tied layers lie on two stages"
    assert stored["schedule"]["ranks"][0].split() == [str(action) for action in plan.schedule.ranks[0]]
    assert read_csv(folder.schedule).ranks == plan.schedule.ranks


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PipekitError, match=r"run\.dir=.*file/run: cannot be written: a part of this path is a file"):
        write_plan(made(run={"dir": str(tmp_path / "file" / "run")}))


def test_what_json_cannot_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match="prepare returned something that JSON cannot hold"):
        replace(made(), prepared={"model": object()}).to_json()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": "pipekit-plan", "version": 0}', "{"])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="here: is not the plan of a run"):
        Plan.from_json(text, where="here")

"""Layouts under which a configuration is verified, and the settings of each."""

from __future__ import annotations

from typing import Any

import pytest

from pipekit.commands.verify_session import _choose, _comparable, _config_of, _own_layout
from pipekit.config import Config, parse_config
from pipekit.layout import Layout
from pipekit.models import build_layers
from pipekit.verify.layouts import LayoutCandidate

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_positions": 32}


def config_of(parallel: Any, **sections: dict[str, Any]) -> Config:
    train = {"steps": 2, "global_batch_size": 8, "sequence_length": 32, **sections.pop("train", {})}
    model = {**SIZES, **sections.pop("model", {})}
    return parse_config({"model": model, "train": train, "parallel": parallel, **sections})


def chosen(config: Config, num_devices: int, num_gpus: int | None = None) -> list[str]:
    own = _own_layout(config, num_gpus)
    return [f"{candidate}" for candidate in _choose(config, build_layers(config), own, num_devices, None)[0]]


def test_the_configurations_own_layout_comes_first() -> None:
    assert chosen(config_of({"pp": 2, "dp": 2}), 4)[:3] == ["pp=2 x dp=2", "pp=2", "dp=2"]
    assert chosen(config_of({"pp": 2}), 4)[0] == "pp=2"
    assert chosen(config_of({"pp": 2}), 4, num_gpus=4)[0] == "pp=2 x dp=2"
    assert chosen(config_of({"pp": 8}), 4)[0] == "pp=2"
    assert chosen(config_of("auto"), 4)[0] == "pp=2"
    assert chosen(config_of({}), 1) == ["pp=1"]


def test_sequences_must_divide_where_ranks_hold_parts_of_them() -> None:
    odd = {"sequence_length": 31}
    assert "tp=2" not in chosen(config_of({}, train=odd), 2)
    assert "tp=2" in chosen(config_of({"sequence_parallel": False}, train=odd), 2)


def test_the_own_layout_keeps_its_schedule_and_stages() -> None:
    config = config_of({"pp": 2, "schedule": "zb-v", "partition": "uniform"})
    own = _config_of(config, LayoutCandidate(Layout(pp=2), 1, is_configured=True))
    assert own.parallel.partition == "uniform"
    other = _config_of(config, LayoutCandidate(Layout(pp=2, dp=2), 0))
    assert (other.parallel.schedule, other.parallel.partition) == ("zb-v", "parameters")
    assert (other.parallel.pp, other.parallel.dp, other.parallel.zero) == (2, 2, 0)


@pytest.mark.parametrize(
    ("parallel", "layout"),
    [
        ({"pp": 2, "schedule": "zb-v"}, Layout(dp=2)),
        ({"pp": 2, "schedule": "auto", "max_in_flight": 4}, Layout(pp=4)),
        ({"pp": 2, "schedule": "interleaved-1f1b", "stages_per_rank": 3}, Layout(pp=8)),
        ({"pp": 2, "partition": "manual", "boundaries": [0, 4, 8]}, Layout(pp=4)),
        ("auto", Layout(pp=2)),
    ],
)
def test_others_take_1f1b_where_the_schedule_cannot_run(parallel: Any, layout: Layout) -> None:
    found = _config_of(config_of(parallel), LayoutCandidate(layout, 1))
    assert (found.parallel.schedule, found.parallel.auto) == ("1f1b", False)
    assert found.parallel.boundaries is None


def test_runs_are_made_comparable() -> None:
    config = config_of({}, model={"dropout": 0.1}, train={"precision": "bf16", "eval_interval": 1})
    with_tp, notes = _comparable(config, [LayoutCandidate(Layout(tp=2), 1)])
    assert (with_tp.train.precision, with_tp.train.eval_interval, with_tp.model.dropout) == ("fp32", None, 0.0)  # type: ignore
    assert len(notes) == 2
    without_tp, notes = _comparable(config, [LayoutCandidate(Layout(pp=2), 1)])
    assert without_tp.model.dropout == 0.1  # type: ignore[union-attr]
    assert len(notes) == 1
    config = config.updated({"train.layer_drop": {"theta": 0.5}})
    whole, notes = _comparable(config, [LayoutCandidate(Layout(pp=2), 1)])
    assert whole.train.layer_drop is None
    assert len(notes) == 2

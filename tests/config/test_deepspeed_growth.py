"""Curricula of DeepSpeed's that a run cannot have are refused, each with its key."""

from __future__ import annotations

from typing import Any

import pytest

from pipekit.config import parse_config
from pipekit.errors import ConfigError

LINEAR: dict[str, Any] = {
    "enabled": True,
    "min_difficulty": 32,
    "max_difficulty": 128,
    "schedule_type": "fixed_linear",
    "schedule_config": {"total_curriculum_step": 100, "difficulty_step": 8},
}


def efficiency(metrics: dict[str, Any], **others: Any) -> dict[str, Any]:
    learning = {"enabled": True, "curriculum_metrics": metrics}
    return {"enabled": True, "data_sampling": {"enabled": True, "curriculum_learning": learning}, **others}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"curriculum_learning": LINEAR | {"schedule_type": "custom"}},
            "curriculum_learning.schedule_type: must be fixed_linear, fixed_root, fixed_discrete",
        ),
        (
            {"curriculum_learning": LINEAR | {"curriculum_type": "vocab"}},
            "curriculum_learning.curriculum_type: must be seqlen",
        ),
        (
            {"curriculum_learning": LINEAR | {"schedule_config": {"total_curriculum_steps": 3}}},
            "schedule_config.total_curriculum_steps: unknown key",
        ),
        (
            {"curriculum_learning": LINEAR, "data_efficiency": efficiency({"seqlen": LINEAR})},
            "curriculum_metrics.seqlen: deepspeed.curriculum_learning gives a curriculum, too",
        ),
        (
            {"data_efficiency": efficiency({"vocabularyrarity": LINEAR})},
            "curriculum_metrics.vocabularyrarity: a curriculum is one of sequence lengths, whose metric is seqlen",
        ),
        (
            {"data_efficiency": efficiency({"seqlen": LINEAR | {"difficulty_type": "percentile"}})},
            "seqlen.difficulty_type: must be value",
        ),
        (
            {"data_efficiency": efficiency({}, data_routing={"enabled": True})},
            "data_efficiency.data_routing: random layer token drop is not available",
        ),
        (
            {
                "curriculum_learning": LINEAR
                | {
                    "schedule_type": "fixed_discrete",
                    "schedule_config": {"difficulty": [16, 128], "max_step": [3]},
                }
            },
            "curriculum_learning.min_difficulty: must be 16, as schedule_config.difficulty has it",
        ),
    ],
)
def test_what_a_run_cannot_have_is_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({"model": {"preset": "tiny"}, "train": {"steps": 3}, "deepspeed": section})


def test_what_is_switched_off_is_nothing() -> None:
    section = {
        "curriculum_learning": LINEAR | {"enabled": False},
        "data_efficiency": efficiency({"vocabularyrarity": LINEAR}) | {"enabled": False},
        "progressive_layer_drop": {"enabled": False},
    }
    config = parse_config({"model": {"preset": "tiny"}, "train": {"steps": 3}, "deepspeed": section})
    assert (config.train.curriculum, config.train.layer_drop, config.deepspeed) == (None, None, {})

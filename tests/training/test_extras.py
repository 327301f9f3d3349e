"""Extras that are not installed, named before a run is prepared."""

from __future__ import annotations

from typing import Any

import pytest

from pipekit.config import parse_config
from pipekit.errors import ConfigError
from pipekit.plan.resources import Resources
from pipekit.training import extras, prepare
from pipekit.training.prepare import prepare_run


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"logging": {"tensorboard": True}}, r"^logging.tensorboard: tensorboard is not .* 'pipekit\[tensorboard\]'"),
        ({"callbacks": {"loss_curve": True}}, r"^callbacks.loss_curve: matplotlib is not installed; .*\[plot\]"),
        (
            {"train": {"steps": 3, "eval_interval": 1}, "callbacks": {"lm_eval": {"tasks": ["arc_easy"]}}},
            r"^callbacks.lm_eval: lm_eval is not installed; run pip install 'pipekit\[eval\]', or leave",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_installed_is_said_before_the_data_are_prepared(
    monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], message: str
) -> None:
    def fail(*args: Any) -> Any:
        raise AssertionError("nothing is prepared")

    monkeypatch.setattr(prepare, "load_trial", fail)
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    config = parse_config({"model": {"preset": "tiny"}, "train": {"steps": 3}, **sections})
    with pytest.raises(ConfigError, match=message):
        prepare_run(config, Resources(), start=None)
    # What is installed, or not asked for, does not matter.
    monkeypatch.setattr(extras, "find_spec", lambda name: name)
    with pytest.raises(AssertionError, match="nothing is prepared"):
        prepare_run(config, Resources(), start=None)

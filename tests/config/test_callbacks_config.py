"""The callbacks section of a configuration: switches, settings, and one message for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipekit.config.callbacks_config import CallbacksConfig, EarlyStoppingConfig, LossCurveConfig
from pipekit.config.trial_config import load_trial_config, parse_trial_config
from pipekit.errors import ConfigError


def test_a_switch_takes_true_false_or_settings() -> None:
    callbacks = parse_trial_config(
        {"callbacks": {"early_stopping": {"patience": 5}, "loss_curve": True, "wandb": False, "memory": True}}
    ).callbacks
    assert callbacks.early_stopping == EarlyStoppingConfig(patience=5)
    assert callbacks.loss_curve == LossCurveConfig()
    assert callbacks.wandb is None
    assert callbacks.memory
    assert parse_trial_config({}).callbacks == CallbacksConfig()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            "early_stopping: {patience: 0}",
            "callbacks.early_stopping.patience=0: must be a whole number greater than 0; for example patience: 3",
        ),
        (
            "early_stopping: {patient: 3}",
            "callbacks.early_stopping.patient: unknown key; did you mean 'callbacks.early_stopping.patience'?",
        ),
        (
            "early_stopping: soon",
            "callbacks.early_stopping=soon: must be true, false, or a mapping of metric, best_is, patience, min_delta",
        ),
        ("early_stoping: true", "callbacks.early_stoping: unknown key; did you mean 'callbacks.early_stopping'?"),
        (
            "loss_curve: {file: loss.jpg}",
            "callbacks.loss_curve.file=loss.jpg: must be a name that ends in .svg or .png; for example loss.svg",
        ),
        ("text_samples: true", "callbacks.text_samples=true: must be a mapping, or null"),
        ("text_samples: {prompts: []}", "callbacks.text_samples.prompts=[]: must be a list"),
        ("memory: 1", "callbacks.memory=1: must be true or false"),
    ],
)
def test_a_mistake_is_told_with_its_line(tmp_path: Path, section: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"trial: a:B\ncallbacks:\n  {section}\n")
    with pytest.raises(ConfigError) as caught:
        load_trial_config(path)
    assert str(caught.value).startswith(f"{path}:3: {message}")

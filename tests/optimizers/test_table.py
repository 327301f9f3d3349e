"""Names of optimizers, and sections of DeepSpeed's JSON, against torch's and DeepSpeed's own names."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipekit.config.optimizer_config import OptimizerConfig, SchedulerConfig
from pipekit.config.optimizer_rules import optimizer_takes_its_settings, schedule_takes_its_settings
from pipekit.optimizers.learning_rates import scheduler_section
from pipekit.optimizers.table import NOT_THERE, OPTIMIZERS, optimizer_name, optimizer_section, set_rates


def test_every_optimizer_of_torch_has_a_name_or_a_refusal() -> None:
    classes = {
        name
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and name != "Optimizer"
    }
    assert len(classes) > 12
    for name in classes:
        assert optimizer_name(f"torch.optim.{name}") == optimizer_name(name) == name.lower()


def test_every_optimizer_of_deepspeed_has_a_name_or_a_reason() -> None:
    from deepspeed.runtime import config

    for name in config.DEEPSPEED_OPTIMIZERS:
        assert optimizer_name(name) is not None or name.lower() in NOT_THERE, name


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.8, 0.99], "weight_decay": 0.1}}, "adamw"),
        ({"type": "Adam", "params": {"lr": 1e-4, "torch_adam": True}}, "adamw"),
        ({"type": "Adam", "params": {"adam_w_mode": False}}, "adam"),
        ({"type": "FusedAdam", "params": {"eps": 1e-7}}, "adamw"),
        ({"type": "Lamb", "params": {"lr": 2e-3, "max_coeff": 10.0, "min_coeff": 0.01}}, "lamb"),
        ({"type": "Lion", "params": {"lr": 1e-4, "weight_decay": 0.2}}, "lion"),
        ({"type": "Adagrad", "params": {"lr": 1e-2, "eps": 1e-8}}, "adagrad"),
        ({"type": "Muon", "params": {"lr": 1e-2, "momentum": 0.9}}, "muon"),
        ({"type": "SGD", "params": {"momentum": 0.9, "nesterov": True}}, "sgd"),
    ],
)
def test_sections_of_deepspeed_become_sections_of_ours(section: dict[str, Any], expected: str) -> None:
    config = OptimizerConfig.model_validate(optimizer_section(section))
    assert config.type == expected
    assert list(optimizer_takes_its_settings(config)) == []
    params = section["params"]
    assert config.lr == params.get("lr", 1e-3)
    assert config.weight_decay == params.get("weight_decay", 0.0)
    if expected in ("adam", "adamw"):
        assert config.betas == tuple(params.get("betas", (0.9, 0.999)))
        assert config.args == {}


def test_a_scheduler_of_deepspeed_becomes_a_section_of_ours() -> None:
    section = {"type": "WarmupLR", "params": {"warmup_num_steps": 100, "warmup_max_lr": 3e-4}}
    config = SchedulerConfig.model_validate(scheduler_section(section))
    assert list(schedule_takes_its_settings(config)) == []
    assert (config.type, config.args["warmup_num_steps"]) == ("warmup_lr", 100)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_defaults_are_those_of_the_algorithm(name: str) -> None:
    config, kind = OptimizerConfig(type=name), OPTIMIZERS[name]
    for key in ("betas", "eps", "weight_decay", "momentum"):
        assert getattr(config, key) == kind.settings.get(key, 0.0 if key == "momentum" else None), key
    assert OptimizerConfig.model_validate(config.model_dump()) == config


def test_defaults_of_adamw_that_an_older_run_has_stored_are_forgotten() -> None:
    stored = {"type": "sgd", "lr": 0.1, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "momentum": 0.9}
    config = OptimizerConfig.model_validate(stored)
    assert (config.betas, config.eps, config.momentum) == (None, None, 0.9)
    assert list(optimizer_takes_its_settings(config)) == []


def test_rates_and_momenta_reach_each_group() -> None:
    groups: list[dict[str, Any]] = [{"lr": 1.0, "momentum": 0.5}, {"lr": 1.0, "lr_scale": 2.0}]
    set_rates(groups, 0.1)
    assert groups == [{"lr": 0.1, "momentum": 0.5}, {"lr": 0.2, "lr_scale": 2.0}]
    set_rates(groups, 0.1, momentum=0.7)
    assert groups[0]["momentum"] == 0.7
    assert "momentum" not in groups[1]

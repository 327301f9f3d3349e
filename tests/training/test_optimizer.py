"""Updates of parameters by the optimizer of a configuration."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipekit.config import OptimizerConfig
from pipekit.training.optimizer import build_optimizer


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
def test_only_matrices_decay(kind: str) -> None:
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = build_optimizer(OptimizerConfig(type=kind, lr=0.1, weight_decay=0.5), [matrix, vector])  # type: ignore[arg-type]
    for parameter in (matrix, vector):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert bool((matrix < 1).all())
    assert bool((vector == 1).all())


def test_adamw_is_that_of_torch() -> None:
    ours, theirs = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    config = OptimizerConfig(lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2)
    reference = torch.optim.AdamW([theirs], lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2, foreach=False)
    optimizer = build_optimizer(config, [ours])
    for step in range(5):
        ours.grad = theirs.grad = torch.full((3, 3), float(step) - 1.5)
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs)


def test_sgd_has_momentum() -> None:
    parameter = nn.Parameter(torch.zeros(2, 2))
    optimizer = build_optimizer(OptimizerConfig(type="sgd", lr=1.0, momentum=0.5, weight_decay=0.0), [parameter])
    for _ in range(2):
        parameter.grad = torch.ones(2, 2)
        optimizer.step()
    assert parameter[0, 0].item() == pytest.approx(-2.5)


@pytest.mark.parametrize(("kind", "expected"), [("adamw", "AdamW"), ("adam", "Adam"), ("sgd", "SGD")])
def test_each_name_is_the_optimizer_of_torch(kind: str, expected: str) -> None:
    config = OptimizerConfig(type=kind, lr=0.3)  # type: ignore[arg-type]
    assert type(build_optimizer(config, [nn.Parameter(torch.ones(2, 2))])).__name__ == expected


def test_parameters_are_grouped_by_whether_they_decay() -> None:
    layers = nn.ModuleList([nn.Linear(3, 4), nn.LayerNorm(4), nn.Conv1d(4, 4, 2)])
    optimizer = build_optimizer(OptimizerConfig(weight_decay=0.3), list(layers.parameters()))
    decay = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    expected = {
        f"{i}.{kind}": 0.3 if kind == "weight" and i != 1 else 0.0 for i in range(3) for kind in ("weight", "bias")
    }
    assert {name: decay[id(parameter)] for name, parameter in layers.named_parameters()} == expected


def test_a_stage_with_norms_alone_has_one_group() -> None:
    optimizer = build_optimizer(OptimizerConfig(), list(nn.LayerNorm(3).parameters()))
    assert [len(group["params"]) for group in optimizer.param_groups] == [2]

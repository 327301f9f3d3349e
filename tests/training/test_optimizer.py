"""Updates of parameters by the optimizer of a configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipekit.config import OptimizerConfig
from pipekit.errors import ConfigError
from pipekit.optimizers.table import OPTIMIZERS
from pipekit.training.optimizer import (
    build_optimizer,
    check_optimizer,
    load_optimizer,
    name_parameters,
    updates_elements,
)


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
def test_only_matrices_decay(kind: str) -> None:
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = build_optimizer(OptimizerConfig(type=kind, lr=0.1, weight_decay=0.5), [matrix, vector])  # type: ignore[arg-type]
    for parameter in (matrix, vector):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert bool((matrix < 1).all())
    assert bool((vector == 1).all())


def test_sgd_has_momentum() -> None:
    parameter = nn.Parameter(torch.zeros(2, 2))
    optimizer = build_optimizer(OptimizerConfig(type="sgd", lr=1.0, momentum=0.5, weight_decay=0.0), [parameter])
    for _ in range(2):
        parameter.grad = torch.ones(2, 2)
        optimizer.step()
    assert parameter[0, 0].item() == pytest.approx(-2.5)


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


LR, UPDATES = 0.01, 20

OURS: dict[str, dict[str, Any]] = {
    "adamw": {"betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.2},
    "adam": {"betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.2},
    "adamw-amsgrad": {"args": {"amsgrad": True}},
    "sgd": {"momentum": 0.9, "args": {"nesterov": True}},
    "adadelta": {"eps": 1e-5, "args": {"rho": 0.8}},
    "adagrad": {"weight_decay": 0.1, "args": {"lr_decay": 0.1, "initial_accumulator_value": 0.2}},
    "adamax": {},
    "asgd": {"args": {"t0": 5.0}},
    "nadam": {},
    "radam": {},
    "rmsprop": {"momentum": 0.8, "args": {"centered": True}},
    "rprop": {},
    "muon": {"momentum": 0.9},
    "lion": {"weight_decay": 0.3},
    "lamb": {"weight_decay": 0.3},
}
"""Settings under which each optimizer that can be used is compared."""


def gradients(shape: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    return [torch.randn(tuple(shape), generator=generator) for _ in range(UPDATES)]


def matrix_and_vector() -> list[nn.Parameter]:
    return [nn.Parameter(torch.linspace(-1, 2, 24).view(6, 4)), nn.Parameter(torch.linspace(0.5, 2, 5))]


def updated(build: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> list[Tensor]:
    """A matrix and a vector after some updates."""
    parameters = matrix_and_vector()
    optimizer = build(parameters)
    for step in range(UPDATES):
        for parameter in parameters:
            parameter.grad = gradients(parameter.shape)[step]
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def by_torch(kind: str, settings: dict[str, Any]) -> list[Tensor]:
    """The same by torch's own class, in the loop form of its updates."""
    given = {key: value for key, value in settings.items() if key != "args"} | settings.get("args", {})
    taken = {key: getattr(OptimizerConfig(type=kind), key) for key in OPTIMIZERS[kind].settings}
    given = {**taken, **given}
    name = next(name for name in vars(torch.optim) if name.lower() == kind)

    def build(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        decay = {"weight_decay": 0.0} if "weight_decay" in given else {}
        groups = [{"params": [parameters[0]]}, {"params": [parameters[1]], **decay}]
        optimizer: torch.optim.Optimizer = getattr(torch.optim, name)(groups, lr=LR, foreach=False, **given)
        return optimizer

    return updated(build)


def muon_of_torch(settings: dict[str, Any]) -> list[Tensor]:
    muon = lambda parameters: torch.optim.Muon([parameters[0]], lr=LR, weight_decay=0.1, **settings)  # noqa: E731
    adamw = lambda parameters: torch.optim.AdamW(  # noqa: E731
        [parameters[1]], lr=LR, betas=(0.9, 0.95), weight_decay=0.0, foreach=False
    )
    return [updated(muon)[0], updated(adamw)[1]]


def lion_of_the_paper(weights: np.ndarray, gradients: list[np.ndarray], decay: float) -> np.ndarray:
    average, beta1, beta2 = np.zeros_like(weights), 0.9, 0.99
    for gradient in gradients:
        update = np.sign(beta1 * average + (1 - beta1) * gradient)
        weights = weights - LR * (update + decay * weights)
        average = beta2 * average + (1 - beta2) * gradient
    return weights


def lamb_of_the_paper(weights: np.ndarray, gradients: list[np.ndarray], decay: float) -> np.ndarray:
    first, second, beta1, beta2 = np.zeros_like(weights), np.zeros_like(weights), 0.9, 0.999
    for step, gradient in enumerate(gradients, start=1):
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        ratio = (first / (1 - beta1**step)) / (np.sqrt(second / (1 - beta2**step)) + 1e-6)
        update = ratio + decay * weights
        weights = weights - LR * np.linalg.norm(weights) / np.linalg.norm(update) * update
    return weights


def by_the_paper(kind: str, settings: dict[str, Any]) -> list[Tensor]:
    formula = {"lion": lion_of_the_paper, "lamb": lamb_of_the_paper}[kind]
    found = []
    for parameter in matrix_and_vector():
        steps = [gradient.double().numpy() for gradient in gradients(parameter.shape)]
        decay = settings["weight_decay"] if parameter.ndim > 1 else 0.0
        found.append(torch.from_numpy(formula(parameter.detach().double().numpy(), steps, decay)).float())
    return found


@pytest.mark.parametrize("case", OURS)
def test_each_makes_the_updates_of_torch_or_of_its_paper(case: str) -> None:
    kind, settings = case.partition("-")[0], OURS[case]
    config = OptimizerConfig(type=kind, lr=LR, **settings)
    expected = (
        muon_of_torch(settings)
        if kind == "muon"
        else by_the_paper(kind, settings)
        if kind in ("lion", "lamb")
        else by_torch(kind, settings)
    )
    for ours, theirs in zip(updated(lambda each: build_optimizer(config, each)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_every_optimizer_that_can_be_used_is_compared() -> None:
    assert {case.partition("-")[0] for case in OURS} == {name for name in OPTIMIZERS if not OPTIMIZERS[name].refusal}


@pytest.mark.parametrize("case", OURS)
def test_the_table_knows_the_states_and_what_parts_of_tensors_allow(case: str) -> None:
    kind = OPTIMIZERS[case.partition("-")[0]]
    config = OptimizerConfig(type=case.partition("-")[0], lr=LR, **OURS[case])
    parameters = matrix_and_vector()
    optimizer = build_optimizer(config, parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    settings = {"momentum": config.momentum, **config.args}
    further = {state for setting, state in kind.setting_states.items() if settings.get(setting)}
    for parameter, states in zip(parameters, (kind.states, kind.vector_states or kind.states), strict=True):
        found = {key: value for key, value in optimizer.state[parameter].items() if isinstance(value, Tensor)}
        assert {key for key in found if found[key].shape == parameter.shape} == {*states, *further}
        if case != "sgd" or found:
            assert {key for key in found if found[key].ndim == 0} == set(kind.tensor_states)
    assert kind.count_states(settings) == len(kind.states) + len(further)
    assert updates_elements(load_optimizer(config)) is not kind.sums_over_tensors


def test_groups_match_by_name_and_scale_the_rate() -> None:
    layers = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 2)})
    groups = [{"match": "embed.*", "lr_scale": 0.1}, {"match": ["*.bias"], "weight_decay": 0.5, "betas": [0.5, 0.6]}]
    config = OptimizerConfig.model_validate({"lr": 0.2, "groups": groups})
    named = dict(layers.named_parameters())
    optimizer = build_optimizer(config, name_parameters(named.items()))
    found = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    picked = {name: found[id(parameter)] for name, parameter in named.items()}
    assert [picked[name].get("lr_scale", 1.0) for name in ("embed.weight", "head.weight")] == [0.1, 1.0]
    assert [picked[name]["weight_decay"] for name in ("embed.weight", "head.weight", "head.bias")] == [0.1, 0.1, 0.5]
    assert picked["head.bias"]["betas"] == (0.5, 0.6)


def test_muon_leaves_matrices_to_adamw_where_a_group_says_so() -> None:
    layers = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 2)})
    config = OptimizerConfig.model_validate(
        {"type": "muon", "groups": [{"match": "embed.*", "algorithm": "adamw", "lr_scale": 0.5}]}
    )
    optimizer = build_optimizer(config, name_parameters(layers.named_parameters()))
    by_shape = {tuple(each.shape): group["algorithm"] for group in optimizer.param_groups for each in group["params"]}
    assert by_shape == {(5, 3): "adamw", (2, 3): "muon", (2,): "adamw"}


class NormedStep(torch.optim.SGD):
    """One of a user's, whose update needs whole tensors."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad /= parameter.grad.norm()
        return super().step(closure)


def test_a_users_class_is_tried_before_it_gets_parts_of_tensors() -> None:
    own = OptimizerConfig(type=f"{__name__}.NormedStep", lr=LR, args={"nesterov": False})
    check_optimizer(own, ["head.weight"], is_sharded=False)
    with pytest.raises(ConfigError, match=r"depends on other weights of the same tensor.*try parallel.zero=0"):
        check_optimizer(own, ["head.weight"], is_sharded=True)
    check_optimizer(OptimizerConfig(type="torch.optim.sgd:SGD"), ["head.weight"], is_sharded=True)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"args": {"amsgrd": True}}, "optimizer.args: amsgrd: AdamW of optimizer.type=adamw .* did you mean amsgrad"),
        (
            {"groups": [{"match": "embde.*"}]},
            r"groups.0.match: 'embde.\*' matches none .* try 'embed.\*'",
        ),
        ({"type": "torch.optim.lr_scheduler:StepLR"}, "must be a subclass of torch.optim.Optimizer"),
        ({"type": "no_such_package.Own"}, "no module named 'no_such_package'"),
        ({"type": "sgd", "args": {"nesterov": True}}, "optimizer.type=sgd does not take its settings: Nesterov"),
    ],
)
def test_mistakes_are_told_before_anything_starts(section: dict[str, Any], message: str) -> None:
    config = OptimizerConfig.model_validate(section)
    names = ["embed.weight", "head.weight"]
    with pytest.raises(ConfigError, match=message):
        check_optimizer(config, names, is_sharded=False)

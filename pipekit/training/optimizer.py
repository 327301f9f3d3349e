"""The torch optimizer that a configuration names, and its parameter groups."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from pipekit.config.optimizer_config import OptimizerConfig, OptimizerGroup
from pipekit.errors import ConfigError
from pipekit.models.custom import load_object
from pipekit.optimizers.table import OPTIMIZERS, SECTION_KEYS
from pipekit.settings.suggest import closest

# DeepSpeed's compute the same from the same states.
_ADAMS = {"adam", "adamw", "fusedadam", "deepspeedcpuadam"}


def takes_states_of(kind: str, config: OptimizerConfig) -> bool:
    """True if the configuration's optimizer can continue from the states of an optimizer of the class `kind`.

    Example:
        >>> takes_states_of("fusedadam", OptimizerConfig(type="adamw"))
        True
        >>> takes_states_of("sgd", OptimizerConfig(type="adamw"))
        False
    """
    return kind == config.type or {kind, config.type} <= _ADAMS


def name_parameters(named: Iterable[tuple[str, nn.Parameter]]) -> list[nn.Parameter]:
    """Return parameters with their logical names, by which groups of the optimizer match them."""
    parameters = []
    for name, parameter in named:
        parameter.logical_name = name  # type: ignore[attr-defined]
        parameters.append(parameter)
    return parameters


def build_optimizer(config: OptimizerConfig, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Build the optimizer, with weight decay on matrices and none on biases and norms.

    Args:
        config: the `optimizer` section.
        parameters: the parameters; from `name_parameters` if the section has groups.

    Raises:
        ConfigError: if the class cannot be imported, or does not take the arguments.
    """
    build = load_optimizer(config)
    groups: dict[Any, dict[str, Any]] = {}
    for parameter in parameters:
        index = find_group(config.groups, getattr(parameter, "logical_name", ""))
        settings = {} if index is None else config.groups[index].settings
        decays = parameter.ndim >= 2
        if not decays and config.weight_decay is not None:
            settings = {"weight_decay": 0.0, **settings}
        # Of Muon, what is no matrix cannot be in a group of matrices.
        key = (not decays, -1 if index is None else index, parameter.ndim == 2)
        groups.setdefault(key, {"params": [], **settings})["params"].append(parameter)
    if config.type != "muon":
        groups = _joined(groups)
    return build([groups[key] for key in sorted(groups)])


def _joined(groups: dict[Any, dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    """Groups without the distinction of matrices from tensors of more dimensions."""
    joined: dict[Any, dict[str, Any]] = {}
    for (*key, _), group in groups.items():
        joined.setdefault(tuple(key), {**group, "params": []})["params"] += group["params"]
    return joined


def load_optimizer(config: OptimizerConfig) -> Callable[[Any], torch.optim.Optimizer]:
    """Return a function that builds the configuration's optimizer for parameters or groups of parameters.

    Raises:
        ConfigError: if the class cannot be imported, or does not take the arguments.
    """
    kind = OPTIMIZERS.get(config.type)
    if kind is None:
        cls = load_object(config.type, key="optimizer.type")
        if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
            raise ConfigError(f"optimizer.type={config.type}: must be a subclass of torch.optim.Optimizer")
        taken: Iterable[str] = [key for key in SECTION_KEYS if getattr(config, key)]
    else:
        module, _, name = kind.path.partition(":")
        cls, taken = getattr(importlib.import_module(module), name), kind.settings
    arguments = {"lr": config.lr, **{key: getattr(config, key) for key in taken}}
    _check_arguments(cls, [*arguments, *config.args], config)
    arguments = {**({} if kind is None else kind.options), **arguments, **config.args}
    if arguments.get("foreach") or arguments.get("differentiable"):
        arguments.pop("fused", None)

    def build(parameters: Any) -> torch.optim.Optimizer:
        try:
            optimizer: torch.optim.Optimizer = cls(parameters, **arguments)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"optimizer.type={config.type} does not take its settings: {error}") from error
        return optimizer

    return build


def _check_arguments(cls: type, names: Iterable[str], config: OptimizerConfig) -> None:
    parameters = inspect.signature(cls).parameters
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        return
    known = [name for name in parameters if name not in ("params", "lr", *SECTION_KEYS)]
    for name in names:
        if name not in parameters:
            match = closest(name, known)
            remedy = f"did you mean {match}?" if match else f"its further arguments are {', '.join(known) or 'none'}"
            key = f"optimizer.{name}" if name in ("lr", *SECTION_KEYS) else f"optimizer.args: {name}"
            raise ConfigError(f"{key}: {cls.__name__} of optimizer.type={config.type} does not take it; {remedy}")


def find_group(groups: Sequence[OptimizerGroup], name: str) -> int | None:
    """Index of the first group that matches a parameter; None if none does.

    Example:
        >>> find_group([OptimizerGroup(match="*.bias"), OptimizerGroup(match=["embed*"])], "embed.weight")
        1
    """
    for index, group in enumerate(groups):
        if any(fnmatchcase(name, pattern) for pattern in group.patterns):
            return index
    return None


def check_optimizer(config: OptimizerConfig, names: Sequence[str], *, is_sharded: bool) -> None:
    """Check the optimizer of a run before anything starts.

    Args:
        config: the `optimizer` section.
        names: logical names of all parameters that are trained.
        is_sharded: whether ranks hold shards of the parameters, or of their fp32 masters.

    Raises:
        ConfigError: if its class cannot be used, or a pattern of its groups matches nothing.
    """
    build = load_optimizer(config)
    build([nn.Parameter(torch.zeros(2, 2))])
    for index, group in enumerate(config.groups):
        for pattern in group.patterns:
            if not group.frozen and not any(fnmatchcase(name, pattern) for name in names):
                layers = {f"{name.rpartition('.')[0]}.*" for name in names}
                close = difflib.get_close_matches(pattern, [*names, *sorted(layers)], n=1)
                remedy = f"try {close[0]!r}" if close else f"names are such as {', '.join(map(repr, names[:3]))}"
                raise ConfigError(
                    f"optimizer.groups.{index}.match: {pattern!r} matches none of the {len(names)} parameters that are "
                    f"trained; {remedy}"
                )
    if is_sharded and config.type not in OPTIMIZERS and not updates_elements(build):
        raise ConfigError(
            f"optimizer.type={config.type}: its update of a weight depends on other weights of the same tensor, and "
            "ranks hold parts of tensors here; try parallel.zero=0, parallel.tp=1 and train.precision=fp32, or "
            "optimizer.type=lamb or muon, which work over parts"
        )


def updates_elements(build: Callable[[Any], torch.optim.Optimizer]) -> bool:
    """True if an optimizer updates each weight from its own gradients only; a test on a small matrix shows this.

    Example:
        >>> updates_elements(lambda parameters: torch.optim.AdamW(parameters, lr=0.1))
        True
        >>> updates_elements(lambda parameters: torch.optim.Adafactor(parameters, lr=0.1))
        False
    """
    start, *gradients = torch.randn(4, 6, 4, generator=torch.Generator().manual_seed(0)).unbind()
    found = []
    for is_whole in (True, False):
        parameters = [nn.Parameter(part) for part in _cut(start, is_whole)]
        try:
            optimizer = build(parameters)
            for gradient in gradients:
                for parameter, part in zip(parameters, _cut(gradient, is_whole), strict=True):
                    parameter.grad = part
                optimizer.step()
        except (RuntimeError, ValueError, IndexError, ConfigError):
            return False  # one that takes matrices alone
        found.append(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    return torch.allclose(found[0], found[1], rtol=1e-5, atol=1e-6)


def _cut(tensor: Tensor, is_whole: bool) -> list[Tensor]:
    """A copy of a tensor, whole or in pieces."""
    flat = tensor.flatten()
    parts = [tensor] if is_whole else [flat[start : start + 7] for start in range(0, len(flat), 7)]
    return [part.clone() for part in parts]

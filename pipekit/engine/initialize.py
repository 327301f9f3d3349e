"""`initialize`: the counterpart of `deepspeed.initialize` for pipekit's pipeline module."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from pipekit.config.deepspeed_keys import unknown_deepspeed_keys
from pipekit.data.batch_loader import MapDataset
from pipekit.deepspeed.deepspeed_config import complete_deepspeed_config
from pipekit.deepspeed.overwrite import read_deepspeed_json
from pipekit.engine.build import build_engine
from pipekit.engine.module import PipelineModule
from pipekit.errors import ConfigError
from pipekit.schedules import Schedule


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | Callable[..., torch.optim.Optimizer] | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: MapDataset | None = None,
    lr_scheduler: Any = None,
    *,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: str | Mapping[str, Any] | None = None,
    config_params: str | Mapping[str, Any] | None = None,
    profile: bool = False,
    **others: Any,
) -> tuple[Any, Any, Any, Any]:
    """Return an engine for a `pipekit.PipelineModule`, as `deepspeed.initialize` does for DeepSpeed's.

    Any other model is passed on to DeepSpeed.

    Args:
        args: has `deepspeed_config`, the path of a configuration, where `config` is not given.
        model: the module.
        optimizer: a torch optimizer, or a function of the parameters that returns one; DeepSpeed's configuration names
            one otherwise.
        model_parameters: what to train; all parameters of the module that need a gradient, unless given.
        training_data: a map-style dataset of pairs of inputs and labels; shuffled anew in every epoch, with an order
            that follows from the module's seed, and a position that checkpoints hold.
        lr_scheduler: steps after every update.
        mpu: for other models; a pipeline module has its own.
        dist_init_required: for other models; a pipeline module has joined the processes.
        collate_fn: makes a micro-batch of a list of samples.
        config: DeepSpeed's configuration, or the path of its JSON file.
        config_params: another name of `config`.
        profile: whether to time every action; see `PipelineEngine.gather_timeline`.
        **others: for other models.

    Returns:
        The engine, its optimizer, the loader of `training_data`, and the learning-rate scheduler, each None if there is
        none.

    Raises:
        ConfigError: if the configuration cannot be read, has a key that DeepSpeed does not know, or cannot run.
    """
    if config is None:
        config = config_params if config_params is not None else getattr(args, "deepspeed_config", None)
    if not isinstance(model, PipelineModule):
        import deepspeed

        result: tuple[Any, Any, Any, Any] = deepspeed.initialize(
            args, model, optimizer, model_parameters, training_data, lr_scheduler,
            mpu=mpu, dist_init_required=dist_init_required, collate_fn=collate_fn, config=config, **others,
        )  # fmt: skip
        return result
    settings = _read_config(config)
    if optimizer is None and "optimizer" not in settings:
        raise ConfigError(
            'no optimizer: give optimizer=torch.optim.AdamW(model.parameters()), or "optimizer": {"type": "AdamW", '
            '"params": {"lr": 1e-4}} in the configuration'
        )
    interval = settings.get("pipeline", {}).pop("activation_checkpoint_interval", 0)
    model.activation_checkpointing = interval or model.activation_checkpointing
    zero = settings.get("zero_optimization", {}).get("stage", 0)
    if zero >= 2:
        _check_zero_stage(model, zero)
    if model_parameters is None:
        model_parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine = build_engine(
        model,
        deepspeed_config=complete_deepspeed_config(settings),
        measure_costs=model.schedule == "auto",
        profile=profile,
        optimizer=optimizer,
        model_parameters=list(model_parameters),
        lr_scheduler=lr_scheduler,
    )
    # A schedule that cannot run is refused here, not in the first step.
    _ = engine.schedule
    if training_data is not None:
        engine.set_training_data(training_data, collate_fn)
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def _check_zero_stage(model: PipelineModule, zero: int) -> None:
    """Raise a ConfigError where a module cannot run under ZeRO-2 or 3."""
    num_stages = model.mpu().num_stages
    if num_stages > 1:
        raise ConfigError(
            f"zero_optimization.stage={zero} does not go with the {num_stages} stages of this PipelineModule: it "
            "shards gradients after every micro-batch, and a pipeline adds them up over all of them; try stage 1, or "
            "num_stages=1"
        )
    if model.schedule != "1f1b":
        name = model.schedule.name if isinstance(model.schedule, Schedule) else model.schedule
        raise ConfigError(
            f"schedule={name} does not go with zero_optimization.stage={zero}, which takes each micro-batch forward "
            "and back at once; try schedule='1f1b', or stage 1"
        )


def _read_config(config: str | Mapping[str, Any] | None) -> dict[str, Any]:
    if config is None:
        raise ConfigError("no configuration: give config=, a dict or the path of a JSON file")
    where = "config"
    if not isinstance(config, Mapping):
        where, config = str(config), read_deepspeed_json(config)
    settings = json.loads(json.dumps(config))
    faults = list(unknown_deepspeed_keys(settings))
    if faults:
        raise ConfigError("\n  ".join(f"{where}: {fault}" for fault in faults))
    result: dict[str, Any] = settings
    return result

"""`initialize`: the counterpart of `deepspeed.initialize`, for pipeline modules and plain modules."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe.module import PipelineModule as DeepSpeedPipelineModule
from torch import nn

from pipekit.checkpoint.model_config import read_model_config, shapes_of_layers
from pipekit.config import Config, ModelConfigSource
from pipekit.config.deepspeed_json import check_deepspeed, read_deepspeed_json
from pipekit.config.deepspeed_keys import Caller
from pipekit.config.deepspeed_section import CHECKPOINTING_KEYS, fill_auto, one_bf16
from pipekit.deepspeed.deepspeed_config import complete_deepspeed_config
from pipekit.deepspeed.optimizer_view import whole_shape
from pipekit.deepspeed.patches import use_joined_processes
from pipekit.distributed.mpu import ModelParallelUnit
from pipekit.distributed.processes import raise_together
from pipekit.engine.build import build_engine
from pipekit.engine.logical_model import persistent_buffers
from pipekit.engine.module import PipelineModule
from pipekit.engine.plain_engine import PlainEngine
from pipekit.engine.plain_module_check import (
    GIVE_OPTIMIZER,
    check_evaluation,
    check_mpu_of_replicas,
    check_plain_module,
    check_same_on_all_ranks,
)
from pipekit.errors import ConfigError, PipekitError
from pipekit.layout import Layout
from pipekit.schedules import Schedule
from pipekit.settings.base import config_error


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | Callable[..., torch.optim.Optimizer] | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    *,
    distributed_port: int | None = None,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    mesh_param: Any = None,
    config: str | Mapping[str, Any] | None = None,
    config_params: str | Mapping[str, Any] | None = None,
    model_config: ModelConfigSource | None = None,
    profile: bool = False,
) -> tuple[Any, Any, Any, Any]:
    """Build an engine for a `pipekit.PipelineModule` or any `nn.Module`, as `deepspeed.initialize` does.

    All ranks call this together, with the same arguments.

    Args:
        args: object with an attribute `deepspeed_config`, the path of a configuration, in place of `config`.
        model: the module.
        optimizer: a torch optimizer, or a function of the parameters that returns one; otherwise DeepSpeed's
            configuration names one. A plain module without an optimizer can only be evaluated.
        model_parameters: parameters to train; by default all parameters of the module that require a gradient.
        training_data: a dataset, read in DeepSpeed's order. For a pipeline module it is map-style with pairs of inputs
            and labels, and is read in order, again and again; checkpoints hold the position. For a plain module,
            DeepSpeed's loader reads and shuffles it.
        lr_scheduler: a scheduler of the given optimizer, or a function of the optimizer that returns one; it steps
            after every update. Otherwise DeepSpeed's configuration may name one.
        distributed_port: the port of rank 0, to use if the processes have not joined yet.
        mpu: a `ModelParallelUnit`, the process groups of a plain module; several engines may share it. A pipeline
            module has its own.
        dist_init_required: False raises an error if the processes have not joined yet; otherwise they join now.
        collate_fn: makes a micro-batch from a list of samples.
        mesh_param: not supported: a pipeline module has a topology, and the ranks of a plain module are replicas.
        config: DeepSpeed's configuration, or the path of its JSON file.
        config_params: another name for `config`.
        model_config: a description of the model for checkpoints to hold: the settings of a family such as
            `GPT2Config(...)`, or a YAML file's path or content with a `model` section and optionally `data.tokenizer`.
        profile: whether to time every action of a pipeline module; see `PipelineEngine.gather_timeline`.

    Returns:
        The engine, its optimizer, the loader of `training_data`, and the learning-rate scheduler, each None if there is
        none.

    Raises:
        ConfigError: on every rank, if the configuration cannot be read, is given twice, has a key that DeepSpeed does
            not know, or cannot run; or if `model_config` describes another model.
    """
    if dist_init_required is False and not dist.is_initialized():
        raise ConfigError(
            "dist_init_required=False, and the processes have not been joined; leave it out, or call "
            "deepspeed.init_distributed() before"
        )
    use_joined_processes(distributed_port)
    parameters: list[Any] = []
    described: Config | None = None
    error = None
    try:
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model is {type(model).__name__}; give model=, a pipekit.PipelineModule or an nn.Module")
        if isinstance(model, DeepSpeedPipelineModule) and not isinstance(model, PipelineModule):
            raise ConfigError(
                f"model is {type(model).__name__}, a pipeline module of DeepSpeed's; import PipelineModule from "
                "pipekit, which takes the same arguments"
            )
        _check_arguments(model, mpu=mpu, mesh_param=mesh_param, profile=profile)
        caller: Caller = "pipeline" if isinstance(model, PipelineModule) else "module"
        settings = _read_config(_only_config(args, config, config_params), caller)
        has_optimizer = optimizer is not None or "optimizer" in settings
        if not has_optimizer and isinstance(model, PipelineModule):
            raise ConfigError(f"no optimizer: {GIVE_OPTIMIZER}")
        if model_parameters is None:
            model_parameters = (parameter for parameter in model.parameters() if parameter.requires_grad)
        parameters = list(model_parameters)
        if isinstance(model, PipelineModule):
            _check_zero_stage(model, settings.get("zero_optimization", {}).get("stage", 0))
            _check_layout(model, settings)
        else:
            if not has_optimizer:
                check_evaluation(settings)
            check_plain_module(model, parameters, optimizer)
            check_mpu_of_replicas(mpu)
        if model_config is not None:
            described = _describe_model(model, model_config)
    except PipekitError as failure:
        error = failure
    raise_together(error)
    given = {"optimizer": optimizer, "model_parameters": parameters, "lr_scheduler": lr_scheduler}
    given["collate_fn"] = collate_fn
    engine: Any
    if not isinstance(model, PipelineModule):
        assert model is not None
        check_same_on_all_ranks(model, settings)
        unit = mpu if isinstance(mpu, ModelParallelUnit) else ModelParallelUnit(Layout(dp=dist.get_world_size()))
        engine = PlainEngine(
            model,
            unit,
            deepspeed_config=complete_deepspeed_config(settings) if has_optimizer else settings,
            training_data=training_data,
            **given,
        )
    else:
        interval = settings.pop("pipeline", {}).get("activation_checkpoint_interval", 0)
        settings.pop("tensor_parallel", None)
        model.activation_checkpointing = interval or model.activation_checkpointing
        model.keep_inputs(**_kept_inputs(settings.pop("activation_checkpointing", {})))
        engine = build_engine(
            model,
            deepspeed_config=complete_deepspeed_config(settings),
            measure_costs=model.schedule == "auto",
            profile=profile,
            **given,
        )
        # A schedule that cannot run is refused here, not in the first step.
        _ = engine.schedule
        if training_data is not None:
            engine.set_training_data(training_data, collate_fn)
    engine.model_config = described
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def _only_config(
    args: Any, config: str | Mapping[str, Any] | None, config_params: str | Mapping[str, Any] | None
) -> str | Mapping[str, Any] | None:
    """Return the configuration from the one argument of three that gives it."""
    ways = {
        "config=": config,
        "config_params=": config_params,
        "args.deepspeed_config": getattr(args, "deepspeed_config", None),
    }
    given = {way: value for way, value in ways.items() if value is not None}
    if len(given) > 1:
        raise ConfigError(f"the configuration is given twice, by {' and '.join(given)}; leave one of them out")
    return next(iter(given.values()), None)


def _check_arguments(model: nn.Module, *, mpu: Any, mesh_param: Any, profile: bool) -> None:
    """Raise a ConfigError for an argument that would have no effect."""
    if mesh_param is not None:
        raise ConfigError("mesh_param: has no effect here; give PipelineModule(topology=...), or leave it out")
    if not isinstance(model, PipelineModule):
        if profile:
            raise ConfigError("profile=True times the actions of a PipelineModule; leave it out")
    elif mpu is not None and mpu is not model.mpu():
        raise ConfigError("mpu: a PipelineModule has its own; give PipelineModule(mpu=...), or leave it out")


def _describe_model(model: nn.Module, given: ModelConfigSource) -> Config:
    """Return the configuration of a model, after comparing it with the model's tensors."""
    if isinstance(model, PipelineModule):
        return read_model_config(given, shapes_of_layers(model.layer_specs), of="the PipelineModule")
    tensors = {**dict(model.named_parameters()), **dict(persistent_buffers(model))}
    shapes = {name: tuple(whole_shape(tensor)) for name, tensor in tensors.items()}
    return read_model_config(given, shapes, of=f"the {type(model).__name__}")


def _check_zero_stage(model: PipelineModule, zero: int) -> None:
    """Raise a ConfigError if a module cannot run under ZeRO-2 or ZeRO-3."""
    if zero < 2:
        return
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


def _check_layout(model: PipelineModule, settings: Mapping[str, Any]) -> None:
    """Raise a ConfigError if a module and the configuration disagree on a setting that both may have."""
    layout = model.mpu().layout
    pipeline = settings.get("pipeline", {})
    stages, interval = pipeline.get("stages"), pipeline.get("activation_checkpoint_interval")
    tp = settings.get("tensor_parallel", {}).get("autotp_size")
    for key, asked, what, own in (
        ("pipeline.stages", stages, "PipelineModule(num_stages)", layout.pp),
        ("tensor_parallel.autotp_size", tp or None, "the model axis of its topology", layout.tp),
        (
            "pipeline.activation_checkpoint_interval",
            interval,
            "PipelineModule(activation_checkpoint_interval)",
            model.activation_checkpointing or interval,
        ),
    ):
        if asked is not None and asked != own:
            raise ConfigError(f"{key}={asked} and {what}={own} do not agree; remove one of them, or make them equal")
    kept = _kept_inputs(settings.get("activation_checkpointing", {}))
    if any(kept.values()) and not (model.activation_checkpointing or interval):
        key = next(theirs for theirs, ours in CHECKPOINTING_KEYS.items() if kept[ours])
        raise ConfigError(
            f"activation_checkpointing.{key}=true is about the inputs of layers that are recomputed, and none is; give "
            "pipeline.activation_checkpoint_interval, or remove it"
        )


def _kept_inputs(section: Mapping[str, Any]) -> dict[str, bool]:
    """Arguments of `PipelineModule.keep_inputs` from DeepSpeed's section `activation_checkpointing`."""
    return {ours: bool(section.get(theirs)) for theirs, ours in CHECKPOINTING_KEYS.items()}


def _read_config(config: str | Mapping[str, Any] | None, caller: Caller) -> dict[str, Any]:
    """Return DeepSpeed's configuration, checked, with pipekit's values in place of `auto`."""
    if config is None:
        raise ConfigError("no configuration: give config=, a dict or the path of a JSON file")
    where = "config"
    if not isinstance(config, Mapping):
        where, config = str(config), read_deepspeed_json(config)
    settings, faults = one_bf16(json.loads(json.dumps(config)), "")
    faults += check_deepspeed(settings, caller)
    if faults:
        raise config_error(f"{where}: {fault.message}" for fault in faults)
    return fill_auto(settings, precision="bf16" if get_accelerator().device_name() == "cuda" else "fp32")

"""pipekit: GPT-style models as lists of layer specs, trained across pipeline, tensor and ZeRO data parallelism.

The names below are imported when they are first used, so that `import pipekit` is quick and needs neither torch nor
deepspeed.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipekit.commands.train import train
    from pipekit.config import Config, load_config, parse_config
    from pipekit.costs.example import Example
    from pipekit.distributed.mpu import ModelParallelUnit
    from pipekit.engine.engine import PipelineEngine
    from pipekit.engine.initialize import initialize
    from pipekit.engine.module import PipelineModule
    from pipekit.errors import PipekitError
    from pipekit.inference.export import export_checkpoint
    from pipekit.layers.specs import LayerSpec, TiedLayerSpec
    from pipekit.layout import Layout
    from pipekit.schedules import Action, Costs, Schedule, Timeline, plan_schedule, simulate
    from pipekit.tensors.weight_gradients import defer_weight_gradient
    from pipekit.training.callbacks import Callback, StepMetrics
    from pipekit.training.language_model import LanguageModelTrial
    from pipekit.training.trainer import Trainer
    from pipekit.training.trial import Trial

_HOMES = {
    "Action": "pipekit.schedules",
    "Callback": "pipekit.training.callbacks",
    "Config": "pipekit.config",
    "Costs": "pipekit.schedules",
    "Example": "pipekit.costs.example",
    "LanguageModelTrial": "pipekit.training.language_model",
    "LayerSpec": "pipekit.layers.specs",
    "Layout": "pipekit.layout",
    "ModelParallelUnit": "pipekit.distributed.mpu",
    "PipekitError": "pipekit.errors",
    "PipelineEngine": "pipekit.engine.engine",
    "PipelineModule": "pipekit.engine.module",
    "Schedule": "pipekit.schedules",
    "StepMetrics": "pipekit.training.callbacks",
    "TiedLayerSpec": "pipekit.layers.specs",
    "Timeline": "pipekit.schedules",
    "Trainer": "pipekit.training.trainer",
    "Trial": "pipekit.training.trial",
    "defer_weight_gradient": "pipekit.tensors.weight_gradients",
    "export_checkpoint": "pipekit.inference.export",
    "initialize": "pipekit.engine.initialize",
    "load_config": "pipekit.config",
    "parse_config": "pipekit.config",
    "plan_schedule": "pipekit.schedules",
    "simulate": "pipekit.schedules",
    "train": "pipekit.commands.train",
}

__all__ = [
    "Action",
    "Callback",
    "Config",
    "Costs",
    "Example",
    "LanguageModelTrial",
    "LayerSpec",
    "Layout",
    "ModelParallelUnit",
    "PipekitError",
    "PipelineEngine",
    "PipelineModule",
    "Schedule",
    "StepMetrics",
    "TiedLayerSpec",
    "Timeline",
    "Trainer",
    "Trial",
    "defer_weight_gradient",
    "export_checkpoint",
    "initialize",
    "load_config",
    "parse_config",
    "plan_schedule",
    "simulate",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("pipekit")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'pipekit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

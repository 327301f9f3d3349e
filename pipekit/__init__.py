"""pipekit: GPT-style models as lists of layer specs, trained across pipeline, tensor and ZeRO data parallelism.

The names below are imported when they are first used, so that `import pipekit` is quick and needs neither torch nor
deepspeed.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipekit.checkpoint.export import export_checkpoint
    from pipekit.config import Config, load_config, parse_config
    from pipekit.engine.engine import PipelineEngine
    from pipekit.engine.module import PipelineModule
    from pipekit.engine.mpu import ModelParallelUnit
    from pipekit.errors import PipekitError
    from pipekit.launch.train import train
    from pipekit.layout import Layout
    from pipekit.schedules import Action, Schedule
    from pipekit.specs import LayerSpec, TiedLayerSpec
    from pipekit.training.callbacks import Callback, StepMetrics
    from pipekit.training.language_model import LanguageModelTrial
    from pipekit.training.trainer import Trainer
    from pipekit.training.trial import Trial

_HOMES = {
    "Action": "pipekit.schedules",
    "Callback": "pipekit.training.callbacks",
    "Config": "pipekit.config",
    "LanguageModelTrial": "pipekit.training.language_model",
    "LayerSpec": "pipekit.specs",
    "Layout": "pipekit.layout",
    "ModelParallelUnit": "pipekit.engine.mpu",
    "PipekitError": "pipekit.errors",
    "PipelineEngine": "pipekit.engine.engine",
    "PipelineModule": "pipekit.engine.module",
    "Schedule": "pipekit.schedules",
    "StepMetrics": "pipekit.training.callbacks",
    "TiedLayerSpec": "pipekit.specs",
    "Trainer": "pipekit.training.trainer",
    "Trial": "pipekit.training.trial",
    "export_checkpoint": "pipekit.checkpoint.export",
    "load_config": "pipekit.config",
    "parse_config": "pipekit.config",
    "train": "pipekit.launch.train",
}

__all__ = [
    "Action",
    "Callback",
    "Config",
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
    "Trainer",
    "Trial",
    "export_checkpoint",
    "load_config",
    "parse_config",
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

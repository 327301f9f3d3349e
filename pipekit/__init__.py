"""pipekit: GPT-style models as lists of layer specs, trained across pipeline, tensor and ZeRO data parallelism.

The names below are imported when they are first used, so that `import pipekit` is quick and needs neither torch nor
deepspeed.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipekit.api import load_model as load_model
    from pipekit.api import plan as plan
    from pipekit.api import train as train
    from pipekit.api import verify as verify
    from pipekit.config import Config as Config
    from pipekit.config import load_config as load_config
    from pipekit.config import parse_config as parse_config
    from pipekit.costs.example import Example as Example
    from pipekit.data.data_loader import DataLoader as DataLoader
    from pipekit.deepspeed.overwrite import overwrite_deepspeed_config as overwrite_deepspeed_config
    from pipekit.distributed.mpu import ModelParallelUnit as ModelParallelUnit
    from pipekit.distributed.rank_role import RankRole as RankRole
    from pipekit.engine.engine import PipelineEngine as PipelineEngine
    from pipekit.engine.initialize import initialize as initialize
    from pipekit.engine.module import PipelineModule as PipelineModule
    from pipekit.errors import PipekitError as PipekitError
    from pipekit.errors import StoppedError as StoppedError
    from pipekit.inference.export import export_checkpoint as export_checkpoint
    from pipekit.inference.export_forms import export as export
    from pipekit.launch.trial import init as init
    from pipekit.layers.specs import LayerSpec as LayerSpec
    from pipekit.layers.specs import TiedLayerSpec as TiedLayerSpec
    from pipekit.layout import Layout as Layout
    from pipekit.plan.train_result import Series as Series
    from pipekit.plan.train_result import TrainResult as TrainResult
    from pipekit.schedules import Action as Action
    from pipekit.schedules import Costs as Costs
    from pipekit.schedules import Schedule as Schedule
    from pipekit.schedules import Timeline as Timeline
    from pipekit.schedules import plan_schedule as plan_schedule
    from pipekit.schedules import simulate as simulate
    from pipekit.settings.activations import ActivationCheckpointing as ActivationCheckpointing
    from pipekit.tensors.weight_gradients import defer_weight_gradient as defer_weight_gradient
    from pipekit.training.context import TrialContext as TrialContext
    from pipekit.training.language_model import LanguageModelTrial as LanguageModelTrial
    from pipekit.training.layers_trial import LayersTrial as LayersTrial
    from pipekit.training.periods import Batch as Batch
    from pipekit.training.periods import Epoch as Epoch
    from pipekit.training.periods import Samples as Samples
    from pipekit.training.periods import Tokens as Tokens
    from pipekit.training.reducers import MetricReducer as MetricReducer
    from pipekit.training.reducers import Reducer as Reducer
    from pipekit.training.trainer import Trainer as Trainer
    from pipekit.training.trial import Trial as Trial
    from pipekit.training.trial_callbacks import TrialCallback as TrialCallback

_HOMES = {
    name: module
    for module, names in {
        "pipekit.api": "load_model plan train verify",
        "pipekit.config": "Config load_config parse_config",
        "pipekit.costs.example": "Example",
        "pipekit.data.data_loader": "DataLoader",
        "pipekit.deepspeed.overwrite": "overwrite_deepspeed_config",
        "pipekit.distributed.mpu": "ModelParallelUnit",
        "pipekit.distributed.rank_role": "RankRole",
        "pipekit.engine.engine": "PipelineEngine",
        "pipekit.engine.initialize": "initialize",
        "pipekit.engine.module": "PipelineModule",
        "pipekit.errors": "PipekitError StoppedError",
        "pipekit.inference.export": "export_checkpoint",
        "pipekit.inference.export_forms": "export",
        "pipekit.layers.specs": "LayerSpec TiedLayerSpec",
        "pipekit.launch.trial": "init",
        "pipekit.layout": "Layout",
        "pipekit.plan.train_result": "Series TrainResult",
        "pipekit.schedules": "Action Costs Schedule Timeline plan_schedule simulate",
        "pipekit.settings.activations": "ActivationCheckpointing",
        "pipekit.tensors.weight_gradients": "defer_weight_gradient",
        "pipekit.training.context": "TrialContext",
        "pipekit.training.language_model": "LanguageModelTrial",
        "pipekit.training.layers_trial": "LayersTrial",
        "pipekit.training.periods": "Batch Epoch Samples Tokens",
        "pipekit.training.reducers": "MetricReducer Reducer",
        "pipekit.training.trainer": "Trainer",
        "pipekit.training.trial": "Trial",
        "pipekit.training.trial_callbacks": "TrialCallback",
    }.items()
    for name in names.split()
}

__all__ = sorted(_HOMES)


_CALLED = ("plan", "verify")


class _CalledPackage(ModuleType):
    """A package with the name of a function in `pipekit.api`; calling the package calls that function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(import_module("pipekit.api"), self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Pipekit(ModuleType):
    """This module. Importing a subpackage sets it as an attribute, which would hide the function of the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _CALLED and type(value) is ModuleType:
            value.__class__ = _CalledPackage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Pipekit


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("pipekit")
    if name in _CALLED:
        return import_module(f"{__name__}.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'pipekit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

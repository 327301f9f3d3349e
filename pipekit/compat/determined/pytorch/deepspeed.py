"""Names of `determined.pytorch.deepspeed`: trials that make their engines with `deepspeed.initialize`."""

from __future__ import annotations

import logging
from abc import ABCMeta
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pipekit.deepspeed.overwrite
import pipekit.distributed.mpu
import pipekit.launch.trial
from pipekit.compat.determined.config import trial_config
from pipekit.distributed.rank_role import RankRole as ModelParallelUnit
from pipekit.distributed.rank_role import role_of
from pipekit.engine.takeover import deepspeed_replaced
from pipekit.errors import ConfigError
from pipekit.training.context import TrialContext
from pipekit.training.trainer import Trainer as Trainer
from pipekit.training.trial import Trial

__all__ = [
    "DeepSpeedTrial",
    "DeepSpeedTrialContext",
    "ModelParallelUnit",
    "Trainer",
    "init",
    "make_data_parallel_mpu",
    "make_deepspeed_mpu",
    "overwrite_deepspeed_config",
]

_logger = logging.getLogger(__name__)


class _MadeOfOurEngines(ABCMeta):
    """Metaclass of trials whose constructor calls `deepspeed.initialize`, which returns pipekit's engines there."""

    def __call__(cls, *args: Any, **settings: Any) -> Any:
        with deepspeed_replaced():
            return super().__call__(*args, **settings)


class DeepSpeedTrial(Trial, metaclass=_MadeOfOurEngines):
    """A `pipekit.Trial` that makes its engines with `deepspeed.initialize` in its constructor.

    There, `deepspeed.initialize` is `pipekit.initialize`, and DeepSpeed's `PipelineModule` is pipekit's.
    """


class DeepSpeedTrialContext(TrialContext):
    """A `pipekit.TrialContext`, under Determined's name."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TrialContext:
        """Make a context in this one process from an experiment's configuration; see `trial_config`."""
        return super().from_config(trial_config(config))


@contextmanager
def init(
    *,
    hparams: Mapping[str, Any] | None = None,
    exp_conf: Mapping[str, Any] | None = None,
    distributed: Any = None,
    enable_tensorboard_logging: bool = True,
) -> Iterator[TrialContext]:
    """Join the processes of this script's launcher, and yield the context of its trial, as `pipekit.init` does.

    Args:
        hparams: the hyperparameters, in place of those of `exp_conf`.
        exp_conf: the experiment's configuration; see `trial_config`.
        distributed: None; the processes are those of the launcher, which pipekit joins.
        enable_tensorboard_logging: whether the trainer writes all metrics to TensorBoard, where that is installed.

    Raises:
        PipekitError: if the configuration is wrong, or the processes do not find each other.
    """
    if distributed is not None:
        raise ConfigError("init: leave distributed out; pipekit joins the processes that the launcher has started")
    if enable_tensorboard_logging and find_spec("tensorboard") is None:
        _logger.info("metrics do not go to TensorBoard, which is not installed")
        enable_tensorboard_logging = False
    # The hyperparameters of exp_conf may be ranges, which those of `hparams` make unimportant.
    given = {} if hparams is None else {"hyperparameters": dict(hparams)}
    config = trial_config({**(exp_conf or {}), **given})
    with pipekit.launch.trial.init(exp_conf=config, enable_tensorboard_logging=enable_tensorboard_logging) as context:
        yield context


def make_deepspeed_mpu(mpu: Any) -> ModelParallelUnit:
    """Return this rank's four answers by an engine's `mpu`, or by an object with DeepSpeed's names for its grid.

    The first tensor-parallel rank of the last stage reports.
    """
    if isinstance(mpu, pipekit.distributed.mpu.ModelParallelUnit):
        return role_of(mpu)
    stage, last = mpu.get_pipe_parallel_rank(), mpu.get_pipe_parallel_world_size() - 1
    return ModelParallelUnit(
        data_parallel_rank=mpu.get_data_parallel_rank(),
        data_parallel_world_size=mpu.get_data_parallel_world_size(),
        should_report_metrics=stage == last and mpu.get_slice_parallel_rank() == 0,
        should_build_data_loader=stage in (0, last),
    )


def make_data_parallel_mpu(distributed: Any) -> ModelParallelUnit:
    """Return this rank's four answers where every rank is a replica.

    Args:
        distributed: `context.distributed`.
    """
    return ModelParallelUnit(distributed.rank, distributed.size, True, True)


def overwrite_deepspeed_config(
    base_ds_config: str | Path | Mapping[str, Any], source_ds_dict: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a DeepSpeed configuration, a dict or a JSON file, with values overwritten or added, at any depth.

    Raises:
        ConfigError: if the file cannot be read, or a section would become a value or the other way round.
    """
    return pipekit.deepspeed.overwrite.overwrite_deepspeed_config(base_ds_config, source_ds_dict, allow_new=True)

"""Building an engine: the one that fits the ZeRO stage of DeepSpeed's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipekit.deepspeed.weight_partitioner import check_same_partition
from pipekit.engine.base_engine import GradientObserver
from pipekit.engine.engine import PipelineEngine
from pipekit.engine.module import PipelineModule
from pipekit.engine.training_engine import TrainingEngine
from pipekit.engine.zero_engine import ZeroEngine


def build_engine(
    module: PipelineModule,
    *,
    deepspeed_config: Mapping[str, Any],
    on_gradients: GradientObserver | None = None,
    **settings: Any,
) -> TrainingEngine:
    """Build the engine of a module: `ZeroEngine` under ZeRO-2 and 3, `PipelineEngine` otherwise.

    Args:
        module: this rank's stages, and the schedule to run; ZeRO-2 and 3 run 1F1B.
        deepspeed_config: DeepSpeed's configuration.
        on_gradients: called before every update with the gradients of the step; see `BaseEngine.on_gradients`.
        **settings: the other arguments of `TrainingEngine`.

    Raises:
        ConfigError: if the module has several stages, and the ZeRO stage is 2 or 3; or if its weights were cut for
            another configuration.
    """
    if module.partitioner is not None:
        check_same_partition(module.partitioner.config, deepspeed_config)
    stage = deepspeed_config.get("zero_optimization", {}).get("stage", 0)
    kind: type[TrainingEngine] = ZeroEngine if stage >= 2 else PipelineEngine
    engine = kind(module, deepspeed_config=deepspeed_config, **settings)
    engine.on_gradients = on_gradients
    return engine

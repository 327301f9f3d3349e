"""One way to an engine: the engine that fits the ZeRO stage of DeepSpeed's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipekit.engine.engine import PipelineEngine
from pipekit.engine.module import PipelineModule
from pipekit.engine.training_engine import GradientObserver, OptimizerBuilder, SchedulePlanner, TrainingEngine
from pipekit.engine.zero_engine import ZeroEngine


def build_engine(
    module: PipelineModule,
    *,
    deepspeed_config: Mapping[str, Any],
    build_optimizer: OptimizerBuilder | None = None,
    plan_schedule: SchedulePlanner | None = None,
    measure_costs: bool = False,
    profile: bool = False,
    on_gradients: GradientObserver | None = None,
    **deepspeed_args: Any,
) -> TrainingEngine:
    """Build the engine of a module: `ZeroEngine` under ZeRO-2 and 3, `PipelineEngine` otherwise.

    Args:
        module: this rank's stages.
        deepspeed_config: DeepSpeed's configuration.
        build_optimizer: called with the trainable parameters; returns a torch optimizer. None where the configuration
            or `deepspeed_args` name one.
        plan_schedule: returns the table of a step; 1F1B unless given. ZeRO-2 and 3 take each micro-batch forward and
            back at once, whatever it returns.
        measure_costs: whether to time the actions of the first steps, and then to plan the table anew for them.
        profile: whether to time every step's actions, for `gather_timeline`.
        on_gradients: called before every update with the gradients of the step; see `TrainingEngine.on_gradients`.
        **deepspeed_args: what else DeepSpeed's engine is given.

    Raises:
        ConfigError: if the module has several stages, and the ZeRO stage is 2 or 3.
    """
    common: dict[str, Any] = {
        "build_optimizer": build_optimizer,
        "deepspeed_config": deepspeed_config,
        "profile": profile,
        **deepspeed_args,
    }
    engine: TrainingEngine
    if deepspeed_config.get("zero_optimization", {}).get("stage", 0) >= 2:
        engine = ZeroEngine(module, **common)
    else:
        engine = PipelineEngine(module, plan_schedule=plan_schedule, measure_costs=measure_costs, **common)
    engine.on_gradients = on_gradients
    return engine

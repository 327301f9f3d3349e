"""Plain modules, configurations, optimizers and mpus that cannot run: one error on every rank."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gloo_workers import GlooWorkers
from pipekit.errors import ConfigError
from plain_modules import Tagger, build, build_tagger, config, narrow

pytestmark = pytest.mark.distributed


class Extra(Tagger):
    def get_extra_state(self) -> Any:
        return {"some": "thing"}

    def set_extra_state(self, state: Any) -> None:
        pass


# What each rank gives, and what all of them are told.
REFUSED: dict[str, tuple[Any, str]] = {
    "twice": (
        lambda rank: {"args": SimpleNamespace(deepspeed_config="ds.json")},
        "the configuration is given twice, by config= and args.deepspeed_config; leave one of them out",
    ),
    "no file": (
        lambda rank: {"config": config() if rank == 0 else "no/such.json"},
        "no/such.json: cannot be read as a DeepSpeed configuration",
    ),
    "typo": (lambda rank: {"config": {**config(), "zero_optimisation": {}}}, "zero_optimisation: unknown key; did you"),
    "batch": (
        lambda rank: {"config": config(train_micro_batch_size_per_gpu=5)},
        "DeepSpeed refuses the configuration: Check batch related parameters.",
    ),
    "another stage": (
        lambda rank: {"config": config(rank)},
        "configuration key zero_optimization is {'stage': 0, 'stage3_param_persistence_threshold': 0} on rank 0",
    ),
    "another model": (
        lambda rank: {"model": narrow(build_tagger()) if rank else build_tagger(), "model_parameters": None},
        "parameter hidden.weight is float32 (5, 8), trained on rank 0 and float32 (4, 8), trained on rank 1",
    ),
    "no model": (lambda rank: {"model": None}, "model is NoneType; give model=, a pipekit.PipelineModule or an"),
    "no optimizer": (lambda rank: {"config": {"train_batch_size": 8, "zero_optimization": {"stage": 2}}},
                     "zero_optimization.stage=2 shards an optimizer, and there is none; give optimizer=torch"),
    "another's": (lambda rank: {"model": build_tagger()}, "the optimizer updates a tensor of shape (11, 8) that is no"),
    "fp64": (lambda rank: {"model": build_tagger().double()}, "is float64, and checkpoints hold fp32; try model.float"),
    "extra state": (lambda rank: {"model": Extra()}, "_extra_state is dict and not a tensor, so no checkpoint can"),
    "hybrid": (lambda rank: {"config": config(hybrid_engine={"enabled": True})}, "hybrid_engine: has no effect here"),
    "parts": (
        lambda rank: {"mpu": SimpleNamespace(get_data_parallel_world_size=lambda: 1)},
        "the mpu has 1 replicas on 2 ranks, but each rank holds a plain module whole",
    ),
}  # fmt: skip


def refuse_all(rank: int) -> dict[str, str]:
    messages = {}
    for name, (give, _) in REFUSED.items():
        with pytest.raises(ConfigError) as caught:
            build(**give(rank))
        messages[name] = str(caught.value)
    return messages


def test_what_cannot_run_is_refused_on_every_rank(gloo: GlooWorkers) -> None:
    for messages in gloo.run(2, refuse_all):
        for name, (_, expected) in REFUSED.items():
            assert expected in messages[name], name

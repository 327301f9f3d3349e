"""Code written for DeepSpeed makes pipekit's engines and modules inside, and DeepSpeed's outside."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from deepspeed.pipe import PipelineModule as DeepSpeedPipelineModule
from torch import nn

import deepspeed
from gloo_workers import GlooWorkers
from pipekit.engine.engine import PipelineEngine
from pipekit.engine.module import PipelineModule
from pipekit.engine.plain_engine import PlainEngine
from pipekit.engine.takeover import deepspeed_replaced
from pipekit.errors import ConfigError

CONFIG = {
    "train_batch_size": 1,
    "steps_per_print": None,
    "optimizer": {"type": "Adam", "params": {"torch_adam": True}},
}


class OwnModule(DeepSpeedPipelineModule):  # type: ignore[misc]
    pass


def make_engines(rank: int) -> None:
    layers = [nn.Linear(2, 2)]
    original = deepspeed.initialize
    args = SimpleNamespace(deepspeed_config="not_there.json")
    with deepspeed_replaced():
        module = DeepSpeedPipelineModule(layers, num_stages=1, loss_fn=nn.MSELoss())
        pipeline, *_ = deepspeed.initialize(args=args, model=module, config=CONFIG)
        plain, *_ = deepspeed.initialize(args, nn.Linear(2, 2), config_params=CONFIG)
        with pytest.raises(ConfigError, match=r"not_there.json: cannot be read"):
            deepspeed.initialize(args=args, model=nn.Linear(2, 2))
        own = OwnModule(layers, num_stages=1, loss_fn=nn.MSELoss())
        with pytest.raises(ConfigError, match=r"model is OwnModule, a pipeline module of DeepSpeed's; import"):
            deepspeed.initialize(model=own, config=CONFIG)
    assert (type(module), type(pipeline), type(plain)) == (PipelineModule, PipelineEngine, PlainEngine)
    with pytest.raises(ZeroDivisionError), deepspeed_replaced():
        _ = 1 / 0
    assert deepspeed.initialize is original
    assert type(DeepSpeedPipelineModule(layers, num_stages=1, loss_fn=nn.MSELoss())) is DeepSpeedPipelineModule
    for engine in (pipeline, plain):
        engine.destroy()


@pytest.mark.distributed
def test_deepspeed_is_replaced_inside_alone(gloo: GlooWorkers) -> None:
    gloo.run(1, make_engines)

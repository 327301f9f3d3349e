"""One view of DeepSpeed's optimizers: where gradients accumulate, what their norm is, where masters and moments lie.

Four of them occur. In fp32 without ZeRO it is the plain torch optimizer; in bf16 with ZeRO-1 `BF16_Optimizer`; else,
with ZeRO-1 and 2, `DeepSpeedZeroOptimizer`. Both of the latter flatten parameters and shard the fp32 masters over the
data-parallel ranks. With ZeRO-3 it is `DeepSpeedZeroOptimizer_Stage3`, which shards the parameters too. An engine that
only evaluates has none.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from pipekit.deepspeed.bf16_optimizer import BF16OptimizerView
from pipekit.deepspeed.optimizer_view import OptimizerView
from pipekit.deepspeed.weights_view import WeightsView
from pipekit.deepspeed.zero3_optimizer import Zero3OptimizerView
from pipekit.deepspeed.zero_optimizer import ZeroOptimizerView
from pipekit.distributed.mpu import ModelParallelUnit


def view_optimizer(optimizer: Any, mpu: ModelParallelUnit, *, takes_gradients: bool = True) -> OptimizerView:
    """Build the view that fits what DeepSpeed made of the torch optimizer.

    Args:
        optimizer: what DeepSpeed made.
        mpu: the process groups over which norms are summed.
        takes_gradients: whether gradients accumulate in the view's buffers; otherwise hooks of DeepSpeed's take them.
    """
    if optimizer is None or isinstance(optimizer, DeepSpeedZeRoOffload):
        return WeightsView(optimizer, mpu, takes_gradients=False)
    if isinstance(optimizer, BF16_Optimizer):
        return BF16OptimizerView(optimizer, mpu, takes_gradients)
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return Zero3OptimizerView(optimizer, mpu, takes_gradients)
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return ZeroOptimizerView(optimizer, mpu, takes_gradients)
    assert isinstance(optimizer, torch.optim.Optimizer), f"unexpected optimizer {type(optimizer).__name__}"
    return OptimizerView(optimizer, mpu, takes_gradients)

"""Layers that sleep where real ones compute."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipekit import LayerSpec, defer_weight_gradient
from pipelines.settings import EmulatedSetting
from pipelines.workload import Workload


def _sleep(seconds: float) -> None:
    # Even a sleep of no time enters the kernel and waits for its timer.
    if seconds > 0:
        time.sleep(seconds)


class _Scale(torch.autograd.Function):
    """Multiplies by a weight, and sleeps for `seconds` in each of forward, input gradient and weight gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, seconds: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.seconds = seconds
        _sleep(seconds)
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        seconds = ctx.seconds

        def weight_gradient() -> Tensor:
            _sleep(seconds)
            return (grad * x).sum().reshape(1)

        # The very first layer sleeps as well, though nobody asks for its input gradient: all ranks cost the same.
        _sleep(seconds)
        # Only a schedule that splits the backward puts this off; elsewhere it is computed here and now.
        return grad * weight, defer_weight_gradient(weight, weight_gradient), None


class _SleepBackward(torch.autograd.Function):
    """Returns a copy of its input, and sleeps for `seconds` in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _sleep(ctx.seconds)
        return grad, None


class SleepingLayer(nn.Module):
    """Scales `(B, 1)` by its one weight, and takes its time.

    Attributes:
        has_own_weight_node: whether the weight gradient sleeps in an autograd node of its own, on the way from the
            weight, so that torch's pipelines can put it off.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.seconds = seconds
        self.has_own_weight_node = False

    def forward(self, x: Tensor) -> Tensor:
        if self.has_own_weight_node:
            _sleep(self.seconds)
            # The very first layer sleeps for its input gradient with its weight gradient.
            halves = 1 if x.requires_grad else 2
            product: Tensor = _SleepBackward.apply(x, self.seconds) * _SleepBackward.apply(
                self.weight, halves * self.seconds
            )
            return product
        scaled: Tensor = _Scale.apply(x, self.weight, self.seconds)
        return scaled


def build_sleeping_workload(setting: EmulatedSetting) -> Workload:
    """Return two sleeping layers for each rank, one sequence a micro-batch, and plain SGD."""
    return Workload(
        specs=[LayerSpec(SleepingLayer, setting.forward_s / 2) for _ in range(2 * setting.pp)],
        pp=setting.pp,
        num_micro_batches=setting.num_micro_batches,
        precision="fp32",
        zero=0,
        loss_fn=F.mse_loss,
        build_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
        inputs=torch.ones(setting.num_micro_batches, 1),
        labels=torch.zeros(setting.num_micro_batches, 1),
    )

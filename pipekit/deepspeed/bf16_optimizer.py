"""View of `BF16_Optimizer`: bf16 with ZeRO-1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipekit.deepspeed.optimizer_view import FlatOptimizerView
from pipekit.deepspeed.patches import replace_norm
from pipekit.distributed.mpu import ModelParallelUnit
from pipekit.tensors.weight_gradients import Compute


class BF16OptimizerView(FlatOptimizerView):
    """`BF16_Optimizer`: gradients accumulate in an fp32 buffer beside the bf16 ones."""

    def __init__(self, optimizer: Any, mpu: ModelParallelUnit) -> None:
        super().__init__(optimizer, mpu)
        self._get_grads_for_norm = optimizer.get_grads_for_norm
        replace_norm(optimizer, self._nonempty_grads_for_norm)
        self._address = {
            parameter: (group, index)
            for group, parameters in enumerate(optimizer.bf16_groups)
            for index, parameter in enumerate(parameters)
        }

    def accumulate(self) -> None:
        self.optimizer.update_hp_grads(clear_lp_grads=False)
        self.optimizer.clear_lp_grads(set_to_none=True)

    def add(self, parameter: Tensor, compute: Compute) -> None:
        parameter.grad = compute()
        with torch.no_grad():
            self.optimizer._update_hp_grad(parameter, *self._address[parameter], clear_lp_grads=False)
        parameter.grad = None

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        gradient: Tensor | None = getattr(parameter, "_hp_grad", None)
        return gradient

    def _nonempty_grads_for_norm(self, for_clipping: bool = False) -> Any:
        """Let a stage that owns none of its parameters, a tied head alone, add nothing; DeepSpeed would stop."""
        gradients = self._get_grads_for_norm(for_clipping=for_clipping)
        if for_clipping:
            return gradients
        dense, expert = gradients
        return dense or [torch.zeros(1, device=self.device)], expert

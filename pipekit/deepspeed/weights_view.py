"""View of the weights of an engine without an optimizer, which evaluates alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from deepspeed.runtime.zero import GatheredParameters
from torch import Tensor, nn

from pipekit.deepspeed.optimizer_view import OptimizerView


class WeightsView(OptimizerView):
    """No optimizer: weights without masters and moments, which ZeRO-3 may have cut into pieces."""

    @property
    def param_groups(self) -> list[dict[str, object]]:
        return []

    def state_names(self) -> list[str]:
        return []

    def step_count(self) -> int:
        return 0

    def full_frozen(self, parameter: nn.Parameter) -> Tensor:
        with GatheredParameters([parameter]):
            return parameter.detach().clone()

    def load_frozen(self, parameter: nn.Parameter, value: Tensor) -> None:
        with GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            parameter.copy_(value)

    def prepare_states(self, names: Sequence[str], step: int) -> None:
        """Without an optimizer there are none."""

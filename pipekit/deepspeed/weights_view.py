"""Views of weights under ZeRO-3, and of the weights of an engine without an optimizer, which only evaluates."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from deepspeed.runtime.zero import GatheredParameters
from torch import Tensor, nn

from pipekit.deepspeed.optimizer_view import OptimizerView, ParameterStates


class PartitionedView(OptimizerView):
    """Common base under ZeRO-3, with an optimizer and without: weights are cut into one piece for each replica."""

    def full_frozen(self, parameter: nn.Parameter) -> Tensor:
        with GatheredParameters([parameter]):
            return parameter.detach().clone()

    def load_frozen(self, parameter: nn.Parameter, value: Tensor) -> None:
        with GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            parameter.copy_(value)


class WeightsView(PartitionedView):
    """No optimizer: weights without masters and moments, cut into pieces under ZeRO-3 and whole without."""

    @property
    def param_groups(self) -> list[dict[str, object]]:
        return []

    def state_names(self) -> list[str]:
        return []

    def step_count(self) -> int:
        return 0

    def prepare_states(self, states: Mapping[nn.Parameter, ParameterStates], step: int) -> None:
        """Without an optimizer there are none."""

"""Workload of every contender: the same layers, batch, loss and optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipekit.deepspeed.deepspeed_config import plan_deepspeed_config
from pipekit.layers.specs import LayerSpec, build_layer
from pipelines.settings import Precision


@dataclass(frozen=True)
class Workload:
    """A model and one global batch, trained by `pp` ranks.

    Attributes:
        specs: the layers of the model.
        pp: number of ranks.
        num_micro_batches: micro-batches of one step.
        precision: of weights and activations.
        zero: ZeRO stage, where the system has one.
        loss_fn: called with the last layer's outputs and the labels of a micro-batch.
        build_optimizer: called with a rank's parameters.
        inputs: of the whole batch, `(num_micro_batches * micro-batch size, ...)`.
        labels: of the whole batch.
    """

    specs: Sequence[LayerSpec]
    pp: int
    num_micro_batches: int
    precision: Precision
    zero: int
    loss_fn: Callable[[Any, Any], Tensor]
    build_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    inputs: Tensor
    labels: Tensor

    @property
    def micro_batch_size(self) -> int:
        """Sequences of one micro-batch."""
        return len(self.inputs) // self.num_micro_batches

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights and of what passes between stages."""
        return torch.float32 if self.precision == "fp32" else torch.bfloat16

    def micro_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Return an iterator over the inputs and the labels of each micro-batch."""
        return zip(self.inputs.split(self.micro_batch_size), self.labels.split(self.micro_batch_size), strict=True)

    def build_stage(self, boundaries: Sequence[int], stage: int) -> nn.Sequential:
        """Return the layers of one stage in plain torch.

        Args:
            boundaries: stage `s` holds layers `boundaries[s]` to `boundaries[s + 1] - 1`.
            stage: which of them.
        """
        layers = range(boundaries[stage], boundaries[stage + 1])
        built = [build_layer(self.specs[layer], name=f"layers.{layer}", seed=1) for layer in layers]
        return nn.Sequential(*built).to(self.dtype)

    def deepspeed_config(self) -> dict[str, Any]:
        """Return what DeepSpeed's engine is configured with, the peer's and ours alike."""
        return plan_deepspeed_config(
            micro_batch_size=self.micro_batch_size,
            num_micro_batches=self.num_micro_batches,
            precision=self.precision,
            zero=self.zero,
            gradient_clipping=0.0,
            extra={},
        )

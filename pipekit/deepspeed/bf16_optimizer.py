"""View of `BF16_Optimizer`: bf16 with ZeRO-1."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from pipekit.deepspeed.gradient_buffers import GradientBuffers, GradientGroup
from pipekit.deepspeed.optimizer_view import FlatOptimizerView
from pipekit.deepspeed.patches import remove_gradient_hooks, replace_global_norm, replace_norm
from pipekit.distributed.mpu import ModelParallelUnit


class BF16OptimizerView(FlatOptimizerView):
    """`BF16_Optimizer`: gradients accumulate in its flat fp32 buffers.

    Of the gradients that are reduced, norm and clipping take what this replica updates; it may have no others.
    """

    def __init__(self, optimizer: Any, mpu: ModelParallelUnit, takes_gradients: bool) -> None:
        super().__init__(optimizer, mpu, takes_gradients)
        if not takes_gradients:
            return
        replace_norm(optimizer, self._gradients_for_norm)
        # On the host, where DeepSpeed looks at it; its own would have the host wait for the device three times.
        replace_global_norm(
            optimizer, lambda input_tensors, **options: self._norm_over_model(input_tensors, sharded=True).cpu()
        )
        # It would fill the buffers with zeros twice in a step.
        optimizer.clear_hp_grads = lambda: None

    def _parameter_groups(self) -> Iterable[Sequence[Tensor]]:
        groups: Iterable[Sequence[Tensor]] = self.optimizer.bf16_groups
        return groups

    def _build_buffers(self) -> GradientBuffers:
        bf16 = self.optimizer
        remove_gradient_hooks(bf16)
        flats = zip(bf16.bf16_groups_flat, bf16.fp32_groups_gradients_flat, bf16.bf16_groups, strict=True)
        replicas = self._mpu.data.size
        return GradientBuffers(
            [GradientGroup.beside(weights, flat, parameters, replicas=replicas) for weights, flat, parameters in flats]
        )

    def hand_over_gradients(self) -> None:
        assert self.buffers is not None
        self.buffers.fill()

    def _gradients_for_norm(self, for_clipping: bool = False) -> Any:
        """Gradients to clip, or those that count for the norm."""
        assert self.buffers is not None
        pieces = [piece for group in self.buffers.groups for piece in group.pieces(self._mpu.data.rank)]
        if for_clipping:
            return [gradient for _, gradient in pieces]
        return [gradient for parameter, gradient in pieces if not getattr(parameter, "ds_pipe_replicated", False)], {}

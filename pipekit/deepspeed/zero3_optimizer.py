"""View of `DeepSpeedZeroOptimizer_Stage3`: ZeRO-3."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipekit.deepspeed.optimizer_view import LossScaledView, whole_shape
from pipekit.deepspeed.patches import replace_norm
from pipekit.deepspeed.weights_view import PartitionedView
from pipekit.distributed.mpu import ModelParallelUnit
from pipekit.optimizers.whole_tensors import Piece


class Zero3OptimizerView(LossScaledView, PartitionedView):
    """`DeepSpeedZeroOptimizer_Stage3`: parameters, masters and moments are cut into one piece for each replica.

    The norm is one all-reduce, and counts what is marked as replicated once, as under the other optimizers.
    """

    def __init__(self, optimizer: Any, mpu: ModelParallelUnit, takes_gradients: bool) -> None:
        super().__init__(optimizer, mpu, takes_gradients)
        replace_norm(optimizer, self._norm_groups)

    def _parameter_groups(self) -> Iterable[Sequence[Tensor]]:
        groups: Iterable[Sequence[Tensor]] = self.optimizer.fp16_groups
        return groups

    @property
    def is_sharded(self) -> bool:
        return True

    def pieces(self) -> Iterator[tuple[Tensor, list[Piece]]]:
        zero, rank = self.optimizer, self._mpu.data_parallel_rank
        for flat, parameters in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
            pieces, start = [], 0
            for parameter in parameters:
                length, size = parameter.partition_numel(), parameter.ds_numel
                offset = min(length * rank, size)
                piece = Piece(parameter, whole_shape(parameter), start, offset, min(length, size - offset))
                pieces.append(piece)
                start += length
            yield flat, pieces

    def _build_buffers(self) -> None:
        """Leave it to DeepSpeed's hooks, which reduce each gradient at once, and keep a piece of it."""

    def _norm_groups(self) -> list[Tensor]:
        zero, gradients = self.optimizer, list[Tensor]()
        for group, parameters in enumerate(zero.fp16_groups):
            if zero.offload_optimizer:
                norms = (zero.norm_for_param_grads.get(zero.get_param_id(parameter)) for parameter in parameters)
                pieces = [torch.zeros(()) if norm is None else norm.float() for norm in norms]
            else:
                pieces = zero.averaged_gradients[group]
            gradients += [g for g, p in zip(pieces, parameters, strict=True) if not p.ds_pipe_replicated]
        # On the host, where DeepSpeed looks at it.
        return [self._norm_over_model(gradients, sharded=True).cpu()]

    @property
    def is_offloaded(self) -> bool:
        return bool(self.optimizer.offload_optimizer)

    def clear_gradients(self) -> None:
        # As under ZeRO-2: what is not used must have no gradient.
        zero = self.optimizer
        zero.grad_partitions_flat_buffer.zero_()
        if self.is_offloaded:
            for flat in zero.fp32_partitioned_groups_flat:
                flat.grad.zero_()
            zero.norm_for_param_grads.clear()

    def full_master(self, parameter: nn.Parameter) -> Tensor:
        master: Tensor = self.optimizer.get_full_hp_param(parameter)
        return master

    def full_state(self, parameter: nn.Parameter, name: str) -> Tensor:
        state: Tensor = self.optimizer.get_full_hp_param(parameter, name)
        return state

    def load_masters(self, masters: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
        zero = self.optimizer
        zero._partition_all_parameters()
        for parameter, value in masters:
            self._copy_piece(parameter, value, None)
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def load_state(self, parameter: nn.Parameter, name: str, value: Tensor) -> None:
        self._copy_piece(parameter, value, name)

    def _copy_piece(self, parameter: nn.Parameter, value: Tensor, state: str | None) -> None:
        # DeepSpeed's own setter fails where a parameter does not divide into equal pieces.
        piece, _ = self.optimizer._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=False, optim_state_key=state
        )
        start = min(piece.numel() * self._mpu.data_parallel_rank, value.numel())
        stop = min(start + piece.numel(), value.numel())
        with torch.no_grad():
            piece[: stop - start].copy_(value.flatten()[start:stop])

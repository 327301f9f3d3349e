"""View of `DeepSpeedZeroOptimizer`: ZeRO-1 and 2."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipekit.deepspeed.gradient_buffers import GradientBuffers, GradientGroup
from pipekit.deepspeed.optimizer_view import FlatOptimizerView, LossScaledView
from pipekit.deepspeed.patches import remove_gradient_hooks, replace_norm
from pipekit.distributed.mpu import ModelParallelUnit
from pipekit.tensors.weight_gradients import Compute


class _Pieces(list[Tensor]):
    """Gradients that a rank updates; where they lie in one tensor, DeepSpeed does not flatten them into another."""

    flat_partition: Tensor | None = None


class ZeroOptimizerView(LossScaledView, FlatOptimizerView):
    """`DeepSpeedZeroOptimizer`, with one all-reduce for the norm in place of one for each parameter group.

    DeepSpeed's would wait for ever where stages have different numbers of groups that are not empty. Under ZeRO-1 the
    gradients are handed over at the end of a step; under ZeRO-2, and with masters in host memory, DeepSpeed's hooks
    take each as soon as it is there.
    """

    def __init__(self, optimizer: Any, mpu: ModelParallelUnit, takes_gradients: bool) -> None:
        super().__init__(optimizer, mpu, takes_gradients)
        # On the host: DeepSpeed looks at it once more for each parameter group.
        replace_norm(optimizer, lambda norm_type=2: self._scaled_global_norm().cpu())

    def _parameter_groups(self) -> Iterable[Sequence[Tensor]]:
        groups: Iterable[Sequence[Tensor]] = self.optimizer.bit16_groups
        return groups

    def _build_buffers(self) -> GradientBuffers | None:
        zero = self.optimizer
        if zero.cpu_offload or zero.partition_gradients:
            return None
        remove_gradient_hooks(zero)
        groups, replicas = [], self._mpu.data.size
        for weights, parameters in zip(zero.bit16_groups_flat, zero.bit16_groups, strict=True):
            flat = torch.zeros_like(weights, dtype=zero.gradient_accumulation_dtype)
            groups.append(GradientGroup.beside(weights, flat, parameters, replicas=replicas))
        return GradientBuffers(groups)

    @property
    def is_offloaded(self) -> bool:
        return bool(self.optimizer.cpu_offload)

    @property
    def can_leave_out(self) -> bool:
        zero = self.optimizer
        return bool(zero.compute_grad_norm and (zero.dtype != torch.bfloat16 or zero.check_grad_overflow))

    @property
    def needs_whole_gradients(self) -> bool:
        # DeepSpeed's Muon makes an update of a whole matrix at once.
        return any(getattr(each, "use_muon", False) for group in self.optimizer.bit16_groups for each in group)

    def clear_gradients(self) -> None:
        super().clear_gradients()
        # DeepSpeed would give a parameter that the next step leaves unused this step's gradient again, and add to it
        # where the first micro-batch leaves it unused.
        if self.is_offloaded:
            for flat in self.optimizer.single_partition_of_fp32_groups:
                flat.grad.zero_()
            for accumulated in self.optimizer.accumulated_grads_in_cpu.values():
                accumulated.zero_()

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        if self.buffers is not None:
            return super().gradient(parameter)
        gradient: Tensor | None = self.optimizer.get_param_gradient_attribute(parameter)
        return gradient

    def add(self, parameter: Tensor, compute: Compute) -> None:
        super().add(parameter, compute)
        if self.buffers is None and self.optimizer.use_grad_accum_attribute:
            self.optimizer._fill_param_grad_accum_attribute(parameter)

    def hand_over_gradients(self) -> None:
        # What DeepSpeed does after its own reduction: each rank picks the part of the gradients that it updates.
        zero = self.optimizer
        zero.set_gradient_accumulation_boundary(True)
        if zero.cpu_offload:
            for parameters in zero.bit16_groups:
                for parameter in parameters:
                    self.gradient_or_zeros(parameter)
            zero.reduce_gradients(pipeline_parallel=True)
            return
        assert self.buffers is not None
        rank = self._mpu.data.rank
        for group, parameters in enumerate(zero.params_in_partition):
            zero.all_grad_tensors[group] = [self.gradient_or_zeros(parameter) for parameter in parameters]
            pieces = zero.averaged_gradients[group] = _Pieces(
                zero.get_flat_partition(
                    parameters,
                    zero.first_offset[group],
                    zero.partition_size[group],
                    dtype=zero.gradient_accumulation_dtype,
                    device=self.device,
                    param_group_idx=group,
                    return_tensor_list=True,
                )
            )
            zero.all_grad_tensors[group] = None
            if not self.needs_whole_gradients:
                shard = zero.partition_size[group]
                pieces.flat_partition = self.buffers.groups[group].flat[rank * shard : (rank + 1) * shard]
        for parameters in zero.bit16_groups:
            for parameter in parameters:
                parameter.grad = None

    def _scaled_global_norm(self) -> Tensor:
        zero, gradients = self.optimizer, list[Tensor]()
        if zero.cpu_offload:
            # By now the gradients are on the CPU; their norms were taken on the way.
            owned = [p for parameters in zero.params_in_partition for p in parameters if not p.ds_pipe_replicated]
            norms = (zero.norm_for_param_grads.get(zero.get_param_id(parameter)) for parameter in owned)
            return self._norm_over_model([norm.float() for norm in norms if norm is not None], sharded=True)
        for group, parameters in enumerate(zero.params_in_partition):
            pieces = (g for g in zero.averaged_gradients[group] if not getattr(g, "_zero_padding", False))
            gradients += [g for g, p in zip(pieces, parameters, strict=False) if not p.ds_pipe_replicated]
        return self._norm_over_model(gradients, sharded=True)

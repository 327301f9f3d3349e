"""One view of DeepSpeed's optimizers: where gradients accumulate, what their norm is, where masters and moments lie.

Four of them occur. In fp32 without ZeRO it is the plain torch optimizer; in bf16 with ZeRO-1 `BF16_Optimizer`; else,
with ZeRO-1 and 2, `DeepSpeedZeroOptimizer`. Both of the latter flatten parameters and shard the fp32 masters over the
data-parallel ranks. With ZeRO-3 it is `DeepSpeedZeroOptimizer_Stage3`, which shards the parameters too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn

from pipekit.distributed.mpu import ModelParallelUnit
from pipekit.tensors.weight_gradients import Compute, add_gradient

# What fp16's dynamic loss scale consists of, in DeepSpeed.
_LOSS_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return the shape of a parameter that ZeRO-3 may have cut into one piece for each data-parallel rank.

    Example:
        >>> whole_shape(torch.zeros(2, 3))
        (2, 3)
    """
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


class OptimizerView:
    """The plain torch optimizer: gradients in `parameter.grad`, whole moments in its state.

    Args:
        optimizer: what DeepSpeed made of the torch optimizer.
        mpu: the process groups over which norms are summed.
    """

    def __init__(self, optimizer: Any, mpu: ModelParallelUnit) -> None:
        self.optimizer = optimizer
        self._mpu = mpu

    @property
    def loss_scale(self) -> float:
        """Factor of the loss before its backward (fp16 only; otherwise 1)."""
        return 1.0

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The torch optimizer's parameter groups."""
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        return groups

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of every group."""
        for group in self.param_groups:
            group["lr"] = lr

    def accumulate(self) -> None:
        """Take up the gradients of a backward that has just ended."""

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Return the accumulated gradient of a parameter."""
        return parameter.grad

    def gradient_or_zeros(self, parameter: nn.Parameter) -> Tensor:
        """Return the accumulated gradient of a parameter, which is zero from now on if there was none."""
        if self.gradient(parameter) is None:
            self.add(parameter, lambda: torch.zeros_like(parameter))
        gradient = self.gradient(parameter)
        assert gradient is not None
        return gradient

    def add(self, parameter: Tensor, compute: Compute) -> None:
        """Add to the accumulated gradient of a parameter what `compute` returns."""
        add_gradient(parameter, compute)

    def hand_over_gradients(self) -> None:
        """Give the gradients, which are now those of the whole step and of all replicas, to the optimizer."""

    @property
    def is_offloaded(self) -> bool:
        """True if masters and moments are in host memory; DeepSpeed reduces gradients on the way there."""
        return False

    def clear_gradients(self) -> None:
        """Forget the gradients of a step that has ended."""

    def loss_scaler_state(self) -> dict[str, float]:
        """Return the state of fp16's dynamic loss scale; empty in other precisions."""
        return {}

    def load_loss_scaler_state(self, state: Mapping[str, float]) -> None:
        """Set the state of fp16's dynamic loss scale; other precisions have none, and ignore it."""

    def state_names(self) -> list[str]:
        """Return the names of the per-element optimizer states, such as `exp_avg`; empty before the first step."""
        for state in self.torch_optimizer.state.values():
            return sorted(key for key, value in state.items() if isinstance(value, Tensor) and key != "step")
        return []

    def step_count(self) -> int:
        """Number of updates that the optimizer has made."""
        for state in self.torch_optimizer.state.values():
            if "step" in state:
                return int(state["step"])
        return 0

    def full_master(self, parameter: nn.Parameter) -> Tensor:
        """Return the whole fp32 weights of a parameter. All data-parallel ranks call this together."""
        return parameter.detach().float()

    def full_state(self, parameter: nn.Parameter, name: str) -> Tensor:
        """Return a whole optimizer state of a parameter. All data-parallel ranks call this together."""
        state: Tensor = self.optimizer.state[parameter][name]
        return state

    def full_frozen(self, parameter: nn.Parameter) -> Tensor:
        """Return the whole weights of a parameter without gradients. All data-parallel ranks call this together."""
        return parameter.detach()

    def load_frozen(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set the weights of a parameter without gradients. All data-parallel ranks call this together."""
        with torch.no_grad():
            parameter.copy_(value)

    def load_masters(self, masters: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
        """Set fp32 weights, and the low-precision weights that follow from them."""
        with torch.no_grad():
            for parameter, value in masters:
                parameter.copy_(value)

    def prepare_states(self, names: Sequence[str], step: int) -> None:
        """Create optimizer states filled with zeros, as if `step` updates had been made."""
        for group in self.torch_optimizer.param_groups:
            for parameter in group["params"]:
                self._prepare_states_of(parameter, group, names, step)

    def _prepare_states_of(self, parameter: Tensor, group: Mapping[str, Any], names: Sequence[str], step: int) -> None:
        state = self.torch_optimizer.state[parameter]
        for name in names:
            state[name] = torch.zeros_like(parameter)
        if not names:
            return
        if isinstance(self.torch_optimizer, DeepSpeedCPUAdam):
            state["step"] = step
            return
        state["step"] = torch.tensor(float(step), dtype=torch.float32)
        if group.get("fused") or group.get("capturable"):
            state["step"] = state["step"].to(parameter.device)

    def load_state(self, parameter: nn.Parameter, name: str, value: Tensor) -> None:
        """Set a whole optimizer state of a parameter; `prepare_states` comes first."""
        self.optimizer.state[parameter][name].copy_(value)

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def global_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Return the 2-norm of the whole model's gradient, every tied parameter counted once.

        The gradients are already reduced over data-parallel ranks. All ranks call this together.
        """
        gradients = [p.grad for p in parameters if p.grad is not None and not getattr(p, "ds_pipe_replicated", False)]
        return self._norm_over_model(gradients)

    def _norm_over_model(self, gradients: Sequence[Tensor], *, sharded: bool = False) -> Tensor:
        # Not where the masters are: on the CPU, with offload, no other rank could be reached over NCCL.
        squares = torch.zeros((), dtype=torch.float32, device=get_accelerator().current_device_name())
        if gradients:
            norms = torch._foreach_norm(list(gradients), 2, dtype=torch.float32)
            squares += torch.stack(norms).to(squares.device).square().sum()
        if sharded:
            dist.all_reduce(squares, group=self._mpu.data.process_group)
        dist.all_reduce(squares, group=self._mpu.model.process_group)
        return squares.sqrt()


class FlatOptimizerView(OptimizerView):
    """Common base of `DeepSpeedZeroOptimizer` and `BF16_Optimizer`: flat fp32 masters, sharded over dp."""

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self.optimizer.optimizer
        return optimizer

    def state_names(self) -> list[str]:
        names = super().state_names()
        if names:
            self._link_states()
        return names

    def _link_states(self) -> None:
        """Let each parameter find its piece of the flat states; DeepSpeed does so after its first group's first update,
        when the other groups have no states yet."""
        self.optimizer._hp_optimizer_states_linked = False
        self.optimizer._lazy_init_hp_params_optimizer_state()

    def full_master(self, parameter: nn.Parameter) -> Tensor:
        master: Tensor = safe_get_full_fp32_param(parameter)
        return master

    def full_state(self, parameter: nn.Parameter, name: str) -> Tensor:
        state: Tensor = safe_get_full_optimizer_state(parameter, name)
        return state

    def load_masters(self, masters: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
        with torch.no_grad():
            for parameter, value in masters:
                parameter.copy_(value)
                _copy_fragment(parameter, value, state=None)

    def prepare_states(self, names: Sequence[str], step: int) -> None:
        super().prepare_states(names, step)
        if names:
            self._link_states()

    def load_state(self, parameter: nn.Parameter, name: str, value: Tensor) -> None:
        with torch.no_grad():
            _copy_fragment(parameter, value, state=name)


class LossScaledView(OptimizerView):
    """Common base of the ZeRO optimizers: a torch optimizer inside, and fp16's dynamic loss scale."""

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self.optimizer.optimizer
        return optimizer

    @property
    def loss_scale(self) -> float:
        return float(self.optimizer.loss_scale)

    def loss_scaler_state(self) -> dict[str, float]:
        scaler = self.optimizer.loss_scaler
        return {name: float(getattr(scaler, name)) for name in _LOSS_SCALER_STATE} if scaler.dynamic else {}

    def load_loss_scaler_state(self, state: Mapping[str, float]) -> None:
        if self.optimizer.loss_scaler.dynamic:
            for name, value in state.items():
                setattr(self.optimizer.loss_scaler, name, value)


class ZeroOptimizerView(LossScaledView, FlatOptimizerView):
    """`DeepSpeedZeroOptimizer`, with one all-reduce for the norm in place of one for each parameter group.

    DeepSpeed's would wait for ever where stages have different numbers of groups that are not empty. Under ZeRO-1 the
    gradients are handed over at the end of a step; under ZeRO-2 DeepSpeed's hooks take each as soon as it is there.
    """

    def __init__(self, optimizer: Any, mpu: ModelParallelUnit) -> None:
        super().__init__(optimizer, mpu)
        optimizer.scaled_global_norm = self._scaled_global_norm

    @property
    def is_offloaded(self) -> bool:
        return bool(self.optimizer.cpu_offload)

    def clear_gradients(self) -> None:
        # DeepSpeed would give a parameter that the next step leaves unused this step's gradient again, and add to it
        # where the first micro-batch leaves it unused.
        if self.is_offloaded:
            for flat in self.optimizer.single_partition_of_fp32_groups:
                flat.grad.zero_()
            for accumulated in self.optimizer.accumulated_grads_in_cpu.values():
                accumulated.zero_()

    def accumulate(self) -> None:
        if self.optimizer.use_grad_accum_attribute:
            self.optimizer.fill_grad_accum_attribute()

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        gradient: Tensor | None = self.optimizer.get_param_gradient_attribute(parameter)
        return gradient

    def add(self, parameter: Tensor, compute: Compute) -> None:
        super().add(parameter, compute)
        if self.optimizer.use_grad_accum_attribute:
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
        for group, parameters in enumerate(zero.params_in_partition):
            zero.all_grad_tensors[group] = [self.gradient_or_zeros(parameter) for parameter in parameters]
            zero.averaged_gradients[group] = zero.get_flat_partition(
                parameters,
                zero.first_offset[group],
                zero.partition_size[group],
                dtype=zero.gradient_accumulation_dtype,
                device=_device(self.param_groups),
                param_group_idx=group,
                return_tensor_list=True,
            )
            zero.all_grad_tensors[group] = None
        for parameters in zero.bit16_groups:
            for parameter in parameters:
                parameter.grad = None
                if zero.use_grad_accum_attribute:
                    parameter.grad_accum = None

    def _scaled_global_norm(self, norm_type: int = 2) -> Tensor:
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


class Zero3OptimizerView(LossScaledView):
    """`DeepSpeedZeroOptimizer_Stage3`: parameters, masters and moments are cut into one piece for each replica.

    The norm is one all-reduce, and counts what is marked as replicated once, as under the other optimizers.
    """

    def __init__(self, optimizer: Any, mpu: ModelParallelUnit) -> None:
        super().__init__(optimizer, mpu)
        optimizer._get_norm_groups = self._norm_groups

    def _norm_groups(self) -> list[Tensor]:
        zero, gradients = self.optimizer, list[Tensor]()
        for group, parameters in enumerate(zero.fp16_groups):
            if zero.offload_optimizer:
                norms = (zero.norm_for_param_grads.get(zero.get_param_id(parameter)) for parameter in parameters)
                pieces = [torch.zeros(()) if norm is None else norm.float() for norm in norms]
            else:
                pieces = zero.averaged_gradients[group]
            gradients += [g for g, p in zip(pieces, parameters, strict=True) if not p.ds_pipe_replicated]
        return [self._norm_over_model(gradients, sharded=True)]

    @property
    def is_offloaded(self) -> bool:
        return bool(self.optimizer.offload_optimizer)

    def clear_gradients(self) -> None:
        # As above: what is not used must have no gradient.
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

    def full_frozen(self, parameter: nn.Parameter) -> Tensor:
        with GatheredParameters([parameter]):
            return parameter.detach().clone()

    def load_frozen(self, parameter: nn.Parameter, value: Tensor) -> None:
        with GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            parameter.copy_(value)

    def load_masters(self, masters: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
        zero = self.optimizer
        zero._partition_all_parameters()
        for parameter, value in masters:
            self._copy_piece(parameter, value, None)
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def prepare_states(self, names: Sequence[str], step: int) -> None:
        zero = self.optimizer
        for index, flat in enumerate(zero.fp32_partitioned_groups_flat):
            group = self.torch_optimizer.param_groups[zero.sub_group_to_group_id[index]]
            self._prepare_states_of(flat, group, names, step)

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


class BF16OptimizerView(FlatOptimizerView):
    """`BF16_Optimizer`: gradients accumulate in an fp32 buffer beside the bf16 ones."""

    def __init__(self, optimizer: Any, mpu: ModelParallelUnit) -> None:
        super().__init__(optimizer, mpu)
        self._get_grads_for_norm = optimizer.get_grads_for_norm
        optimizer.get_grads_for_norm = self._nonempty_grads_for_norm

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
        return dense or [torch.zeros(1, device=_device(self.param_groups))], expert


def view_optimizer(optimizer: Any, mpu: ModelParallelUnit) -> OptimizerView:
    """Return the view that fits what DeepSpeed made of the torch optimizer."""
    if isinstance(optimizer, BF16_Optimizer):
        return BF16OptimizerView(optimizer, mpu)
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return Zero3OptimizerView(optimizer, mpu)
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return ZeroOptimizerView(optimizer, mpu)
    assert isinstance(optimizer, torch.optim.Optimizer), f"unexpected optimizer {type(optimizer).__name__}"
    return OptimizerView(optimizer, mpu)


def _device(param_groups: Sequence[dict[str, Any]]) -> torch.device:
    device: torch.device = param_groups[0]["params"][0].device
    return device


def _copy_fragment(parameter: nn.Parameter, value: Tensor, *, state: str | None) -> None:
    """Copy the part of `value` that falls on this rank into its shard of the masters, or of an optimizer state."""
    mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is not None:
        address = mapping.lp_fragment_address
        mapping.get_hp_fragment(state).copy_(value.flatten().narrow(0, address.start, address.numel))

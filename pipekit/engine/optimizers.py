"""One view of DeepSpeed's optimizers: where gradients accumulate, what their norm is, where masters and moments lie.

Three of them occur under a pipeline. In fp32 without ZeRO it is the plain torch optimizer; in fp32 with ZeRO-1, and in
fp16, `DeepSpeedZeroOptimizer`; in bf16 `BF16_Optimizer`. Both of the latter flatten parameters and shard the fp32
masters over the data-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn

from pipekit.engine.mpu import ModelParallelUnit
from pipekit.weight_gradients import Compute, add_gradient

# What fp16's dynamic loss scale consists of, in DeepSpeed.
_LOSS_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


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
        """What the loss is multiplied with before its backward (fp16 only; otherwise 1)."""
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
        """Return how many updates the optimizer has made."""
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

    def load_masters(self, masters: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
        """Set fp32 weights, and the low-precision weights that follow from them."""
        with torch.no_grad():
            for parameter, value in masters:
                parameter.copy_(value)

    def prepare_states(self, names: Sequence[str], step: int) -> None:
        """Create optimizer states filled with zeros, as if `step` updates had been made."""
        for group in self.torch_optimizer.param_groups:
            for parameter in group["params"]:
                state = self.torch_optimizer.state[parameter]
                for name in names:
                    state[name] = torch.zeros_like(parameter)
                if names:
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
        squares = torch.zeros((), dtype=torch.float32, device=_device(self.param_groups))
        if gradients:
            norms = torch._foreach_norm(list(gradients), 2, dtype=torch.float32)
            squares += torch.stack(norms).to(squares.device).square().sum()
        if sharded:
            dist.all_reduce(squares, group=self._mpu.data.process_group)
        dist.all_reduce(squares, group=self._mpu.model.process_group)
        return squares.sqrt()


class FlatOptimizerView(OptimizerView):
    """What `DeepSpeedZeroOptimizer` and `BF16_Optimizer` have in common: flat fp32 masters, sharded over dp."""

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


class ZeroOptimizerView(FlatOptimizerView):
    """`DeepSpeedZeroOptimizer`, with one all-reduce for the norm in place of one for each parameter group.

    DeepSpeed's would wait for ever where stages have different numbers of groups that are not empty.
    """

    def __init__(self, optimizer: Any, mpu: ModelParallelUnit) -> None:
        super().__init__(optimizer, mpu)
        optimizer.scaled_global_norm = self._scaled_global_norm

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
        gradients: list[Tensor] = []
        for group, parameters in enumerate(self.optimizer.params_in_partition):
            pieces = (g for g in self.optimizer.averaged_gradients[group] if not getattr(g, "_zero_padding", False))
            gradients += [g for g, p in zip(pieces, parameters, strict=False) if not p.ds_pipe_replicated]
        return self._norm_over_model(gradients, sharded=True)


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

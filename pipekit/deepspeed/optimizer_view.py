"""View of an optimizer of DeepSpeed: gradients, their norm, masters and moments; here of the plain torch optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn

from pipekit.deepspeed.gradient_buffers import GradientBuffers, flat_gradients
from pipekit.distributed.mpu import ModelParallelUnit
from pipekit.errors import CheckpointError
from pipekit.optimizers.table import set_rates
from pipekit.optimizers.whole_tensors import Piece
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


@dataclass(frozen=True)
class ParameterStates:
    """States of an optimizer for one parameter.

    Attributes:
        names: of those that have a number for each element of the weights.
        numbers: those that have one number, but for the count of updates.
    """

    names: Sequence[str] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)


def element_states(tensor: Tensor, state: Mapping[str, Any]) -> set[str]:
    """Names of the states with one number for each element of what the optimizer updates."""
    return {
        key
        for key, value in state.items()
        if isinstance(value, Tensor) and value.shape == tensor.shape and (key != "step" or value.ndim)
    }


class OptimizerView:
    """The plain torch optimizer: gradients in `parameter.grad`, whole moments in its state.

    Args:
        optimizer: what DeepSpeed made of the torch optimizer.
        mpu: the process groups over which norms are summed.
        takes_gradients: whether gradients accumulate in `buffers`, where this optimizer has some.

    Attributes:
        buffers: where gradients accumulate; None where that is left to autograd, or to hooks of DeepSpeed's.
        accepts: called with the step's loss before every update, on all ranks with the same one; where it returns
            False, the update is left out, as where the gradient is not finite. The host waits for the loss. None
            accepts every loss that is finite.
        norm: the norm of the last gradient, also where its update was left out; None before the first.
        state_like: makes the zeros of a state of a tensor that the optimizer updates.
    """

    def __init__(self, optimizer: Any, mpu: ModelParallelUnit, takes_gradients: bool) -> None:
        self.optimizer = optimizer
        self._mpu = mpu
        self._updated = {
            parameter for parameter in chain.from_iterable(self._parameter_groups()) if parameter.requires_grad
        }
        self.buffers = self._build_buffers() if takes_gradients else None
        self._summed_along: Tensor | None = None
        self.accepts: Callable[[float], bool] | None = None
        self.norm: Tensor | None = None
        self.state_like: Callable[[Tensor], Tensor] = torch.zeros_like

    @property
    def can_leave_out(self) -> bool:
        """True if an update is left out where `accepts` says so, whatever the gradient."""
        return True

    def _build_buffers(self) -> GradientBuffers | None:
        if self._mpu.data.size == 1:
            return None
        return GradientBuffers([each for group in self.param_groups for each in flat_gradients(group["params"])])

    def _parameter_groups(self) -> Iterable[Sequence[Tensor]]:
        """Parameters of each group of the optimizer."""
        return [group["params"] for group in self.param_groups]

    def updates(self, parameter: nn.Parameter) -> bool:
        """True if the optimizer updates a parameter: it has a master and, after the first update, states."""
        return parameter in self._updated

    @property
    def needs_whole_gradients(self) -> bool:
        """True if an update needs more of the gradients than those of the weights that it updates."""
        return False

    @property
    def loss_scale(self) -> float:
        """Factor of the loss before its backward (fp16 only; otherwise 1)."""
        return 1.0

    @property
    def may_overflow(self) -> bool:
        """True while a gradient that is not finite is nothing special: fp16's loss scale can still be lowered."""
        return False

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The torch optimizer's parameter groups."""
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        return groups

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        device: torch.device = self.param_groups[0]["params"][0].device
        return device

    def set_lr(self, lr: float, momentum: float | None = None) -> None:
        """Set the learning rate of every group, times its own factor, and the momentum where one is given."""
        set_rates(self.param_groups, lr, momentum)

    @property
    def is_sharded(self) -> bool:
        """True if each replica updates a part of the weights alone."""
        return False

    def pieces(self) -> Iterator[tuple[Tensor, list[Piece]]]:
        """Yield each tensor that the optimizer updates, and the parameters of which it holds pieces."""
        for parameter in chain.from_iterable(self._parameter_groups()):
            yield parameter, [Piece(parameter, tuple(parameter.shape), 0, 0, parameter.numel())]

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Return the accumulated gradient of a parameter."""
        buffers = self._buffers_of(parameter)
        return parameter.grad if buffers is None else buffers.gradient(parameter)

    def _buffers_of(self, parameter: Tensor) -> GradientBuffers | None:
        """Where the gradient of a parameter accumulates, unless that is elsewhere, as where no optimizer updates it."""
        return self.buffers if self.buffers is not None and parameter in self.buffers else None

    def gradient_or_zeros(self, parameter: nn.Parameter) -> Tensor:
        """Return the accumulated gradient of a parameter, which is zero from now on if there was none."""
        if (buffers := self._buffers_of(parameter)) is not None:
            return buffers.gradient_or_zeros(parameter)
        if self.gradient(parameter) is None:
            self.add(parameter, lambda: torch.zeros_like(parameter))
        gradient = self.gradient(parameter)
        assert gradient is not None
        return gradient

    def add(self, parameter: Tensor, compute: Compute) -> None:
        """Add to the accumulated gradient of a parameter what `compute` returns."""
        if (buffers := self._buffers_of(parameter)) is None:
            add_gradient(parameter, compute)
        else:
            buffers.add(parameter, compute)

    def hand_over_gradients(self) -> None:
        """Give the gradients, which are now those of the whole step and of all replicas, to the optimizer."""

    @property
    def is_offloaded(self) -> bool:
        """True if masters and moments are in host memory; DeepSpeed reduces gradients on the way there."""
        return False

    def clear_gradients(self) -> None:
        """Forget the gradients of a step that has ended."""
        if self.buffers is not None:
            self.buffers.clear()

    def loss_scaler_state(self) -> dict[str, float]:
        """Return the state of fp16's dynamic loss scale; empty in other precisions."""
        return {}

    def load_loss_scaler_state(self, state: Mapping[str, float]) -> None:
        """Set the state of fp16's dynamic loss scale; other precisions have none, and ignore it."""

    def state_names(self) -> list[str]:
        """Return the names of the per-element optimizer states, such as `exp_avg`; empty before the first step.

        Raises:
            CheckpointError: if a state has neither one number for each element of its weights, nor one in all.
        """
        names = set[str]()
        for parameter, state in self.torch_optimizer.state.items():
            names |= (own := element_states(parameter, state))
            tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
            if uneven := sorted(key for key in tensors.keys() - own if tensors[key].numel() != 1):
                raise CheckpointError(
                    f"{type(self.torch_optimizer).__name__} has the states {', '.join(uneven)}, and a checkpoint "
                    "holds only states with one number for each element of the weights, or one for each tensor; use an "
                    "optimizer such as AdamW or SGD"
                )
        return sorted(names)

    def states_by_parameter(self) -> dict[Tensor, ParameterStates]:
        """Names and numbers of the states of each parameter that the optimizer updates and has updated."""
        found = {}
        for tensor, pieces in self.pieces():
            state = self.torch_optimizer.state.get(tensor, {})
            names = element_states(tensor, state)
            others = {key: value for key, value in state.items() if isinstance(value, Tensor) and key not in names}
            numbers = {key: float(value) for key, value in others.items() if key != "step"}
            for piece in pieces:
                found[piece.parameter] = ParameterStates(sorted(names), numbers)
        return found

    def step_count(self) -> int:
        """Number of updates that the optimizer has made."""
        # DeepSpeed's FusedAdam counts in the state of one parameter alone.
        return max((int(state["step"]) for state in self.torch_optimizer.state.values() if "step" in state), default=0)

    def full_master(self, parameter: nn.Parameter) -> Tensor:
        """Return the whole fp32 weights of a parameter. All data-parallel ranks call this together."""
        return parameter.detach().float()

    def full_state(self, parameter: nn.Parameter, name: str) -> Tensor:
        """Return a whole optimizer state of a parameter. All data-parallel ranks call this together."""
        state: Tensor | None = self.optimizer.state.get(parameter, {}).get(name)
        # A parameter that has never had a gradient has none.
        return torch.zeros_like(parameter) if state is None else state

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

    def prepare_states(self, states: Mapping[nn.Parameter, ParameterStates], step: int) -> None:
        """Create optimizer states filled with zeros, as if `step` updates had been made.

        Args:
            states: those of each parameter.
            step: number of updates.
        """
        on_device = any(group.get("fused") or group.get("capturable") for group in self.torch_optimizer.param_groups)
        for tensor, pieces in self.pieces():
            held = [found for piece in pieces if (found := states.get(piece.parameter)) is not None]  # type: ignore[call-overload]
            names = {name for found in held for name in found.names}
            if not names:
                continue
            state = self.torch_optimizer.state[tensor]
            state.update({name: self.state_like(tensor) for name in names})
            for key, number in (pair for found in held for pair in found.numbers.items()):
                state[key] = torch.tensor(number, dtype=torch.float32, device=tensor.device)
            if isinstance(self.torch_optimizer, DeepSpeedCPUAdam):
                state["step"] = step
            else:
                state["step"] = torch.tensor(float(step), device=tensor.device if on_device else "cpu")

    def load_state(self, parameter: nn.Parameter, name: str, value: Tensor) -> None:
        """Set a whole optimizer state of a parameter; `prepare_states` comes first."""
        self.optimizer.state[parameter][name].copy_(value)

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        """Optimizer of torch's that updates the weights or their masters."""
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def global_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Return the 2-norm of the whole model's gradient, every tied parameter counted once.

        The gradients are already reduced over data-parallel ranks. All ranks call this together.
        """
        gradients = [p.grad for p in parameters if p.grad is not None and not getattr(p, "ds_pipe_replicated", False)]
        return self._norm_over_model(gradients)

    def sum_along(self, value: Tensor) -> None:
        """Sum a number over the model's ranks in place, with the norm of the next update: in one all-reduce."""
        self._summed_along = value

    @property
    def sums_along(self) -> bool:
        """True while a number waits for a norm; after an update, if the optimizer needed none."""
        return self._summed_along is not None

    def _norm_over_model(self, gradients: Sequence[Tensor], *, sharded: bool = False) -> Tensor:
        # Not where the masters are: on the CPU, with offload, no other rank could be reached over NCCL.
        squares = torch.zeros((), dtype=torch.float32, device=get_accelerator().current_device_name())
        if gradients:
            norms = torch._foreach_norm(list(gradients), 2, dtype=torch.float32)
            squares += torch.stack(norms).to(squares.device).square().sum()
        if sharded and self._mpu.data.size > 1:
            dist.all_reduce(squares, group=self._mpu.data.process_group)
        along, self._summed_along = self._summed_along, None
        sums = squares[None] if along is None else torch.stack([squares, along])
        dist.all_reduce(sums, group=self._mpu.model.process_group)
        self.norm = norm = sums[0].sqrt()
        if along is None:
            return norm
        along.copy_(sums[1])
        if self.accepts is not None and not self.accepts(float(along)):
            return torch.full_like(norm, math.inf)
        # A loss that is not finite has no update, even where its gradient is.
        return torch.where(sums[1].isfinite(), norm, math.inf)


class FlatOptimizerView(OptimizerView):
    """Common base of `DeepSpeedZeroOptimizer` and `BF16_Optimizer`: flat fp32 masters, sharded over dp."""

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self.optimizer.optimizer
        return optimizer

    @property
    def is_sharded(self) -> bool:
        return True

    def pieces(self) -> Iterator[tuple[Tensor, list[Piece]]]:
        for group, parameters in zip(self.torch_optimizer.param_groups, self._parameter_groups(), strict=True):
            yield group["params"][0], [_piece_of(parameter) for parameter in parameters]

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

    def prepare_states(self, states: Mapping[nn.Parameter, ParameterStates], step: int) -> None:
        super().prepare_states(states, step)
        if any(found.names for found in states.values()):
            self._link_states()

    def load_state(self, parameter: nn.Parameter, name: str, value: Tensor) -> None:
        with torch.no_grad():
            _copy_fragment(parameter, value, state=name)


class LossScaledView(OptimizerView):
    """Common base of the ZeRO optimizers: a torch optimizer inside, and fp16's dynamic loss scale."""

    def __init__(self, optimizer: Any, mpu: ModelParallelUnit, takes_gradients: bool) -> None:
        super().__init__(optimizer, mpu, takes_gradients)
        if takes_gradients and optimizer.loss_scaler.dynamic:
            # DeepSpeed would raise an exception in the middle of a step; a run ends with an error that says where.
            optimizer.loss_scaler.raise_error_at_min_scale = False

    @property
    def may_overflow(self) -> bool:
        scaler = self.optimizer.loss_scaler
        return bool(scaler.dynamic and scaler.cur_scale > scaler.min_scale)

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


def _piece_of(parameter: Tensor) -> Piece:
    """The piece of a parameter that falls on this rank's shard of its group's masters."""
    mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return Piece(parameter, tuple(parameter.shape), 0, 0, 0)
    here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
    return Piece(parameter, tuple(parameter.shape), here.start, there.start, there.numel)


def _copy_fragment(parameter: nn.Parameter, value: Tensor, *, state: str | None) -> None:
    """Copy the part of `value` that falls on this rank into its shard of the masters, or of an optimizer state."""
    mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is not None:
        address = mapping.lp_fragment_address
        mapping.get_hp_fragment(state).copy_(value.flatten().narrow(0, address.start, address.numel))

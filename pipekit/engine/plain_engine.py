"""The engine of a plain module: DeepSpeed's own training step, with checkpoints that know no layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from pipekit.deepspeed.patches import asked_mpu, linear_function, number_from_zero
from pipekit.distributed.mpu import ModelParallelUnit
from pipekit.distributed.processes import raise_together
from pipekit.engine.base_engine import BaseEngine
from pipekit.engine.logical_model import LogicalModel, WholeModel
from pipekit.errors import PipekitError


class PlainEngine(BaseEngine, DeepSpeedEngine):  # type: ignore[misc]
    """Trains any `nn.Module` under ZeRO 0 to 3: `loss = engine(batch)`, `engine.backward(loss)`, `engine.step()`.

    It is DeepSpeed's engine, with three differences. Checkpoints are pipekit's own, which any number of replicas and
    any ZeRO stage read; a step whose gradients are not finite is skipped and counted, also in fp32 without ZeRO; and
    several engines may train at once, even on a loss that went through the module of another one.

    Args:
        module: the whole model, the same on every rank.
        mpu: the process groups; engines may share them. All ranks are replicas.
        deepspeed_config: DeepSpeed's configuration.
        **settings: the other arguments of `BaseEngine`.
    """

    # Set by DeepSpeed's engine.
    micro_steps: int

    _takes_gradients = False
    _has_last_gradients = False
    """True between the backward of a step's last micro-batch and the step."""

    def __init__(
        self, module: nn.Module, mpu: ModelParallelUnit, *, deepspeed_config: Mapping[str, Any], **settings: Any
    ) -> None:
        if not any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
            number_from_zero()
        for parameter in module.parameters():
            # In a gradient norm each counts once.
            parameter.ds_pipe_replicated = False  # type: ignore[attr-defined]
        self._logical = WholeModel(module)
        with linear_function(F.linear):
            super().__init__(module, mpu, deepspeed_config=deepspeed_config, **settings)
            self._own_linear = F.linear

    @property
    def logical(self) -> LogicalModel:
        return self._logical

    @contextmanager
    def _asked_by_deepspeed(self) -> Iterator[None]:
        """Give DeepSpeed's functions, which ask `mpu` for the replicas, an mpu of DeepSpeed's kind inside the block."""
        unit = self.mpu
        self.mpu = self._deepspeed_mpu  # type: ignore[assignment]
        try:
            with asked_mpu(self._deepspeed_mpu):
                yield
        finally:
            self.mpu = unit

    def deepspeed_io(self, dataset: Any, *args: Any, **options: Any) -> Any:
        """Return a loader of this replica's share of a dataset, in micro-batches, as DeepSpeed makes it."""
        if self.device.type == "cpu" and len(args) < 3:
            # Pinned memory speeds up copies to a device, and there is none.
            options.setdefault("pin_memory", False)
        with self._asked_by_deepspeed():
            return super().deepspeed_io(dataset, *args, **options)

    def allreduce_gradients(self, *args: Any, **options: Any) -> None:
        """Sum the gradients over the replicas, as DeepSpeed's engine asks for it."""
        with self._asked_by_deepspeed():
            super().allreduce_gradients(*args, **options)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        with linear_function(self._own_linear):
            return super().forward(*inputs, **options)

    def backward(self, loss: Tensor, *args: Any, **options: Any) -> Any:
        """Do the backward of a loss; the last one of a step also reduces the gradients."""
        if not self.view.param_groups:
            raise PipekitError(
                "this engine has no optimizer and only evaluates; give initialize(optimizer=...), or an optimizer in "
                "the configuration"
            )
        is_last = self.zero_optimization_stage() > 0 and self.is_gradient_accumulation_boundary()
        if is_last and self._has_last_gradients and not self.inside_no_sync_ctxt:
            raise PipekitError(
                "backward was called twice before step, and under ZeRO the first gradients would be lost; add the "
                "losses, and call engine.backward once"
            )
        with linear_function(self._own_linear):
            result = super().backward(loss, *args, **options)
        self._has_last_gradients = is_last and not self.inside_no_sync_ctxt
        return result

    def _backward_prologue(self) -> None:
        # The loss of another engine goes through this one, whose weights must not get gradients from it.
        if not self._running_engine_backward:
            if not any(parameter.requires_grad for parameter in self.module.parameters()):
                return
            if not self._support_torch_style_backward:
                raise PipekitError(
                    "a loss went back through this engine without its backward: call engine.backward(loss), or, if "
                    "another engine did, switch its module off meanwhile: engine.module.requires_grad_(False)"
                )
        super()._backward_prologue()

    def step(self, lr_kwargs: Any = None) -> None:
        self._has_last_gradients = False
        before = self.global_steps
        super().step(lr_kwargs)
        if self.global_steps > before:
            self.view.clear_gradients()

    def save_checkpoint(self, *args: Any, **options: Any) -> bool:
        self._check_boundary("save_checkpoint")
        return super().save_checkpoint(*args, **options)

    def load_checkpoint(self, *args: Any, **options: Any) -> tuple[str | None, dict[str, Any] | None]:
        self._check_boundary("load_checkpoint")
        return super().load_checkpoint(*args, **options)

    @property
    def boundary_is_set(self) -> bool:
        """True where `set_gradient_accumulation_boundary`, and not their number, says which micro-batch ends a step."""
        return self._is_gradient_accumulation_boundary is not None

    def _check_boundary(self, function: str) -> None:
        is_counted = not self.boundary_is_set and self.managed_gradient_accumulation()
        total = self.gradient_accumulation_steps()
        done = self.micro_steps % total if is_counted else 0
        error = None
        if done:
            error = PipekitError(
                f"{function} was called between the micro-batches of a step, after {done} of {total}, and a "
                f"checkpoint holds no gradients; call it where engine.micro_steps is a multiple of {total}"
            )
        raise_together(error)

"""The engine of a plain module: DeepSpeed's own training step, with checkpoints that know no layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from pipekit.deepspeed.optimizer_view import whole_shape
from pipekit.deepspeed.patches import asked_mpu, linear_function, number_from_zero
from pipekit.distributed.mpu import ModelParallelUnit
from pipekit.distributed.processes import raise_together
from pipekit.engine.base_engine import BaseEngine
from pipekit.engine.logical_model import LogicalModel, WholeModel, persistent_buffers
from pipekit.errors import ConfigError, PipekitError


class PlainEngine(BaseEngine, DeepSpeedEngine):  # type: ignore[misc]
    """Trains any `nn.Module` under ZeRO 0 to 3: `loss = engine(batch)`, `engine.backward(loss)`, `engine.step()`.

    It is DeepSpeed's engine, and does what that does. Checkpoints are pipekit's own, which any number of replicas and
    any ZeRO stage read; in fp32 without ZeRO too, a step whose gradients are not finite is skipped and counted; and
    several engines may train at once, also on a loss that went through the module of another one.

    Args:
        module: the whole model, the same on every rank.
        mpu: the process groups; engines may share them. All ranks are replicas.
        deepspeed_config: DeepSpeed's configuration.
        **settings: the other arguments of `BaseEngine`.
    """

    _takes_gradients = False

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
        """Let `mpu` be inside what functions of DeepSpeed's ask for replicas."""
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
            # There is no other memory for which a page would be locked.
            options.setdefault("pin_memory", False)
        with self._asked_by_deepspeed():
            return super().deepspeed_io(dataset, *args, **options)

    def allreduce_gradients(self, *args: Any, **options: Any) -> None:
        with self._asked_by_deepspeed():
            super().allreduce_gradients(*args, **options)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        with linear_function(self._own_linear):
            return super().forward(*inputs, **options)

    def backward(self, loss: Tensor, *args: Any, **options: Any) -> Any:
        if not self.view.param_groups:
            raise PipekitError(
                "this engine has no optimizer, and evaluates alone; give initialize(optimizer=...), or an optimizer in "
                "the configuration"
            )
        with linear_function(self._own_linear):
            return super().backward(loss, *args, **options)

    def _backward_prologue(self) -> None:
        # The loss of another engine goes through this one, whose weights are not to get gradients of it.
        if self._running_engine_backward or any(parameter.requires_grad for parameter in self.module.parameters()):
            super()._backward_prologue()

    def step(self, lr_kwargs: Any = None) -> None:
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

    def _check_boundary(self, function: str) -> None:
        is_counted = self._is_gradient_accumulation_boundary is None and self.managed_gradient_accumulation()
        total = self.gradient_accumulation_steps()
        done = self.micro_steps % total if is_counted else 0
        error = None
        if done:
            error = PipekitError(
                f"{function} stands between the micro-batches of a step, after {done} of {total}, and a checkpoint "
                f"holds no gradients; call it where engine.micro_steps is a multiple of {total}"
            )
        raise_together(error)


def check_plain_module(
    module: nn.Module, settings: Mapping[str, Any], parameters: Iterable[Any], optimizer: Any
) -> None:
    """Raise a ConfigError where a module, a configuration and an optimizer cannot run, or not be saved.

    Args:
        module: the model.
        settings: DeepSpeed's configuration.
        parameters: what is to be trained, or groups of it.
        optimizer: a torch optimizer, a function that returns one, or None.

    Example:
        >>> check_plain_module(nn.Linear(1, 1).double(), {}, [], None)
        Traceback (most recent call last):
        ...
        pipekit.errors.ConfigError: weight is float64, and checkpoints hold fp32; try model.float()
    """
    named = dict(module.named_parameters())
    for name, parameter in named.items():
        if parameter.dtype == torch.float64 or parameter.is_complex():
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise ConfigError(f"{name} is {dtype}, and checkpoints hold fp32; try model.float()")
        if not getattr(parameter, "allreduce", True):
            raise ConfigError(f"{name} belongs to an expert, and expert parallelism is not available yet")
    for name, buffer in persistent_buffers(module):
        if not isinstance(buffer, Tensor):
            raise ConfigError(
                f"{name} is {type(buffer).__name__} and no tensor, so that no checkpoint can hold it; register it as "
                "a buffer, or keep it in client_state"
            )
    sections = ("hybrid_engine", "tensor_parallel", "expert_parallel", "autotuning", "pipeline")
    for key in sections:
        if settings.get(key):
            raise ConfigError(f"{key}: has no effect on a plain module; remove it")
    if settings.get("zero_optimization", {}).get("zenflow"):
        raise ConfigError("zero_optimization.zenflow: ZenFlow brings optimizers of its own; remove it")
    groups = [*parameters, *(optimizer.param_groups if isinstance(optimizer, torch.optim.Optimizer) else ())]
    known = set(named.values())
    for group in groups:
        for parameter in group["params"] if isinstance(group, dict) else [group]:
            if parameter not in known:
                raise ConfigError(
                    f"the optimizer updates a tensor of shape {tuple(parameter.shape)} that is no parameter of the "
                    f"{type(module).__name__}; register it there, or give it an optimizer of its own"
                )


def check_evaluation(settings: Mapping[str, Any]) -> None:
    """Raise a ConfigError where a configuration needs an optimizer, and there is none.

    Example:
        >>> check_evaluation({"zero_optimization": {"stage": 1}})
        Traceback (most recent call last):
        ...
        pipekit.errors.ConfigError: zero_optimization.stage=1 shards an optimizer, and there is none; give optimizer=...
    """
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    if stage in (1, 2):
        raise ConfigError(
            f"zero_optimization.stage={stage} shards an optimizer, and there is none; give "
            'optimizer=torch.optim.AdamW(model.parameters()), or "optimizer": {"type": "AdamW", "params": {"lr": '
            "1e-4}} in the configuration; to evaluate alone, try stage 0 or 3"
        )
    if not stage and settings.get("bf16", settings.get("bfloat16", {})).get("enabled"):
        raise ConfigError(
            "bf16 without an optimizer needs zero_optimization.stage=3; or evaluate model.bfloat16() without bf16"
        )


def check_same_on_all_ranks(module: nn.Module, settings: Mapping[str, Any]) -> None:
    """Compare the parameters and the configuration of all ranks, which call this together.

    Raises:
        ConfigError: on every rank, with the first parameter or key that differs from rank 0's.
    """
    mine = {f"parameter {name}": _describe(parameter) for name, parameter in module.named_parameters()}
    mine.update({f"configuration key {key}": str(value) for key, value in settings.items()})
    everyones: list[dict[str, str]] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    first = everyones[0]
    for rank, theirs in enumerate(everyones):
        differing = [name for name in {**first, **theirs} if first.get(name) != theirs.get(name)]
        if differing:
            name = differing[0]
            raise ConfigError(
                f"{name} is {first.get(name, 'missing')} on rank 0 and {theirs.get(name, 'missing')} on rank {rank}; "
                "give all ranks the same model and the same configuration"
            )


def _describe(parameter: nn.Parameter) -> str:
    trains = "trained" if parameter.requires_grad else "frozen"
    return f"{str(parameter.dtype).removeprefix('torch.')} {whole_shape(parameter)}, {trains}"

"""Base class of all engines: construction on DeepSpeed's, gradient norms, skipped steps, checkpoints and `destroy`."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.comm.utils import get_local_rank_from_launcher
from deepspeed.runtime.config import DeepSpeedConfig
from torch import Tensor, nn

from deepspeed import set_optimizer_flags
from pipekit.config import Config
from pipekit.deepspeed.cpu_adam import offloads_optimizer, with_cpu_adam
from pipekit.deepspeed.mpu import DeepSpeedMPU
from pipekit.deepspeed.optimizers import view_optimizer
from pipekit.deepspeed.patches import clean_globals, drop_process_groups, import_muon_uncompiled, use_joined_processes
from pipekit.deepspeed.state_files import StateFiles, take_nvme_path
from pipekit.deepspeed.weight_partitioner import free_shapes
from pipekit.distributed.mpu import ModelParallelUnit
from pipekit.engine.consistency_check import check_consistency
from pipekit.engine.late_number import LateNumber
from pipekit.engine.logical_model import LogicalModel
from pipekit.engine.shared_tensors import SharedTensors
from pipekit.errors import ConfigError, PipekitError
from pipekit.optimizers.whole_tensors import SharedOptimizer
from pipekit.tensors.host_memory import keep_freed_memory, return_freed_memory

OptimizerBuilder = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

GradientOf = Callable[[nn.Parameter], Tensor | None]
"""Returns the gradient of a parameter, or None. All data-parallel ranks call it together."""

GradientObserver = Callable[[GradientOf], None]


class BaseEngine:
    """The part of an engine that does not depend on the form of a training step.

    It comes before one of DeepSpeed's engines in the bases of a class.

    Args:
        module: the model, or this rank's stages of it.
        mpu: the process groups.
        deepspeed_config: DeepSpeed's configuration.
        build_optimizer: called with the trainable parameters; returns a torch optimizer. None if the configuration or
            `deepspeed_args` name one.
        **deepspeed_args: further arguments of DeepSpeed's engine.

    Raises:
        ConfigError: if DeepSpeed refuses the configuration.
    """

    # Set by DeepSpeed's engine.
    module: Any
    device: torch.device
    optimizer: Any
    lr_scheduler: Any
    config: Any
    global_steps: int
    global_samples: int
    skipped_steps: int
    train_batch_size: Callable[[], int]
    gradient_clipping: Callable[[], float]
    zero_grad: Callable[[], None]
    torch_autocast_z0_gradscaler: Any
    _global_grad_norm: Any

    _is_destroyed = False

    _takes_gradients = True
    """False if DeepSpeed's hooks accumulate and reduce the gradients, rather than pipekit."""

    model_config: Config | None = None
    """Configuration of the model, which checkpoints hold besides DeepSpeed's configuration."""

    on_gradients: GradientObserver | None = None
    """Called before every update, when the gradients of the step are reduced over all replicas. Its argument is a
    function that returns a parameter's gradient in fp32 or the parameter's type; for a tensor that is sharded over
    tensor-parallel ranks, this rank's shard. In fp16 the gradients are multiplied by `view.loss_scale`."""

    def __init__(
        self,
        module: nn.Module,
        mpu: ModelParallelUnit,
        *,
        deepspeed_config: Mapping[str, Any],
        build_optimizer: OptimizerBuilder | None = None,
        **deepspeed_args: Any,
    ) -> None:
        config, nvme_path = take_nvme_path(deepspeed_config)
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        device = next(iter(parameters), torch.empty(0)).device
        files = None if nvme_path is None else StateFiles(nvme_path)
        if files is not None:
            # What passes through memory on its way to a file must not stay this process's.
            return_freed_memory()
        elif device.type == "cpu":
            keep_freed_memory()
        optimizer = build_optimizer(parameters) if build_optimizer is not None else None
        if optimizer is not None and offloads_optimizer(config):
            optimizer = with_cpu_adam(optimizer)
        use_joined_processes()
        import_muon_uncompiled()
        self._deepspeed_mpu = DeepSpeedMPU(mpu)
        try:
            parsed = DeepSpeedConfig(config, self._deepspeed_mpu)
            set_optimizer_flags(parsed, module)
            free_shapes(module)
            with clean_globals(), nullcontext() if files is None else files.placing():
                super().__init__(  # type: ignore[call-arg]
                    # Unless told, DeepSpeed takes the local rank for the number of the GPU.
                    args=SimpleNamespace(device_rank=_device_index(device)),
                    model=module,
                    mpu=self._deepspeed_mpu,
                    config=config,
                    config_class=parsed,
                    **{"optimizer": optimizer, "model_parameters": parameters, **deepspeed_args},
                )
        except (AssertionError, ValueError) as error:
            raise ConfigError(f"DeepSpeed refuses the configuration: {error}") from error
        self.mpu = mpu
        mpu.register_engine()
        self.view = view_optimizer(self.optimizer, mpu, takes_gradients=self._takes_gradients)
        if files is not None and self.view.is_offloaded:
            files.hold(self.optimizer)
            self.view.state_like = files.state_like
        if isinstance(self.view.torch_optimizer, SharedOptimizer):
            self.view.torch_optimizer.tensors = SharedTensors(self.view, mpu, self.logical.tensor_group)

    def _do_args_sanity_check(self, args: Any) -> None:
        # DeepSpeed's wants a local rank in the environment, which a process without a launcher does not have.
        pass

    def _configure_with_arguments(self, args: Any, mpu: Any) -> None:
        self.local_rank = get_local_rank_from_launcher()

    @property
    def logical(self) -> LogicalModel:
        """Logical model: the tensors under the names that checkpoints use."""
        raise NotImplementedError

    @property
    def grad_norm(self) -> float:
        """The 2-norm of the last step's gradient, before clipping; infinite if the step was skipped."""
        return self.late_grad_norm.read()

    @property
    def late_grad_norm(self) -> LateNumber:
        """`grad_norm` as a number that can be read without waiting for later work on the device."""
        norm = self._global_grad_norm
        return LateNumber(float("nan") if norm is None else norm)

    def set_lr(self, lr: float, momentum: float | None = None) -> None:
        """Set the learning rate of the next step, and the momentum if given."""
        self.view.set_lr(lr, momentum)

    def _take_model_step(self, lr_kwargs: Any) -> None:
        if isinstance(self.optimizer, torch.optim.Optimizer) and self.torch_autocast_z0_gradscaler is None:
            self._global_grad_norm = self.view.global_norm(self.module.parameters())
            if not torch.isfinite(self._global_grad_norm):
                self._skip_update()
                return
        super()._take_model_step(lr_kwargs)  # type: ignore[misc]

    def _skip_update(self) -> None:
        self.zero_grad()
        self._global_grad_norm = torch.tensor(float("inf"))
        self.skipped_steps += 1
        self.global_steps += 1
        self.global_samples += self.train_batch_size()

    def clip_fp32_gradients(self) -> None:
        """Clip by the norm of the whole model's gradient; DeepSpeed would use only that of the first stage."""
        if self.torch_autocast_z0_gradscaler is not None:
            self._global_grad_norm = self.view.global_norm(self.module.parameters())
        coefficient = (self.gradient_clipping() / (self._global_grad_norm + 1e-6)).clamp(max=1.0)
        gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, coefficient)

    def destroy(self) -> None:
        """Free the engine's process groups, unless another engine uses them. All ranks call this together.

        The module communicates through these groups, so it cannot be used afterwards.
        """
        if self._is_destroyed:
            return
        self._is_destroyed = True
        super().destroy()  # type: ignore[misc]
        self.mpu.release_engine()
        drop_process_groups(self)
        gc.collect()

    def __del__(self) -> None:
        # DeepSpeed's calls `destroy`, for which all ranks must come together.
        if not self._is_destroyed:
            with suppress(Exception):
                super().destroy()  # type: ignore[misc]

    def check_replicas(self) -> None:
        """Check that all ranks that hold the same tensor hold the same bits. All ranks call this together.

        Raises:
            ReplicaError: on every rank, with the tensors that differ and the ranks on which they differ.
        """
        check_consistency(self.logical, self.mpu, step=self.global_steps)

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Save a checkpoint to a folder; any layout can read it. All ranks call this together.

        Args:
            save_dir: the folder, which every rank can see.
            tag: name of the checkpoint; by default it is made from the step.
            client_state: further values to keep: numbers, texts, lists and dicts.
            save_latest: whether to point `latest` to the checkpoint.
            exclude_frozen_parameters: not supported.
        """
        from pipekit.engine.engine_state import save_engine

        if exclude_frozen_parameters:
            raise PipekitError("save_checkpoint always writes frozen parameters; leave exclude_frozen_parameters out")
        save_engine(self, Path(save_dir), name=tag, client_state=client_state or {}, update_latest=save_latest)
        return True

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Load a checkpoint that `save_checkpoint` or a run wrote under any layout.

        Args:
            load_dir: the folder that the checkpoint was saved to.
            tag: name of the checkpoint; by default the newest.
            load_module_strict: must not be False.
            load_optimizer_states: whether to load the optimizer's states.
            load_lr_scheduler_states: whether to load the learning-rate scheduler's state.
            load_module_only: whether to load only the weights.
            custom_load_fn: not supported.

        Returns:
            The checkpoint's path and the `client_state` it holds; None and None if the folder holds no checkpoint.
        """
        from pipekit.engine.engine_state import load_engine

        if not load_module_strict:
            raise PipekitError(
                "load_checkpoint refuses a checkpoint of another model; leave load_module_strict out, and change the "
                "module to what was saved"
            )
        if custom_load_fn is not None:
            raise PipekitError("load_checkpoint takes no custom_load_fn; change the weights after loading")
        return load_engine(
            self,
            Path(load_dir),
            name=tag,
            optimizer_states=load_optimizer_states and not load_module_only,
            scheduler_state=load_lr_scheduler_states and not load_module_only,
        )


def _device_index(device: torch.device) -> int:
    # A model that is still on the CPU goes to the current GPU.
    index = device.index if device.type != "cpu" else get_accelerator().current_device()
    return int(index or 0)

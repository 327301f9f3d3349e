"""Replacements at run time of functions of DeepSpeed 0.19.8 and torch 2.13, each with its reason."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from deepspeed.comm.utils import get_local_rank_from_launcher
from deepspeed.constants import default_pg_timeout
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.activation_checkpointing import checkpointing
from deepspeed.runtime.pipe import p2p
from deepspeed.runtime.zero import parameter_offload, stage3, stage_1_and_2
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import groups
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.hooks import RemovableHandle

import deepspeed
from pipekit.distributed.processes import bind_gpu, join_processes


def use_joined_processes(port: int | None = None) -> None:
    """Have DeepSpeed talk through the process groups of torch; it joins the processes where that has not been done.

    On GPUs the one of this process is made the current one, unless the script has chosen another than the first.

    On CPUs DeepSpeed would compile a shared-memory collective at its first use. That takes most of a minute, and a run
    that is killed meanwhile leaves it locked. It serves inference; training does not call it.

    Args:
        port: the port of rank 0, where the environment does not name one.
    """
    # The attribute `deepspeed.comm.torch` is torch itself, not the module of that name.
    module: Any = import_module("deepspeed.comm.torch")
    if get_accelerator().device_name() == "cpu":
        module.build_shm_op = lambda: None
    for method in vars(module.TorchBackend).values():
        # The world of the moment when DeepSpeed was imported, which may have ended; None is that of the call.
        if any(isinstance(default, ProcessGroup) for default in getattr(method, "__defaults__", None) or ()):
            method.__defaults__ = tuple(None if isinstance(d, ProcessGroup) else d for d in method.__defaults__)
    if get_accelerator().device_name() == "cuda":
        _bind_gpu_and_join(get_local_rank_from_launcher())
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(verbose=False, **({} if port is None else {"distributed_port": port}))


def _bind_gpu_and_join(local_rank: int) -> None:
    if not dist.is_initialized() and local_rank >= torch.cuda.device_count():
        # DeepSpeed would take the local rank for the number of a GPU, although this process sees fewer.
        join_processes(device="cuda", timeout_s=default_pg_timeout.total_seconds(), local_rank=local_rank)
    elif torch.cuda.current_device() == 0:
        # Scripts for DeepSpeed leave it to its engine, before which layers would be built on the first GPU by all.
        bind_gpu(local_rank)


def import_muon_uncompiled() -> None:
    """Import the Muon optimizer of DeepSpeed 0.19.8 without torch's compiler, unless it has been imported.

    DeepSpeed imports it with the first engine under ZeRO, and decorates functions of it with `torch.compile`. That
    imports six hundred modules of the compiler, a second of a CPU or more, beside `torch._dynamo`, which torch's own
    optimizers import. Muon makes the same updates uncompiled.
    """
    name = "deepspeed.runtime.zero.muon.original_muon"
    if name in sys.modules:
        return
    compile_function = torch.compile
    torch.compile = lambda function, **options: function  # type: ignore[assignment]
    try:
        import_module(name)
    finally:
        torch.compile = compile_function


def number_from_zero() -> None:
    """Number modules and parameters of ZeRO-3 from zero again.

    DeepSpeed counts them through all engines of a process, and compares what ranks have.
    """
    parameter_offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][:] = [0]
    Init.param_id = 0


@contextmanager
def linear_function(function: Callable[..., Tensor]) -> Iterator[None]:
    """Let `F.linear` be a function inside, and what it was before outside.

    ZeRO-3 puts a function of its own in its place, for all that the process does from then on.
    """
    before = F.linear
    F.linear = function
    try:
        yield
    finally:
        F.linear = before


def replace_norm(optimizer: Any, norm: Callable[..., Any]) -> None:
    """Have an optimizer of DeepSpeed take the norm of the gradients, or the gradients for it, from a function of ours.

    That of ZeRO-1 and 2 makes one all-reduce for each parameter group, and waits for ever where stages have different
    numbers of groups that are not empty. That of ZeRO-3 counts tied and replicated parameters on every rank. That of
    BF16_Optimizer stops on a stage that owns none of its parameters.
    """
    names = ("scaled_global_norm", "_get_norm_groups", "get_grads_for_norm")
    kinds = (stage_1_and_2.DeepSpeedZeroOptimizer, stage3.DeepSpeedZeroOptimizer_Stage3, bf16_optimizer.BF16_Optimizer)
    setattr(optimizer, next(name for name, kind in zip(names, kinds, strict=True) if isinstance(optimizer, kind)), norm)


def remove_gradient_hooks(optimizer: Any) -> None:
    """Remove the hooks by which an optimizer of DeepSpeed accumulates gradients in tensors of its own."""
    for hook in optimizer._grad_acc_hooks:
        hook.remove()
    optimizer._grad_acc_hooks.clear()


def replace_global_norm(optimizer: Any, norm: Callable[..., Tensor]) -> None:
    """Have a BF16_Optimizer take the norm over all ranks from a function of ours, called as DeepSpeed's own is.

    Its `step` finds that function among the globals of its module; this optimizer gets a `step` with others.
    """
    step = bf16_optimizer.BF16_Optimizer.step.__wrapped__
    step = FunctionType(step.__code__, {**step.__globals__, "get_global_norm_of_tensors": norm}, argdefs=(None,))
    optimizer.step = torch.no_grad()(MethodType(step, optimizer))


@contextmanager
def clean_globals() -> Iterator[None]:
    """Keep an engine that is built inside out of the globals of DeepSpeed's modules.

    The grid of DeepSpeed's own messages and the mpu of its activation checkpointing are not used here, and may be those
    of an engine of DeepSpeed's. The mpu of `deepspeed.utils.groups` would be taken for its own by an engine without one
    that is built later. ZeRO-3 has the whole model on its stack between forwards, and would keep it for ever: a weak
    reference takes its place.
    """
    found = p2p._grid, checkpointing.mpu, groups.mpu
    stack = parameter_offload.FWD_MODULE_STACK
    before = len(stack)

    def forget(dead: Any) -> None:
        stack[:] = [module for module in stack if module is not dead]

    try:
        yield
    except BaseException:
        del stack[before:]
        raise
    finally:
        stack[before:] = [weakref.proxy(module, forget) for module in stack[before:]]
        p2p._grid, checkpointing.mpu, groups.mpu = found


@contextmanager
def asked_mpu(mpu: Any) -> Iterator[None]:
    """Let functions of `deepspeed.utils.groups` answer from an mpu inside, and from the one before outside."""
    before = groups.mpu
    groups.mpu = mpu
    try:
        yield
    finally:
        groups.mpu = before


def drop_process_groups(engine: Any) -> None:
    """Drop what an engine that has ended keeps of process groups: a group lives as long as one refers to it."""
    optimizer, module = engine.optimizer, engine.module
    owners = [engine, optimizer, getattr(optimizer, "parameter_offload", None), *module.modules()]
    for owner in owners:
        for name, value in list(vars(owner).items()) if owner is not None else ():
            kept = value if isinstance(value, (list, tuple)) else [value]
            if any(isinstance(item, ProcessGroup) for item in kept):
                vars(owner)[name] = None
    for parameter in module.parameters():
        # ZeRO-3 gives them methods, which refer to groups.
        for name, value in list(vars(parameter).items()):
            if isinstance(value, ProcessGroup) or callable(value):
                delattr(parameter, name)
    getattr(module, "tied_comms", {}).clear()


def _cache_in_coordinator() -> None:
    """Keep what ZeRO-3 remembers of a coordinator in it: a cache of the class holds all engines for ever."""
    name = "_PartitionedParameterCoordinator__params_to_release"
    timed = getattr(PartitionedParameterCoordinator, name)
    # Within a wrapper that does not name it.
    cached = next(cell.cell_contents for cell in timed.__closure__ if hasattr(cell.cell_contents, "cache_clear"))

    def params_to_release(coordinator: Any, module: Any, step: int) -> set[int]:
        known = vars(coordinator).setdefault("_known_params_to_release", {})
        if (module, step) not in known:
            known[module, step] = cached.__wrapped__(coordinator, module, step)
        released: set[int] = known[module, step]
        return released

    setattr(PartitionedParameterCoordinator, name, params_to_release)


def _register_gradient_hook(parameter: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Register a hook of a ZeRO optimizer, which the parameter does not keep.

    A hook that refers to its parameter is a cycle that Python's collector cannot see. The optimizer keeps the handle.
    """
    weak = weakref.ref(hook)

    def call(parameter: Tensor) -> None:
        alive = weak()
        if alive is not None:
            alive(parameter)

    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(call)  # type: ignore[no-untyped-call]
    handle.hook = hook  # type: ignore[attr-defined]
    return handle


_cache_in_coordinator()
for _optimizer in (stage_1_and_2, stage3, bf16_optimizer):
    _optimizer.register_grad_hook = _register_gradient_hook

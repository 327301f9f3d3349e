"""Joining the other processes of a run, and agreeing with them."""

from __future__ import annotations

import contextlib
import warnings
from datetime import timedelta
from importlib import import_module
from typing import Literal

import torch
import torch.distributed as dist

from pipekit.errors import CommunicationError, LaunchError, PipekitError


def join_processes(*, device: Literal["cpu", "cuda"], timeout_s: float, local_rank: int) -> torch.device:
    """Join the run that the environment describes (`RANK`, `WORLD_SIZE`, `MASTER_ADDR`, ...), and return this rank's
    device.

    Args:
        device: `cuda` talks over NCCL, `cpu` over gloo.
        timeout_s: no wait for another rank lasts longer.
        local_rank: index of this process on its machine, which picks its GPU.

    Raises:
        CommunicationError: if the others do not come within `timeout_s`.
        LaunchError: if rank 0's port is in use.
    """
    import deepspeed

    if device == "cuda":
        # Some launchers show each process its own GPU only.
        local_rank %= torch.cuda.device_count()
        torch.cuda.set_device(local_rank)
    else:
        _leave_shm_op_out()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            deepspeed.init_distributed(
                dist_backend="nccl" if device == "cuda" else "gloo",
                auto_mpi_discovery=False,
                verbose=False,
                timeout=timedelta(seconds=timeout_s),
            )
    except (RuntimeError, dist.DistStoreError) as error:
        first_line = str(error).strip().splitlines()[0]
        if "EADDRINUSE" in first_line:
            raise LaunchError(
                f"rank 0 cannot listen for the other processes, since another program uses its port: {first_line}; set "
                "MASTER_PORT to a free one for all of them"
            ) from error
        raise CommunicationError(
            f"the processes of the run did not find each other within {timeout_s:g} s: {first_line}; see that all of "
            "them were started, with the same MASTER_ADDR and MASTER_PORT"
        ) from error
    return torch.device(device, local_rank) if device == "cuda" else torch.device("cpu")


def _leave_shm_op_out() -> None:
    """Keep DeepSpeed from compiling a shared-memory collective for CPUs at its first use.

    That takes most of a minute, and a run that is killed meanwhile leaves it locked. It serves inference; training does
    not call it.
    """
    # The attribute `deepspeed.comm.torch` is torch itself, not the module of that name.
    import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]


def join_as_deepspeed() -> None:
    """Join the other processes as a DeepSpeed script does, where that has not been done yet."""
    from deepspeed.accelerator import get_accelerator

    import deepspeed

    if get_accelerator().device_name() == "cpu":
        _leave_shm_op_out()
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(verbose=False)


def leave_processes() -> None:
    """Take down the process groups, and what DeepSpeed keeps of them, so that this process can join others."""
    import deepspeed.comm

    from pipekit.distributed.mpu import forget_groups

    forget_groups()
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):
            deepspeed.comm.destroy_process_group()


def raise_together(error: Exception | None) -> None:
    """Raise on every rank if any of them has an error, so that none goes on to wait for one that has stopped.

    Every rank calls this at the same place, with its own error or None.

    Raises:
        PipekitError: of the type and with the message of the lowest rank that failed.
    """
    mine = None if error is None else (type(error), f"{error}")
    reports: list[tuple[type[Exception], str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, mine)
    for rank, report in enumerate(reports):
        if report is None:
            continue
        if error is not None and rank == dist.get_rank():
            raise error
        kind, message = report
        raise (kind if issubclass(kind, PipekitError) else PipekitError)(message)

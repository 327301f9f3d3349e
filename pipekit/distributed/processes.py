"""Joining the other processes of a run, and agreeing with them."""

from __future__ import annotations

import contextlib
import errno
import gc
import socket
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

# Its functions have the world of the moment of this import as a default, and would keep it for ever.
import torch.distributed.nn
import torch.nn.functional as F

from pipekit.distributed.messages import decode_message, encode_message
from pipekit.errors import CommunicationError, LaunchError, PipekitError

Result = TypeVar("Result")


def join_processes(
    *,
    device: Literal["cpu", "cuda"],
    timeout_s: float,
    local_rank: int,
    loopback_port: int | None = None,
    restarts: int = 0,
) -> torch.device:
    """Join the run that the environment describes (`RANK`, `WORLD_SIZE`, `MASTER_ADDR`, ...), and return this rank's
    device.

    Args:
        device: `cuda` talks over NCCL, `cpu` over gloo.
        timeout_s: no wait for another rank lasts longer.
        local_rank: index of this process on its machine, which picks its GPU.
        loopback_port: of rank 0 of a run on one machine, the port of the environment, on which it then listens on the
            loopback alone; torch would listen on all interfaces.
        restarts: how often the ranks have been started again, with a store that may outlive them.

    Raises:
        CommunicationError: if the others do not come within `timeout_s`.
        LaunchError: if rank 0's port is in use, or torch sees no GPU.
    """
    place, backend = (bind_gpu(local_rank), "nccl") if device == "cuda" else (torch.device("cpu"), "gloo")
    timeout = timedelta(seconds=timeout_s)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # In one process, stores on one port share its server.
            server = None if loopback_port is None else _serve_on_loopback(loopback_port)
            store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))  # type: ignore[attr-defined]
            dist.init_process_group(
                backend,
                store=dist.PrefixStore(f"default_pg/{restarts}", store),  # type: ignore[attr-defined]
                rank=rank,
                world_size=world_size,
                timeout=timeout,
                # Makes the groups of a bound device by splitting the first; one rank has nothing to split.
                device_id=place if device == "cuda" and world_size > 1 else None,
            )
            del server
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
    return place


def _serve_on_loopback(port: int) -> object:
    """The store of rank 0, which nobody on another machine reaches."""
    try:
        listener = socket.create_server(("127.0.0.1", port))
    except OSError as error:
        reason = "EADDRINUSE" if error.errno == errno.EADDRINUSE else error.strerror
        raise RuntimeError(f"failed to listen on 127.0.0.1, port: {port}: {reason}") from error
    return dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listener.detach(),
    )


def join_alone(*, device: Literal["cpu", "cuda"]) -> torch.device:
    """Form a run of this one process, without a launcher, an environment or a port, and return its device.

    Processes that have been joined before are left as they are.

    Raises:
        LaunchError: if torch sees no GPU.
    """
    place = bind_gpu(0) if device == "cuda" else torch.device("cpu")
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            store=dist.HashStore(),  # type: ignore[attr-defined]
            rank=0,
            world_size=1,
        )
    return place


def bind_gpu(local_rank: int) -> torch.device:
    """Make the GPU of a local rank the current one of this process, and return it.

    Launchers that show each process one GPU only still count local ranks over the machine; ROCm's GPUs are "cuda", too.

    Raises:
        LaunchError: if torch sees no GPU.
    """
    if not torch.cuda.device_count():
        raise LaunchError(
            f"local rank {local_rank} sees no GPU: torch {torch.__version__} finds none; install a build of torch for "
            "the GPUs of this machine, correct CUDA_VISIBLE_DEVICES (HIP_VISIBLE_DEVICES under ROCm), or set "
            "run.device=cpu"
        )
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def leave_processes() -> None:
    """Take down the process groups, their threads and connections, so that this process can join others.

    Groups that something still uses live on; `engine.destroy()` frees those of an engine that is kept.
    """
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()
    # Engines are full of cycles.
    gc.collect()


def wait(work: dist.Work, what: str) -> None:
    """Wait for a message or a collective that is under way.

    Raises:
        CommunicationError: if it fails or lasts longer than the group's time limit; it names `what`.
    """
    try:
        work.wait()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CommunicationError(f"rank {dist.get_rank()} failed while waiting for {what}: {reason}") from error


def gather_objects(mine: Result, group: dist.ProcessGroup | None = None, *, to_first: bool = False) -> list[Result]:
    """Return the objects of all ranks of a group, in their order. They call this together.

    Args:
        mine: this rank's object, of the types that `pipekit.distributed.messages` sends.
        group: the ranks; by default those of the world.
        to_first: whether the group's first rank alone gets them, and the others an empty list.
    """
    own = _as_tensor(encode_message(mine), group)
    sizes = [torch.zeros(1, dtype=torch.int64, device=own.device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([own.numel()], device=own.device), group=group)
    lengths = torch.cat(sizes).tolist()
    longest = max(lengths)
    padded = F.pad(own, (0, longest - own.numel()))
    everyones = [torch.empty_like(padded) for _ in lengths]
    if to_first:
        first = 0 if group is None else dist.get_global_rank(group, 0)
        everyones = everyones if dist.get_rank() == first else []
        dist.gather(padded, everyones or None, first, group=group)
    else:
        dist.all_gather(everyones, padded, group=group)
    return [decode_message(_as_bytes(each[:length])) for each, length in zip(everyones, lengths, strict=not to_first)]


def tell_object(mine: Result | None, group: dist.ProcessGroup | None = None, *, source: int | None = None) -> Result:
    """Return the object of one rank on all ranks of a group, by default those of the world. They call this together.

    Args:
        mine: this rank's object; None on the others.
        group: the ranks.
        source: global rank of the one that has it; the group's first unless given.
    """
    first = source if source is not None else 0 if group is None else dist.get_global_rank(group, 0)
    own = _as_tensor(encode_message(mine) if dist.get_rank() == first else b"", group)
    size = torch.tensor([own.numel()], device=own.device)
    dist.broadcast(size, first, group=group)
    message = own if dist.get_rank() == first else own.new_empty(int(size))
    dist.broadcast(message, first, group=group)
    return decode_message(_as_bytes(message))  # type: ignore[no-any-return]


def _as_tensor(message: bytes, group: dist.ProcessGroup | None) -> torch.Tensor:
    """A message on the device on which a group communicates."""
    device = dist.distributed_c10d._get_object_coll_device(group)
    data = torch.frombuffer(bytearray(message), dtype=torch.uint8) if message else torch.empty(0, dtype=torch.uint8)
    return data.to(device)


def _as_bytes(message: torch.Tensor) -> bytes:
    return message.cpu().numpy().tobytes()


def raise_together(error: Exception | None, group: dist.ProcessGroup | None = None) -> None:
    """Raise an error on every rank if any rank has one, so that no rank goes on to wait for one that has stopped.

    Every rank calls this at the same point, with its own error or None. `group` is a group of all ranks, by default
    that of the world.

    Raises:
        PipekitError: with the type and the message of the lowest rank's error; that rank raises the error itself.
    """
    mine = None if error is None else (type(error) if isinstance(error, PipekitError) else PipekitError, f"{error}")
    for rank, report in enumerate(gather_objects(mine, group)):
        if report is None:
            continue
        kind, message = report
        if error is None or rank != dist.get_rank():
            error = kind(message)
        if isinstance(error, PipekitError):
            error.is_everyones = True
        raise error


def run_together(call: Callable[..., Result], *args: Any, group: dist.ProcessGroup | None = None) -> Result:
    """Call a function on every rank, and raise its error on all of them where it fails on any; see `raise_together`.

    Raises:
        PipekitError: if it fails on another rank; a rank on which it fails raises its own error.
    """
    result, error = None, None
    try:
        result = call(*args)
    except Exception as failure:
        error = failure
    raise_together(error, group)
    return result  # type: ignore[return-value]

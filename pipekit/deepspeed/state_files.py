"""Optimizer states and ZeRO-3 weights in files on NVMe (ZeRO-Infinity): mapped into memory, updated chunk by chunk.

DeepSpeed holds them in host memory, as under ZeRO-Offload, and each of its tensors is then given a file mapped into
memory. The system writes pages back and drops them whenever memory is short, so that neither DeepSpeed's asynchronous
I/O nor libaio is needed. What DeepSpeed allocates while it is built is placed in files at once, so that no rank ever
needs host memory for all of it. The files have no name: the system frees their room when the process ends, however it
ends.

Source: Rajbhandari et al., ZeRO-Infinity: Breaking the GPU Memory Wall for Extreme Scale Deep Learning, section 5.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipekit.deepspeed.optimizer_view import element_states
from pipekit.distributed.processes import run_together
from pipekit.errors import ConfigError, StorageError
from pipekit.optimizers.whole_tensors import SharedOptimizer
from pipekit.storage import storing

_CHUNK = 2**22
"""Elements that one call of the optimizer updates: 16 MiB of each fp32 tensor, a multiple of every page size."""

_LEAST_BYTES = 2**20
"""Bytes from which on a tensor of DeepSpeed is placed in a file as it is allocated."""


def take_nvme_path(deepspeed_config: Mapping[str, Any]) -> tuple[dict[str, Any], Path | None]:
    """Configuration of DeepSpeed with `nvme` replaced by `cpu`, and the folder of the files; None without `nvme`.

    Raises:
        ConfigError: if no folder is named, or weights alone would go into files.

    Example:
        >>> config = {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"}}}
        >>> take_nvme_path(config)[0]
        {'zero_optimization': {'offload_optimizer': {'device': 'cpu', 'pin_memory': False}}}
    """
    config = deepcopy(dict(deepspeed_config))
    zero = config.get("zero_optimization") or {}
    sections = {key: zero.get(key) or {} for key in ("offload_optimizer", "offload_param")}
    in_files = {key: section for key, section in sections.items() if section.get("device") == "nvme"}
    if not in_files:
        return config, None
    if "offload_optimizer" not in in_files or sections["offload_param"].get("device") == "cpu":
        raise ConfigError(
            "zero_optimization: weights and optimizer states are kept in files together; set device: nvme in "
            "offload_optimizer, and under ZeRO-3 in offload_param"
        )
    paths = {str(section["nvme_path"]) for section in in_files.values() if section.get("nvme_path")}
    if len(paths) != 1:
        raise ConfigError("zero_optimization.offload_optimizer: device=nvme needs one folder; set nvme_path to it")
    for key in in_files:
        zero[key] = {"device": "cpu", "pin_memory": False}
    return config, Path(paths.pop())


class StateFiles:
    """Files of one rank that hold tensors of its ZeRO optimizer.

    Args:
        folder: where the files are; it must be there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Each map lives as long as its tensor.
        self._maps: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()
        self._reserved: dict[Tensor, list[Tensor]] = {}
        self._failure: StorageError | None = None

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(map(len, self._maps.values()))

    @contextmanager
    def placing(self) -> Iterator[None]:
        """Place what is allocated in host memory inside, and is not small, in files.

        A file that cannot be made is an error of `hold`, in which all ranks hear of it; until then its tensor is in
        memory.
        """
        with _Placing(self):
            yield

    def build(self, like: Tensor) -> Tensor:
        """Zeros of the shape and type of a tensor, in a file whose room on the disk is taken at once.

        Raises:
            StorageError: if the disk has no room, or the folder cannot be written.
        """
        num_bytes = max(like.numel() * like.element_size(), 1)
        with storing(self.folder), tempfile.TemporaryFile(dir=self.folder) as file:
            # A mapped file with holes would end the process with SIGBUS when the disk is full.
            os.posix_fallocate(file.fileno(), 0, num_bytes)
            mapped = mmap.mmap(file.fileno(), num_bytes)
        tensor = torch.frombuffer(mapped, dtype=like.dtype, count=like.numel()) if like.numel() else like.new_empty(0)
        if like.numel():
            self._maps[tensor.data_ptr()] = mapped
        return tensor.view(like.shape)

    def build_or_none(self, like: Tensor) -> Tensor | None:
        """Zeros as of `build`; None, and an error of `hold`, if that fails."""
        try:
            return self.build(like)
        except StorageError as error:
            self._failure = self._failure or error
            return None

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._maps

    def take(self, tensor: Tensor) -> Tensor:
        """Return a tensor itself where it is in a file, and a copy in one otherwise."""
        if tensor in self:
            return tensor
        copied = self.build(tensor)
        copied.copy_(tensor)
        self._drop(copied)
        return copied

    def state_like(self, tensor: Tensor) -> Tensor:
        """Zeros for a state of a tensor that the optimizer updates."""
        reserved = self._reserved.get(tensor)
        return reserved.pop() if reserved else self.build(tensor.detach())

    def hold(self, optimizer: Any) -> None:
        """Move masters, gradients and ZeRO-3 weights into files, and update them chunk by chunk from now on.

        All ranks call this together.

        Args:
            optimizer: DeepSpeed's, with everything in host memory, and without states yet.

        Raises:
            ConfigError: if the optimizer needs whole tensors, or ZeRO manages nothing.
            StorageError: if a file cannot be made on any rank.
        """
        run_together(self._hold, optimizer)

    def _hold(self, optimizer: Any) -> None:
        if self._failure is not None:
            raise self._failure
        inner = getattr(optimizer, "optimizer", None)
        if isinstance(inner, SharedOptimizer):
            raise ConfigError(
                f"offload_optimizer.device=nvme does not go with {type(inner).__name__}, which updates whole tensors; "
                "keep its states in host memory (device: cpu), or use an optimizer such as AdamW"
            )
        if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            self._hold_weights(optimizer)
            updated = optimizer.fp32_partitioned_groups_flat
        else:
            assert isinstance(optimizer, DeepSpeedZeroOptimizer), type(optimizer).__name__
            updated = optimizer.single_partition_of_fp32_groups
        self.hold_states(inner, updated)
        if isinstance(optimizer, DeepSpeedZeroOptimizer):
            self._hold_copies(optimizer)

    def hold_states(self, optimizer: Any, updated: Sequence[Tensor]) -> None:
        """Move what a torch optimizer updates into files, with its gradients, and have its states there.

        Args:
            optimizer: treats every number by itself, and has made no update yet.
            updated: flat tensors with gradients, the parameters of its groups.
        """
        for tensor in updated:
            assert tensor.grad is not None
            tensor.data = self.take(tensor.detach())
            tensor.grad = self.take(tensor.grad)
        num_states = _count_states(optimizer)
        self._reserved = {tensor: [self.build(tensor.detach()) for _ in range(num_states)] for tensor in updated}
        whole_step = optimizer.step
        optimizer.step = lambda closure=None: self._step(optimizer, whole_step)

    def _hold_copies(self, zero: DeepSpeedZeroOptimizer) -> None:
        # Through these, updated masters go to the weights.
        for master, buffer in zip(
            zero.single_partition_of_fp32_groups, zero.param_buffer_of_bit16_for_cpu_offload_groups, strict=True
        ):
            buffer.data = master.data if buffer.dtype == master.dtype else self.take(buffer)
        zero._link_all_hp_params()
        # On CPUs these are in host memory too; every gradient passes through them.
        for name in ("temp_grad_buffer_for_cpu_offload", "temp_grad_buffer_for_gpu_offload"):
            if (buffer := getattr(zero, name)) in self:
                setattr(zero, name, torch.zeros_like(buffer))
        if zero.gradient_accumulation_steps > 1:
            self._hold_sums(zero)

    def _hold_sums(self, zero: DeepSpeedZeroOptimizer) -> None:
        """Build the sums of gradients over micro-batches, which DeepSpeed would allocate as they come."""
        for parameters in filter(None, zero.params_in_partition):
            sizes = [parameter.numel() for parameter in parameters]
            sums = self.build(torch.empty(sum(sizes), dtype=parameters[0].dtype, device="meta"))
            for parameter, piece in zip(parameters, torch.split(sums, sizes), strict=True):
                zero.accumulated_grads_in_cpu[zero.get_param_id(parameter)] = piece

    def _hold_weights(self, zero: Any) -> None:
        name = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"
        accumulated = zero.grad_partitions_flat_buffer = self.take(zero.grad_partitions_flat_buffer)
        start = 0
        for piece in getattr(zero, name).values():
            piece.data = accumulated[start : start + piece.numel()]
            start += piece.numel()
        if not zero.offload_param:
            return
        for group, weights in enumerate(zero.fp16_partitioned_groups_flat):
            zero.fp16_partitioned_groups_flat[group] = self.take(weights)
            zero._unflatten_partitioned_parameters(group)
        zero.param_groups_fp16_flat_cpu_memory = []

    def _step(self, optimizer: Any, whole_step: Any) -> None:
        """Do one update, chunk by chunk: the system reads the next one ahead, and each that is done may go."""
        groups = optimizer.param_groups
        try:
            for group in groups:
                for tensor in group["params"]:
                    if tensor.grad is not None and tensor.numel():
                        self._update(optimizer, whole_step, group, tensor)
        finally:
            optimizer.param_groups = groups

    def _update(self, optimizer: Any, whole_step: Any, group: dict[str, Any], tensor: Tensor) -> None:
        states = optimizer.state.pop(tensor, {})
        names = element_states(tensor, states)
        held = {name: states[name] for name in names}
        numbers = after = {name: value for name, value in states.items() if name not in names}
        try:
            for start in range(0, tensor.numel(), _CHUNK):
                chunk = slice(start, start + _CHUNK)
                self._advise(mmap.MADV_WILLNEED, chunk.stop, tensor, tensor.grad, *held.values())
                piece = tensor.detach()[chunk]
                piece.grad = tensor.grad[chunk]  # type: ignore[index]
                # Before the first update there are none, in any chunk.
                before = {name: states[name][chunk] for name in names}
                optimizer.state[piece] = {**before, **{name: _copy(value) for name, value in numbers.items()}}
                optimizer.param_groups = [{**group, "params": [piece]}]
                whole_step()
                after = optimizer.state.pop(piece)
                for name in element_states(piece, after):
                    if name not in held:
                        held[name] = self.state_like(tensor)
                    if after[name] is not before.get(name):
                        held[name][chunk] = after[name]
                self._advise(mmap.MADV_DONTNEED, start, tensor, tensor.grad, *held.values())
        finally:
            optimizer.state[tensor] = {**{name: after[name] for name in after if name not in held}, **held}

    def _advise(self, advice: int, start: int, *tensors: Tensor | None) -> None:
        for tensor in tensors:
            mapped = self._maps.get(tensor.data_ptr()) if tensor is not None else None
            if mapped is None or tensor is None:
                continue
            first = start * tensor.element_size()
            if first < len(mapped):
                with suppress(OSError):
                    mapped.madvise(advice, first, min(_CHUNK * tensor.element_size(), len(mapped) - first))

    def _drop(self, tensor: Tensor) -> None:
        """Let the system drop the pages of a tensor once they are written."""
        for start in range(0, tensor.numel(), _CHUNK):
            self._advise(mmap.MADV_DONTNEED, start, tensor)


class _Placing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Has large tensors that are allocated in host memory placed in files."""

    def __init__(self, files: StateFiles) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._files = files

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        fill = _ALLOCATING.get(function)
        if fill is None:
            return function(*args, **kwargs)
        is_copy = isinstance(args[0], Tensor)
        device = kwargs.get("device") or (args[0].device if is_copy else "cpu")
        dtype = kwargs.get("dtype") or (args[0].dtype if is_copy else torch.get_default_dtype())
        like = torch.empty(args[0].shape if is_copy else args[0], dtype=dtype, device="meta")
        if torch.device(device).type != "cpu" or like.numel() * like.element_size() < _LEAST_BYTES:
            return function(*args, **kwargs)
        placed = self._files.build_or_none(like)
        return function(*args, **kwargs) if placed is None else fill(placed, *args)


_ATEN = torch.ops.aten
_ALLOCATING: dict[Any, Callable[..., Tensor]] = {
    _ATEN.empty.memory_format: lambda placed, size: placed,
    _ATEN.zeros.default: lambda placed, size: placed,
    _ATEN.full.default: lambda placed, size, value: placed.fill_(value),
    _ATEN.clone.default: lambda placed, source: placed.copy_(source),
    _ATEN._to_copy.default: lambda placed, source: placed.copy_(source),
}
"""Functions that fill a tensor in a file, by the function of torch that would have allocated it."""


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _count_states(optimizer: Any) -> int:
    """The most states with a number for each weight that a group has, as the update of a tensor of zeros shows."""
    groups, found = optimizer.param_groups, 0
    for group in groups:
        scratch = torch.zeros(16)
        scratch.grad = torch.zeros(16)
        optimizer.param_groups = [{**group, "params": [scratch]}]
        try:
            optimizer.step()
        finally:
            optimizer.param_groups = groups
        found = max(found, len(element_states(scratch, optimizer.state.pop(scratch, {}))))
    return found

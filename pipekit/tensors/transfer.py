"""Transfer of nested host tensors to a device: one asynchronous copy for all that lie in one storage."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from pipekit.tensors.nested import map_tensors

# In bytes; every element type is aligned to it.
_ALIGNMENT = 16


def pack(value: Any, *, pin_memory: bool = False) -> Any:
    """Copy of nested host tensors in which they lie one after the other in one storage, which is pinned on request.

    Example:
        >>> first, second = pack([torch.ones(2), torch.tensor([3])])
        >>> first.tolist(), second.tolist(), first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        ([1.0, 1.0], [3], True)
    """
    sizes: list[int] = []

    def count(tensor: Tensor) -> None:
        if _is_packable(tensor):
            sizes.append(-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT)

    map_tensors(count, value)
    storage = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=pin_memory)
    pieces = iter(torch.split(storage, sizes))

    def copy(tensor: Tensor) -> Tensor:
        if not _is_packable(tensor):
            return tensor
        piece: Tensor = next(pieces)
        return piece[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)

    return map_tensors(copy, value)


def to_device(value: Any, device: torch.device) -> Any:
    """Nested tensors on `device`; the host does not wait where they come from pinned memory.

    A storage of which they are the greater part is copied whole, in one piece.
    """
    used: Counter[int] = Counter()
    copies: dict[int, Tensor] = {}

    def count(tensor: Tensor) -> None:
        if tensor.device != device and _lies_in_storage(tensor):
            used[tensor.untyped_storage().data_ptr()] += tensor.nbytes

    def move(tensor: Tensor) -> Tensor:
        if tensor.device == device or not _lies_in_storage(tensor):
            return tensor.to(device, non_blocking=True)
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if 2 * used[key] < storage.nbytes() or storage.nbytes() % tensor.itemsize:
            return tensor.to(device, non_blocking=True)
        if key not in copies:
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            copies[key] = whole.to(device, non_blocking=True)
        copied = copies[key].view(tensor.dtype)
        return copied.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    map_tensors(count, value)
    return map_tensors(move, value)


def _is_packable(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and _lies_in_storage(tensor)


def _lies_in_storage(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.requires_grad and not tensor.is_conj() and not tensor.is_neg()

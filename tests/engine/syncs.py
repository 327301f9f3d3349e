"""Waits of the host for its device, counted where the device is the CPU itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Devices:
    """The tensors that would be in host memory if the device were a GPU; all others would be on the GPU.

    In host memory are the tensors that are made of no other without naming a `torch.device`, as `torch.zeros(2)` is,
    and what is computed of these alone. `to(device)` takes a tensor to the device. What existed before the counting
    began is on the device. All tensors of a storage are in one place; storages are kept, so that none is taken for
    another.

    Attributes:
        waits: number of waits of the host, by what made it wait.
        num_copies: copies from the host that it does not wait for.
    """

    def __init__(self) -> None:
        self._host: dict[int, Any] = {}
        self.waits: Counter[str] = Counter()
        self.num_copies = 0
        self.assigns_number = False

    def is_host(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._host

    def to_host(self, values: Any) -> None:
        for tensor in _tensors(values):
            storage = tensor.untyped_storage()
            self._host[storage._cdata] = storage

    def all_on_host(self, values: Any) -> bool:
        return all(map(self.is_host, _tensors(values)))


class _Functions(TorchFunctionMode):
    """Watches what is visible in Python alone: where tensors are asked for, and reads past the dispatcher."""

    def __init__(self, devices: _Devices) -> None:
        super().__init__()
        self._devices = devices

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, devices = kwargs or {}, self._devices
        named = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.device)]
        # No copy, but the argument of a kernel.
        devices.assigns_number = func is Tensor.__setitem__ and not isinstance(args[2], Tensor)
        result = func(*args, **kwargs)
        devices.assigns_number = False
        if func in (Tensor.tolist, Tensor.numpy) and not devices.all_on_host(args):
            devices.waits[func.__name__] += 1
        elif func is Tensor.cpu and not devices.is_host(args[0]):
            devices.waits["cpu"] += 1
            result = result.clone()
            devices.to_host(result)
        elif func is Tensor.to and named and devices.is_host(args[0]):
            result = _without_host(result)
            if kwargs.get("non_blocking"):
                devices.num_copies += 1
            else:
                devices.waits["to(device)"] += 1
        elif func is torch.tensor and named:
            devices.waits["tensor(device=)"] += 1
        elif not named and isinstance(result, Tensor) and not list(_tensors((args, kwargs))):
            devices.to_host(result)
        return result


class _Operations(TorchDispatchMode):
    """Watches the operations of the dispatcher, those of autograd and of C++ included."""

    def __init__(self, devices: _Devices) -> None:
        super().__init__()
        self._devices = devices

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, devices = kwargs or {}, self._devices
        given = list(_tensors((args, kwargs)))
        name = func.overloadpacket.__name__
        result = func(*args, **kwargs)
        if not given or devices.assigns_number:
            pass
        elif devices.all_on_host(given):
            devices.to_host(result)
        elif name == "copy_":
            to, source = args[:2]
            non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            if devices.is_host(to) != devices.is_host(source) and not non_blocking:
                devices.waits["copy_"] += 1
        elif (
            _has_mask(name, args)
            or torch.Tag.data_dependent_output in func.tags
            or (torch.Tag.dynamic_output_shape in func.tags and name != "index")
        ):
            devices.waits[name] += 1
        return result


@contextmanager
def counting_waits() -> Iterator[_Devices]:
    """Count the waits of the host for its device in what runs inside."""
    devices, accelerator = _Devices(), type(get_accelerator())
    # Its name alone would not tell the device from host memory.
    name, synchronize = accelerator.current_device_name, accelerator.synchronize
    accelerator.current_device_name = lambda self: torch.device("cpu")
    accelerator.synchronize = lambda self, device_index=None: devices.waits.update(["synchronize"])
    try:
        with _Operations(devices), _Functions(devices):
            yield devices
    finally:
        accelerator.current_device_name, accelerator.synchronize = name, synchronize


def _has_mask(name: str, args: Any) -> bool:
    """True for an operation that finds the elements of a mask."""
    return name.startswith("index") and any(
        isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in tree_leaves(args[1:2])
    )


def _tensors(values: Any) -> Iterator[Tensor]:
    return (value for value in tree_leaves(values) if isinstance(value, Tensor))


def _without_host(tensor: Tensor) -> Tensor:
    """A copy that no mode has seen, so that its storage is not in host memory."""
    with torch._C._DisableTorchDispatch():  # type: ignore[attr-defined]
        return tensor.clone()

"""Numbers of the device that the host reads later, without waiting for what has been launched since."""

from __future__ import annotations

import torch
from torch import Tensor


class LateNumber:
    """A number on its way from the device to the host.

    `float(tensor)` waits for all that is launched; `read` waits only for what was launched before this was made.

    Args:
        value: a tensor of one number, or a number.
    """

    def __init__(self, value: Tensor | float) -> None:
        self._copied: torch.cuda.Event | None = None
        if isinstance(value, Tensor) and value.is_cuda:
            host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            value = host.copy_(value.detach(), non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()
        self._value = value

    @property
    def is_here(self) -> bool:
        """True if it can be read without waiting, as always on a CPU."""
        return self._copied is None or bool(self._copied.query())  # type: ignore[no-untyped-call]

    def read(self) -> float:
        """Return the number."""
        if self._copied is not None:
            self._copied.synchronize()
        return float(self._value)

"""Precision of matrix products of fp32 on GPUs: fp32, or TF32 with 10 bits of mantissa."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fp32_products(device: torch.device, *, tf32: bool) -> Iterator[None]:
    """Let a GPU multiply fp32 in TF32, or not, inside; the setting of the process comes back afterwards.

    Source: torch/backends/cuda, `torch.set_float32_matmul_precision`.
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

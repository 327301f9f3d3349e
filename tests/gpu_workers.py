"""Processes with a GPU each, over NCCL, or with one GPU for all of them, over gloo."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.process import BaseProcess
from typing import Any, Literal
from unittest import mock

import pytest
import torch

from gloo_workers import GlooWorkers, serve_rank

# CUDA has threads of its own in every process.
_MAX_THREADS = 2000
_ENVIRON = {
    "DS_ACCELERATOR": "cuda",
    # What cuBLAS needs for results that are the same in every run.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # Streams that share a hardware queue wait for each other.
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
}


class GpuWorkers(GlooWorkers):
    """Starts the ranks of one job after another in new interpreters: CUDA does not survive a fork.

    Args:
        backend: `nccl` gives every rank a GPU, `gloo` the first one to all.
    """

    _max_threads = _MAX_THREADS

    def __init__(self, backend: Literal["nccl", "gloo"] = "nccl") -> None:
        self._device = "cuda" if backend == "nccl" else "cpu"

    def _start(self, *arguments: Any) -> BaseProcess:
        process = multiprocessing.get_context("spawn").Process(target=serve_rank, args=arguments, daemon=True)
        with mock.patch.dict(os.environ, _ENVIRON):
            process.start()
        return process


def workers_on(device: str) -> GlooWorkers:
    """Starter of ranks on a kind of device."""
    return GpuWorkers() if device == "cuda" else GlooWorkers()


def on_gpus(number: int, *values: Any, name: str | None = None) -> Any:
    """Return a test's parameters that need as many GPUs."""
    found = torch.cuda.device_count()
    reason = f"needs {number} CUDA device{'s' if number > 1 else ''}, found {found}"
    return pytest.param(*values, marks=[pytest.mark.gpu, pytest.mark.skipif(found < number, reason=reason)], id=name)


def on_cpu(*values: Any, name: str | None = None) -> Any:
    """Return a test's parameters without a GPU, which only show that the test runs: its proof is elsewhere, or slow."""
    return pytest.param(*values, marks=pytest.mark.slow, id=name)


def own_device(device: str) -> torch.device:
    """Return the device of a rank: the GPU that it is bound to, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")


def compute_repeatably() -> None:
    """Let this process compute the same bits in every run, also on a GPU."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)

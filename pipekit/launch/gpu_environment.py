"""Environment of ranks on GPUs: hardware queues, the allocator, and torch's flight recorder for NCCL."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def gpu_environ(log_dir: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """Environment variables of a rank on a GPU, with the user's own settings kept.

    - Each stream has a hardware queue of its own, up to 32. Streams that share one wait for each other, and a pipeline
      whose messages wait for more than they need can hang.
    - The allocator grows its segments, so that memory does not break up into pieces that fit nothing.
    - The flight recorder writes `flight-recorder-<rank>` beside the logs, for `torchfrtrace` to read.

    Source: CUDA C++ Programming Guide, "CUDA Environment Variables"; torch/docs/source/notes/cuda.rst;
    torch/csrc/distributed/c10d/FlightRecorder.hpp, ProcessGroupNCCL.hpp.
    """
    defaults = {
        "CUDA_DEVICE_MAX_CONNECTIONS": "32",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_TEMP_FILE": f"{log_dir.absolute()}/flight-recorder-",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    return {name: environ.get(name, value) for name, value in defaults.items()}

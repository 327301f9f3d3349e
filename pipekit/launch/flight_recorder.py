"""Torch's flight recorder: the last operations of NCCL's groups, written to files when one lasts too long."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def flight_recorder_environ(log_dir: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """Environment variables that turn the flight recorder on, with the user's own settings kept.

    It writes `flight-recorder-<rank>` beside the logs, for `torchfrtrace` to read.

    Source: torch/csrc/distributed/c10d/FlightRecorder.hpp, ProcessGroupNCCL.hpp.
    """
    defaults = {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_TEMP_FILE": f"{log_dir.absolute()}/flight-recorder-",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    return {name: environ.get(name, value) for name, value in defaults.items()}

"""The environment of ranks on GPUs."""

from __future__ import annotations

from pathlib import Path

from pipekit.launch.gpu_environment import gpu_environ


def test_the_users_own_settings_win(tmp_path: Path) -> None:
    assert gpu_environ(tmp_path, {"TORCH_FR_BUFFER_SIZE": "9", "X": "x", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}) == {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "TORCH_FR_BUFFER_SIZE": "9",
        "TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/flight-recorder-",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }

"""The environment of torch's flight recorder."""

from __future__ import annotations

from pathlib import Path

from pipekit.launch.flight_recorder import flight_recorder_environ


def test_the_users_own_settings_of_the_flight_recorder_win(tmp_path: Path) -> None:
    assert flight_recorder_environ(tmp_path, {"TORCH_FR_BUFFER_SIZE": "9", "X": "x"}) == {
        "TORCH_FR_BUFFER_SIZE": "9",
        "TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/flight-recorder-",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }

"""Variables that go along to the hosts, and the files that name them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipekit.errors import LaunchError
from pipekit.launch.exports import exported_environ


def exported(tmp_path: Path, environ: dict[str, str] | None = None, asked: tuple[str, ...] = ()) -> dict[str, str]:
    for name in ("home", "work"):
        (tmp_path / name).mkdir(exist_ok=True)
    return exported_environ(environ or {}, asked, home=tmp_path / "home", folder=tmp_path / "work")


def test_what_tells_libraries_how_to_compute_goes_along_and_what_is_a_hosts_own_does_not(tmp_path: Path) -> None:
    here = {"NCCL_DEBUG": "INFO", "PYTHONPATH": "/x", "LD_LIBRARY_PATH": "/lib", "OMP_NUM_THREADS": "2"}
    own = {"HOME": "/root", "CUDA_VISIBLE_DEVICES": "0", "SSH_CONNECTION": "x", "PIPEKIT_ERROR_FILE": "/x"}
    assert exported(tmp_path, here | own) == here


def test_deepspeeds_file_is_read_in_the_home_and_then_the_working_directory(tmp_path: Path) -> None:
    exported(tmp_path)
    (tmp_path / "home/.deepspeed_env").write_text("A=home\nB=of home\n")
    (tmp_path / "work/.deepspeed_env").write_text("# what the cluster needs\n\nA = work=1 \n")
    assert exported(tmp_path, {"A": "here"}, ("C", "D=x y")[1:]) == {"A": "work=1", "B": "of home", "D": "x y"}
    assert exported(tmp_path, {"A": "here"}, ("A",))["A"] == "here"
    (tmp_path / "home/other").write_text("A=other\n")
    assert exported(tmp_path, {"DS_ENV_FILE": "other"})["A"] == "other"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("export A=1", "line 2: 'export A' is no name of a variable"),
        ("A", "line 2: 'A' is no variable; write NAME=VALUE"),
        ("A;reboot=1", "is no name of a variable"),
        ("RANK=3", "RANK is set for each process by the launcher"),
        ("MASTER_ADDR=x", "MASTER_ADDR is set for each process by the launcher"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    exported(tmp_path)
    (tmp_path / "work/.deepspeed_env").write_text(f"A=1\n{line}\n")
    with pytest.raises(LaunchError, match=rf"\.deepspeed_env, {message}|{message}"):
        exported(tmp_path)


def test_a_variable_that_is_not_set_cannot_be_passed_on(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="--export C: is not set here; set it, or write --export C=VALUE"):
        exported(tmp_path, {}, ("C",))

"""Environment variables that the processes of a run get on every host."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from pipekit.errors import LaunchError

# Of the launching machine's own, those that tell libraries how to compute and to communicate.
_PREFIXES = (
    "PYTHON",
    "NCCL_",
    "GLOO_",
    "UCX_",
    "MV2_",
    "OMP_",
    "MKL_",
    "KMP_",
    "TORCH",
    "PYTORCH_",
    "CUDA_",
    "HIP_",
    "RCCL_",
    "DS_",
    "PIPEKIT_",
    "TOKENIZERS_",
    "HF_",
    "WANDB_",
    "MLFLOW_",
)
_NAMES = ("LD_LIBRARY_PATH",)
# What is a matter of each host, or of each process.
_NOT_EXPORTED = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "PIPEKIT_ERROR_FILE", "PIPEKIT_LAUNCHER_PID")
_OF_THE_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", *_NOT_EXPORTED)
_DEFAULT_FILE = ".deepspeed_env"


def exported_environ(environ: Mapping[str, str], asked: Iterable[str], *, home: Path, folder: Path) -> dict[str, str]:
    """Variables to set on every host: the usual ones, those of `.deepspeed_env`, and those that are asked for.

    Those asked for come before those of the file in the working directory, then that in the home directory, then this
    machine's own, such as `NCCL_*` and `PYTHON*`.

    Args:
        environ: the variables of this machine.
        asked: `NAME`, with the value here, or `NAME=VALUE`.
        home: the home directory.
        folder: the working directory.

    Raises:
        LaunchError: if a line of a file, or what is asked for, is no variable.

    Example:
        >>> here = Path("/nowhere")
        >>> exported_environ({"NCCL_DEBUG": "INFO", "EDITOR": "vi"}, ["SEED=1"], home=here, folder=here)
        {'NCCL_DEBUG': 'INFO', 'SEED': '1'}
    """
    variables = {name: value for name, value in environ.items() if name.startswith(_PREFIXES) or name in _NAMES}
    variables = {name: value for name, value in variables.items() if name not in _NOT_EXPORTED}
    name = environ.get("DS_ENV_FILE", _DEFAULT_FILE)
    for path in dict.fromkeys((home / name, folder / name)):
        variables |= _read_file(path)
    for text in asked:
        name, equals, value = text.partition("=")
        _check_name(name, f"--export {text}")
        if not equals and name not in environ:
            raise LaunchError(f"--export {name}: is not set here; set it, or write --export {name}=VALUE")
        variables[name] = value if equals else environ[name]
    return variables


def _read_file(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    variables = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"{path}: cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        name, equals, value = stripped.partition("=")
        if not equals:
            raise LaunchError(f"{path}, line {number}: {stripped[:60]!r} is no variable; write NAME=VALUE")
        _check_name(name.strip(), f"{path}, line {number}")
        variables[name.strip()] = value.strip()
    return variables


def _check_name(name: str, where: str) -> None:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise LaunchError(f"{where}: {name[:60]!r} is no name of a variable; write NAME=VALUE")
    if name in _OF_THE_LAUNCH:
        raise LaunchError(f"{where}: {name} is set for each process by the launcher; leave it out")

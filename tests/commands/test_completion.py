"""`pipekit completion`, in bash itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fork_server import run_pipekit


@pytest.mark.distributed
@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_a_script_for_each_shell(shell: str, tmp_path: Path) -> None:
    done = run_pipekit(["completion", shell], cwd=tmp_path)
    assert f"_PIPEKIT_COMPLETE=complete_{shell}" in done.stdout
    assert "no-files" not in done.stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_and_options(tmp_path: Path) -> None:
    # The command that is installed, under a name that the shell finds.
    program = tmp_path / "pipekit"
    program.write_text(f"#!{sys.executable}\nfrom pipekit.cli import main\nmain()\n")
    program.chmod(0o755)
    script = (
        'eval "$(pipekit completion bash)"; COMP_WORDS=(pipekit plan c.yaml --dev); COMP_CWORD=3; '
        '_pipekit_completion pipekit; echo "${COMPREPLY[@]}"'
    )
    environ = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environ, timeout=120, check=True)
    assert done.stdout.split() == ["--devices", "--device", "--device-file"], done.stderr

"""Copying a checkpoint's files from hosts, through an ssh that reads a folder for each host."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from pipekit.checkpoint.manifest import CONFIG_FILE, WEIGHTS, TensorEntry, TrainingState, find_latest
from pipekit.checkpoint.overview import find_faults
from pipekit.checkpoint.publish import begin_checkpoint, hidden_folder, publish_checkpoint, write_manifest
from pipekit.checkpoint.retention import Retention
from pipekit.checkpoint.writer import write_tensors
from pipekit.cli import app
from pipekit.errors import PipekitError
from pipekit.launch.gather import _Fleet
from pipekit.launch.hosts import Host
from pipekit.launch.ssh import SshSettings

# The last word of its command line is what the login shell of the host runs.
SSH = f"""#!{sys.executable}
import os, shlex, sys
host, command = sys.argv[-2:]
if host == "down":
    sys.stderr.write("ssh: connect to host down port 22: No route to host\\n")
    sys.exit(255)
*_, program, end, path = shlex.split(command)
assert (program, end) == ("cat", "--"), command
root = os.environ["HOSTS_ROOT"]
os.execlp("cat", "cat", "--", path.replace(f"{{root}}/here", f"{{root}}/{{host}}", 1))
"""


def write_parts(root: Path, step: int) -> None:
    """Write a checkpoint of three files, of which hosts a, b and c lack one each."""
    final = root / "all/run/checkpoints" / f"step-{step:08d}"
    begin_checkpoint(final)
    tensors, sizes = {}, {}
    for rank in range(3):
        file = f"weights-{rank:04d}.safetensors"
        values = {f"layer.{rank}": torch.full((4,), float(step * rank))}
        for name, value in write_tensors(hidden_folder(final) / file, values).items():
            tensors[name] = TensorEntry((4,), "float32", {WEIGHTS: file}, True, {WEIGHTS: value})
        sizes[file] = (hidden_folder(final) / file).stat().st_size
    training = TrainingState(step, step, 0, 0.1, {"type": "sgd", "step": step, "states": []})
    write_manifest(final, training, {CONFIG_FILE: b"{}"}, tensors=tensors, tensor_bytes=sizes, hosts=["a", "b", "c"])
    publish_checkpoint(final, retention=Retention())
    for rank, host in enumerate("abc"):
        part = root / host / "run/checkpoints" / final.name
        shutil.copytree(final, part)
        (part / f"weights-{rank:04d}.safetensors").unlink()
        shutil.copy(final.parent / "latest", part.parent)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for step in (1, 2):
        write_parts(tmp_path, step)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/ssh").write_text(SSH)
    (tmp_path / "bin/ssh").chmod(0o755)
    (tmp_path / "hosts").write_text("".join(f"{host} slots=1\n" for host in ("down", "b", "c")))
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("HOSTS_ROOT", str(tmp_path))
    return tmp_path


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["checkpoints", *map(str, arguments)])
    if isinstance(result.exception, PipekitError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_a_part_is_listed_as_one_and_gather_makes_it_whole(root: Path) -> None:
    run = root / "here/run"
    shutil.copytree(root / "a/run", run)
    lines = invoke(run).splitlines()
    assert lines[2].split()[:2] == ["step-00000002", "2"]
    assert lines[2].endswith("in part, latest")
    assert "weights-0000.safetensors: is not on this host (parts of this checkpoint are on a, b, c)" in lines[4]
    assert f"pipekit checkpoints gather {run} --hostfile HOSTFILE" in lines[4]
    assert json.loads(invoke(run, "--json"))[1]["state"] == "in part"
    assert invoke("gather", run, "--hostfile", root / "hosts").splitlines() == [
        "weights-0000.safetensors from b",
        f"{run}/checkpoints/step-00000002 is whole on this machine",
    ]
    assert invoke(run).splitlines()[2].endswith("whole, latest")
    assert find_faults(run / "checkpoints/step-00000002") == []
    invoke("gather", run / "checkpoints/step-00000001", "--hostfile", root / "hosts")
    assert find_faults(run / "checkpoints/step-00000001") == []
    assert find_latest(run / "checkpoints") == run / "checkpoints/step-00000002"
    assert not list(run.glob("**/.*"))


def test_a_part_with_a_damaged_file_is_listed_as_damaged(root: Path) -> None:
    run = root / "here/run"
    shutil.copytree(root / "a/run", run)
    held = run / "checkpoints/step-00000002/weights-0001.safetensors"
    held.write_bytes(held.read_bytes()[:-1])
    assert [record["state"] for record in json.loads(invoke(run, "--json"))] == ["in part", "damaged"]


def test_no_more_of_a_file_is_copied_than_its_size(root: Path) -> None:
    (root / "b/long").write_bytes(bytes(10 * 2**20))
    fleet = _Fleet((), SshSettings(Path("/"), "python3"))
    assert not fleet.read(Host("b", (0,)), root / "here/long", root / "copy", most_bytes=100)
    assert (root / "copy").stat().st_size <= 2**20


def test_an_empty_folder_gets_all_of_it_and_what_is_damaged_on_one_host_comes_from_another(root: Path) -> None:
    damaged = root / "b/run/checkpoints/step-00000002/weights-0000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")
    (root / "b/run/checkpoints/step-00000002/manifest.json").write_text("{")
    run = root / "here/run"
    assert invoke("gather", run, "-H", root / "hosts").splitlines() == [
        "config.yaml from b",
        "weights-0000.safetensors from c",
        "weights-0001.safetensors from c",
        "weights-0002.safetensors from b",
        f"{run}/checkpoints/step-00000002 is whole on this machine",
    ]
    assert find_latest(run / "checkpoints") == run / "checkpoints/step-00000002"
    assert find_faults(run / "checkpoints/step-00000002") == []


def test_what_cannot_be_gathered_is_one_message_and_nothing_half_done_stays(root: Path) -> None:
    run = root / "here/run"
    with pytest.raises(PipekitError, match="name them with --hostfile FILE"):
        invoke("gather", run)
    (root / "hosts").write_text("down slots=1\nc slots=1\n")
    with pytest.raises(
        PipekitError, match=r"weights-0002.safetensors: neither this machine nor down, c has it"
    ) as error:
        invoke("gather", run, "--hostfile", root / "hosts")
    assert "; down cannot be reached: ssh: connect to host down port 22: No route to host; give" in str(error.value)
    assert not list(run.glob("checkpoints/*/manifest.json"))
    assert not list(run.glob("checkpoints/.*"))
    (root / "hosts").write_text("down slots=1\n")
    with pytest.raises(PipekitError, match="neither this machine nor down has a checkpoint there"):
        invoke("gather", root / "here/other", "--hostfile", root / "hosts")
    assert not (root / "here/other").exists()

"""Reading a checkpoint's tensors."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hand_made import write_manifest
from pipekit.checkpoint.manifest import TrainingState
from pipekit.checkpoint.reader import CheckpointReader
from pipekit.errors import CheckpointError, DamagedCheckpointError

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.tensor([7.0])}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two tensors that two ranks wrote, the first with an optimizer state."""
    save_file({"a.weight": WEIGHTS["a.weight"]}, tmp_path / "weights-0000.safetensors")
    save_file({"b.bias": WEIGHTS["b.bias"]}, tmp_path / "weights-0001.safetensors")
    save_file({"a.weight": -WEIGHTS["a.weight"]}, tmp_path / "exp_avg-0000.safetensors")
    a, b = WEIGHTS.values()
    held = {
        "a.weight": {"weights": ("weights-0000.safetensors", a), "exp_avg": ("exp_avg-0000.safetensors", -a)},
        "b.bias": {"weights": ("weights-0001.safetensors", b)},
    }
    write_manifest(tmp_path, held, TrainingState(step=1, consumed_samples=8, seed=1, lr=0.1, optimizer={}))
    return tmp_path


def test_weights_come_by_name_from_whatever_file_holds_them(checkpoint: Path) -> None:
    weights = dict(CheckpointReader(checkpoint).weights())
    assert list(weights) == list(WEIGHTS)
    assert all(torch.equal(weights[name], tensor) for name, tensor in WEIGHTS.items())


def test_states_come_by_kind(checkpoint: Path) -> None:
    reader = CheckpointReader(checkpoint)
    assert torch.equal(reader.tensor("a.weight", "exp_avg"), -WEIGHTS["a.weight"])
    assert torch.equal(reader.tensor("a.weight"), WEIGHTS["a.weight"])


@pytest.mark.parametrize(("name", "kind"), [("c.weight", "weights"), ("b.bias", "exp_avg")])
def test_a_missing_tensor_is_named(checkpoint: Path, name: str, kind: str) -> None:
    with pytest.raises(CheckpointError, match=f"holds no {kind} of '{name}'"):
        CheckpointReader(checkpoint).tensor(name, kind)


def test_a_cut_file_is_found_before_anything_is_read(checkpoint: Path) -> None:
    (checkpoint / "exp_avg-0000.safetensors").write_bytes(b"12345")
    with pytest.raises(CheckpointError, match=r"exp_avg-0000\.safetensors: has 5 bytes of "):
        CheckpointReader(checkpoint)


def test_a_file_of_the_right_size_that_is_damaged_is_named(checkpoint: Path) -> None:
    file = checkpoint / "weights-0001.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)
    reader = CheckpointReader(checkpoint)
    assert torch.equal(reader.tensor("a.weight"), WEIGHTS["a.weight"])
    with pytest.raises(CheckpointError, match=r"weights-0001\.safetensors: damaged"):
        reader.tensor("b.bias")


def test_a_file_without_the_tensor_that_the_manifest_promises_is_damaged(checkpoint: Path) -> None:
    manifest = CheckpointReader(checkpoint).manifest
    entry = replace(manifest.tensors["b.bias"], files={"weights": "weights-0000.safetensors"})
    changed = replace(manifest, tensors={**manifest.tensors, "b.bias": entry})
    (checkpoint / "manifest.json").write_text(changed.to_json())
    with pytest.raises(CheckpointError, match=r"weights-0000\.safetensors: damaged .*b\.bias"):
        CheckpointReader(checkpoint).tensor("b.bias")


def test_numbers_that_no_checkpoint_holds_are_damage(checkpoint: Path) -> None:
    file = checkpoint / "weights-0001.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"U32"'))
    with pytest.raises(DamagedCheckpointError, match=r"weights-0001\.safetensors: damaged \(no .* format 'U32'\)"):
        CheckpointReader(checkpoint).tensor("b.bias")


def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no manifest\.json, so it is not a checkpoint"):
        CheckpointReader(tmp_path)


WALK = """
import sys
from pathlib import Path
from pipekit.checkpoint.reader import CheckpointReader

def resident(key):
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) * 1024

reader = CheckpointReader(Path(sys.argv[1]))
before = resident("VmRSS")
for name, tensor in reader.weights():
    tensor.sum()
print(resident("VmHWM") - before)
"""


def test_a_walk_keeps_one_tensor_in_memory(tmp_path: Path) -> None:
    tensors = {f"{index}": torch.zeros(2_000_000) for index in range(30)}
    file = "weights-0000.safetensors"
    save_file(tensors, tmp_path / file)
    held = {name: {"weights": (file, tensor)} for name, tensor in tensors.items()}
    write_manifest(tmp_path, held, TrainingState(step=1, consumed_samples=8, seed=1, lr=0.1, optimizer={}))
    walk = subprocess.run([sys.executable, "-c", WALK, tmp_path], capture_output=True, text=True, check=True)
    assert int(walk.stdout) < 4 * tensors["0"].nbytes, "of 30"


def test_damage_is_named_where_a_tensor_is_rounded_as_well(checkpoint: Path) -> None:
    reader = CheckpointReader(checkpoint)
    assert torch.equal(reader.rounded("b.bias", torch.bfloat16), WEIGHTS["b.bias"])
    path = checkpoint / "weights-0001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(DamagedCheckpointError, match=r"damaged \(weights of 'b\.bias' has changed"):
        CheckpointReader(checkpoint).rounded("b.bias", torch.bfloat16)

"""Raw exports, read by the loader beside them in a process without pipekit, and by safetensors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hand_made import random_model, write_checkpoint
from pipekit.cli import app
from pipekit.errors import CheckpointError, PipekitError
from pipekit.inference import raw_export
from pipekit.inference.raw_export import export_raw

_ALONE = """
import sys
for name in ("pipekit", "safetensors", "numpy"):
    sys.modules[name] = None
sys.path.insert(0, sys.argv[1])
import torch
from load_tensors import load_tensors
tensors = load_tensors()
linear = torch.nn.Linear(3, 2, dtype=torch.float32)
linear.load_state_dict(load_tensors(layer="blocks.1"))
torch.save({"all": {name: tensor.clone() for name, tensor in tensors.items()}, "linear": linear.weight}, sys.argv[2])
"""

TENSORS = {
    "embed.weight": torch.randn(7, 3),
    "blocks.1.weight": torch.randn(2, 3),
    "blocks.1.bias": torch.randn(2),
    "blocks.10.flags": torch.tensor([True, False, True]),
    "blocks.10.count": torch.tensor(3),
    "blocks.10.half": torch.randn(3, 1).half(),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    config, _ = random_model()
    return write_checkpoint(tmp_path / "run", config, TENSORS)


def test_the_loader_needs_torch_alone(checkpoint: Path, tmp_path: Path) -> None:
    done = export_raw(checkpoint, tmp_path / "out")
    assert (done.step, done.num_tensors, done.num_elements) == (5, 6, 21 + 6 + 2 + 3 + 1 + 3)
    found = tmp_path / "found.pt"
    subprocess.run([sys.executable, "-c", _ALONE, str(tmp_path / "out"), str(found)], check=True, cwd=tmp_path)
    read = torch.load(found, weights_only=True)
    assert read["all"].keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        expected = tensor.float() if tensor.is_floating_point() else tensor
        torch.testing.assert_close(read["all"][name], expected, rtol=0, atol=0)
    assert torch.equal(read["linear"], TENSORS["blocks.1.weight"])


def test_the_command_writes_tensors_configuration_and_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["export", str(checkpoint.parents[1]), str(tmp_path / "out"), "--raw", "--dtype", "bfloat16"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "6 tensors" in done.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model.safetensors",
        "load_tensors.py",
        "config.yaml",
        "tokenizer.json",
    }
    assert (tmp_path / "out/config.yaml").read_text() == (checkpoint / "config.yaml").read_text()
    found = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(found["embed.weight"], TENSORS["embed.weight"].bfloat16())
    assert torch.equal(found["blocks.10.count"], torch.tensor(3))


def test_only_an_earlier_raw_export_is_replaced(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/own").touch()
    with pytest.raises(PipekitError, match="is no earlier raw export"):
        export_raw(checkpoint, tmp_path / "out", overwrite=True)
    (tmp_path / "out/own").unlink()
    export_raw(checkpoint, tmp_path / "out")
    with pytest.raises(PipekitError, match="--overwrite"):
        export_raw(checkpoint, tmp_path / "out")
    export_raw(checkpoint, tmp_path / "out", overwrite=True)


def test_damage_is_named_and_nothing_is_left_behind(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = raw_export.write_tensors

    def damaged(path: Path, tensors: dict[str, torch.Tensor], **options: Any) -> dict[str, str]:
        checksums = write(path, tensors, **options)
        save_file({**load_file(path), "blocks.1.bias": torch.ones(2)}, path)
        return checksums

    with monkeypatch.context() as patch:
        patch.setattr(raw_export, "write_tensors", damaged)
        with pytest.raises(PipekitError, match=r"blocks\.1\.bias is not what was written"):
            export_raw(checkpoint, tmp_path / "out")
    save_file({**TENSORS, "embed.weight": torch.zeros(7, 3)}, checkpoint / "weights-0000.safetensors")
    with pytest.raises(CheckpointError, match=r"embed\.weight"):
        export_raw(checkpoint, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}

"""Differences and averages of checkpoints, against torch on the whole tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import pipekit.checkpoint.combine as combine
from hand_made import random_model, write_checkpoint, write_manifest
from pipekit.checkpoint.combine import average_checkpoints, compare_checkpoints
from pipekit.checkpoint.manifest import list_checkpoints
from pipekit.checkpoint.reader import CheckpointReader
from pipekit.errors import CheckpointError
from pipekit.inference.load_model import load_model


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints of a run, each with tensors of its own."""
    config, tensors = random_model(num_layers=1)
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, config, {name: tensor * step for name, tensor in tensors.items()}, step=step)
    return tmp_path / "checkpoints"


def stored(checkpoint: Path) -> dict[str, Tensor]:
    return {name: value for file in checkpoint.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("file_bytes", [1, 2**30])
def test_an_average_is_the_mean_and_a_model(run: Path, monkeypatch: pytest.MonkeyPatch, file_bytes: int) -> None:
    monkeypatch.setattr(combine, "_FILE_BYTES", file_bytes)
    checkpoints = list_checkpoints(run)
    path = average_checkpoints(checkpoints, run)
    assert path.name == "average-of-3-step-00000003"
    sources = [stored(checkpoint) for checkpoint in checkpoints]
    found = dict(CheckpointReader(path).weights())
    assert found.keys() == sources[0].keys()
    for name, tensor in found.items():
        expected = torch.stack([source[name].double() for source in sources]).mean(0).float()
        assert torch.equal(tensor, expected), name
    assert len(list(path.glob("*.safetensors"))) == (len(found) if file_bytes == 1 else 1)
    load_model(path)
    # A run does not go on from it.
    assert list_checkpoints(run) == checkpoints
    assert not list(run.glob(".*"))


def test_models_of_other_shapes_are_not_averaged(run: Path, tmp_path: Path) -> None:
    config, tensors = random_model(num_layers=1, hidden_size=16)
    other = write_checkpoint(tmp_path / "other", config, tensors)
    with pytest.raises(CheckpointError, match=r"is not as in .*; average one model's"):
        average_checkpoints([other, *list_checkpoints(run)], run)
    assert not list(run.glob("*average*"))


def test_differences_are_those_of_the_tensors(run: Path) -> None:
    one, other, _ = list_checkpoints(run)
    assert compare_checkpoints(one, one) == []
    found = {difference.name: difference for difference in compare_checkpoints(one, other)}
    assert found.keys() == stored(one).keys()
    for name, tensor in stored(one).items():
        # The other is twice the first.
        assert found[name].largest == pytest.approx(float(tensor.abs().max()))
        assert found[name].relative == pytest.approx(1.0)


def test_one_element_is_one_tensor(run: Path, tmp_path: Path) -> None:
    config, tensors = random_model(num_layers=1)
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    changed["embed.weight" if "embed.weight" in changed else next(iter(changed))].view(-1)[3] += 0.5
    one = write_checkpoint(tmp_path / "one", config, tensors)
    other = write_checkpoint(tmp_path / "other", config, changed)
    (difference,) = compare_checkpoints(one, other)
    assert (difference.kind, difference.largest) == ("weights", pytest.approx(0.5))


def test_tensors_of_one_alone_are_named(run: Path, tmp_path: Path) -> None:
    config, tensors = random_model(num_layers=1)
    name = next(iter(tensors))
    one = write_checkpoint(tmp_path / "one", config, tensors)
    other = write_checkpoint(tmp_path / "other", config, {k: v for k, v in tensors.items() if k != name})
    for pair in ((one, other), (other, one)):
        (difference,) = compare_checkpoints(*pair)
        assert (difference.name, difference.largest) == (name, None)
        assert difference.reason == f"is in {one.name} alone"


def test_a_moving_average_becomes_the_weights(run: Path, tmp_path: Path) -> None:
    config, tensors = random_model(num_layers=1)
    checkpoint = write_checkpoint(tmp_path / "other", config, tensors)
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, checkpoint / "ema-0000.safetensors")
    held = {
        name: {"weights": ("weights-0000.safetensors", tensor), "ema": ("ema-0000.safetensors", 2 * tensor)}
        for name, tensor in tensors.items()
    }
    write_manifest(checkpoint, held, CheckpointReader(checkpoint).manifest.training)
    path = average_checkpoints([checkpoint], run, kind="ema")
    assert path.name == "ema-of-step-00000005"
    found = dict(CheckpointReader(path).weights())
    assert all(torch.equal(found[name], 2 * tensor) for name, tensor in tensors.items())
    load_model(path)
    with pytest.raises(CheckpointError, match="holds no ema of"):
        average_checkpoints(list_checkpoints(run)[-1:], run, kind="ema")

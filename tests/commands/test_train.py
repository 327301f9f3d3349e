"""`pipekit train --dry-run`: all that comes before the start, and nothing behind it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from train_runs import pipekit, write_workspace

pytestmark = pytest.mark.distributed

MISFIT = """
from torch import nn
from pipekit import Example, LayersTrial, LayerSpec

class Misfit(LayersTrial):
    @classmethod
    def build_layers(cls, config):
        return [LayerSpec(nn.Linear, 4, 6), LayerSpec(nn.Tanh), LayerSpec(nn.Linear, 5, 2)]

    @classmethod
    def example(cls, config, micro_batch_size):
        import torch
        return Example(torch.zeros(micro_batch_size, 4), torch.zeros(micro_batch_size, 2))

    def build_train_dataset(self):
        import torch
        return [(torch.zeros(4), torch.zeros(2))] * 8

    def loss(self, outputs, labels):
        return (outputs - labels).square().mean()

class Untold(Misfit):
    @classmethod
    def example(cls, config, micro_batch_size):
        return None
"""


def test_a_dry_run_shows_what_would_start_and_writes_prepared_data_alone(tmp_path: Path) -> None:
    workspace = write_workspace(tmp_path)
    before = {path.name for path in workspace.iterdir()}
    done = pipekit(workspace, "train", "c.yaml", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "pp=2 x dp=1 x tp=1, 2 processes" in done.stdout
    assert done.stdout.splitlines()[-1] == "dry run: 2 processes would start; nothing was written but data in cache"
    assert {path.name for path in workspace.iterdir()} == before | {"cache"}
    done = pipekit(workspace, "train", "c.yaml", "--dry-run", "parallel.pp=9")
    assert done.returncode == 2
    assert "parallel.pp=9" in done.stderr


@pytest.mark.parametrize("options", [("--dry-run",), ()], ids=["dry", "started"])
def test_a_layer_that_does_not_fit_is_named_before_a_rank_starts(options: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "misfit.py").write_text(MISFIT)
    config = {"model": "misfit:Misfit", "train": {"steps": 1}, "run": {"trial": "misfit:Misfit"}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    done = pipekit(tmp_path, "train", "c.yaml", *options)
    assert done.returncode == 2, done.stdout
    assert "layer 'layers.2' (Linear) does not fit its input, float32[1, 6]" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_an_error_of_a_forward_on_a_rank_names_the_layer_first(tmp_path: Path) -> None:
    (tmp_path / "misfit.py").write_text(MISFIT)
    config = {"model": "misfit:Untold", "train": {"steps": 1}, "run": {"trial": "misfit:Untold"}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    done = pipekit(tmp_path, "train", "c.yaml")
    assert done.returncode == 3, done.stdout
    assert "rank 0 failed: RuntimeError: layer 'layers.2': mat1 and mat2 shapes cannot be" in done.stderr


def test_a_dry_run_of_a_trial_says_its_processes(tmp_path: Path) -> None:
    methods = {
        "train_batch": "dataloader_iter, epoch_idx, batch_idx",
        "evaluate_batch": "dataloader_iter, batch_idx",
        "build_training_data_loader": "",
        "build_validation_data_loader": "",
    }
    lines = [f"    def {name}(self, {arguments}): ...\n" for name, arguments in methods.items()]
    (tmp_path / "mine.py").write_text("".join(["import pipekit\n\nclass Mine(pipekit.Trial):\n", *lines]))
    config = {"trial": "mine:Mine", "run": {"processes": 3, "device": "cpu"}, "fit": {"max_length": {"batches": 2}}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    done = pipekit(tmp_path, "train", "c.yaml", "--dry-run")
    assert done.stdout == "dry run: 3 processes of Mine would start; nothing was written\n", done.stderr
    assert not (tmp_path / "runs").exists()

"""Trials from YAML and from scripts, in processes of their own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from fork_server import run_joining, run_pipekit
from gloo_workers import free_port
from pipekit.config import load_config
from pipekit.config.trial_config import load_trial_config, names_trial
from pipekit.errors import ConfigError

pytestmark = pytest.mark.distributed

TRIAL = """
import time

import torch
from torch import nn

import pipekit


class LineTrial(pipekit.Trial):
    def __init__(self, context):
        self.context = context
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": context.get_hparam("lr"), "torch_adam": True}},
        }
        engine, *_ = pipekit.initialize(model=nn.Linear(4, 1), config=config)
        self.engine = context.wrap_model_engine(engine)

    def train_batch(self, dataloader_iter, epoch_idx, batch_idx):
        points, targets = self.context.to_device(next(dataloader_iter))
        loss = nn.functional.mse_loss(self.engine(points), targets)
        self.engine.backward(loss)
        self.engine.step()
        return loss

    def build_training_data_loader(self):
        points = torch.sin(torch.arange(64.0)).view(16, 4)
        return pipekit.DataLoader(torch.utils.data.TensorDataset(points, points.sum(1, keepdim=True)), batch_size=2)


class Wordy(LineTrial):
    def train_batch(self, dataloader_iter, epoch_idx, batch_idx):
        super().train_batch(dataloader_iter, epoch_idx, batch_idx)
        return "fine" if self.context.distributed.rank == 1 else 0.0


class Sleepy(LineTrial):
    def train_batch(self, dataloader_iter, epoch_idx, batch_idx):
        if self.context.distributed.rank == 1 and batch_idx == 2:
            time.sleep(600)
        return super().train_batch(dataloader_iter, epoch_idx, batch_idx)


class Unfinished(pipekit.Trial):
    pass
"""

SCRIPT = """
import sys

import pipekit
from line_trial import LineTrial

with pipekit.init(hparams={"lr": 0.05}, exp_conf={"run": {"dir": sys.argv[1], "device": "cpu"}}) as context:
    result = pipekit.Trainer(LineTrial(context), context).fit(max_length=pipekit.Epoch(2))
    print(context.distributed.size, result.batch, result.metrics["loss"])
"""


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    (tmp_path / "line_trial.py").write_text(TRIAL)
    (tmp_path / "script.py").write_text(SCRIPT)
    config = {
        "trial": "line_trial:LineTrial",
        "hyperparameters": {"lr": 0.05},
        "run": {"processes": 2, "device": "cpu", "timeout_s": 60},
        "fit": {"max_length": {"epochs": 4}, "reporting_period": {"batches": 3}, "checkpoint_period": {"batches": 5}},
    }
    (tmp_path / "line.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_trial_named_in_yaml_is_trained_and_goes_on(workspace: Path) -> None:
    done = run_pipekit(["train", "line.yaml", "fit.max_length={tokens: 120, per_sample: 3}"], cwd=workspace)
    assert done.returncode == 0, done.stderr
    assert "batch 3/5  loss " in done.stdout
    again = run_pipekit(["train", "line.yaml", "callbacks.loss_curve={file: loss.png}"], cwd=workspace)
    assert again.returncode == 0, again.stderr
    assert (workspace / "runs/line/loss.png").is_file()
    # An epoch of 16 samples is two batches of two replicas.
    assert [record["step"] for record in records(workspace / "runs/line")] == [3, 5, 6, 8]
    whole = run_pipekit(["train", "line.yaml", "run.dir=runs/whole"], cwd=workspace)
    assert whole.returncode == 0, whole.stderr
    assert records(workspace / "runs/whole")[-1] == records(workspace / "runs/line")[-1]
    assert load_trial_config(workspace / "runs/line/config.yaml").hyperparameters == {"lr": 0.05}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trial=line_trial:Wordy", "train_batch returned the str 'fine'; return a dict of metrics"),
        ("trial=line_trial:Unfinished", "Unfinished has no train_batch, which is called on every rank; write one"),
        ("trial=line_trial:Missing", "trial=line_trial:Missing"),
        ("fit.max_length=null", "fit.max_length: missing; for example fit: {max_length: {epochs: 3}}"),
        (
            "callbacks.early_stopping=true",
            "callbacks.early_stopping: LineTrial has no evaluation; write",
        ),
        ("hyperparameters={}", "hyperparameters.lr: the trial asks for it, and it is not given; there are none"),
    ],
)
def test_a_wrong_trial_ends_with_one_error_and_exit_code_2(workspace: Path, override: str, message: str) -> None:
    done = run_pipekit(["train", "line.yaml", override], cwd=workspace)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_rank_that_sleeps_in_train_batch_is_named_and_ends_all_at_the_limit(workspace: Path) -> None:
    done = run_pipekit(["train", "line.yaml", "trial=line_trial:Sleepy", "run.timeout_s=5"], cwd=workspace)
    assert done.returncode == 4
    error, *report = done.stderr[done.stderr.index("error: ") :].splitlines()
    assert error.startswith("error: the run hangs: rank 1 waits for nobody, and has been calling train_batch for ")
    table = [re.split(r"\s\s+", line) for line in report[1:4]]
    assert table[0] == ["rank", "stage", "phase", "doing", "waits for", "for"]
    assert table[1][:5] == ["0", "-", "step 3", "calling train_batch: in all_reduce", "others"]
    assert table[2][:5] == ["1", "-", "step 3", "calling train_batch", "-"]
    folder = workspace / "runs/line/logs"
    assert report[-1] == f"saved in {folder}/hang.txt"
    assert not list(folder.glob("*.heartbeat.json"))


@pytest.mark.slow
def test_the_ranks_of_a_script_tell_of_a_hang_themselves(workspace: Path) -> None:
    script = SCRIPT.replace("LineTrial", "Sleepy").replace('"device": "cpu"', '"device": "cpu", "timeout_s": 10')
    (workspace / "sleepy.py").write_text(script)
    done = run_pipekit(["launch", "-n", "2", "sleepy.py", "runs/own"], cwd=workspace)
    assert done.returncode == 3
    assert "the run hangs: rank 1 waits for nobody, and has been calling train_batch for " in done.stdout
    assert (workspace / "runs/own/logs/hang.txt").is_file()


def test_a_script_is_one_rank_of_its_launch(workspace: Path) -> None:
    command = [str(workspace / "script.py"), "runs/two"]
    ranks = run_joining(command, cwd=workspace, world_size=2, port=free_port())
    said = [rank.stdout.split()[-3:] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert said[0] == said[1]
    assert said[0][:2] == ["2", "4"]


def test_commands_that_need_a_model_say_so(workspace: Path) -> None:
    with pytest.raises(ConfigError, match=r"line.yaml: trial=line_trial:LineTrial: only pipekit train takes the"):
        load_config(workspace / "line.yaml")


def test_mistakes_in_the_file_are_shown_where_they_are(workspace: Path) -> None:
    path = workspace / "wrong.yaml"
    path.write_text(
        "trial: line_trial:LineTrial\nhyperparametrs: {lr: 1}\nfit: {max_length: {batches: 1, epochs: 1}, "
        "reporting_period: {tokens: 9}}\n"
    )
    assert names_trial(path)
    with pytest.raises(ConfigError) as error:
        load_trial_config(path, ["run.processes=0"])
    assert [line.strip() for line in str(error.value).splitlines()] == [
        "4 mistakes in the configuration:",
        f"{path}:2: hyperparametrs: unknown key; did you mean 'hyperparameters'?",
        f"{path}:3: fit.max_length={{batches: 1, epochs: 1}}: needs one unit, and has 2; for example {{batches: 100}}",
        f"{path}:3: fit.reporting_period={{tokens: 9}}: tokens and per_sample go together; for example "
        "{tokens: 1000000, per_sample: 1024}",
        "command line: run.processes=0: must be a whole number greater than 0, or auto; for example processes: 2",
    ]

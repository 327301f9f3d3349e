"""Trials of Determined's on pipekit: they train as torch alone does, and go on; names, samplers, configurations."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import pipekit.compat.determined as det
from determined_trials import DS_CONFIG, NUM_SAMPLES, PipelinePointsTrial, PointsDataset, PointsTrial
from fork_server import run_pipekit
from gloo_workers import GlooWorkers
from pipekit.config.trial_config import parse_trial_config
from pipekit.errors import ConfigError

EXPERIMENT: dict[str, Any] = {
    "name": "points",
    "entrypoint": "determined_trials:PointsTrial",
    "hyperparameters": {
        "deepspeed_config": DS_CONFIG,
        "overwrite_deepspeed_args": {"gradient_accumulation_steps": 2, "zero_optimization": {"stage": 0}},
        "width": {"type": "const", "val": 8},
        "pipe_parallel_size": 2,
    },
    "data": {"kind": "points"},
    "reproducibility": {"experiment_seed": 5},
    "resources": {"slots_per_trial": 2, "resource_pool": "large"},
    "searcher": {"name": "single", "metric": "loss", "smaller_is_better": True, "max_length": {"epochs": 2}},
    "min_validation_period": {"batches": 0},
    "min_checkpoint_period": {"records": 500},
    "scheduling_unit": 3,
    "checkpoint_policy": "all",
    "perform_initial_validation": True,
    "profiling": {"enabled": False},
}


def train(rank: int, folder: str, kind: type[PointsTrial]) -> dict[str, Any]:
    """Train two batches, and go on to four."""
    result: dict[str, Any] = {"losses": []}
    for length in (2, 4):
        context = det.pytorch.deepspeed.DeepSpeedTrialContext.from_config(
            {**EXPERIMENT, "run": {"dir": folder, "device": "cpu"}}
        )
        trial = kind(context)
        trainer = det.pytorch.deepspeed.Trainer(trial, context)
        done = trainer.fit(max_length=det.pytorch.Batch(length), reporting_period=det.pytorch.Batch(1))
        result["losses"] += [metrics["loss"] for metrics in trial.callback.metrics]
        result |= {"validation": done.validation_metrics, "num_reports": trial.callback.num_reports}
        trial.model_engine.destroy()
    return result


def losses_of_torch(samples: int) -> tuple[list[float], dict[str, float]]:
    """The losses of four batches, then the mean and the largest error on all samples, by torch alone."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    features, targets = map(torch.stack, zip(*(PointsDataset()[index] for index in range(NUM_SAMPLES)), strict=True))
    losses = []
    for batch in range(4):
        chosen = [index % NUM_SAMPLES for index in range(batch * samples, (batch + 1) * samples)]
        loss = nn.functional.mse_loss(model(features[chosen]), targets[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    errors = (model(features) - targets).detach()
    return losses, {"loss": errors.square().mean().item(), "largest_error": errors.abs().max().item()}


@pytest.mark.distributed
@pytest.mark.parametrize("kind", [PointsTrial, PipelinePointsTrial])
def test_a_trial_with_one_line_changed_trains_as_torch_does(
    gloo: GlooWorkers, tmp_path: Path, kind: type[PointsTrial]
) -> None:
    first, second = gloo.run(2, train, str(tmp_path), kind)
    is_pipeline = kind is PipelinePointsTrial
    losses, validation = losses_of_torch(samples=4 if is_pipeline else 8)
    if is_pipeline:
        del validation["largest_error"]
    assert first["losses"] == second["losses"] == pytest.approx(losses, rel=1e-5)
    assert first["validation"] == second["validation"] == pytest.approx(validation, rel=1e-5)
    assert first["num_reports"] == 4


@pytest.mark.distributed
def test_an_experiment_trains_from_yaml(tmp_path: Path) -> None:
    config = {**det.trial_config(EXPERIMENT), "run": {"processes": 1, "device": "cpu"}}
    (tmp_path / "points.yaml").write_text(yaml.safe_dump(config))
    done = run_pipekit(["train", "points.yaml"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    records = [yaml.safe_load(line) for line in (tmp_path / "runs/points/metrics.jsonl").read_text().splitlines()]
    losses, _ = losses_of_torch(samples=4)
    # 24 samples twice, 4 in a batch.
    assert [record["step"] for record in records if "loss" in record] == [3, 6, 9, 12]
    assert records[1]["loss"] == pytest.approx(sum(losses[:3]) / 3, rel=1e-5)
    assert [record["step"] for record in records if "val_loss" in record] == [0, 12]


def test_an_experiments_configuration_becomes_a_trials() -> None:
    config = parse_trial_config(det.trial_config(EXPERIMENT))
    assert config.trial == "determined_trials:PointsTrial"
    assert config.hyperparameters["width"] == 8
    assert config.hyperparameters["deepspeed_config"] == DS_CONFIG
    assert (config.seed, config.data, config.run.processes) == (5, {"kind": "points"}, 2)
    fit = config.fit
    assert (fit.max_length.epochs, fit.checkpoint_period.samples) == (2, 500)  # type: ignore[union-attr]
    assert (fit.reporting_period.batches, fit.validation_period) == (3, None)
    assert (fit.best_metric, fit.best_is, fit.checkpoint_policy) == ("loss", "lowest", "all")
    assert (fit.step_zero_validation, fit.profiling_enabled) == (True, False)
    assert det.trial_config({"searcher": {"smaller_is_better": False}})["fit"] == {"best_is": "highest"}
    with pytest.raises(ConfigError, match=r"hyperparameters.lr=.*: a range to search, and pipekit searches none"):
        det.trial_config({"hyperparameters": {"lr": {"type": "log", "minval": -4, "maxval": -1, "base": 10}}})
    with pytest.raises(ConfigError, match=r"min_validation_period=.*: must be a number of one unit"):
        det.trial_config({"min_validation_period": {"hours": 1}})


def test_init_yields_a_context_of_the_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DS_ACCELERATOR", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.setenv(name, "cpu")  # init sets them for the process
    ranges = {"lr": {"type": "double", "minval": 0, "maxval": 1}}
    experiment = {**EXPERIMENT, "hyperparameters": ranges, "run": {"dir": str(tmp_path), "device": "cpu"}}
    with det.pytorch.deepspeed.init(hparams={"lr": 0.5}, exp_conf=experiment) as context:
        assert context.get_hparams() == {"lr": 0.5}
        assert (context.get_data_config(), context.get_trial_seed()) == ({"kind": "points"}, 5)
        assert context.get_enable_tensorboard_logging() is (find_spec("tensorboard") is not None)
        numbers = context.distributed
        assert (numbers.get_rank(), numbers.get_size(), numbers.get_local_rank()) == (0, 1, 0)
    with pytest.raises(ConfigError, match="leave distributed out"), det.pytorch.deepspeed.init(distributed=numbers):
        pass
    assert det.get_cluster_info() is None  # type: ignore[func-returns-value]


class Grid:
    """Answers of DeepSpeed's grid, of a rank among three stages, three replicas and two tensor-parallel ranks."""

    def __init__(self, stage: int, tensor: int) -> None:
        self.get_pipe_parallel_rank = lambda: stage
        self.get_slice_parallel_rank = lambda: tensor
        self.get_pipe_parallel_world_size = self.get_data_parallel_world_size = lambda: 3
        self.get_data_parallel_rank = lambda: 1


def test_the_four_answers_of_a_grid_and_of_replicas() -> None:
    deepspeed = det.pytorch.deepspeed
    places = [(stage, tensor) for stage in range(3) for tensor in (0, 1)]
    roles = {place: deepspeed.make_deepspeed_mpu(Grid(*place)) for place in places}
    assert {place for place, role in roles.items() if role.should_report_metrics} == {(2, 0)}
    assert {place for place, role in roles.items() if not role.should_build_data_loader} == {(1, 0), (1, 1)}
    assert roles[2, 0] == deepspeed.ModelParallelUnit(1, 3, should_report_metrics=True, should_build_data_loader=True)


def test_samplers_take_their_arguments_by_the_names_known_there() -> None:
    samplers = det.pytorch.samplers
    batches = [[0, 1], [2, 3], [4]]
    shards = [list(samplers.DistributedBatchSampler(batches, num_workers=2, rank=rank)) for rank in (0, 1)]
    assert shards == [[[0, 1], [4]], [[2, 3]]]
    assert list(samplers.DistributedSampler(range(5), num_workers=2, rank=1)) == [1, 3]
    assert list(islice(samplers.RepeatBatchSampler(batch_sampler=batches), 4)) == [*batches, [0, 1]]
    assert list(islice(samplers.RepeatSampler(sampler=range(2)), 3)) == [0, 1, 0]
    assert list(samplers.SkipBatchSampler(batch_sampler=batches, skip=2)) == [[4]]
    assert list(samplers.SkipSampler(sampler=range(3), skip=2)) == [2]
    assert sorted(samplers.ReproducibleShuffleBatchSampler(batch_sampler=batches, seed=1)) == batches
    assert sorted(samplers.ReproducibleShuffleSampler(sampler=range(5), seed=1)) == list(range(5))


def test_configurations_are_overwritten_with_new_keys_too() -> None:
    config = det.pytorch.deepspeed.overwrite_deepspeed_config(
        base_ds_config={"a": {"b": 1}}, source_ds_dict={"a": {"c": 2}, "d": 3}
    )
    assert config == {"a": {"b": 1, "c": 2}, "d": 3}

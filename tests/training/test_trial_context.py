"""The context of a trial: settings, sizes, several engines, accumulation by hand, stops, profiles."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fork_server import run_script
from gloo_workers import GlooWorkers
from pipekit.data import DataLoader
from pipekit.errors import ConfigError
from pipekit.training.context import TrialContext
from pipekit.training.periods import Batch
from pipekit.training.trial import Trial
from trial_jobs import MICRO_BATCH, Points, PointsTrial, fit, make_trial

pytestmark = pytest.mark.distributed


class Settings(PointsTrial):
    """Notes what the context answers while it trains."""

    def __init__(self, context: TrialContext) -> None:
        super().__init__(context)
        self.answers: list[Any] = []

    def train_batch(self, dataloader_iter: Iterator[Any] | None, epoch_idx: int, batch_idx: int) -> Any:
        context = self.context
        assert (context.current_train_batch(), context.current_train_epoch()) == (batch_idx, epoch_idx)
        self.answers.append((batch_idx, epoch_idx, context.is_epoch_start(), context.is_epoch_end()))
        return super().train_batch(dataloader_iter, epoch_idx, batch_idx)


def ask(rank: int, folder: str) -> dict[str, Any]:
    trial = make_trial(f"{folder}/run", Settings, lr=0.5)
    context = trial.context
    with pytest.raises(ConfigError, match=r"hyperparameters.learning_rat: .* is not given; there are lr$"):
        context.get_hparam("learning_rat")
    with pytest.raises(ConfigError, match=r"run.devise: unknown key; did you mean 'run.device'"):
        TrialContext.from_config({"run": {"devise": "cpu"}})
    fit(trial, max_length=Batch(5))
    sizes = [
        context.train_micro_batch_size_per_gpu,
        context.get_train_micro_batch_size_per_gpu(),
        context.num_micro_batches_per_slot,
        context.get_num_micro_batches_per_slot(),
        context.get_per_slot_batch_size(),
        context.get_global_batch_size(),
    ]
    moved = context.to_device({"x": [torch.zeros(1), (torch.ones(1), "text")]})
    assert moved["x"][1][1] == "text"
    context.reset_reducers()
    total = context.wrap_reducer(sum, name="total", for_validation=False)
    total.update(rank + 1)
    assert context.reduce_metrics(for_training=True) == {"total": 3}
    assert context.reduce_metrics(for_training=False) == {}
    context.reset_reducers()
    assert context.reduce_metrics(for_training=True) == {}
    return {
        "sizes": sizes,
        "answers": trial.answers[::3],
        "lr": context.get_hparam("lr"),
        "hparams": context.get_hparams(),
        "names": [context.get_experiment_id(), context.get_trial_id(), context.get_trial_seed()],
        "config": context.get_experiment_config()["run"]["device"],
        "data": context.get_data_config(),
        "ranks": [context.distributed.rank, context.distributed.size],
    }


def test_the_context_knows_settings_sizes_and_where_the_training_stands(gloo: GlooWorkers, tmp_path: Path) -> None:
    first, second = gloo.run(2, ask, str(tmp_path))
    assert first["sizes"] == [2, 2, 3, 3, 6, 12]
    # An epoch has 11 micro-batches, of which a batch takes 6: it ends within the second, the fourth and the sixth.
    assert first["answers"] == [
        (0, 0, True, False),
        (1, 0, False, True),
        (2, 1, True, False),
        (3, 1, False, True),
        (4, 2, True, False),
    ]
    assert (first["lr"], first["hparams"], first["data"], first["config"]) == (0.5, {"lr": 0.5}, {}, "cpu")
    assert first["names"] == [tmp_path.name, "run", 1]
    assert (first.pop("ranks"), second.pop("ranks")) == ([0, 2], [1, 2])
    assert first == second


class Adversaries(Trial):
    """Two engines: one makes points of noise, the other tells them from those of the data."""

    def __init__(self, context: TrialContext) -> None:
        import pipekit

        self.context = context
        by_hand = context.get_hparams().get("by_hand", False)
        if by_hand:
            context.disable_auto_grad_accumulation()
        config = {
            "train_micro_batch_size_per_gpu": MICRO_BATCH,
            "gradient_accumulation_steps": 3,
            "steps_per_print": None,
            "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}},
        }
        maker, *_ = pipekit.initialize(model=nn.Linear(2, 4), config=config)
        judge, *_ = pipekit.initialize(model=nn.Linear(4, 1), config=config)
        self.maker, self.judge = context.wrap_model_engine(maker), context.wrap_model_engine(judge)
        self.by_hand = by_hand
        self.losses: list[float] = []

    def train_batch(self, dataloader_iter: Iterator[Any] | None, epoch_idx: int, batch_idx: int) -> Any:
        assert dataloader_iter is not None
        for _ in range(3 if self.by_hand else 1):
            _, points, _ = next(dataloader_iter)
            ones, zeros = torch.ones(len(points), 1), torch.zeros(len(points), 1)
            made = self.maker(torch.randn(len(points), 2))
            judged = F.binary_cross_entropy_with_logits(self.judge(points), ones)
            judged = judged + F.binary_cross_entropy_with_logits(self.judge(made.detach()), zeros)
            self.judge.backward(judged)
            self.judge.step()
            # The judge is to get no gradients of this loss.
            self.judge.module.requires_grad_(False)
            fooled = F.binary_cross_entropy_with_logits(self.judge.module(made), ones)
            self.maker.backward(fooled)
            self.maker.step()
            self.judge.module.requires_grad_(True)
            self.losses += [judged.item(), fooled.item()]
        return {"judged": judged, "fooled": fooled}

    def build_training_data_loader(self) -> DataLoader:
        return DataLoader(Points(), batch_size=MICRO_BATCH, shuffle=True)


def train_adversaries(rank: int, folder: str) -> list[float]:
    def train(name: str, batches: int, **hparams: Any) -> Any:
        trial = make_trial(f"{folder}/{name}", Adversaries, **hparams)
        fit(trial, max_length=Batch(batches), checkpoint_policy="none")
        assert (trial.maker.global_steps, trial.judge.global_steps) == (batches, batches)
        return trial

    whole = train("whole", 4)
    train("parts", 2)
    rest = train("parts", 4)
    assert rest.losses == whole.losses[2 * 6 :]
    for ours, theirs in ((rest.maker, whole.maker), (rest.judge, whole.judge)):
        assert all(map(torch.equal, ours.module.parameters(), theirs.module.parameters()))
    # By hand, the three micro-batches are drawn for in one call, and counted all the same.
    train("hand", 2, by_hand=True)
    half, full = train("hand", 4, by_hand=True), train("whole by hand", 4, by_hand=True)
    assert half.losses == full.losses[2 * 6 :]
    return list(whole.losses)


@pytest.mark.parametrize("dp", [1, 2])
def test_two_engines_are_trained_saved_and_resumed_together(gloo: GlooWorkers, tmp_path: Path, dp: int) -> None:
    results = gloo.run(dp, train_adversaries, str(tmp_path))
    assert all(len(losses) == 4 * 6 for losses in results)
    assert [path.name for path in sorted((tmp_path / "whole/checkpoints/step-00000004").glob("model*"))] == [
        "model0",
        "model1",
    ]


class Stopping(PointsTrial):
    """Asks for the end of the training on the last rank alone."""

    def train_batch(self, dataloader_iter: Iterator[Any] | None, epoch_idx: int, batch_idx: int) -> Any:
        if batch_idx == 2 and self.context.distributed.rank == self.context.distributed.size - 1:
            self.context.set_stop_requested()
        return super().train_batch(dataloader_iter, epoch_idx, batch_idx)


class OwnFiles(PointsTrial):
    """Saves a file of its own beside the engine."""

    def save(self, context: TrialContext, path: Path) -> None:
        super().save(context, path)
        if context.distributed.rank == 0:
            (path / "own.txt").write_text("own")

    def load(self, context: TrialContext, path: Path) -> None:
        super().load(context, path)
        self.own = (path / "own.txt").read_text()


def go_through(rank: int, folder: str) -> dict[str, Any]:
    stopping = make_trial(f"{folder}/stop", Stopping)
    stopped = fit(stopping, max_length=Batch(50), reporting_period=Batch(4))
    fit(make_trial(f"{folder}/own", OwnFiles), max_length=Batch(1))
    own = make_trial(f"{folder}/own", OwnFiles)
    fit(own, max_length=Batch(1))
    tested = make_trial(f"{folder}/test")
    result = fit(tested, test_mode=True)
    profiled = make_trial(f"{folder}/profile")
    fit(profiled, max_length=Batch(6), profiling_enabled=True)
    return {
        "stopped": (stopped.batch, stopped.checkpoint and stopped.checkpoint.name),
        "own": own.own,
        "tested": (result.batch, [event.split()[0] for event in tested.seen.events]),
        "left": [path.name for path in Path(f"{folder}/test").glob("**/*")],
    }


@pytest.mark.parametrize("dp", [1, 2])
def test_stops_own_files_tests_and_profiles(gloo: GlooWorkers, tmp_path: Path, dp: int) -> None:
    for rank, result in enumerate(gloo.run(dp, go_through, str(tmp_path))):
        # Where the next metrics are reported.
        assert result["stopped"] == (4, "step-00000004")
        assert result["own"] == "own"
        batch, events = result["tested"]
        assert batch == 2
        assert {"validation_end", "workload_end", "upload_end", "trial_shutdown"} <= set(events)
        assert result["left"] == []
        (trace,) = (tmp_path / "profile" / "profile").glob(f"rank-{rank}-*.json")
        events = json.loads(trace.read_text())["traceEvents"]
        assert any("linear" in event.get("name", "") for event in events)


SCRIPT = """
from trial_jobs import make_trial
trial = make_trial("points")
batches = iter(trial.build_training_data_loader().get_data_loader(repeat=True))
print(float(trial.train_batch(batches, 0, 0)))
"""


def test_a_plain_python_session_trains_a_batch(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = run_script(script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) > 0

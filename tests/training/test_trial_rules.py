"""Trials that break a rule: one clear error on all ranks, and no wait."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.data
from torch import nn

import pipekit
from gloo_workers import GlooWorkers
from pipekit.data import DataLoader
from pipekit.errors import PipekitError
from pipekit.training.context import TrialContext
from pipekit.training.layers_trial import LayersTrial
from pipekit.training.periods import Batch, Epoch
from pipekit.training.trial import Trial, check_trial
from pipekit.training.trial_callbacks import TrialCallback
from trial_jobs import MICRO_BATCH, Points, PointsTrial, destroy_engines, fit, make_trial


class Complete(Trial):
    def train_batch(self, dataloader_iter: Any, epoch_idx: int, batch_idx: int) -> Any: ...

    def build_training_data_loader(self) -> Any: ...


def with_methods(*names: str, base: type = Complete, **methods: Any) -> type:
    """A subclass with methods that take no arguments, or the given ones."""
    return type("Mine", (base,), {**{name: lambda self: None for name in names}, **methods, "__module__": "mine"})


CLASSES: dict[str, tuple[type, str]] = {
    "no trial": (int, "int is no trial; make it a subclass of pipekit.Trial"),
    "no train_batch": (
        with_methods("build_training_data_loader", base=Trial),
        "Mine has no train_batch, which is called on every rank; write one",
    ),
    "other arguments": (
        with_methods("train_batch"),
        r"Mine.train_batch takes \(\), and is called as train_batch\(dataloader_iter, epoch_idx, batch_idx\)",
    ),
    "a name that is nearly right": (
        with_methods("build_training_dataloader"),
        "Mine.build_training_dataloader: nothing calls it; did you mean build_training_data_loader\\?",
    ),
    "two evaluations": (
        with_methods(
            evaluate_batch=lambda self, dataloader_iter, batch_idx: {},
            evaluate_full_dataset=lambda self, data_loader: {},
        ),
        "Mine has evaluate_batch and evaluate_full_dataset; leave one of them out",
    ),
    "evaluation without data": (
        with_methods(evaluate_batch=lambda self, dataloader_iter, batch_idx: {}),
        "Mine has evaluate_batch and no build_validation_data_loader; write one",
    ),
    "data without evaluation": (
        with_methods("build_validation_data_loader"),
        "Mine has build_validation_data_loader and no evaluate_batch; write one",
    ),
    "a reducer of nothing": (with_methods("evaluation_reducer"), "Mine.evaluation_reducer: nothing calls it without"),
    "hooks of the short way": (
        with_methods("build_layers", "build_training_data_loader", base=Trial),
        r"Mine.build_layers: nothing calls it on a pipekit.Trial; write class Mine\(pipekit.LayersTrial\)",
    ),
    "steps of its own in the short way": (
        with_methods("train_batch", base=LayersTrial),
        r"Mine.train_batch: nothing calls it on a pipekit.LayersTrial; write class Mine\(pipekit.Trial\)",
    ),
}


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_that_would_not_be_called_as_it_thinks_is_refused(name: str) -> None:
    kind, message = CLASSES[name]
    with pytest.raises(PipekitError, match=f"^{message}"):
        check_trial(kind)


def test_methods_of_ones_own_may_have_any_other_name() -> None:
    check_trial(with_methods("loss", "train_step", "evaluate", "build_model", "learning_rate"))
    check_trial(with_methods("helper", base=LayersTrial))


def returning(value: Callable[[int], Any]) -> type[PointsTrial]:
    """A trial whose `train_batch` returns a value that depends on the number of its calls."""

    def train_batch(self: Any, dataloader_iter: Any, epoch_idx: int, batch_idx: int) -> Any:
        loss = PointsTrial.train_batch(self, dataloader_iter, epoch_idx, batch_idx)
        self.calls = getattr(self, "calls", 0) + 1
        return value(self.calls) if value(self.calls) is not None else loss

    return type("Mine", (PointsTrial,), {"train_batch": train_batch})


class Unwrapped(PointsTrial):
    def __init__(self, context: TrialContext) -> None:
        super().__init__(context)
        context.models.clear()


class NoEngine(Complete):
    pass


class Twice(PointsTrial):
    def __init__(self, context: TrialContext) -> None:
        super().__init__(context)
        unit = pipekit.RankRole(context.distributed.rank, context.distributed.size, True, True)
        context.set_mpu(unit)
        context.set_mpu(unit)


class Roleless(PointsTrial):
    def __init__(self, context: TrialContext) -> None:
        super().__init__(context)
        context.set_mpu(object())


class SameReplica(PointsTrial):
    def __init__(self, context: TrialContext) -> None:
        super().__init__(context)
        context.set_mpu(pipekit.RankRole(0, context.distributed.size, True, True))


class Foreign(PointsTrial):
    def __init__(self, context: TrialContext) -> None:
        super().__init__(context)
        context.wrap_model_engine(nn.Linear(1, 1))


class TorchLoader(PointsTrial):
    def build_training_data_loader(self) -> Any:
        return torch.utils.data.DataLoader(Points(), batch_size=MICRO_BATCH)


class Endless(torch.utils.data.IterableDataset[int]):
    def __iter__(self) -> Iterator[Any]:
        yield from (Points()[index] for index in range(22))


class EndlessValidation(PointsTrial):
    def build_validation_data_loader(self) -> DataLoader:
        return DataLoader(Endless(), batch_size=MICRO_BATCH)


class FewValidation(PointsTrial):
    def build_validation_data_loader(self) -> DataLoader:
        return DataLoader(Points(0), batch_size=MICRO_BATCH)


class ByHand(PointsTrial):
    """Steps after the second micro-batch, and not after the others."""

    def train_batch(self, dataloader_iter: Iterator[Any] | None, epoch_idx: int, batch_idx: int) -> Any:
        assert dataloader_iter is not None
        _, features, _ = next(dataloader_iter)
        loss = self.engine(features).mean()
        self.engine.backward(loss)
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 2:
            self.engine.step()
        return loss


class Failing(TrialCallback):
    """Fails on the last rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_training_workload_end(self, avg_metrics: dict[str, Any], batch_metrics: list[dict[str, float]]) -> None:
        if self.rank == torch.distributed.get_world_size() - 1:
            raise ZeroDivisionError("out of luck")


class FailingCallback(PointsTrial):
    def build_callbacks(self) -> dict[str, TrialCallback]:
        return {"luckless": Failing(self.context.distributed.rank)}


class UnequalCallbacks(PointsTrial):
    def build_callbacks(self) -> dict[str, TrialCallback]:
        return {"first": TrialCallback()} if self.context.distributed.rank == 0 else {}


class NoCallbacks(PointsTrial):
    def build_callbacks(self) -> Any:
        return [TrialCallback()]


class Unwritable(TrialCallback):
    def state_dict(self) -> dict[str, Any]:
        return {"tensor": torch.zeros(1)}


class UnwritableState(PointsTrial):
    def build_callbacks(self) -> dict[str, TrialCallback]:
        return {"odd": Unwritable()}


class BadMetric(PointsTrial):
    def evaluate_batch(self, dataloader_iter: Iterator[Any] | None, batch_idx: int) -> dict[str, Any]:
        super().evaluate_batch(dataloader_iter, batch_idx)
        return 0.5  # type: ignore[return-value]


class ReadsUnequally(PointsTrial):
    def train_batch(self, dataloader_iter: Iterator[Any] | None, epoch_idx: int, batch_idx: int) -> Any:
        assert dataloader_iter is not None
        if self.context.distributed.rank == 0 and not self.read:
            next(dataloader_iter)
        return super().train_batch(dataloader_iter, epoch_idx, batch_idx)


TRIALS: dict[str, tuple[type[Any], dict[str, Any], str]] = {
    "engine not wrapped": (
        Unwrapped,
        {},
        "Unwrapped.engine is an engine that no checkpoint would hold; write",
    ),
    "no engine": (NoEngine, {}, "NoEngine has wrapped no engine; in __init__, make one with pipekit.initialize"),
    "mpu twice": (Twice, {}, "set_mpu: called twice; call it once"),
    "mpu without answers": (Roleless, {}, "set_mpu: the object has no data_parallel_rank; give a pipekit.Model"),
    "a replica twice": (SameReplica, {}, "replica 1 of 2: no rank has should_build_data_loader=True"),
    "foreign engine": (Foreign, {}, "wrap_model_engine: a torch.nn.modules.linear.Linear is no engine of pipekit's"),
    "torch's loader": (
        TorchLoader,
        {},
        r"TorchLoader.build_training_data_loader returned a torch.*DataLoader, in",
    ),
    "validation without length": (
        EndlessValidation,
        {},
        "EndlessValidation.build_validation_data_loader: the data",
    ),
    "no validation data": (FewValidation, {}, "FewValidation.build_validation_data_loader: a replica has no batch to"),
    "steps by hand": (ByHand, {}, "train_batch has left engine 0 after 1 of 3 micro-batches: it is called for each"),
    "no metrics": (returning(lambda call: "good"), {}, "train_batch returned the str 'good'; return a dict of metrics"),
    "no number": (
        returning(lambda call: {"loss": torch.zeros(2)}),
        {},
        r"train_batch returned a tensor of the shape \(2,\) as the metric 'loss'; return a number",
    ),
    "other names": (
        returning(lambda call: {f"loss{call}": 1.0}),
        {},
        "train_batch returned the metrics loss2, and in the batch before loss1; return the same in every batch",
    ),
    "a failing callback": (
        FailingCallback,
        {},
        "callback 'luckless': on_training_workload_end raised ZeroDivisionError: out of luck",
    ),
    "unequal callbacks": (
        UnequalCallbacks,
        {},
        r"build_callbacks returned first \(TrialCallback\) on rank 0 and none on rank 1; return the same on all ranks",
    ),
    "no callbacks": (NoCallbacks, {}, "build_callbacks must return a dict of TrialCallback objects by name"),
    "a state that JSON cannot hold": (
        UnwritableState,
        {},
        "callback 'odd': state_dict raised TypeError: .*; checkpoints hold numbers, texts, lists and dicts",
    ),
    "no dict of metrics": (BadMetric, {}, "evaluate_batch returned the float 0.5; return a dict of metrics"),
    "unequal reads": (
        ReadsUnequally,
        {},
        "rank 0 has read 4 micro-batches and rank 1 has read 3, so that a",
    ),
    "no length": (PointsTrial, {"max_length": None}, "max_length=None: must be a period; for example max_length="),
    "a number for a period": (
        PointsTrial,
        {"reporting_period": 7},
        "reporting_period=7: must be a period; for",
    ),
    "an unknown policy": (
        PointsTrial,
        {"checkpoint_policy": "some"},
        "checkpoint_policy='some': must be all, best or none",
    ),
    "an unknown metric": (
        PointsTrial,
        {"best_metric": "accuracy"},
        "best_metric='accuracy': the validation returns error; give one of them",
    ),
    "no such checkpoint": (
        PointsTrial,
        {"latest_checkpoint": "nowhere"},
        "nowhere: no such folder; give a run's",
    ),
    "epochs of an endless stream": (
        type("Streaming", (PointsTrial,), {"build_training_data_loader": lambda self: DataLoader(Endless())}),
        {"max_length": Epoch(1)},
        r"Epoch\(1\): the training data have no length; give Batch, or a dataset with __len__",
    ),
}


def break_rules(rank: int, folder: str) -> dict[str, str]:
    messages = {}
    for name, (kind, arguments, _) in TRIALS.items():
        try:
            fit(make_trial(f"{folder}/{name}", kind), **{"max_length": Batch(1), **arguments})
            messages[name] = "nothing raised"
        except PipekitError as error:
            messages[name] = f"{error} (exit code {error.exit_code})"
        destroy_engines()
    try:
        fit(make_trial(f"{folder}/unequal"), max_length=Batch(1 + rank))
    except PipekitError as error:
        messages["unequal arguments"] = str(error)
    fit(make_trial(f"{folder}/shared"), max_length=Batch(1))
    try:
        fit(make_trial(f"{folder}/shared", Another), max_length=Batch(2))
    except PipekitError as error:
        messages["another trial"] = str(error)
    return messages


class Another(PointsTrial):
    """Another trial with the same engine."""


@pytest.mark.distributed
def test_every_broken_rule_is_one_error_on_all_ranks(gloo: GlooWorkers, tmp_path: Path) -> None:
    first, second = gloo.run(2, break_rules, str(tmp_path))
    assert first == second
    for name, (_, _, message) in TRIALS.items():
        assert re.match(f"{message}.*exit code 2.$", first[name], re.DOTALL), f"{name}: {first[name]}"
    assert re.match(r".*step-00000001: is of the trial PointsTrial, and this is Another; go", first["another trial"])
    assert re.match(
        r"rank 0 trains with \(max_length=Batch\(1\), .*\), and rank 1 with \(max_length=Batch\(2\), .*; call fit with",
        first["unequal arguments"],
    )
    assert list(tmp_path.rglob(".step-*")) == []

"""The data of a run of layers: mixtures, from start to start, with an engine that computes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from fake_layers_run import Numbers, NumbersTrial, Run
from pipekit.data.collate import MapDataset
from pipekit.data.mixture import MixedSource, Mixture, whole_weights
from pipekit.errors import CheckpointError, ConfigError

pytestmark = pytest.mark.usefixtures("alone")

# Samples are numbered through all sources.
SIZES = {"web": 10, "code": 7, "math": 3}


class MixedTrial(NumbersTrial):
    """Sources of numbers, mixed as the configuration says."""

    sizes: Mapping[str, int] = SIZES
    fingerprints: Mapping[str, str] = {}

    def build_train_dataset(self) -> MapDataset:
        return list(zip(*[range(sum(self.sizes.values()))] * 2, strict=True))

    def build_mixture(self, dataset: MapDataset) -> Mixture | None:
        data = self.context.config.data
        entries = data.entries
        sizes = [self.sizes[entry.name] for entry in entries]
        stages = [(0, {entry.name: entry.weight for entry in entries})]
        stages += [(stage.after_step, dict(stage.weights)) for stage in data.stages]
        whole = tuple(
            (step, whole_weights([each.get(entry.name, 0) for entry in entries], sizes)) for step, each in stages
        )
        sources = tuple(
            MixedSource(entry.name, size, entry.epochs, self.fingerprints.get(entry.name, ""))
            for entry, size in zip(entries, sizes, strict=True)
        )
        return Mixture(sources, whole, self.context.config.train.seed, data.shuffle)

    def build_validation_dataset(self) -> MapDataset | Mapping[str, MapDataset] | None:
        return {"web": Numbers(), "math": Numbers()}


def mixture(epochs: float | None = None, **weights: Any) -> list[dict[str, Any]]:
    return [{"name": name, "source": name, "weight": weight, "epochs": epochs} for name, weight in weights.items()]


DATA = {
    "mixture": mixture(web=0.5, code=0.4, math=0.1),
    "stages": [{"after_step": 7, "weights": {"math": 0.5, "web": 0.5}}],
}


def start(monkeypatch: pytest.MonkeyPatch, folder: Path, steps: int, **sections: Any) -> Run:
    train = {"steps": steps, **sections.pop("train", {})}
    return Run(monkeypatch, folder, kind=sections.pop("kind", MixedTrial), train=train, **{"data": DATA, **sections})


def go_on(made: Run, before: Run) -> None:
    """Take over the state that another run saved last."""
    state = before.saved[-1]
    made.run.data.go_on(state.step, state.consumed_samples, state.mixture)


def read(made: Run, steps: Sequence[int]) -> list[list[int]]:
    """The samples of some steps, read as in training."""
    found = []
    for _ in steps:
        batches = made.run.data.read(None)
        assert batches is not None
        found.append([int(sample) for inputs, _ in batches for sample in inputs])
        made.run.data.consumed_samples += made.run.config.train.global_batch_size
    return found


def test_a_run_that_goes_on_under_another_micro_batch_reads_what_the_whole_one_reads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = start(monkeypatch, tmp_path, 18)
    whole.fit()
    assert {sample for samples in whole.engine.trained for sample in samples} == set(range(20)), "three epochs of 20"
    for stopped in (3, 7, 11):
        first = start(monkeypatch, tmp_path, stopped)
        first.fit()
        second = start(monkeypatch, tmp_path, 18, train={"micro_batch_size": 1 + stopped % 2})
        go_on(second, first)
        assert [*first.engine.trained, *read(second, range(stopped, 18))] == whole.engine.trained


def test_a_mixture_goes_on_while_its_batches_grow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    warmup = {"start": 2, "increment": 2, "samples": 12}
    whole = start(monkeypatch, tmp_path, 10, train={"batch_warmup": warmup})
    whole.fit()
    assert [len(samples) for samples in whole.engine.trained] == [2] * 6 + [4] * 4
    assert [each["global_batch_size"] for each in whole.events.metrics] == [2] * 6 + [4] * 4
    at_stage = {each["step"]: each["samples/code"] for each in whole.events.metrics}
    assert at_stage[6] < at_stage[7] == at_stage[10], "the stage begins after 7 steps, whatever their sizes"
    first = start(monkeypatch, tmp_path, 4, train={"batch_warmup": warmup})
    first.fit()
    second = start(monkeypatch, tmp_path, 10, train={"batch_warmup": warmup, "micro_batch_size": 1})
    go_on(second, first)
    for samples in whole.engine.trained[4:]:
        batches = second.run.data.read(None)
        assert batches is not None
        assert [int(sample) for inputs, _ in batches for sample in inputs] == samples
        second.run.data.consumed_samples += len(samples)


def test_metrics_count_the_samples_of_each_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = start(monkeypatch, tmp_path, 9)
    made.fit()
    at = {each["step"]: each for each in made.events.metrics}
    assert [at[5][f"samples/{name}"] for name in SIZES] == [10, 8, 2]
    assert at[5]["epochs/code"] == 8 / 7
    first, last = ([each[f"samples/{name}"] for name in SIZES] for each in (at[7], at[9]))
    assert [after - before for before, after in zip(first, last, strict=True)] == [4, 0, 4]
    assert 0 <= at[9]["data_wait"] <= 1
    trained = [sample for samples in made.engine.trained for sample in samples]
    assert last == [
        sum(sample < 10 for sample in trained),
        *(sum(low <= s < high for s in trained) for low, high in ((10, 17), (17, 20))),
    ]


def test_weights_that_change_between_two_starts_count_from_the_checkpoint_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = start(monkeypatch, tmp_path, 3)
    first.fit()
    # Of another order, without one source, and with other weights.
    second = start(monkeypatch, tmp_path, 9, data={"mixture": mixture(math=0.25, web=0.75)})
    go_on(second, first)
    assert second.run.data.metrics(12) == {"samples/math": 1, "samples/web": 6, "epochs/math": 1 / 3, "epochs/web": 0.6}
    assert second.run.data.metrics(20) == pytest.approx(
        {"samples/math": 3, "samples/web": 12, "epochs/math": 1, "epochs/web": 1.2}
    )


def test_a_source_that_has_changed_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Changed(MixedTrial):
        fingerprints = {"code": "other"}  # noqa: RUF012

    first = start(monkeypatch, tmp_path, 3)
    first.fit()
    second = start(monkeypatch, tmp_path, 9, kind=Changed)
    with pytest.raises(
        CheckpointError, match=r"the source code of data.mixture gives other samples than when the checkp"
    ):
        go_on(second, first)


def test_a_run_that_needs_more_than_its_sources_give_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = {"mixture": mixture(2, web=0.5, code=0.5)}
    with pytest.raises(ConfigError) as error:
        start(monkeypatch, tmp_path, 9, data=data)
    assert str(error.value) == (
        "train.steps=9: the sources of data.mixture give samples for 8 steps within their epochs; "
        "try train.steps=8, or more epochs in data.mixture"
    )
    made = start(monkeypatch, tmp_path, 8, data=data)
    made.fit()
    assert made.events.metrics[-1]["epochs/code"] == 2


def test_each_source_is_evaluated_by_itself_and_they_weigh_as_in_the_mixture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = start(monkeypatch, tmp_path, 1, train={"eval_interval": 1})
    made.fit()
    evaluated = made.events.metrics[0]
    # Losses are 2, 4 for web and 6, 8 for math; their weights are 0.5 and 0.1.
    assert evaluated["val_loss/web"] == 3.0
    assert evaluated["val_loss/math"] == 7.0
    assert evaluated["val_loss"] == pytest.approx((5 * 3.0 + 1 * 7.0) / 6)
    assert evaluated["val_largest/web"] == evaluated["val_largest/math"] == 4.0


def test_a_rollback_goes_on_behind_what_was_passed_by(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = start(monkeypatch, tmp_path, 20)
    before = made.run.data.metrics(20)
    made.run.data.skip_to(4, 20)
    assert made.run.data.metrics(20) == before
    # The stage after 7 steps begins 3 steps later.
    assert made.run.data.metrics(32)["samples/code"] > before["samples/code"]
    assert made.run.data.metrics(80)["samples/code"] == made.run.data.metrics(32)["samples/code"]

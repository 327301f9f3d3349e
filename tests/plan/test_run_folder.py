"""Run folders: the configurations that may go on in one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipekit.checkpoint.manifest import Manifest, TrainingState, load_manifest
from pipekit.config import Config, parse_config
from pipekit.errors import CheckpointError, ConfigError
from pipekit.plan.decide import decide_run
from pipekit.plan.plan import Plan, StartPoint
from pipekit.plan.resources import Resources
from pipekit.plan.run_folder import RunFolder, adopt_config, check_data, find_start, read_plan, trim_records, write_plan
from pipekit.training.language_model import LanguageModelTrial


def config_in(tmp_path: Path, *overrides: str) -> Config:
    values = {"model": {"preset": "tiny"}, "train": {"steps": 10}, "run": {"dir": str(tmp_path / "run")}}
    return parse_config(values, overrides)


def write_config(folder: RunFolder, config: Config) -> None:
    folder.path.mkdir(parents=True)
    folder.config.write_text(config.to_yaml())


def add_checkpoint(folder: RunFolder, step: int, fingerprint: str = "abc") -> Path:
    path = folder.checkpoints / f"step-{step:08d}"
    path.mkdir(parents=True)
    state = TrainingState(step=step, consumed_samples=step, seed=1, lr=0.1, optimizer={}, data_fingerprint=fingerprint)
    (path / "manifest.json").write_text(Manifest(state, {}, {}).to_json())
    return path


def test_a_new_folder_starts_anew_and_nothing_is_written(tmp_path: Path) -> None:
    assert find_start(config_in(tmp_path)) is None
    assert list(tmp_path.iterdir()) == []


def test_it_goes_on_from_the_newest(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    folder = RunFolder(tmp_path / "run")
    write_config(folder, config)
    add_checkpoint(folder, 3)
    newest = add_checkpoint(folder, 6)
    assert find_start(config) == StartPoint(newest, 6)
    other_layout = config_in(tmp_path, "parallel.pp=2", "train.steps=20", "optimizer.lr=1e-4")
    assert find_start(other_layout) == StartPoint(newest, 6)


def test_never_does_not_overwrite(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert find_start(config_in(tmp_path, "checkpoint.resume=never")) is None
    add_checkpoint(folder, 3)
    with pytest.raises(ConfigError, match="never would overwrite the 1 checkpoints"):
        find_start(config_in(tmp_path, "checkpoint.resume=never"))


@pytest.mark.parametrize(
    "override", ["model.num_layers=3", "train.seed=5", "train.sequence_length=64", "data.vocab_size=512"]
)
def test_another_run_is_refused(tmp_path: Path, override: str) -> None:
    folder = RunFolder(tmp_path / "run")
    write_config(folder, config_in(tmp_path))
    add_checkpoint(folder, 1)
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=f"another configuration: {key} differs.*another run.dir"):
        find_start(config_in(tmp_path, override))


def test_what_nothing_has_been_trained_on_takes_other_data_and_keeps_its_model(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    write_config(folder, config_in(tmp_path))
    imported = add_checkpoint(folder, 0)
    (imported / "config.yaml").write_text(config_in(tmp_path).to_yaml())
    others = ("data.source=my_text", "train.seed=5", "train.sequence_length=64", "parallel.pp=2", "train.steps=20")
    assert find_start(config_in(tmp_path, *others)) == StartPoint(imported, 0)
    branch = config_in(tmp_path / "branch", *others, f"checkpoint.resume={imported}")
    assert find_start(branch) == StartPoint(imported, 0)
    with pytest.raises(ConfigError, match=r"another configuration: model\.num_layers differs"):
        find_start(config_in(tmp_path, *others, "model.num_layers=3"))
    add_checkpoint(folder, 2)
    with pytest.raises(ConfigError, match=r"configuration: data\.source, train\.sequence_length, train\.seed differ"):
        find_start(config_in(tmp_path, *others))


def test_a_checkpoint_can_be_named(tmp_path: Path) -> None:
    elsewhere = RunFolder(tmp_path / "other")
    first = add_checkpoint(elsewhere, 1)
    add_checkpoint(elsewhere, 2)
    (first / "config.yaml").write_text(config_in(tmp_path).to_yaml())
    assert find_start(config_in(tmp_path, f"checkpoint.resume={first}")) == StartPoint(first, 1)
    with pytest.raises(CheckpointError, match="no such folder"):
        find_start(config_in(tmp_path, f"checkpoint.resume={tmp_path / 'none'}"))


def make_plan(config: Config) -> Plan:
    resources = Resources(num_cpus=2, num_gpus=None)
    return decide_run(config.updated({"model.vocab_size": 300}), LanguageModelTrial, resources).plan


def test_a_start_without_a_checkpoint_gives_way_to_another_configuration(tmp_path: Path) -> None:
    folder = write_plan(make_plan(config_in(tmp_path, "parallel.pp=2")))
    interrupted = folder.checkpoints / ".step-00000003.tmp"
    misleading = [folder.metrics, folder.spikes, folder.samples, folder.failures]
    misleading += [folder.logs / "rank-7.log", folder.logs / "hang.txt", folder.logs / "stalls.jsonl"]
    misleading += [
        folder.profile / "step-00000010.svg",
        folder.profile / "actions.json",
        folder.tensorboard / "events.out.tfevents.1",
    ]
    misleading += [interrupted / "x", folder.path / ".metrics.jsonl.0123.tmp"]
    their_own = [folder.path / "notes.txt", folder.logs / "my.log", folder.profile / "mine" / "trace.json"]
    for path in misleading + their_own:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    changed = config_in(tmp_path, "model.num_layers=3")
    assert find_start(changed) is None
    assert all(path.exists() for path in misleading)
    write_plan(make_plan(changed))
    assert [path for path in [*misleading, interrupted, folder.schedule] if path.exists()] == []
    assert all(path.exists() for path in their_own)
    assert read_plan(folder.plan).config.model.num_layers == 3  # type: ignore[union-attr]


def test_logs_and_metrics_of_the_same_configuration_are_kept(tmp_path: Path) -> None:
    folder = write_plan(make_plan(config_in(tmp_path)))
    folder.logs.mkdir()
    for path in (folder.metrics, folder.logs / "rank-0.log"):
        path.write_text("before")
    write_plan(make_plan(config_in(tmp_path, "parallel.pp=2", "optimizer.lr=1e-4")))
    assert folder.metrics.read_text() == (folder.logs / "rank-0.log").read_text() == "before"


@pytest.mark.parametrize("name", ["checkpoints", "logs", "profile", "tensorboard"])
def test_a_file_in_place_of_a_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).touch()
    with pytest.raises(ConfigError, match=rf"run/{name} is a file, and a run needs a folder of that name; remove it"):
        find_start(config_in(tmp_path))


@pytest.mark.parametrize(
    "name",
    [
        "config.yaml",
        "plan.json",
        "metrics.jsonl",
        "spikes.jsonl",
        "evaluations.jsonl",
        "failures.jsonl",
        "schedule.csv",
    ],
)
def test_a_folder_in_place_of_a_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match=rf"run/{name} is no file, and a run writes one of that name; remove it"):
        find_start(config_in(tmp_path))


def test_a_file_in_place_of_the_run_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        find_start(config_in(tmp_path))


def test_a_folder_of_checkpoints_without_a_configuration_gets_that_of_the_newest(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    adopt_config(folder)
    assert not folder.path.exists()
    (add_checkpoint(folder, 1) / "config.yaml").write_text("of the checkpoint")
    adopt_config(folder)
    assert folder.config.read_text() == "of the checkpoint"
    folder.config.write_text("its own")
    adopt_config(folder)
    assert folder.config.read_text() == "its own"


def test_other_data_are_refused(tmp_path: Path) -> None:
    manifest = load_manifest(add_checkpoint(RunFolder(tmp_path / "run"), 3))
    check_data(manifest, "abc", where=tmp_path)
    with pytest.raises(CheckpointError, match="trained on other data"):
        check_data(manifest, "def", where=tmp_path)


def test_metrics_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(6)) + '{"step": 6, "lo')
    trim_records(path, 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]
    trim_records(tmp_path / "none.jsonl", 3)
    assert not (tmp_path / "none.jsonl").exists()


def test_lines_that_are_no_records_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [b"5", b"[]", b"null", b'{"loss": 1}', b'{"step": "x"}', b"[" * 100_000, b"\xff\xfe", b'{"step": 1}', b""]
    path.write_bytes(b"\n".join(lines))
    trim_records(path, 3)
    assert path.read_text() == '{"step": 1}\n'


def test_a_run_that_starts_anew_writes_all_records_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "val_loss": 3}\n{"step": 1}\n')
    trim_records(path, 0)
    assert path.read_text() == ""


def test_a_named_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    other = add_checkpoint(RunFolder(tmp_path / "other"), 1)
    (other / "config.yaml").write_text(config_in(tmp_path, "model.num_layers=3").to_yaml())
    with pytest.raises(
        ConfigError, match=r"checkpoint\.resume=.* is of another configuration: model\.num_layers differs"
    ):
        find_start(config_in(tmp_path, f"checkpoint.resume={other}"))


def test_a_run_can_be_named_and_means_its_newest_checkpoint(tmp_path: Path) -> None:
    other = RunFolder(tmp_path / "other")
    add_checkpoint(other, 1)
    newest = add_checkpoint(other, 2)
    (newest / "config.yaml").write_text(config_in(tmp_path).to_yaml())
    assert find_start(config_in(tmp_path, f"checkpoint.resume={other.path}")) == StartPoint(newest, 2)


def test_what_differs_is_listed_and_long_lists_are_cut(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    write_config(folder, config_in(tmp_path))
    add_checkpoint(folder, 1)
    changes = ("model.num_layers=3", "model.dropout=0.1", "model.init_std=0.1", "train.seed=5", "data.vocab_size=512")
    with pytest.raises(ConfigError, match=r"num_layers, .* and 1 more differ from .*config\.yaml; give another"):
        find_start(config_in(tmp_path, *changes))


def test_a_cut_checkpoint_is_not_gone_on_from(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    state = TrainingState(step=3, consumed_samples=3, seed=1, lr=0.1, optimizer={})
    newest = add_checkpoint(folder, 3)
    (newest / "manifest.json").write_text(Manifest(state, {}, {"weights-0000.safetensors": 10}).to_json())
    with pytest.raises(CheckpointError, match="is missing: the checkpoint is damaged"):
        find_start(config_in(tmp_path))


def test_the_newest_by_name_is_not_taken_where_latest_names_another(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    older = add_checkpoint(folder, 3)
    add_checkpoint(folder, 6)
    (folder.checkpoints / "latest").write_text("step-00000003\n")
    assert find_start(config_in(tmp_path)) == StartPoint(older, 3)


def test_data_without_a_fingerprint_are_not_compared(tmp_path: Path) -> None:
    checkpoint = add_checkpoint(RunFolder(tmp_path / "run"), 3, fingerprint="")
    check_data(load_manifest(checkpoint), "abc", where=checkpoint)

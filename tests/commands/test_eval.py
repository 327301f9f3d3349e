"""`pipekit eval` on runs, checkpoints and exports: its table, its JSON, its records, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from hand_made import TEXT, random_model, write_checkpoint
from pipekit.commands.eval import command
from pipekit.config import Config, parse_config
from pipekit.errors import CheckpointError, ConfigError, DataError, LayoutError, PipekitError
from pipekit.inference.export import export_checkpoint

Show = Any


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts, a run that logs to TensorBoard, and its export."""
    folder = tmp_path_factory.mktemp("eval")
    (folder / "mine.jsonl").write_text("".join(json.dumps({"text": TEXT}) + "\n" for _ in range(20)))
    (folder / "other.txt").write_text("return function(argument)\n" * 30)
    (folder / "short.txt").write_text("")
    config, tensors = random_model()
    config = config.updated(
        {
            "data.source": str(folder / "mine.jsonl"),
            "data.validation_fraction": 0.5,
            "data.cache_dir": str(folder / "cache"),
            "logging.tensorboard": True,
        }
    )
    write_checkpoint(folder / "run", config, tensors)
    (folder / "run/config.yaml").write_text(config.to_yaml())
    export_checkpoint(folder / "run", folder / "export")
    return folder


@pytest.fixture
def show(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Show:
    """Run the command in the folder, and return what it prints."""
    monkeypatch.chdir(work)

    def run(source: str, *data: str, **options: Any) -> str:
        capsys.readouterr()
        command(Path(source), list(data), **{"device": "cpu", "batch_size": 4, **options})
        return capsys.readouterr().out

    return run


def test_a_run_is_evaluated_on_its_held_out_text_into_its_folder(show: Show, work: Path) -> None:
    shown = show("run")
    assert "run/checkpoints/step-00000005, step 5" in shown
    assert "in windows of 24 tokens" in shown
    (record,) = map(json.loads, (work / "run/evaluations.jsonl").read_text().splitlines())
    assert (record["step"], record["window"], record["stride"]) == (5, 24, 24)
    (text,) = record["texts"]
    assert text["name"] == f"held out of {work / 'mine.jsonl'}"
    assert f"{text['loss']:.4f}" in shown
    assert f"{text['bits_per_byte']:.4f}" in shown
    # Ten documents of twenty are held out, whose ends have no bytes; the first token is not scored.
    assert text["num_bytes"] == len(TEXT * 10) - len("def")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(work / "run/tensorboard")).Reload()
    (scalar,) = events.Scalars("eval/loss")
    assert (scalar.step, scalar.value) == (5, pytest.approx(text["loss"]))


def test_run_checkpoint_and_export_agree_on_another_text_and_all_of_it_is_taken(show: Show, work: Path) -> None:
    found = []
    for source in ("run", "run/checkpoints/step-00000005", "export"):
        cache = f"data.cache_dir={work / 'cache'}"
        shown = show(source, "data.source=other.txt", cache, window=24, stride=6, as_json=True)
        found.append(json.loads(shown)["texts"][0])
    assert found[0]["num_bytes"] == len((work / "other.txt").read_bytes()) - len("ret")
    assert found[1] == found[0]
    assert found[2] == {
        **found[0],
        "loss": pytest.approx(found[0]["loss"]),
        **{name: pytest.approx(found[0][name]) for name in ("perplexity", "bits_per_byte")},
    }


def test_what_does_not_fit_is_one_error(show: Show, work: Path) -> None:
    cache = f"data.cache_dir={work / 'cache'}"
    with pytest.raises(ConfigError, match=r"train\.steps=5: only the data can be another"):
        show("run", "train.steps=5")
    with pytest.raises(ConfigError, match=r"data\.tokenizer=x: the model has its own tokenizer"):
        show("run", "data.tokenizer=x")
    with pytest.raises(ConfigError, match=r"data\.sauce=x: unknown key; did you mean 'data\.source'\?"):
        show("run", "data.sauce=x")
    with pytest.raises(ConfigError, match=r"export: is an export, and holds no text .* add data\.source=FILE"):
        show("export")
    with pytest.raises(DataError, match=r"data\.source=short\.txt"):
        show("export", "data.source=short.txt", cache)
    with pytest.raises(CheckpointError, match=r"nowhere: no such folder"):
        show("nowhere")
    with pytest.raises(ConfigError, match=r"--window 25: the model sees at most 24 tokens"):
        show("export", "data.source=other.txt", cache, window=25)
    with pytest.raises(ConfigError, match=r"--stride 9: must be at most the window, 8 tokens"):
        show("export", "data.source=other.txt", cache, window=8, stride=9)


def test_what_is_for_tasks_is_refused_before_anything_is_read(show: Show) -> None:
    for name, value in {"num_fewshot": 0, "limit": 3, "include_path": Path("x"), "samples": Path("x")}.items():
        with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')}: applies to tasks, and none are given; a"):
            show("nowhere", **{name: value})
    with pytest.raises(ConfigError, match="--apply-chat-template: applies to tasks"):
        show("nowhere", apply_chat_template=True)
    with pytest.raises(ConfigError, match=r"--samples none/a\.jsonl: no such folder; make it"):
        show("nowhere", tasks="animals", samples=Path("none/a.jsonl"))


def test_tasks_need_lm_eval(show: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipekit.evaluation.tasks.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"lm-eval, which is not installed; run pip install 'pipekit\[eval\]'"):
        show("run", tasks="arc_easy")


def test_a_model_without_a_tokenizer_reads_no_text(show: Show, work: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", *random_model(), tokenizer=None)
    with pytest.raises(CheckpointError, match=r"step-00000005: holds no tokenizer\.json"):
        show(str(tmp_path / "run"))


CUSTOM = """
from torch import nn
from pipekit import LayerSpec


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(301, 4)

    def forward(self, tokens):
        return self.embed(tokens).mean(1)


def build(config):
    return [LayerSpec(Mean, name="mean")]
"""


def custom_run(folder: Path) -> Config:
    import torch

    values = {"model": "mean_model:build", "train": {"steps": 1, "sequence_length": 8}}
    config = parse_config(values)
    write_checkpoint(folder, config, {"mean.embed.weight": torch.zeros(301, 4)})
    return config


def test_a_model_of_ones_own_must_be_trusted_and_return_logits(
    show: Show, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mean_model.py").write_text(CUSTOM)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    custom_run(tmp_path / "run")
    text = ("data.source=other.txt", f"data.cache_dir={work / 'cache'}")
    with pytest.raises(CheckpointError, match=r"--trust-code"):
        show(str(tmp_path / "run"), *text)
    with pytest.raises(PipekitError, match=r"the model returns \(4, 4\) for \(4, 8\) tokens, and an evaluation needs"):
        show(str(tmp_path / "run"), *text, trust_code=True)
    monkeypatch.delitem(sys.modules, "mean_model")


TASK = """
task: keywords
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/keywords.jsonl}}, cache_dir: {folder}/hf}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


def write_task(folder: Path) -> Path:
    questions = [{"question": word, "choices": ["def", "return"], "answer": 0} for word in ("function", "argument")]
    (folder / "keywords.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (folder / "keywords.yaml").write_text(TASK.format(folder=folder))
    return folder


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("source", ["run", "export"])
def test_processes_measure_what_one_does(show: Show, work: Path, source: str) -> None:
    options = {"tasks": "keywords", "include_path": write_task(work), "as_json": True}
    alone, spread = (
        json.loads(show(source, "data.source=other.txt", **options, **degrees)) for degrees in ({}, {"pp": 2, "tp": 2})
    )
    (text,), (expected,) = spread.pop("texts"), alone.pop("texts")
    assert text.pop("loss") == pytest.approx(expected["loss"], rel=1e-5)
    assert (text["num_tokens"], text["num_bytes"]) == (expected["num_tokens"], expected["num_bytes"])
    assert spread == alone


def test_layers_that_cannot_be_shared_out_are_refused_before_a_text_is_read(show: Show) -> None:
    with pytest.raises(LayoutError, match=r"^--tp 3 does not divide"):
        show("run", "data.source=no/such/text", tp=3)

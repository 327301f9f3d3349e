"""`pipekit data`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from chat_templates import write_chat_tokenizer
from pipekit.cli import app
from pipekit.config import DataConfig, load_config
from pipekit.data.prepare import prepare_data
from pipekit.data.samples.loss_mask import load_loss_mask
from pipekit.data.tokenizer import load_tokenizer
from pipekit.errors import PipekitError
from pipekit.training.language_model import LanguageModelTrial

TEXTS = ["the same text again", *(f"text {number} says {number}" for number in range(40)), "the same text again"]
SETTINGS = ["data.source=text.jsonl", "data.vocab_size=300", "data.cache_dir=cache", "train.sequence_length=16"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a text, and the YAML file of a run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "run.yaml").write_text(
        "model: {preset: tiny}\ntrain: {steps: 10, global_batch_size: 4, micro_batch_size: 1}\n"
        "data: {validation_fraction: 0.1}\n"
    )
    return tmp_path


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["data", *arguments])
    if isinstance(result.exception, PipekitError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_prepare_makes_what_a_run_would_make() -> None:
    prepared = json.loads(invoke("prepare", "run.yaml", *SETTINGS, "--json"))
    messages: list[str] = []
    config = load_config("run.yaml", SETTINGS)
    of_run = LanguageModelTrial.prepare(config, lambda message, fraction: messages.append(message))
    assert prepared | {"samples": {}} == of_run
    assert messages == [], "the run found everything in the cache"
    (source,) = prepared["sources"]
    assert f"text: {source['train']['num_documents']} documents" in invoke("prepare", "run.yaml", *SETTINGS)


def test_inspect_tells_of_documents_lengths_duplicates_and_epochs() -> None:
    found: dict[str, Any] = json.loads(invoke("inspect", "run.yaml", *SETTINGS, "--json", "--samples", "40"))
    (source,) = found["sources"]
    tokenizer = load_tokenizer(found["tokenizer"])
    num_tokens = [len(tokenizer.encode(text)) + 1 for text in TEXTS]
    train, held_out = source["train"], source["validation"]
    assert train["num_documents"] + held_out["num_documents"] == 42
    assert train["num_tokens"] + held_out["num_tokens"] == sum(num_tokens)
    assert found["run"]["num_tokens"] == 10 * 4 * 16
    assert found["run"]["epochs"] == {"text": pytest.approx(40 / ((train["num_tokens"] - 1) // 16))}
    assert source["duplicates"]["num_documents"] + source["duplicates"]["num_held_out_in_training"] == 1
    shown = [sample["text"] for sample in source["samples"]]
    assert set(shown) <= {f"{text}<|endoftext|>" for text in TEXTS}
    assert sum(bin["num_documents"] for bin in source["lengths"]["histogram"]) == train["num_documents"]


def test_inspect_tells_the_epochs_of_each_source_of_a_mixture(folder: Path) -> None:
    (folder / "more.jsonl").write_text((folder / "text.jsonl").read_text() * 2)
    sources = [{"name": "one", "source": "text.jsonl", "weight": 0.75}, {"name": "two", "source": "more.jsonl"}]
    data = {"mixture": sources, "stages": [{"after_step": 8, "weights": {"two": 1}}], "validation_fraction": 0}
    train = {"steps": 10, "global_batch_size": 4, "micro_batch_size": 1}
    (folder / "mixed.yaml").write_text(yaml.safe_dump({"model": {"preset": "tiny"}, "train": train, "data": data}))
    found = json.loads(invoke("inspect", "mixed.yaml", *SETTINGS[1:], "--json", "--samples", "0"))
    sizes = [(source["train"]["num_tokens"] - 1) // 16 for source in found["sources"]]
    # Of the first 32 samples three of four are of the first source, and all of the last eight are of the second.
    assert found["run"]["epochs"] == {"one": pytest.approx(24 / sizes[0]), "two": pytest.approx(16 / sizes[1])}


def test_inspect_shows_them_as_text() -> None:
    output = invoke("inspect", "run.yaml", *SETTINGS, "--samples", "1")
    assert "the same text again<|endoftext|>" in output
    assert "The run reads 640 tokens (10 steps of 4 sequences of 16 tokens), " in output
    assert "Tokens in each training document:" in output
    assert "\u2588" in output, "bars"
    without_run = invoke("inspect", "text.jsonl", *SETTINGS[1:3], "--samples", "0")
    assert "The run" not in without_run
    assert "\ndocument " not in without_run


def test_convert_writes_all_documents_and_reads_them_again() -> None:
    output = invoke("convert", "text.jsonl", "out/a.bin", *SETTINGS[1:3])
    assert output.startswith("42 documents written to out/a.bin; the tokenizer is cache/tokenizers/")
    tokenizer = output.split()[-1]
    invoke("convert", "out/a.bin", "out/a.jsonl", f"data.tokenizer={tokenizer}", "data.cache_dir=cache")
    lines = Path("out/a.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == TEXTS
    with pytest.raises(PipekitError, match="is there already"):
        invoke("convert", "text.jsonl", "out/a.bin", *SETTINGS[1:3])


def test_convert_carries_what_is_held_out_and_the_loss_masks(folder: Path) -> None:
    write_chat_tokenizer(folder / "tokenizer", None)
    lines = [{"prompt": f"Is {number} even?", "completion": "no" if number % 2 else "yes"} for number in range(20)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = ["data.tokenizer=tokenizer", "data.cache_dir=cache", "data.validation_fraction=0.2"]
    output = invoke("convert", "chat.jsonl", "out/chat.bin", *settings)
    assert output.startswith(
        "16 documents written to out/chat.bin, 4 documents written to out/chat-validation.bin, with loss masks; the "
    )
    before, after = (
        prepare_data(DataConfig(cache_dir="cache", tokenizer="tokenizer", **values), sequence_length=4).sources[0]
        for values in (
            {"source": "chat.jsonl", "validation_fraction": 0.2},
            {"source": "out/chat.bin", "validation": "out/chat-validation.bin"},
        )
    )
    assert after.has_loss_mask
    for ours, theirs in zip(after.slices, before.slices, strict=True):
        assert ours.path.parent == Path("out"), "read where it lies"
        assert ours.load_tokens().tolist() == theirs.load_tokens().tolist()
        assert load_loss_mask(ours).tolist() == load_loss_mask(theirs).tolist()
        assert 0 < load_loss_mask(ours).mean() < 1
    with pytest.raises(
        PipekitError, match=r"out/chat\.jsonl: .* do not say which tokens count in the loss; give .*\.bin"
    ):
        invoke("convert", "chat.jsonl", "out/chat.jsonl", *settings)
    for values, message in (
        ({"source": ["out/chat.bin", "out/chat-validation.bin"]}, "a loss mask is beside one of several token files"),
        (
            {"source": "out/chat.bin", "validation": "text.jsonl"},
            "and data.validation=text.jsonl: one holds text, and one",
        ),
    ):
        with pytest.raises(PipekitError, match=message):
            prepare_data(DataConfig(tokenizer="tokenizer", cache_dir="cache", **values), sequence_length=4)
    # A file in place of it whose tokens all count has no mask.
    invoke("convert", "text.jsonl", "out/chat.bin", *SETTINGS[1:3], "--overwrite")
    assert not Path("out/chat.mask").exists()


@pytest.mark.parametrize(
    "words",
    [["prepare"], ["look", "run.yaml"], ["convert", "run.yaml"], ["inspect", "a", "b"], ["convert", "a", "b", "c"]],
    ids=" ".join,
)
def test_other_words_are_refused(words: list[str]) -> None:
    with pytest.raises(PipekitError, match="give prepare or inspect, and a YAML file or a source; or convert"):
        invoke(*words)


def test_data_of_a_trial_of_ones_own_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "own_data_trial.py").write_text("import pipekit\nclass Own(pipekit.LayersTrial):\n    pass\n")
    monkeypatch.syspath_prepend(str(folder))
    with pytest.raises(PipekitError, match=r"run\.trial=own_data_trial:Own: prepares its own data"):
        invoke("prepare", "run.yaml", "run.trial=own_data_trial:Own", *SETTINGS)

"""Mistakes that are refused while a run is prepared, before any process starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from hand_made import TEXT, random_model, small_tokenizer, write_checkpoint, write_hf_folder
from pipekit.config import Config, parse_config
from pipekit.errors import CheckpointError, ConfigError, DataError
from pipekit.plan.plan import StartPoint
from pipekit.plan.resources import Resources
from pipekit.training.prepare import prepare_run


def run_config(tmp_path: Path, *overrides: str, **model: Any) -> Config:
    (tmp_path / "text.txt").write_text(TEXT * 20)
    data = {"source": str(tmp_path / "text.txt"), "cache_dir": str(tmp_path / "cache"), "validation_fraction": 0}
    sections = {"model": model or {"preset": "tiny"}, "train": {"steps": 1, "sequence_length": 8}, "data": data}
    return parse_config({**sections, "run": {"dir": str(tmp_path / "run")}}, overrides)


@pytest.mark.parametrize("given", ["file", "folder", "folder that names one", "model"])
def test_a_tokenizer_without_an_end_of_documents_is_refused(tmp_path: Path, given: str) -> None:
    write_hf_folder(folder := tmp_path / "model", with_tokenizer=False)
    backend = Tokenizer(models.WordLevel({"def": 0, "return": 1, "STOP": 2}, unk_token="def"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(folder / "tokenizer.json"))
    if given == "folder that names one":
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    if given == "model":
        config = run_config(tmp_path, family="auto", init_from=str(folder))
    else:
        config = run_config(tmp_path, f"data.tokenizer={folder / 'tokenizer.json' if given == 'file' else folder}")
    with pytest.raises(DataError, match=r'no token that ends a document .*: \{"eos_token": "\.\.\."\}$'):
        prepare_run(config, Resources(), start=None)
    assert not (tmp_path / "run").exists()
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "STOP"}))
    assert prepare_run(config, Resources(), start=None).plan.config.data.tokenizer == config.data.tokenizer


@pytest.mark.parametrize("is_imported", [False, True], ids=["init_from", "pipekit import"])
def test_imported_weights_are_not_trained_on_the_tokens_of_a_new_tokenizer(tmp_path: Path, is_imported: bool) -> None:
    write_hf_folder(folder := tmp_path / "model", with_tokenizer=False)
    start = StartPoint(tmp_path / "run/checkpoints/step-00000000", 0) if is_imported else None
    model = {"family": "auto", "init_from": str(folder)}
    config = run_config(tmp_path, **model)
    config = config.updated({"model.init_from": None}) if is_imported else config
    with pytest.raises(ConfigError, match=r"^data\.tokenizer is not given, .* set data\.tokenizer=FOLDER$"):
        prepare_run(config, Resources(), start=start)
    small_tokenizer().save(str(tmp_path / "tokenizer.json"))
    prepare_run(config.updated({"data.tokenizer": str(tmp_path)}), Resources(), start=start)


def test_adapters_need_the_weights_that_they_are_added_to(tmp_path: Path) -> None:
    config = run_config(tmp_path, "lora.rank=2")
    with pytest.raises(ConfigError, match=r"^lora.rank=2: nothing says which weights .*, or lora.base=RUN of your"):
        prepare_run(config, Resources(), start=None)
    own, tensors = random_model()
    checkpoint = write_checkpoint(tmp_path / "own", own, tensors)
    based = config.updated({"lora.base": str(tmp_path / "own")})
    with pytest.raises(ConfigError, match=r"^data.tokenizer is not given, .* lora.base=.*tokenizer.json$"):
        prepare_run(based, Resources(), start=None)
    based = based.updated({"data.tokenizer": str(checkpoint / "tokenizer.json")})
    with pytest.raises(CheckpointError, match=r"^lora.base=.*own: embed.weight is \(301, 32\), and \(\d+, 128\) in "):
        prepare_run(based, Resources(), start=None)
    changes = [f"lora.base={tmp_path / 'own'}", f"data.tokenizer={checkpoint / 'tokenizer.json'}"]
    fitting = run_config(tmp_path, "lora.rank=2", *changes, **own.model.given())
    plan = prepare_run(fitting, Resources(), start=None).plan
    assert plan.num_parameters == 2 * 2 * (32 + 96 + 32 + 32 + 32 + 48 + 48 + 32)


def test_a_run_of_adapters_goes_on_from_none_that_has_none(tmp_path: Path) -> None:
    write_hf_folder(folder := tmp_path / "model")
    config = run_config(tmp_path, "lora.rank=2", family="auto", init_from=str(folder))
    plain, tensors = random_model(family="llama")
    checkpoint = write_checkpoint(tmp_path / "run", plain, tensors)
    with pytest.raises(CheckpointError, match=r"step-00000005: holds a whole model and no adapters; to add some "):
        prepare_run(config, Resources(), start=StartPoint(checkpoint, 5))

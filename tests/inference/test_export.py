"""Exports, read by `transformers`."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from hand_made import TEXT, random_model, write_checkpoint
from pipekit.config import load_config, parse_config
from pipekit.errors import CheckpointError, PipekitError
from pipekit.inference import export
from pipekit.inference.export import export_checkpoint
from pipekit.inference.load_model import load_model
from pipekit.models.family import TensorRename, TransformerFamily

MODELS: dict[str, dict[str, Any]] = {
    "GPT-2": {},
    "GPT-2 untied": {"tied_embedding": False},
    "GPT-NeoX": {"family": "gpt_neox"},
    "GPT-NeoX tied, all rotated": {"family": "gpt_neox", "tied_embedding": True, "rotary_pct": 1.0},
    "GPT-NeoX sequential": {"family": "gpt_neox", "use_parallel_residual": False},
    "GPT-NeoX sequential, all rotated": {"family": "gpt_neox", "use_parallel_residual": False, "rotary_pct": 1.0},
}


@pytest.fixture(params=["GPT-2", "GPT-2 untied", "GPT-NeoX"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint of a random model."""
    config, tensors = random_model(**MODELS[request.param])
    return write_checkpoint(tmp_path / "run", config, tensors)


@pytest.mark.parametrize("checkpoint", MODELS, indirect=True)
def test_transformers_computes_the_same_logits(checkpoint: Path, tmp_path: Path) -> None:
    check = export_checkpoint(checkpoint, tmp_path / "out")
    assert check.max_logit_difference <= 1e-5
    assert check.step == 5
    assert json.loads((tmp_path / "out/export_check.json").read_text())["num_logits"] == 2 * 24 * 301
    ours, *_ = load_model(checkpoint)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompt = torch.randint(301, (3, 20), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        torch.testing.assert_close(ours(prompt), theirs(prompt).logits, rtol=0, atol=1e-5)


def test_the_tokenizer_and_settings_come_along(checkpoint: Path, tmp_path: Path) -> None:
    export_checkpoint(checkpoint.parents[1], tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.convert_tokens_to_ids("<|endoftext|>")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_exports_hold_rounded_weights(checkpoint: Path, tmp_path: Path, dtype: str) -> None:
    check = export_checkpoint(checkpoint, tmp_path / "out", dtype=dtype)  # type: ignore[arg-type]
    assert check.max_logit_difference <= check.tolerance
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in theirs.parameters()} == {getattr(torch, dtype)}


def test_a_wrong_export_is_caught_and_not_left_behind(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = type(load_config(checkpoint / "config.yaml").model)
    assert issubclass(family, TransformerFamily)
    right = family.hf_renames

    def swapped(config: Any) -> list[TensorRename]:
        renames = right(config)
        names = {"blocks.0.attention.norm.bias": "blocks.0.mlp.norm.bias"}
        names |= {value: key for key, value in names.items()}
        return [replace(rename, ours=names.get(rename.ours, rename.ours)) for rename in renames]

    monkeypatch.setattr(family, "hf_renames", swapped)
    with pytest.raises(PipekitError, match=r"from the checkpoint's.*not written"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_an_earlier_export_is_replaced_only_on_demand(checkpoint: Path, tmp_path: Path) -> None:
    export_checkpoint(checkpoint, tmp_path / "out")
    (tmp_path / "out/stale").write_text("of the earlier one")
    with pytest.raises(PipekitError, match=r"is there already; .*--overwrite"):
        export_checkpoint(checkpoint, tmp_path / "out")
    export_checkpoint(checkpoint, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out/stale").exists()


@pytest.mark.parametrize("file", ["notes.txt", "config.json"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_that_is_no_export_is_never_replaced(
    checkpoint: Path, tmp_path: Path, file: str, overwrite: bool
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / file).write_text("precious")
    for place in (tmp_path / "mine", tmp_path / "mine" / file):
        with pytest.raises(PipekitError, match=r"no earlier export.*give another folder"):
            export_checkpoint(checkpoint, place, overwrite=overwrite)
    assert (tmp_path / "mine" / file).read_text() == "precious"


@pytest.mark.parametrize("overwrite", [True, False])
def test_an_empty_folder_is_filled(checkpoint: Path, tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "out").mkdir()
    export_checkpoint(checkpoint, tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out/config.json").is_file()


def test_the_working_directory_can_be_filled(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    export_checkpoint(checkpoint, Path("."))
    assert (tmp_path / "out/config.json").is_file()


def test_a_full_disk_is_told_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")  # as safetensors says it

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(PipekitError, match=r"out: could not be written: .*No space left"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_model_trained_without_text_has_no_tokenizer(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "run", *random_model(), tokenizer=None)
    export_checkpoint(checkpoint, tmp_path / "out")
    assert not list((tmp_path / "out").glob("tokenizer*"))
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] is None


def test_grouped_queries_have_no_counterpart(tmp_path: Path) -> None:
    model = {"hidden_size": 16, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "max_positions": 8, "vocab_size": 9}
    config = parse_config({"model": model, "train": {"steps": 1, "sequence_length": 8}})
    checkpoint = write_checkpoint(tmp_path / "run", config, {"a.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"model.num_kv_heads=2 for 4 heads, and GPT2LMHeadModel knows"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_counterpart_is_refused_and_not_built(tmp_path: Path) -> None:
    config = parse_config({"model": "no_such_module:build", "train": {"steps": 1}})
    checkpoint = write_checkpoint(tmp_path / "run", config, {"a.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"no_such_module:build, and its configuration names no .*--raw"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    _, tensors = random_model(tied_embedding=True)
    untied, _ = random_model(tied_embedding=False)
    checkpoint = write_checkpoint(tmp_path / "run", untied, tensors)
    with pytest.raises(CheckpointError, match=r"head\.weight is missing, and the model has \(301, 32\)"):
        load_model(checkpoint)


MY_MODEL = """
from torch import nn
from pipekit.models.gpt2 import GPT2Config

SIZES = dict(vocab_size=301, hidden_size=32, num_layers=1, num_heads=4, ffn_size=48, max_positions=24)

def build_layers(config):
    return GPT2Config(family="gpt2", **SIZES, init_std=0.3).layer_specs()

def hf_names(config):
    return {rename.ours: rename for rename in GPT2Config(family="gpt2", **SIZES).hf_renames()}

def fewer_names(config):
    return {ours: theirs for ours, theirs in hf_names(config).items() if ours != "final_norm.bias"}

def hf_config(config):
    return {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 301, "n_embd": 32, "n_layer": 1,
        "n_head": 4, "n_inner": 48, "n_positions": 24, "activation_function": config.model.args["activation"],
    }
"""


@pytest.fixture
def own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a function that writes a checkpoint of a model of one's own with these settings."""
    monkeypatch.chdir(tmp_path)
    module = f"model_{uuid.uuid4().hex}"
    (tmp_path / f"{module}.py").write_text(MY_MODEL)

    def write(activation: str = "gelu_new", **functions: str) -> Path:
        paths = {key: f"{module}:{function}" for key, function in functions.items()}
        model = {"builder": f"{module}:build_layers", "args": {"activation": activation}, **paths}
        config = parse_config({"model": model, "train": {"steps": 1, "sequence_length": 24}})
        return write_checkpoint(tmp_path / "run", config, random_model(num_layers=1)[1])

    return write


def test_a_model_of_ones_own_goes_home_through_its_door(own_model: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = own_model(hf_names="hf_names", hf_config="hf_config")
    with pytest.raises(CheckpointError, match="--trust-code"):
        export_checkpoint(checkpoint, tmp_path / "out")
    check = export_checkpoint(checkpoint, tmp_path / "out", trust_code=True)
    assert check.max_logit_difference <= 1e-5 < check.num_logits
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.n_embd == 32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "names no model.hf_names and model.hf_config; --raw writes its tensors"),
        ({"hf_names": "fewer_names", "hf_config": "hf_config"}, "final_norm.bias has no name in transformers"),
        ({"hf_names": "hf_config", "hf_config": "hf_config"}, "model.hf_names=.*must return a dict of the name"),
        ({"hf_names": "hf_names", "hf_config": "hf_names"}, "a dict without architectures, model_type, vocab_size"),
        ({"hf_names": "hf_names", "hf_config": "hf_config", "activation": "relu"}, "logits are .* was not written"),
    ],
)
def test_a_door_that_does_not_fit_is_refused(
    own_model: Callable[..., Path], tmp_path: Path, settings: dict[str, str], message: str
) -> None:
    with pytest.raises(PipekitError, match=message):
        export_checkpoint(own_model(**settings), tmp_path / "out", trust_code=True)
    assert not (tmp_path / "out").exists()


def test_half_a_door_is_refused(own_model: Callable[..., Path]) -> None:
    with pytest.raises(PipekitError, match=r"model.hf_names needs model.hf_config beside it"):
        own_model(hf_names="hf_names")

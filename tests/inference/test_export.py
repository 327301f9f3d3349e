"""Exports, read by `transformers`."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from hand_made import TEXT, random_model, write_checkpoint
from pipekit.config import load_config, parse_config
from pipekit.data.tokenizer import TextTokenizer
from pipekit.errors import CheckpointError, PipekitError
from pipekit.inference import export, safetensors_folder
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


@pytest.mark.parametrize("checkpoint", MODELS, indirect=True)
def test_larger_models_are_compared_layer_by_layer(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = export_checkpoint(checkpoint, tmp_path / "whole")
    monkeypatch.setattr(export, "_WHOLE_BYTES", 0)
    streamed = export_checkpoint(checkpoint, tmp_path / "streamed", shard_size="20kB")
    assert streamed == replace(whole, layer_by_layer=True)


def test_shards_hold_what_one_file_holds(checkpoint: Path, tmp_path: Path) -> None:
    check = export_checkpoint(checkpoint, tmp_path / "one")
    assert export_checkpoint(checkpoint, tmp_path / "many", shard_size="20kB") == check
    whole = load_file(tmp_path / "one/model.safetensors")
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    files = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{number + 1:05d}-of-{len(files):05d}.safetensors" for number in range(len(files))
    ]
    found = {}
    for file in files:
        held = load_file(file)
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= 20_000
        assert {index["weight_map"][name] for name in held} == {file.name}
        found |= held
    assert found.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


PEAK_ABOVE_START = """
import re, sys
from pathlib import Path
import torch, transformers
from pipekit.inference.export import export_checkpoint
from pipekit.tensors.host_memory import return_freed_memory
return_freed_memory()  # as the command does
transformers.GPT2LMHeadModel
def held_kib(what):
    return int(re.search(what + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
start_kib = held_kib("VmRSS")
export_checkpoint(*sys.argv[1:])
print((held_kib("VmHWM") - start_kib) * 1024)
"""


@pytest.mark.slow
def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    # More than a GiB, of which the largest tensor is 16 MiB.
    sizes = {"vocab_size": 2048, "hidden_size": 1024, "num_layers": 22, "num_heads": 8, "ffn_size": 4096}
    config, tensors = random_model(**sizes, init_std=0.02)
    checkpoint = write_checkpoint(tmp_path / "run", config, tensors, tokenizer=None)
    assert sum(tensor.nbytes for tensor in tensors.values()) > 2**30
    command = [sys.executable, "-c", PEAK_ABOVE_START, str(checkpoint), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 300 * 2**20
    assert json.loads((tmp_path / "out/export_check.json").read_text())["layer_by_layer"]


@pytest.mark.parametrize("size", ["no", "-1", 0, "5 parsecs"])
def test_a_size_of_shards_that_is_none_is_refused(checkpoint: Path, tmp_path: Path, size: str | int) -> None:
    with pytest.raises(PipekitError, match=r"shard_size=.*500MB or 5GB"):
        export_checkpoint(checkpoint, tmp_path / "out", shard_size=size)


def test_the_card_tells_what_trained_the_model(checkpoint: Path, tmp_path: Path) -> None:
    check = export_checkpoint(checkpoint, tmp_path / "mine")
    card = (tmp_path / "mine/README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n")
    names = ("# run", check.reference.split()[-1], f"{check.num_parameters:,} parameters", "| Tokens | 960 |")
    assert all(name in card for name in names)
    assert str(tmp_path) not in card
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "mine")
    assert check.num_parameters == theirs.num_parameters()
    generate = pipeline("text-generation", model=str(tmp_path / "mine"))
    assert generate("def", max_new_tokens=2)[0]["generated_text"].startswith("def")


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
        names = {"blocks.1.attention.norm.bias": "blocks.1.mlp.norm.bias"}
        names |= {value: key for key, value in names.items()}
        return [replace(rename, ours=names.get(rename.ours, rename.ours)) for rename in renames]

    monkeypatch.setattr(family, "hf_renames", swapped)
    where = r"after blocks\.0(\.mlp)?, in blocks\.1(\.attention)? or the rest of its block"
    for whole_bytes in (2**30, 0):
        monkeypatch.setattr(export, "_WHOLE_BYTES", whole_bytes)
        with pytest.raises(
            PipekitError, match=rf"out: the exported logits are .* from the checkpoint's.*{where}.*not wri"
        ):
            export_checkpoint(checkpoint, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_wrong_final_norm_is_named(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = export.write_shards

    def damaged(folder: Path, tensors: Any, **options: Any) -> Any:
        def negated(name: str) -> torch.Tensor:
            tensor: torch.Tensor = options["read"](name)
            return -tensor if "ln_f.bias" in name or "final_layer_norm.bias" in name else tensor

        return read(folder, tensors, read=negated, shard_bytes=options["shard_bytes"])

    monkeypatch.setattr(export, "write_shards", damaged)
    with pytest.raises(PipekitError, match=r"after blocks\.1(\.mlp)?, in final_norm or the rest"):
        export_checkpoint(checkpoint, tmp_path / "out")


def test_a_tensor_that_the_disk_damaged_is_named(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = export.write_shards

    def damaged(folder: Path, tensors: Any, **options: Any) -> Any:
        checksums = write(folder, tensors, **options)
        stored = load_file(folder / "model.safetensors")
        name = sorted(stored)[3]
        stored[name].view(-1)[0] += 1e-6
        save_file(stored, folder / "model.safetensors")
        damaged.name = name  # type: ignore[attr-defined]
        return checksums

    monkeypatch.setattr(export, "write_shards", damaged)
    with pytest.raises(PipekitError, match="is not what was written; the disk may be at fault") as caught:
        export_checkpoint(checkpoint, tmp_path / "out")
    assert damaged.name in str(caught.value)  # type: ignore[attr-defined]


def test_a_tokenizer_that_transformers_reads_otherwise_stops_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = write_checkpoint(tmp_path / "run", *random_model())
    read = export.load_tokenizer

    def lowering(path: Path) -> TextTokenizer:
        tokenizer = read(path)
        tokenizer.backend.normalizer = normalizers.Lowercase()
        return tokenizer

    monkeypatch.setattr(export, "load_tokenizer", lowering)
    with pytest.raises(
        PipekitError, match=r"of transformers .* splits the text '.*' into other tokens .*; the export was"
    ):
        export_checkpoint(checkpoint, tmp_path / "out")
    monkeypatch.setattr(export, "load_tokenizer", read)
    monkeypatch.setattr(export, "special_token_ids", lambda path: {"eos_token_id": 7})
    with pytest.raises(PipekitError, match=r"eos_token_id is 7, and .* has 0; see tokenizer_config\.json"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


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
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_folder, "write_tensors", full)
    with pytest.raises(PipekitError, match=r"out: cannot be written: the disk is full"):
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

"""Exports, read by `transformers`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipekit.checkpoint.export import export_checkpoint, load_model
from pipekit.checkpoint.manifest import Manifest, TensorEntry, TrainingState
from pipekit.config import Config, parse_config
from pipekit.data.tokenizer import train_tokenizer
from pipekit.errors import CheckpointError, PipekitError
from pipekit.models import build_layers, hf_gpt2
from pipekit.sampling import stream_text
from pipekit.sequential import SequentialModel

TEXT = "def function(argument):\n    return argument + 1\n"


def config_of(*, tied: bool) -> Config:
    return parse_config(
        {
            "model": {
                "vocab_size": 301,
                "hidden_size": 32,
                "num_layers": 2,
                "num_heads": 4,
                "ffn_size": 48,
                "max_positions": 24,
                "tied_embedding": tied,
                "init_std": 0.3,
            },
            "train": {"steps": 1, "sequence_length": 24},
        }
    )


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint of a random model, written without the code that writes checkpoints."""
    config = config_of(tied=request.param)
    folder = tmp_path / "run/checkpoints/step-00000005"
    folder.mkdir(parents=True)
    tensors = {name: t.detach().clone() for name, t in SequentialModel(build_layers(config)).logical_tensors().items()}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if tensor.ndim == 1:  # norms and biases that are all ones or zeros would hide a mix-up
            tensors[name] = tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, folder / "weights-0000.safetensors")
    entries = {
        name: TensorEntry(tuple(t.shape), "float32", {"weights": "weights-0000.safetensors"})
        for name, t in tensors.items()
    }
    state = TrainingState(step=5, consumed_samples=40, seed=1, lr=0.1, optimizer={})
    sizes = {"weights-0000.safetensors": (folder / "weights-0000.safetensors").stat().st_size}
    (folder / "manifest.json").write_text(Manifest(state, entries, sizes).to_json())
    (folder / "config.yaml").write_text(config.to_yaml())
    train_tokenizer([TEXT] * 20, vocab_size=300).backend.save(str(folder / "tokenizer.json"))
    return folder


def test_transformers_computes_the_same_logits(checkpoint: Path, tmp_path: Path) -> None:
    check = export_checkpoint(checkpoint, tmp_path / "out")
    assert check.max_logit_difference <= 1e-5
    assert check.step == 5
    assert json.loads((tmp_path / "out/export_check.json").read_text())["num_logits"] == 2 * 24 * 301
    ours, _ = load_model(checkpoint)
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
    assert theirs.transformer.wpe.weight.dtype == getattr(torch, dtype)


def test_a_wrong_export_is_caught_and_not_left_behind(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = hf_gpt2.plan_renames

    def swapped(config: object) -> list[hf_gpt2.TensorRename]:
        renames = right(config)  # type: ignore[arg-type]
        names = {"blocks.0.attention.norm.bias": "blocks.0.mlp.norm.bias"}
        names |= {value: key for key, value in names.items()}
        return [replace(rename, ours=names.get(rename.ours, rename.ours)) for rename in renames]

    monkeypatch.setattr(hf_gpt2, "plan_renames", swapped)
    with pytest.raises(PipekitError, match=r"from the checkpoint's.*not written"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_an_earlier_export_is_replaced_only_on_demand(checkpoint: Path, tmp_path: Path) -> None:
    export_checkpoint(checkpoint, tmp_path / "out")
    with pytest.raises(PipekitError, match="--overwrite"):
        export_checkpoint(checkpoint, tmp_path / "out")
    export_checkpoint(checkpoint, tmp_path / "out", overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("precious")
    with pytest.raises(PipekitError, match="no earlier export"):
        export_checkpoint(checkpoint, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine/notes.txt").read_text() == "precious"


def test_a_model_without_a_counterpart_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    config = parse_config({"model": "my_model:build", "train": {"steps": 1}})
    (checkpoint / "config.yaml").write_text(config.to_yaml())
    (tmp_path / "my_model.py").write_text("def build(config): raise NotImplementedError")
    with pytest.raises((CheckpointError, PipekitError), match="my_model"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_run_checkpoint_and_export_say_the_same(checkpoint: Path, tmp_path: Path) -> None:
    export_checkpoint(checkpoint, tmp_path / "out")
    options = {"max_new_tokens": 30, "temperature": 0.0, "top_k": None, "seed": 0}
    texts = [
        "".join(stream_text(source, "def f", **options))  # type: ignore[arg-type]
        for source in (checkpoint.parents[1], checkpoint, tmp_path / "out")
    ]
    assert texts[0] == texts[1] == texts[2]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompt = tokenizer("def f", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
    reference = tokenizer.decode(ids, skip_special_tokens=True)
    assert texts[0].startswith(reference.rstrip("�")[:40])

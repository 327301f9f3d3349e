"""Adapters between runs and `peft`: the same losses, the same logits, and folders that both read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor

from hand_made import write_checkpoint, write_hf_folder
from pipekit.checkpoint.reader import CheckpointReader
from pipekit.config import Config, parse_config
from pipekit.inference.base_weights import base_record, open_base, with_base
from pipekit.inference.hugging_face import to_hf
from pipekit.inference.peft_adapter import AdapterFolder, export_adapter
from pipekit.layers.lora import is_adapter
from pipekit.layers.sequential import SequentialModel
from pipekit.models import adapted_layers, build_layers
from tensor_parallel.outcomes import VOCAB

# What peft says of its own and of transformers' code.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

STEPS = 20
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt2"},
    "gpt_neox": {"family": "gpt_neox"},
    "llama": {"family": "llama"},
    "qwen2": {"family": "qwen2", "num_kv_heads": 2, "tied_embedding": True},
    "qwen3": {"family": "qwen3", "num_kv_heads": 2, "head_size": 16},
    "mistral": {"family": "mistral", "num_kv_heads": 1, "sliding_window": 5},
    "gemma2": {"family": "gemma2", "num_kv_heads": 2, "head_size": 12},
    "gemma3": {"family": "gemma3", "num_kv_heads": 2, "head_size": 16, "sliding_window": 3},
    "olmo2": {"family": "olmo2", "num_kv_heads": 2},
    "phi3": {"family": "phi3", "num_kv_heads": 2, "rotary_pct": 0.5},
}
TARGETS = {
    "gpt2": [["c_attn", "c_proj", "c_fc"], ["transformer.h.1.mlp.c_proj"]],
    "gpt_neox": [["query_key_value", "dense"], ["dense_h_to_4h", "dense_4h_to_h"]],
    "phi3": [["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], ["qkv_proj"]],
}
LLAMA_TARGETS = [
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ["q_proj", "v_proj", "model.layers.0.mlp.up_proj"],
]


def config_of(kind: str, **sections: Any) -> Config:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "ffn_size": 48, "init_std": 0.2}
    model = {**sizes, "max_positions": 16, **KINDS[kind]}
    return parse_config({"model": model, "train": {"steps": STEPS, "sequence_length": 16}, **sections})


def their_model(config: Config, folder: Path) -> Any:
    """Write the initial weights of a model as `transformers` has them, and read them with it."""
    model: Any = config.model
    stored = transformers.AutoConfig.for_model(**model.hf_config(end_token_id=0, dtype="float32"))
    stored.pad_token_id = None
    weights = dict(to_hf(model, SequentialModel(build_layers(config)).logical_tensors()))
    kind = getattr(transformers, model.hf_class)
    theirs = kind.from_pretrained(None, config=stored, state_dict=weights, dtype=torch.float32)
    theirs.save_pretrained(folder)
    return theirs


def train(model: Any, parameters: list[Any]) -> list[float]:
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1), []
    for step in range(STEPS):
        tokens = torch.randint(VOCAB, (4, 16), generator=torch.Generator().manual_seed(step))
        output = model(tokens)
        logits: Tensor = getattr(output, "logits", output)
        loss = F.cross_entropy(logits.flatten(0, 1), ((tokens * 3 + 1) % VOCAB).flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "llama"])
def test_files_hold_by_the_arithmetic_of_peft_what_the_merged_model_has_more(kind: str, tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "base", with_tokenizer=False, **KINDS[kind])
    targets = TARGETS.get(kind, LLAMA_TARGETS)[0]
    lora = {"rank": 3, "alpha": 8.0, "rslora": True, "targets": targets}
    model = {"family": "auto", "init_from": str(tmp_path / "base")}
    config = parse_config({"model": model, "train": {"steps": 1, "sequence_length": 16}, "lora": lora})
    base, generator = open_base(config), torch.Generator().manual_seed(2)
    tensors = SequentialModel(adapted_layers(config, build_layers(config)), seed=None).logical_tensors()
    adapters = {
        name: torch.randn(each.shape, generator=generator) for name, each in tensors.items() if is_adapter(name)
    }
    reader = CheckpointReader(
        write_checkpoint(tmp_path / "run", config, adapters, tokenizer=None, base=base_record(base))
    )
    export_adapter(tmp_path / "run", tmp_path / "out")

    merged, before = (
        dict(to_hf(config.model, {name: source.tensor(name) for name in base.shapes}))  # type: ignore[arg-type]
        for source in (with_base(reader, config), base)
    )
    stored = load_file(tmp_path / "out/adapter_model.safetensors")
    settings = json.loads((tmp_path / "out/adapter_config.json").read_text())
    # As in `peft`: LoraLayer.update_layer, and Linear.get_delta_weight.
    scale = settings["lora_alpha"] / (settings["r"] ** 0.5 if settings["use_rslora"] else settings["r"])
    for name, weight in before.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        added = torch.zeros(())
        if f"{module}.lora_A.weight" in stored:
            added = scale * stored.pop(f"{module}.lora_B.weight") @ stored.pop(f"{module}.lora_A.weight")
            added = added.t() if settings["fan_in_fan_out"] else added
        torch.testing.assert_close(merged[name], weight + added, rtol=1e-5, atol=1e-5)
    assert not stored, "every adapter is of a linear layer"
    again = config.updated({"lora.init_from": str(tmp_path / "out")})
    folder = AdapterFolder(tmp_path / "out", again, adapted_layers(again, build_layers(again)))
    assert all(torch.equal(folder.tensor(name), tensor) for name, tensor in adapters.items())


@pytest.mark.slow
@pytest.mark.parametrize("some", [0, 1], ids=["all", "some"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_weights_are_those_of_peft_and_it_reads_the_adapter(kind: str, some: int, tmp_path: Path) -> None:
    import peft  # which takes seconds

    targets = TARGETS.get(kind, LLAMA_TARGETS)[some]
    plain = config_of(kind)
    settings = peft.LoraConfig(
        r=3, lora_alpha=8, target_modules=targets, use_rslora=bool(some), fan_in_fan_out=kind == "gpt2"
    )
    theirs = peft.get_peft_model(their_model(plain, tmp_path / "base"), settings)
    theirs.save_pretrained(tmp_path / "initial")
    adapter = {"rank": 3, "alpha": 8.0, "rslora": bool(some), "targets": targets}
    config = plain.updated({f"lora.{key}": value for key, value in adapter.items()})
    config = config.updated({"model.init_from": str(tmp_path / "base"), "lora.init_from": str(tmp_path / "initial")})
    specs = adapted_layers(config, build_layers(config))
    ours, initial = SequentialModel(specs), AdapterFolder(tmp_path / "initial", config, specs)
    with torch.no_grad():
        for name, tensor in ours.logical_tensors().items():
            if is_adapter(name):
                tensor.copy_(initial.tensor(name))
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    expected = train(theirs, trained)
    assert expected[-1] < expected[0] - 0.1, "something is learned"
    assert train(ours, [each for each in ours.parameters() if each.requires_grad]) == pytest.approx(expected, rel=1e-5)

    adapters = {name: each.detach() for name, each in ours.logical_tensors().items() if is_adapter(name)}
    write_checkpoint(tmp_path / "run", config, adapters, tokenizer=None, base=base_record(open_base(config)))
    export_adapter(tmp_path / "run", tmp_path / "out")
    read = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32), tmp_path / "out"
    )
    tokens = torch.arange(16)[None] % VOCAB
    with torch.no_grad():
        torch.testing.assert_close(read.eval()(tokens).logits, ours.eval()(tokens), rtol=1e-5, atol=1e-5)

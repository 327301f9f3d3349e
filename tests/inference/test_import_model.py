"""Models of transformers, imported, trained and exported again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from engine_jobs import SEQUENCE, VOCAB, Case, batch, build_engine, make_optimizer, micro_batches
from gloo_workers import GlooWorkers
from hand_made import small_tokenizer
from pipekit.config import load_config, parse_config
from pipekit.data.tokenizer import load_tokenizer
from pipekit.errors import CheckpointError, ConfigError, DataError, PipekitError
from pipekit.inference.export import export_checkpoint
from pipekit.inference.hugging_face import HuggingFaceFolder
from pipekit.inference.import_model import import_config, import_model
from pipekit.inference.load_model import load_model, open_model
from pipekit.models.family import TransformerFamily
from pipekit.tensor_parallel.shards import Shard

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": SEQUENCE}
KINDS: dict[str, dict[str, Any]] = {
    "GPT-2": {"model_type": "gpt2", "resid_pdrop": 0.0},
    "GPT-2 untied": {"model_type": "gpt2", "tie_word_embeddings": False, "resid_pdrop": 0.0},
    "GPT-NeoX": {"model_type": "gpt_neox", "intermediate_size": 128, "hidden_dropout": 0.0},
    "Llama": {"model_type": "llama", "intermediate_size": 64},
    "Llama, grouped, tied": {
        "model_type": "llama",
        "intermediate_size": 64,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "Qwen2": {"model_type": "qwen2", "intermediate_size": 64, "num_key_value_heads": 2},
}


def write_hf(
    folder: Path, kind: str = "GPT-2", *, dtype: str = "bfloat16", vocab_size: int = VOCAB, **save: Any
) -> Any:
    """Write a random model as transformers does, and return it in fp32."""
    torch.manual_seed(3)
    settings = {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 0, **SIZES, **KINDS[kind]}
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    model.to(getattr(torch, dtype)).save_pretrained(folder, **save)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"], ids=["one file", "several"])
def test_import_and_export_give_the_same_bytes(kind: str, shard_size: str, tmp_path: Path) -> None:
    theirs = write_hf(tmp_path / "hf", kind, max_shard_size=shard_size)
    assert (tmp_path / "hf/model.safetensors").exists() == (shard_size == "5GB")
    checkpoint, _ = import_model(tmp_path / "hf", tmp_path / "run")
    model, *_ = load_model(checkpoint)
    prompt = torch.randint(VOCAB, (2, SEQUENCE))
    with torch.no_grad():
        torch.testing.assert_close(model(prompt), theirs(prompt).logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(open_model(tmp_path / "hf").build()(prompt), model(prompt))
    export_checkpoint(tmp_path / "run", tmp_path / "out", dtype="bfloat16")
    before, after = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)) for name, tensor in before.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [0, 6])
def test_shards_are_those_of_the_whole_tensor(kind: str, padded: int, tmp_path: Path) -> None:
    write_hf(tmp_path, kind)
    model = import_config(tmp_path, None, [f"model.vocab_size={VOCAB + padded}"]).model
    assert isinstance(model, TransformerFamily)
    source = HuggingFaceFolder(tmp_path, model)
    for name, shape in source.shapes.items():
        whole = source.tensor(name)
        assert whole.shape == shape
        for dim in range(len(shape)):
            for blocks in ((shape[dim],), (shape[dim] // 4, shape[dim] - shape[dim] // 4)):
                for rank in range(3):
                    shard = Shard(dim, blocks, rank, 3)
                    assert torch.equal(source.tensor(name, shard=shard), shard.take(whole)), (name, shard)


def initial_job(rank: int, case: Case, folder: str) -> list[float]:
    from pipekit.engine.load import load_initial_weights

    model = import_config(folder).model
    assert isinstance(model, TransformerFamily)
    engine = build_engine(case, model.layer_specs())
    load_initial_weights(engine, HuggingFaceFolder(Path(folder), model))
    dp_rank = engine.mpu.data_parallel_rank
    return [float(engine.train_batch(micro_batches(step, case, dp_rank))) for step in range(case.steps)]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "case"),
    [
        pytest.param("GPT-2", Case(pp=2, tp=2, zero=1, steps=3), marks=pytest.mark.slow),
        ("Llama, grouped, tied", Case(pp=2, tp=2, zero=1, steps=3)),
        ("Llama", Case(dp=2, zero=3, steps=3)),
        pytest.param("GPT-NeoX", Case(pp=2, tp=2, dp=2, zero=1, steps=3), marks=pytest.mark.slow),
    ],
)
def test_ranks_begin_with_the_imported_weights(gloo: GlooWorkers, tmp_path: Path, kind: str, case: Case) -> None:
    theirs = write_hf(tmp_path, kind, dtype="float32")
    losses = gloo.run(case.world_size, initial_job, case, str(tmp_path))[0]
    optimizer = make_optimizer(case, list(theirs.parameters()))
    expected = []
    for step in range(case.steps):
        inputs, labels = batch(step)
        loss = torch.nn.functional.cross_entropy(theirs(inputs).logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), case.clip)
        optimizer.step()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-4)


def test_a_padded_vocabulary_is_cut_again(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", "Llama")
    checkpoint, config = import_model(tmp_path / "hf", tmp_path / "run", ["model.vocab_size=72"])
    assert config.model.export_vocab_size == VOCAB  # type: ignore[attr-defined]
    weights = load_file(checkpoint / "weights-0000.safetensors")
    assert weights["embed.weight"].shape == (72, 32)
    assert not weights["embed.weight"][VOCAB:].any()
    export_checkpoint(tmp_path / "run", tmp_path / "out", dtype="bfloat16")
    before, after = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "out")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == VOCAB


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", vocab_size=320)
    small_tokenizer().save(str(tmp_path / "hf/tokenizer.json"))
    (tmp_path / "hf/chat_template.jinja").write_text("{{ messages }}")
    checkpoint, config = import_model(tmp_path / "hf", tmp_path / "run")
    assert config.data.tokenizer == str(tmp_path / "run/tokenizer")
    assert load_config(tmp_path / "run/config.yaml") == config
    assert (checkpoint / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_sentencepiece_tokenizer_comes_along_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write_hf(tmp_path / "hf", vocab_size=320)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to learn from", "and other words"] * 20),
        model_prefix=str(tmp_path / "hf/tokenizer"),
        model_type="bpe",
        vocab_size=30,
        minloglevel=2,
    )
    (tmp_path / "hf/tokenizer.vocab").unlink()
    checkpoint, config = import_model(tmp_path / "hf", tmp_path / "run")
    assert config.data.tokenizer == str(tmp_path / "run/tokenizer")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "hf/tokenizer.model"))
    ours = load_tokenizer(checkpoint / "tokenizer.json")
    assert ours.encode("other words learn") == theirs.encode("other words learn")
    assert ours.end_token == "</s>"


def test_a_tokenizer_that_does_not_fit_is_not_imported(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", vocab_size=280)
    small_tokenizer().save(str(tmp_path / "hf/tokenizer.json"))
    num_tokens = small_tokenizer().get_vocab_size()
    with pytest.raises(ConfigError, match=rf"model\.vocab_size=280 is smaller .*; try model\.vocab_size={num_tokens} "):
        import_model(tmp_path / "hf", tmp_path / "run")
    (tmp_path / "hf/tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    with pytest.raises(DataError, match=r"no token that ends a document \(looked for <\|im_end\|>\)"):
        import_model(tmp_path / "hf", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_special_tokens_and_the_chat_template_go_home(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", vocab_size=320)
    backend = small_tokenizer()
    backend.add_special_tokens(["<|im_end|>", "<pad>"])
    backend.save(str(tmp_path / "hf/tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<pad>"}
    (tmp_path / "hf/tokenizer_config.json").write_text(json.dumps(names))
    (tmp_path / "hf/chat_template.jinja").write_text("{{ messages[0].content }}<|im_end|>")
    end, pad = (backend.token_to_id(token) for token in ("<|im_end|>", "<pad>"))
    generation = {"eos_token_id": [end, 0], "top_k": 7}
    (tmp_path / "hf/generation_config.json").write_text(json.dumps(generation))
    import_model(tmp_path / "hf", tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    stored = json.loads((tmp_path / "out/config.json").read_text())
    assert (stored["eos_token_id"], stored["bos_token_id"], stored["pad_token_id"]) == (end, None, pad)
    kept = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert (kept["eos_token_id"], kept["top_k"], kept["pad_token_id"]) == ([end, 0], 7, pad)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (end, pad)
    assert "<|im_end|>" in tokenizer.apply_chat_template([{"role": "user", "content": "def"}], tokenize=False)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_damaged_generation_settings_stop_the_export(tmp_path: Path, content: str) -> None:
    write_hf(tmp_path / "hf", vocab_size=320)
    small_tokenizer().save(str(tmp_path / "hf/tokenizer.json"))
    (tmp_path / "hf/generation_config.json").write_text("{}")
    checkpoint, _ = import_model(tmp_path / "hf", tmp_path / "run")
    (checkpoint / "generation_config.json").write_text(content)
    with pytest.raises(PipekitError, match=r"generation_config\.json"):
        export_checkpoint(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_imported_is_refused_by_name(tmp_path: Path) -> None:
    write_hf(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    stored = json.loads((tmp_path / "config.json").read_text())

    def refused(match: str, error: type[Exception] = CheckpointError) -> None:
        with pytest.raises(error, match=match):
            import_model(tmp_path, tmp_path / "run")
        assert not (tmp_path / "run").exists()

    save_file({**whole, "transformer.extra": torch.zeros(2)}, tmp_path / "model.safetensors")
    refused("holds transformer.extra, which the gpt2 model")
    save_file(
        {name: t for name, t in whole.items() if name != "transformer.wpe.weight"}, tmp_path / "model.safetensors"
    )
    refused(r"transformer\.wpe\.weight is missing")
    save_file({**whole, "transformer.wpe.weight": torch.zeros(5, 32)}, tmp_path / "model.safetensors")
    refused(r"transformer\.wpe\.weight make position\.weight \(5, 32\), and the model has \(16, 32\)")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    refused(r"pytorch_model\.bin: is a pickle.*save_pretrained")
    (tmp_path / "pytorch_model.bin").unlink()
    refused("so it holds no weights")
    (tmp_path / "config.json").write_text(json.dumps({**stored, "activation_function": "relu"}))
    refused("activation_function='relu'", ConfigError)
    (tmp_path / "config.json").write_text(json.dumps({**stored, "model_type": "mamba"}))
    refused("model_type='mamba'", ConfigError)
    (tmp_path / "config.json").unlink()
    refused("no such file; give the folder of a Hugging Face model", ConfigError)


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "run")
    with pytest.raises(ConfigError, match="holds a run already"):
        import_model(tmp_path / "hf", tmp_path / "run")


def test_other_sizes_than_the_source_has_are_refused(tmp_path: Path) -> None:
    write_hf(tmp_path)
    model = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_positions": 16, "vocab_size": VOCAB}
    train = {"steps": 1, "sequence_length": 8}
    config = parse_config({"model": {**model, "init_from": str(tmp_path)}, "train": train})
    with pytest.raises(CheckpointError, match=r"model\.num_layers=2 \(there 3\)"):
        HuggingFaceFolder(tmp_path, config.model).check()  # type: ignore[arg-type]

"""Text from runs, checkpoints and exports."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from hand_made import random_model, small_tokenizer, write_checkpoint
from pipekit.config import parse_config
from pipekit.errors import CheckpointError, ConfigError, PipekitError
from pipekit.inference.export import export_checkpoint
from pipekit.inference.generator import Generator
from pipekit.inference.sample_tokens import Sampling

END = "<|endoftext|>"


def pieces(source: Path, prompt: str, **options: Any) -> list[str]:
    """The prompt, and what a model adds to it, piece by piece."""
    settings: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.0, "top_k": None, "seed": 0, **options}
    generator = Generator.open(
        source, device=settings.pop("device", "cpu"), trust_code=settings.pop("trust_code", True)
    )
    sampling = Sampling(settings.pop("temperature"), settings.pop("top_k"), settings.pop("top_p", None))
    prompt_ids, seeds = [generator.encode_prompt(prompt)], [settings.pop("seed")]
    added = [piece.text for piece in generator.stream(prompt_ids, sampling=sampling, seeds=seeds, **settings)]
    return [prompt, *filter(None, added)]


def text(source: Path, prompt: str, **options: Any) -> str:
    return "".join(pieces(source, prompt, **options))


MODELS: dict[str, dict[str, Any]] = {
    "GPT-2": {},
    "untied": {"tied_embedding": False},
    "GPT-NeoX": {"family": "gpt_neox"},
}


@pytest.fixture(params=MODELS)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A run's folder with a random model in it."""
    write_checkpoint(tmp_path / "run", *random_model(**MODELS[request.param]))
    return tmp_path / "run"


@pytest.mark.parametrize("prompt", ["def f", "return argument"])
def test_run_checkpoint_export_and_transformers_say_the_same(run: Path, tmp_path: Path, prompt: str) -> None:
    export_checkpoint(run, tmp_path / "out")
    checkpoint = run / "checkpoints/step-00000005"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)[0]
    expected = tokenizer.decode(ids, skip_special_tokens=True).rstrip("�")
    assert len(expected) > len(prompt)
    for source in (run, run / "checkpoints", checkpoint, tmp_path / "out"):
        assert text(source, prompt) == expected


def test_a_rounded_export_is_read_too(run: Path, tmp_path: Path) -> None:
    export_checkpoint(run, tmp_path / "out", dtype="bfloat16")
    assert text(tmp_path / "out", "def").startswith("def")


def test_the_seed_decides_what_is_drawn(run: Path) -> None:
    drawn = [text(run, "def", temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_one_of_the_likeliest_is_the_likeliest(run: Path) -> None:
    assert text(run, "def", temperature=1.0, top_k=1) == text(run, "def")


def test_an_empty_prompt_begins_a_document(run: Path, tmp_path: Path) -> None:
    export_checkpoint(run, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    start = torch.tensor([[tokenizer.eos_token_id]])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    ids = model.generate(start, attention_mask=torch.ones_like(start), **options)[0]
    assert text(run, "") == tokenizer.decode(ids, skip_special_tokens=True).rstrip("�")


# A model of ones own, whose next token is that of a table.

TABLE_MODEL = """
import torch
from torch import nn
from pipekit import LayerSpec


class Table(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, size))

    def forward(self, tokens):
        assert tokens.shape[1] <= 4, "it was trained on sequences of 4"
        return self.weight[tokens]


def build(config):
    return [LayerSpec(Table, config.model.args["size"], name="table")]
"""

Says = Callable[[Tokenizer, list[int]], Path]


@pytest.fixture
def says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Says]:
    """Make a run whose model says some tokens, all different, one after the other."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "table_model", raising=False)
    (tmp_path / "table_model.py").write_text(TABLE_MODEL)

    def make(tokenizer: Tokenizer, tokens: list[int]) -> Path:
        assert len(set(tokens[:-1])) == len(tokens) - 1, "a table cannot tell what follows a token that comes twice"
        size = tokenizer.get_vocab_size()
        weight = torch.zeros(size, size)
        for before, after in pairwise(tokens):
            weight[before, after] = 9.0
        config = parse_config(
            {
                "model": {"builder": "table_model:build", "args": {"size": size}},
                "train": {"steps": 1, "sequence_length": 4},
            }
        )
        write_checkpoint(tmp_path / "run", config, {"table.weight": weight}, tokenizer=tokenizer)
        return tmp_path / "run"

    yield make
    sys.modules.pop("table_model", None)


def test_a_character_of_several_tokens_comes_whole(says: Says) -> None:
    tokenizer = small_tokenizer()
    words = "a€é\U0001d11e!"
    tokens = tokenizer.encode(words).ids
    assert len(tokens) == 1 + 3 + 2 + 4 + 1
    source = says(tokenizer, [*tokens, tokenizer.get_vocab()[END]])
    assert pieces(source, "a") == ["a", "€", "é", "\U0001d11e", "!"], "it stops before the end of the document"
    assert pieces(source, "a", max_new_tokens=4) == ["a", "€"], "half a character is not shown"


def test_what_comes_before_half_a_character_is_shown(says: Says) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    halves = {**{char: index for index, char in enumerate([END, *alphabet])}, "bÃ": 257}  # b and the first byte of é
    backend = Tokenizer(models.BPE(vocab=halves, merges=[("b", "Ã")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokens = backend.encode("abé").ids
    assert tokens == [halves["a"], 257, halves["©"]]
    source = says(backend, [*tokens, 0])
    assert pieces(source, "a") == ["a", "b", "é"]
    assert pieces(source, "a", max_new_tokens=1) == ["a", "b"]


def test_a_space_that_the_tokenizer_writes_before_words_is_kept(says: Says) -> None:
    vocabulary = {"</s>": 0, "▁once": 1, "▁upon": 2, "▁a": 3, "▁time": 4}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    assert text(says(backend, [1, 2, 3, 4, 0]), "once") == "once upon a time"


def test_code_that_a_checkpoint_names_runs_only_where_it_is_trusted(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')\n")
    _, tensors = random_model()
    custom = parse_config({"model": "evil:build", "train": {"steps": 1, "sequence_length": 24}})
    write_checkpoint(tmp_path, custom, tensors)
    with pytest.raises(CheckpointError, match=r"model\.builder=evil:build is code, .* --trust-code"):
        text(tmp_path, "def", trust_code=False)


def test_a_configuration_that_was_changed_is_refused(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, *random_model())
    path = checkpoint / "config.yaml"
    path.write_text(path.read_text().replace("num_heads: 4", "num_heads: 2"))
    for read in (lambda: text(tmp_path, "def"), lambda: export_checkpoint(tmp_path, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=r"config\.yaml: has changed since it was written"):
            read()


def test_ones_own_model_sees_as_much_as_it_was_trained_on(says: Says) -> None:
    tokenizer = small_tokenizer()
    tokens = [tokenizer.get_vocab()[letter] for letter in "qwertyuiop"]
    assert text(says(tokenizer, tokens), "qwerty", max_new_tokens=4) == "qwertyuiop"


# What goes wrong


def test_without_a_tokenizer_there_is_no_text(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "run", *random_model(), tokenizer=None)
    with pytest.raises(PipekitError, match=r"step-00000005: holds no tokenizer\.json"):
        pieces(tmp_path / "run", "def")
    export_checkpoint(checkpoint, tmp_path / "out")
    with pytest.raises(PipekitError, match=r"out: holds no tokenizer\.json"):
        pieces(tmp_path / "out", "def")


@pytest.mark.parametrize(
    ("file", "content"),
    [("config.json", b'{"n_embd": 3'), ("config.json", b"[]"), ("config.json", b"\xff"), ("model.safetensors", b"12")],
)
def test_a_damaged_export_is_told(tmp_path: Path, file: str, content: bytes) -> None:
    write_checkpoint(tmp_path / "run", *random_model())
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    (tmp_path / "out" / file).write_bytes(content)
    with pytest.raises(PipekitError, match=r"out.*(cannot be read|damaged|holds no mapping)"):
        pieces(tmp_path / "out", "def")


def test_an_export_of_another_architecture_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", *random_model())
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    (tmp_path / "out/config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ConfigError, match=r"out/config\.json: model_type='mamba'; only .* is known"):
        pieces(tmp_path / "out", "def")


def test_a_model_that_has_diverged_is_told(tmp_path: Path) -> None:
    config, tensors = random_model()
    tensors["final_norm.bias"][:] = float("nan")
    write_checkpoint(tmp_path / "run", config, tensors)
    with pytest.raises(PipekitError, match="logits are nan or infinite: its training diverged"):
        pieces(tmp_path / "run", "def")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_that_is_not_there_is_refused(run: Path) -> None:
    with pytest.raises(PipekitError, match="no GPU is present; use --device auto or cpu"):
        pieces(run, "def", device="cuda")
    assert text(run, "def", device="auto") == text(run, "def", device="cpu")


def test_nothing_to_sample_from_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        pieces(tmp_path / "none", "def")

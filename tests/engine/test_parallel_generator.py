"""Generation over pipeline and tensor-parallel ranks, against one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gloo_workers import GlooWorkers
from hand_made import random_model, write_chat_tokenizer, write_checkpoint, write_hf_folder
from pipekit.errors import LayoutError, PipekitError
from pipekit.inference.export import export_checkpoint
from pipekit.inference.generator import Generator
from pipekit.inference.load_model import open_model

PROMPTS = [[1, 2, 3], [7], [5, 6, 7, 8, 9]]
SETTINGS: dict[str, Any] = {"max_new_tokens": 30, "temperature": 1.0, "top_k": 20, "seed": [4, 5, 6]}
TEXTS = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])


def generate(rank: int, source: str, pp: int, tp: int) -> tuple[list[list[int]], torch.Tensor, list[tuple[str, int]]]:
    """Tokens and logits of one rank, and the size of each tensor that it holds."""
    from pipekit.distributed.mpu import ModelParallelUnit
    from pipekit.engine.parallel_generator import open_on_ranks
    from pipekit.layout import Layout

    generator = open_on_ranks(open_model(Path(source)), ModelParallelUnit(Layout(pp=pp, tp=tp)), torch.device("cpu"))
    assert generator.has_cache
    tokens = [result.token_ids for result in generator.generate(PROMPTS, **SETTINGS)]
    held = [(name, tensor.numel()) for name, tensor in generator.model.layers.logical_tensors().items()]
    return tokens, generator.logits(TEXTS), held


def write_model(folder: Path, kind: str) -> Path:
    """An export of a model with tied embeddings and absolute positions, or a download with grouped queries."""
    if kind == "gpt2":
        export_checkpoint(write_checkpoint(folder / "run", *random_model()), folder / "out")
    else:
        write_hf_folder(folder / "out", family="mistral", num_kv_heads=2, sliding_window=5, vocab_size=301)
    return folder / "out"


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["gpt2", pytest.param("mistral", marks=pytest.mark.slow)])
def test_ranks_say_what_one_process_says_and_hold_their_parts_alone(
    kind: str, tmp_path: Path, gloo: GlooWorkers
) -> None:
    source = write_model(tmp_path, kind)
    alone = Generator.open(source, device="cpu")
    expected = [result.token_ids for result in alone.generate(PROMPTS, **SETTINGS)]
    whole = {name: tensor.numel() for name, tensor in alone.model.layers.logical_tensors().items()}
    results = gloo.run(4, generate, str(source), 2, 2)
    for tokens, logits, held in results:
        assert tokens == expected
        torch.testing.assert_close(logits, alone.logits(TEXTS), rtol=1e-4, atol=1e-4)
        halves = [name for name, size in held if size <= whole[name] // 2 + 32]
        assert len(halves) > len(held) / 3, "what tensor-parallel ranks share out"
        assert sum(size for _, size in held) < 0.6 * sum(whole.values())
    assert {name for *_, held in results for name, _ in held} == set(whole)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("arguments", "said"), [(["--prompt", "def f"], b""), (["--chat"], b"a\n\nb\n")])
def test_the_command_starts_the_ranks_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: bytes
) -> None:
    write_hf_folder(tmp_path / "run", with_tokenizer=False, max_positions=90, vocab_size=302)
    write_chat_tokenizer(tmp_path / "run")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    command = [
        sys.executable,
        "-m",
        "pipekit",
        "generate",
        str(tmp_path / "run"),
        *arguments,
        "--max-new-tokens",
        "8",
        "--device",
        "cpu",
    ]
    outputs = [
        subprocess.run([*command, *more], check=True, capture_output=True, timeout=400, input=said).stdout
        for more in ([], ["--pp", "2", "--tp", "2"])
    ]
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith(b"def f") if not said else outputs[0].count(b"\n") >= 2
    assert not list((tmp_path / "tmp").iterdir())


def test_a_model_that_cannot_be_cut_so_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", *random_model())
    stored = open_model(tmp_path / "run")
    with pytest.raises(LayoutError, match=r"parallel\.tp=3 does not divide model\.num_heads=4"):
        stored.cut(pp=1, tp=3)
    with pytest.raises(PipekitError, match="stages"):
        stored.cut(pp=9)
    assert [len(layers) for layers in stored.cut(pp=8)] == [1] * 8

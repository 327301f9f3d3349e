"""Checkpoints of a script's own training loop, exported as the model that the script says it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import gpt2_script
from engine_jobs import GLOBAL_BATCH, SEQUENCE, Case, batch, micro_batches
from gloo_workers import GlooWorkers
from hand_made import TEXT, small_tokenizer
from pipekit.inference.export import export_checkpoint
from pipekit.inference.generator import Generator
from pipekit.models.gpt2 import GPT2Config

pytestmark = pytest.mark.distributed


def loss_fn(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def train_and_save(rank: int, folder: str, num_stages: int, zero: int, tokenizer: str | None) -> Tensor | None:
    """Train two steps, save, and return what this rank's engine computes of the third batch: logits `(B, S, V)`."""
    import pipekit

    family = GPT2Config(vocab_size=301, hidden_size=32, num_layers=2, num_heads=4, max_positions=SEQUENCE, init_std=0.3)
    described: Any = {"model": family, "data": {"tokenizer": tokenizer}} if tokenizer else family
    module = pipekit.PipelineModule(family.layer_specs(), num_stages=num_stages, loss_fn=loss_fn)
    config = {
        "train_batch_size": GLOBAL_BATCH,
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": zero, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = pipekit.initialize(model=module, config=config, model_config=described)
    mine = Case(dp=engine.mpu.layout.dp)
    for step in range(2):
        engine.train_batch(micro_batches(step, mine, engine.mpu.data_parallel_rank))
    engine.save_checkpoint(folder, tag="mine")
    _, logits = engine.eval_batch(micro_batches(2, mine, engine.mpu.data_parallel_rank), return_logits=True)
    return None if logits is None else logits.detach()


@pytest.mark.parametrize(("num_stages", "zero"), [(2, 1), (1, 3)])
def test_transformers_computes_what_a_scripts_engine_computes(
    gloo: GlooWorkers, tmp_path: Path, num_stages: int, zero: int
) -> None:
    tokenizer = None
    if num_stages == 2:
        tokenizer = str(tmp_path / "tokenizer.json")
        small_tokenizer().save(tokenizer)
    results = gloo.run(2, train_and_save, str(tmp_path / "run"), num_stages, zero, tokenizer)
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        logits = theirs(batch(2)[0]).logits
    torch.testing.assert_close(logits, torch.cat(results if num_stages == 1 else results[-1:]), rtol=0, atol=2e-5)
    if tokenizer is not None:
        read = AutoTokenizer.from_pretrained(tmp_path / "out")
        assert read.decode(read(TEXT)["input_ids"]) == TEXT
        generator = Generator.open(tmp_path / "run", device="cpu")
        (mine,) = generator.generate([generator.encode_prompt("def")], max_new_tokens=3)
        ids = theirs.generate(**read("def", return_tensors="pt"), max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert mine.token_ids == ids[0, -3:].tolist()


def train_plain(rank: int, folder: str) -> Tensor:
    """Train a plain module under ZeRO-3, save, and return what its engine computes of this replica's batch."""
    import pipekit

    torch.manual_seed(0)
    config = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    described = {"model": gpt2_script.MODEL, "train": {"sequence_length": gpt2_script.SEQUENCE}}
    engine, *_ = pipekit.initialize(model=gpt2_script.Whole(), config=config, model_config=described)
    prompt = gpt2_script.prompt()[2 * rank : 2 * rank + 2]
    for _ in range(2):
        engine.backward(loss_fn(engine(prompt), prompt))
        engine.step()
    engine.save_checkpoint(folder)
    with torch.no_grad():
        logits: Tensor = engine(prompt)
    return logits


def test_a_plain_module_under_zero_3_goes_through_its_own_door(gloo: GlooWorkers, tmp_path: Path) -> None:
    results = gloo.run(2, train_plain, str(tmp_path / "run"))
    export_checkpoint(tmp_path / "run", tmp_path / "out", trust_code=True)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(gpt2_script.prompt()).logits
    torch.testing.assert_close(logits, torch.cat(results), rtol=0, atol=1e-5)

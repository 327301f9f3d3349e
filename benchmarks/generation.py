"""Generation with the cache of keys and values, measured against the whole text for each token, and transformers.

    python benchmarks/generation.py [--new-tokens 512] [--repeats 3] [--threads 1] [--json generation.json]

The model is that of examples/gpt_stdlib.yaml with random weights: as it is, where 512 new tokens go beyond the 256 that
it sees at once, and with 1,024 positions, which transformers needs for so many. Each way generates the same number of
tokens after the same prompt: with the cache; without it, as pipekit did before, from the newest tokens for each one; by
the `generate` of transformers with its cache; and 16 prompts in a batch with the cache. Ways take turns, and the median
counts. Times are those of the processor, which other programs disturb less than the clock. Prints a table, writes JSON,
and exits with 1 where the cache saves less than a factor of 10.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

from pipekit.config import load_config
from pipekit.inference.generator import Generator
from pipekit.inference.hugging_face import to_hf
from pipekit.inference.safetensors_folder import write_shards
from pipekit.inference.sample_tokens import Sampling
from pipekit.layers.sequential import SequentialModel
from pipekit.models.family import TransformerFamily

EXAMPLE = Path(__file__).resolve().parents[1] / "examples/gpt_stdlib.yaml"
LEAST_RATIO, BATCH = 10.0, 16
PROMPT = [17, 4, 99, 3]


def write_model(folder: Path, max_positions: int) -> None:
    """Write the model of the example with random weights, as transformers has it."""
    config = load_config(EXAMPLE)
    model = config.updated(
        {"model.vocab_size": config.data.vocab_size, "model.max_positions": max_positions, "model.init_std": 0.1}
    ).model
    assert isinstance(model, TransformerFamily)
    tensors = dict(to_hf(model, SequentialModel(model.layer_specs(), seed=1).logical_tensors()))
    (folder / "config.json").write_text(json.dumps(model.hf_config(end_token_id=None, dtype="float32")))
    write_shards(folder, tensors, read=tensors.__getitem__, shard_bytes=2**30)


def ways_of(folder: Path, new_tokens: int) -> dict[str, Callable[[], int]]:
    """Ways to generate, each of which returns the number of tokens that it has made."""
    ours = Generator.open(folder, device="cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)

    def with_cache(batch: int = 1) -> int:
        results = ours.generate(
            [PROMPT] * batch, max_new_tokens=new_tokens, temperature=0.8, top_k=50, batch_size=batch
        )
        return sum(len(result.token_ids) for result in results)

    def whole_text() -> int:
        tokens, sampling, generator = list(PROMPT), Sampling(0.8, 50), random.Random(0)
        for _ in range(new_tokens):
            context = torch.tensor([tokens[-ours.longest_sequence :]])
            tokens.append(sampling.draw(ours.logits(context)[0, -1], generator))
        return new_tokens

    def in_transformers() -> int:
        ids = torch.tensor([PROMPT])
        options = {"do_sample": True, "temperature": 0.8, "top_k": 50, "pad_token_id": 0}
        made = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **options)
        return int(made.shape[1]) - len(PROMPT)

    ways = {
        "cache": with_cache,
        "whole text for each token": whole_text,
        f"cache, {BATCH} prompts": lambda: with_cache(BATCH),
    }
    if ours.longest_sequence >= len(PROMPT) + new_tokens:
        ways["transformers, cache"] = in_transformers
    return ways


def measure(ways: dict[str, Callable[[], int]], repeats: int) -> dict[str, float]:
    """Milliseconds of the processor for a token, by way: the median of some turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, generate in ways.items():
            began_s = time.process_time()
            num_tokens = generate()
            if turn:  # the first warms up
                times[name].append(1000 * (time.process_time() - began_s) / num_tokens)
    return {name: statistics.median(each) for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("generation.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    table = Table("positions", "way", "ms a token", "times the cache")
    records = []
    for max_positions in (256, 1024):
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), max_positions)
            found = measure(ways_of(Path(folder), arguments.new_tokens), arguments.repeats)
        for name, ms in found.items():
            ratio = ms / found["cache"]
            records.append({"max_positions": max_positions, "way": name, "ms_per_token": ms, "ratio_to_cache": ratio})
            table.add_row(f"{max_positions:,}", name, f"{ms:.3f}", f"{ratio:.2f}")
    Console().print(table)
    result = {
        "new_tokens": arguments.new_tokens,
        "threads": arguments.threads,
        "torch": torch.__version__,
        "ways": records,
    }
    arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    slow = [each for each in records if each["way"].startswith("whole") and each["ratio_to_cache"] < LEAST_RATIO]
    sys.exit(1 if slow else 0)


if __name__ == "__main__":
    main()

"""Throughput and memory of preparing JSON lines, beside `encode_batch` of the tokenizers library on the same cores.

    python benchmarks/prepare.py --megabytes 1000 --out prepare.json

The corpus is the source code of Python's standard library, cut into documents of 200 to 4000 characters in a seeded
order. The two are measured in turns, `--rounds` times, each in processes of its own; the table has the median of each.
`encode_batch` gets texts that are in memory already, in batches of 1,000, and its token ids are thrown away. Preparing
reads the file, parses the lines, writes `.bin` and `.idx` files, and has everything on the disk at the end.

Memory is the sum over all processes of the memory that no other shares, and their share of what is shared (PSS), looked
at ten times a second.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipekit.data.corpus import find_corpus, read_passages
from pipekit.data.tokenizer import train_tokenizer

VOCAB_SIZE = 32_000

ENCODE_BATCH = """
import json, sys, time
from tokenizers import Tokenizer
path, tokenizer = sys.argv[1:]
tokenizer = Tokenizer.from_file(tokenizer)
seconds, batch = 0.0, []
def encode(batch):
    began = time.perf_counter()
    tokenizer.encode_batch(batch, add_special_tokens=False)
    return time.perf_counter() - began
for line in open(path, encoding="utf-8"):
    batch.append(json.loads(line)["text"])
    if len(batch) == 1000:
        seconds, batch = seconds + encode(batch), []
print(seconds + encode(batch))
"""

PREPARE = """
import sys, time
from pipekit.config import DataConfig
from pipekit.data.prepare import prepare_data
path, tokenizer, cache = sys.argv[1:]
config = DataConfig(source=path, tokenizer=tokenizer, cache_dir=cache)
began = time.perf_counter()
prepare_data(config, sequence_length=1024)
print(time.perf_counter() - began)
"""


def write_corpus(path: Path, num_bytes: int) -> int:
    """Write JSON lines with about so many bytes of text; return how many."""
    texts = [passage.text for passage in read_passages(find_corpus("python-stdlib"))]
    draw, written = random.Random(0), 0
    with path.open("w", encoding="utf-8") as lines:
        while written < num_bytes:
            text = draw.choice(texts)
            begin = draw.randrange(max(1, len(text) - 4000))
            part = text[begin : begin + draw.randrange(200, 4000)]
            lines.write(json.dumps({"text": part}) + "\n")
            written += len(part.encode())
    return written


def tree_pss_bytes(pid: int) -> int:
    """Memory of a process and of all that it has started."""
    total = 0
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += 1024 * int(line.split()[1])
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(tree_pss_bytes(int(child)) for child in (task / "children").read_text().split())
    return total


def run(program: str, *arguments: str) -> tuple[float, int]:
    """Run a program that prints its seconds; return them, and the most memory that it had."""
    command = [sys.executable, "-c", program, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    most = 0
    while process.poll() is None:
        most = max(most, tree_pss_bytes(process.pid))
        time.sleep(0.1)
    output, _ = process.communicate()
    if process.returncode:
        sys.exit(f"benchmark: a measured program ended with exit code {process.returncode}")
    return float(output.split()[-1]), most


def measure(megabytes: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Measure both, in turns."""
    text, tokenizer = folder / "text.jsonl", folder / "tokenizer.json"
    num_bytes = write_corpus(text, megabytes * 1_000_000)
    sample = (passage.text for passage in read_passages(find_corpus("python-stdlib"), max_bytes=8_000_000))
    train_tokenizer(sample, vocab_size=VOCAB_SIZE).backend.save(str(tokenizer))
    seconds: dict[str, list[float]] = {"encode_batch": [], "prepare": []}
    memory: dict[str, int] = {"encode_batch": 0, "prepare": 0}
    for index in range(rounds):
        for name, program, more in (
            ("encode_batch", ENCODE_BATCH, ()),
            ("prepare", PREPARE, (str(folder / f"cache-{index}"),)),
        ):
            took_s, most = run(program, str(text), str(tokenizer), *more)
            seconds[name].append(took_s)
            memory[name] = max(memory[name], most)
    rows = {
        name: {
            "seconds": seconds[name],
            "megabytes_per_s": num_bytes / 1e6 / statistics.median(seconds[name]),
            "memory_bytes": memory[name],
        }
        for name in seconds
    }
    ratio = statistics.median(seconds["encode_batch"]) / statistics.median(seconds["prepare"])
    cores = len(os.sched_getaffinity(0))
    return {"megabytes": num_bytes / 1e6, "cores": cores, "load": os.getloadavg()[0], "rows": rows, "ratio": ratio}


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    table = Table(title=f"{result['megabytes']:,.0f} MB of text on {result['cores']} cores (load {result['load']:.1f})")
    for title in ("", "MB/s", "seconds", "memory"):
        table.add_column(title, justify="left" if title == "" else "right")
    for name, row in result["rows"].items():
        seconds = " ".join(f"{each:.1f}" for each in row["seconds"])
        table.add_row(name, f"{row['megabytes_per_s']:.2f}", seconds, f"{row['memory_bytes'] / 1e6:,.0f} MB")
    Console().print(table)
    print(f"preparing has {result['ratio']:.2f} of the throughput of encode_batch")


def main() -> None:
    """Measure, and write the table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000, help="of text")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each")
    parser.add_argument("--out", type=Path, help="file for the numbers as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments.megabytes, arguments.rounds, Path(folder))
    show(result)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

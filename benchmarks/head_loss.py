"""Head and loss with a large vocabulary, measured: the memory that they take, and the time.

    python benchmarks/head_loss.py [--tokens 2048] [--hidden-size 512] [--vocab-size 128256] [--out head_loss.json]

Forward and backward of the head and of the mean cross-entropy, four ways: as torch does it at once (`plain`), with the
vocabulary in the parts of tp=2, by the chunk of tokens, and both. Memory is what a rank's process holds at its peak
over what it held before, as the kernel counts it (Linux): logits, what operations take in between, and the gradients of
activations and weight. Each way has fresh processes, which talk over gloo, and all cores in total. Prints a table and
writes JSON. `plain` takes 3.5 GB; on two cores it takes a few minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pipekit.tensor_parallel import Shard, TensorGroup, chunked_head_loss, plan_chunk_tokens
from pipekit.tensor_parallel.cross_entropy import vocabulary_parallel_cross_entropy
from pipekit.tensor_parallel.group import Done, Pending
from pipekit.tensor_parallel.layers import column_parallel_linear

WAYS = {"plain": (1, False), "tp=2": (2, False), "chunks": (1, True), "chunks, tp=2": (2, True)}
"""The tensor-parallel degree, and whether tokens are taken by the chunk."""

REPEATS = 3
LIMIT_BYTES = 64 * 2**20
"""For the fp32 logits of a chunk."""

WANTED = 0.35
"""Largest memory of `chunks, tp=2` over that of `plain`."""


class GlooGroup(TensorGroup):
    """The ranks of this benchmark."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def start_all_reduce(self, tensor: Tensor) -> Pending:
        return _Sum(tensor)

    def start_all_gather(self, tensor: Tensor, dim: int) -> Pending:
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return Done(torch.cat(parts, dim))

    def start_reduce_scatter(self, tensor: Tensor, dim: int) -> Pending:
        raise NotImplementedError


class _Sum:
    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._work = dist.all_reduce(tensor, async_op=True)

    def wait(self) -> Tensor:
        self._work.wait()
        return self._tensor


def loss_of(
    hidden: Tensor, weight: Tensor, labels: Tensor, group: TensorGroup | None, vocab_size: int, *, by_chunk: bool
) -> Tensor:
    """Return the loss, one of the four ways."""
    if by_chunk:
        chunk_tokens = plan_chunk_tokens(labels.numel(), len(weight), limit_bytes=LIMIT_BYTES) or labels.numel()
        return chunked_head_loss(
            hidden, weight, labels, group, sequence_parallel=False, vocab_size=vocab_size, chunk_tokens=chunk_tokens
        )
    if group is None:
        return F.cross_entropy(F.linear(hidden, weight).float().flatten(0, 1), labels.flatten())
    logits = column_parallel_linear(hidden, weight, None, group)
    return vocabulary_parallel_cross_entropy(logits, labels, group, vocab_size=vocab_size)


def memory_bytes(key: str) -> int:
    """Return what the kernel says of this process: `VmRSS`, what it holds, or `VmHWM`, the most that it has held."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise SystemExit("the memory of a process is read from /proc/self/status, which is Linux's")


def measure_rank(job: dict[str, Any]) -> None:
    """Measure one rank of one way, and write what was seen to `job["out"]`."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // job["tp"]))
    group = None
    if job["tp"] > 1:
        store = dist.FileStore(job["store"], job["tp"])
        dist.init_process_group("gloo", store=store, rank=job["rank"], world_size=job["tp"])
        group = GlooGroup()
    dtype = getattr(torch, job["dtype"])
    vocab_size, num_tokens, width = job["vocab_size"], job["tokens"], job["hidden_size"]
    rows = Shard(0, (vocab_size,), job["rank"], job["tp"]).slices[0]

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, num_tokens, width, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(vocab_size, (1, num_tokens), generator=generator)
    weight = torch.empty(rows.stop - rows.start, width, dtype=dtype)
    # Each rank draws all of one and the same weight, and never holds more of it than its part.
    for row in range(0, vocab_size, 64):
        block = torch.randn(64, width, generator=generator) / width**0.5
        first, last = max(row, rows.start), min(row + 64, rows.stop)
        if first < last:
            weight[first - rows.start : last - rows.start] = block[first - row : last - row]
    weight.requires_grad_()
    # What the libraries take once and keep is taken before the measurement begins.
    few, first_rows = (tensor.detach()[..., :64, :].clone().requires_grad_() for tensor in (hidden, weight))
    first_labels = torch.zeros(few.shape[:2], dtype=torch.int64)
    loss_of(few, first_rows, first_labels, group, 64 * job["tp"], by_chunk=job["by_chunk"]).backward()

    peaks, times_s, loss_value = [], [], 0.0
    for _ in range(job["repeats"]):
        hidden.grad = weight.grad = None
        if group is not None:
            dist.barrier()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        before = memory_bytes("VmRSS")
        started_s = time.perf_counter()
        loss = loss_of(hidden, weight, labels, group, vocab_size, by_chunk=job["by_chunk"])
        loss.backward()
        times_s.append(time.perf_counter() - started_s)
        peaks.append(memory_bytes("VmHWM") - before)
        loss_value = loss.item()
        del loss
    assert hidden.grad is not None
    seen = {
        "peak_bytes": max(peaks),
        "time_s": statistics.median(times_s),
        "loss": loss_value,
        "hidden_gradient_norm": hidden.grad.double().norm().item(),
    }
    Path(job["out"]).write_text(json.dumps(seen))
    if group is not None:
        dist.destroy_process_group()


def measure(tp: int, by_chunk: bool, dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one way, in fresh processes: the rank that holds most, and the slowest."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jobs = [
            {
                "rank": rank,
                "tp": tp,
                "by_chunk": by_chunk,
                "dtype": dtype,
                **{key: getattr(arguments, key) for key in ("tokens", "hidden_size", "vocab_size", "repeats")},
                "store": str(folder / "store"),
                "out": str(folder / f"{rank}.json"),
            }
            for rank in range(tp)
        ]
        command = [sys.executable, __file__, "--rank-of"]
        ranks = [subprocess.Popen([*command, json.dumps(job)]) for job in jobs]
        try:
            failed = [code for code in [rank.wait() for rank in ranks] if code]
        finally:
            for rank in ranks:
                rank.kill()
        if failed:
            raise SystemExit(f"a rank of tp={tp}, {dtype} ended with {failed[0]}")
        seen = [json.loads(Path(job["out"]).read_text()) for job in jobs]
    return {key: max(rank[key] for rank in seen) for key in seen[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of the micro-batch")
    parser.add_argument("--hidden-size", type=int, default=512, help="width of the activations")
    parser.add_argument("--vocab-size", type=int, default=128_256, help="words of the vocabulary")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="types of activations and weight")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="of each measurement")
    parser.add_argument("--out", type=Path, default=Path("head_loss.json"), help="JSON file to write")
    parser.add_argument("--rank-of", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of is not None:
        measure_rank(arguments.rank_of)
        return
    results: dict[str, Any] = {
        "num_cpus": os.cpu_count(),
        "torch": torch.__version__,
        "tokens": arguments.tokens,
        "hidden_size": arguments.hidden_size,
        "vocab_size": arguments.vocab_size,
        "chunk_tokens": plan_chunk_tokens(arguments.tokens, arguments.vocab_size, limit_bytes=LIMIT_BYTES),
        "chunk_tokens_tp2": plan_chunk_tokens(arguments.tokens, -(-arguments.vocab_size // 2), limit_bytes=LIMIT_BYTES),
        "wanted_of_plain": WANTED,
        "measured": {},
    }
    title = (
        f"head and loss, {arguments.tokens} tokens of width {arguments.hidden_size}, vocabulary of "
        f"{arguments.vocab_size}, {results['num_cpus']} cores"
    )
    table = Table("type", "way", "peak memory of a rank", "of plain", "time", "of plain", "loss", title=title)
    console = Console(width=None if sys.stdout.isatty() else 130)
    for dtype in arguments.dtypes:
        plain: dict[str, Any] = {}
        for way, (tp, by_chunk) in WAYS.items():
            with console.status(f"{dtype}, {way}"):
                seen = measure(tp, by_chunk, dtype, arguments)
            plain = plain or seen
            of_plain = {key: seen[key] / plain[key] for key in ("peak_bytes", "time_s")}
            results["measured"][f"{dtype}, {way}"] = {**seen, "of_plain": of_plain}
            table.add_row(
                *(dtype, way, f"{seen['peak_bytes'] / 2**20:,.0f} MiB", f"{of_plain['peak_bytes']:.3f}"),
                *(f"{seen['time_s']:.2f} s", f"{of_plain['time_s']:.2f}", f"{seen['loss']:.6f}"),
            )
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    console.print(table)
    most = max(results["measured"][f"{dtype}, chunks, tp=2"]["of_plain"]["peak_bytes"] for dtype in arguments.dtypes)
    console.print(f"with chunks and tp=2 a rank takes {most:.3f} of the memory of plain, wanted at most {WANTED}")


if __name__ == "__main__":
    main()

"""Memory and time of sparse attention on the CPU beside dense attention, forward and backward.

    python benchmarks/sparse_attention.py [--tokens 16384] [--long 65536] [--short 8192] [--out sparse_attention.json]

At `--tokens`: plain torch that masks all scores (`scores`), torch's `scaled_dot_product_attention` with the same mask
(`masked`) and with none but the causal one (`causal`, which attends to more), and `pipekit`'s sparse attention in each
mode. Then the dense ways at `--short` tokens and the modes at `--long`. Memory is what a fresh process holds at its
peak over what it held before, as the kernel counts it (Linux), gradients included. Prints a table and writes JSON; some
minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from head_loss import memory_bytes
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pipekit.models.sparsity import BlockLayouts, SparseAttention
from pipekit.models.transformer.sparse import HeadLayouts, Weighing, attend_sparsely

MODES: dict[str, dict[str, Any]] = {
    "fixed": {"num_local_blocks": 8},
    "variable": {"local_window_blocks": (4, 8), "num_random_blocks": 1},
    "bigbird": {},
    "bslongformer": {},
}
DENSE = ("scores", "masked", "causal")
WANTED = 0.25
"""Largest memory of a mode over that of dense attention with a mask."""


def attend(way: str, q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
    """Weighted sums of the values, one of the ways; the dense ones with a mask have that of `fixed`."""
    mode, length, heads = way if way in MODES else "fixed", q.shape[2], q.shape[1]
    layouts = BlockLayouts(SparseAttention(mode=mode, block=block, **MODES[mode]), heads, length)  # type: ignore[arg-type]
    scale = q.shape[3] ** -0.5
    if way in MODES:
        return attend_sparsely(q, k, v, HeadLayouts(layouts, 0, heads), Weighing(scale))
    if way == "causal":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    blocks = torch.from_numpy(layouts.tables()[0])
    mask = blocks.repeat_interleave(block, 0).repeat_interleave(block, 1)[:length, :length].tril_()
    if way == "masked":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return (scale * q @ k.mT).masked_fill(~mask, -torch.inf).softmax(-1) @ v


def measure_here(job: dict[str, Any]) -> dict[str, float]:
    """Measure one way in this process."""
    generator = torch.Generator().manual_seed(0)

    def heads(length: int) -> list[Tensor]:
        shape = (1, length, job["heads"], job["head_size"])
        return [torch.randn(shape, generator=generator).transpose(1, 2).requires_grad_() for _ in range(3)]

    # What the libraries take once and keep is taken before the measurement begins.
    attend(job["way"], *heads(256), job["block"]).sum().backward()
    inputs = heads(job["length"])
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before, started_s = memory_bytes("VmRSS"), time.perf_counter()
    y = attend(job["way"], *inputs, job["block"])
    y.sum().backward()
    time_s = time.perf_counter() - started_s
    return {"peak_bytes": memory_bytes("VmHWM") - before, "time_s": time_s, "norm": y.detach().norm().item()}


def measure(way: str, length: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one way in a fresh process."""
    job = {"way": way, "length": length, **{key: getattr(arguments, key) for key in ("heads", "head_size", "block")}}
    done = subprocess.run(
        [sys.executable, __file__, "--job", json.dumps(job)], stdout=subprocess.PIPE, check=True, text=True
    )
    return {"way": way, "tokens": length, **json.loads(done.stdout)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of the comparison")
    parser.add_argument("--short", type=int, default=8192, help="tokens of dense attention")
    parser.add_argument("--long", type=int, default=65536, help="tokens of sparse attention in the memory of that")
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--block", type=int, default=64, help="tokens in a block")
    parser.add_argument("--out", type=Path, default=Path("sparse_attention.json"), help="JSON file to write")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job is not None:
        print(json.dumps(measure_here(arguments.job)))
        return
    settings = {key: value for key, value in vars(arguments).items() if key not in ("job", "out")}
    results: dict[str, Any] = {"num_cpus": os.cpu_count(), "torch": torch.__version__, **settings, "measured": []}
    title = f"attention of {arguments.heads} heads of {arguments.head_size}, fp32, {results['num_cpus']} cores"
    table = Table("tokens", "way", "peak memory", "of scores", "of masked", "time", title=title)
    console = Console(width=None if sys.stdout.isatty() else 130)
    jobs = [(way, arguments.tokens) for way in (*DENSE, *MODES)]
    jobs += [(way, arguments.short) for way in DENSE] + [(way, arguments.long) for way in MODES]
    dense: dict[str, int] = {}
    for way, length in jobs:
        with console.status(f"{way}, {length} tokens"):
            seen = measure(way, length, arguments)
        results["measured"].append(seen)
        if way in DENSE:
            dense[way] = seen["peak_bytes"]
        shares = [f"{seen['peak_bytes'] / dense[name]:.3f}" if name in dense else "" for name in DENSE[:2]]
        peak = f"{seen['peak_bytes'] / 2**20:,.0f} MiB"
        table.add_row(f"{length:,}", way, peak, *shares, f"{seen['time_s']:.1f} s")
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    console.print(table)
    console.print(
        f"wanted: at {arguments.tokens:,} tokens, at most {WANTED} of dense attention with a mask; at "
        f"{arguments.long:,}, no more than `scores` at {arguments.short:,}"
    )


if __name__ == "__main__":
    main()

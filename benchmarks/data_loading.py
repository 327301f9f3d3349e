"""Data that are read while the step before runs, measured: how much longer they make a step.

    python benchmarks/data_loading.py [--steps 20] [--share 0.5] [--workers 1] [--out data_loading.json]

A small GPT trains on one process and one core. Its dataset takes a share of a step for the samples of a step: by
waiting, as a disk or a network lets it wait, or by computing in Python, which needs a second core and the interpreter's
lock now and then. The samples of a step are collated in memory before (`ready`), in the step (`in the step`), on a
thread while the step before runs (`ahead`), as `pipekit train` does it, or in worker processes (`workers`), as it does
with `data.workers`. The ways take turns. Prints a table and writes JSON; it takes a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pipekit.data.batch_loader import BatchLoader
from pipekit.data.order import SampleOrder
from pipekit.data.prefetch import Prefetcher
from pipekit.data.workers import Workers
from pipekit.deepspeed.deepspeed_config import plan_deepspeed_config
from pipekit.distributed.mpu import ModelParallelUnit
from pipekit.distributed.processes import join_processes, leave_processes
from pipekit.engine.build import build_engine
from pipekit.engine.module import PipelineModule
from pipekit.layout import Layout
from pipekit.models import find_families
from pipekit.models.transformer import language_model_loss

VOCAB, SEQUENCE, GLOBAL_BATCH, MICRO_BATCH = 2048, 128, 16, 2
WANTED = 1.02
"""Largest step time of `ahead` over that of `ready`, with a dataset that waits."""
WANTED_OF_WORKERS = 1.05
"""Largest step time of `workers` over that of `ready`, with a dataset that computes, and a core for each process."""


class Samples:
    """Random windows of tokens, each of which takes its time: by computing or by waiting."""

    def __init__(self, kind: str, seconds: float) -> None:
        self._kind, self._seconds = kind, seconds

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        (compute if self._kind == "compute" else time.sleep)(self._seconds)
        window = torch.randint(VOCAB, (SEQUENCE + 1,), generator=torch.Generator().manual_seed(index))
        return window[:-1], window[1:]


def compute(seconds: float) -> None:
    """Compute in Python for so long, as a dataset does that parses text."""
    until_s, total = time.perf_counter() + seconds, 0
    while time.perf_counter() < until_s:
        total += sum(range(100))


def build() -> Any:
    config = find_families()["gpt2"](
        vocab_size=VOCAB, hidden_size=128, num_layers=4, num_heads=4, max_positions=SEQUENCE, dropout=0.0
    )
    specs = config.layer_specs()
    module = PipelineModule(
        specs,
        mpu=ModelParallelUnit(Layout(pp=1, dp=1, tp=1)),
        boundaries=(0, len(specs)),
        loss_fn=language_model_loss,
        base_seed=1,
    )
    return build_engine(
        module,
        deepspeed_config=plan_deepspeed_config(
            micro_batch_size=MICRO_BATCH,
            num_micro_batches=GLOBAL_BATCH // MICRO_BATCH,
            precision="fp32",
            zero=0,
            gradient_clipping=1.0,
            extra={},
        ),
        build_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    )


class Way:
    """One way to have the samples of a step collated, and the times of its steps."""

    def __init__(self, name: str, dataset: Samples, num_workers: int) -> None:
        self.name = name
        self.times_s: list[float] = []
        order = SampleOrder(len(dataset), 1, shuffle=False)
        loader = BatchLoader(dataset, order, global_batch_size=GLOBAL_BATCH, micro_batch_size=MICRO_BATCH)
        workers = Workers(loader, num_workers, timeout_s=600.0) if name == "workers" else None
        self._prefetcher = Prefetcher(loader, workers=workers)
        self._position = 0
        self._is_ahead = name in ("ahead", "workers")
        if self._is_ahead:
            self._read(then=GLOBAL_BATCH)

    def _read(self, then: int | None) -> list[Any]:
        batches = self._prefetcher.step_batches(self._position, then=then)
        self._position += GLOBAL_BATCH
        return batches

    def step(self, engine: Any) -> None:
        """Time a step; the samples of the one after are collated meanwhile, if they are at all."""
        ready = self._read(None) if self.name == "ready" else None
        started_s = time.perf_counter()
        if ready is None:
            ready = self._read(self._position + GLOBAL_BATCH if self._is_ahead else None)
        engine.train_batch(iter(ready))
        self.times_s.append(time.perf_counter() - started_s)

    def close(self) -> None:
        """End threads and processes."""
        self._prefetcher.close()


def measure(engine: Any, dataset: Samples, steps: int, num_workers: int) -> dict[str, dict[str, float]]:
    """Median time of a step in seconds, and median of its ratios to the step of `ready` before it, by way."""
    ways = [Way(name, dataset, num_workers) for name in ("ready", "in the step", "ahead", "workers")]
    for _ in range(steps):
        for way in ways:
            # What is collated ahead must not run under the steps of the others.
            way.step(engine)
            time.sleep(0.1)
    for way in ways:
        way.close()
    ready = ways[0]
    return {
        way.name: {
            "step_s": statistics.median(way.times_s),
            "of_ready": statistics.median(
                step_s / ready_s for step_s, ready_s in zip(way.times_s, ready.times_s, strict=True)
            ),
        }
        for way in ways
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="steps of each measurement")
    parser.add_argument("--share", type=float, default=0.5, help="share of a step that its samples take")
    parser.add_argument("--workers", type=int, default=1, help="worker processes")
    parser.add_argument("--out", type=Path, default=Path("data_loading.json"), help="JSON file to write")
    arguments = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    join_processes(device="cpu", timeout_s=60.0, local_rank=0)
    engine = build()
    alone_s = measure(engine, Samples("wait", 0.0), 5, 1)["ready"]["step_s"]
    sample_s = arguments.share * alone_s / GLOBAL_BATCH
    results: dict[str, Any] = {
        "num_cpus": os.cpu_count(),
        "torch": torch.__version__,
        "share": arguments.share,
        "step_s": alone_s,
        "wanted_of_ready": {"ahead": WANTED, "workers": WANTED_OF_WORKERS},
        "measured": {},
    }
    title = f"a step of {alone_s:.2f} s, whose samples take {arguments.share:g} of it, {results['num_cpus']} cores"
    table = Table("samples", "collated", "step", "of ready", title=title)
    console = Console(width=None if sys.stdout.isatty() else 100)
    for kind in ("wait", "compute"):
        dataset = Samples(kind, sample_s)
        seen = results["measured"][kind] = measure(engine, dataset, arguments.steps, arguments.workers)
        for way, values in seen.items():
            table.add_row(kind, way, f"{values['step_s']:.3f} s", f"{values['of_ready']:.3f}")
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    console.print(table)
    of_ready = results["measured"]["wait"]["ahead"]["of_ready"]
    console.print(f"collated ahead, a step takes {of_ready:.3f} of the time without reading, wanted at most {WANTED}")
    of_ready = results["measured"]["compute"]["workers"]["of_ready"]
    console.print(
        f"computed in workers, it takes {of_ready:.3f} of it, wanted at most {WANTED_OF_WORKERS} with a core for each"
    )
    leave_processes()


if __name__ == "__main__":
    from data_loading import main as main_of_module  # workers find the dataset by the name of its module

    main_of_module()

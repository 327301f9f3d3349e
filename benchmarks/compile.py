"""Compiled layers, measured: the time of a step with `train.compile` and without, and the difference of the losses.

    python benchmarks/compile.py [--hidden-size 256] [--num-layers 4] [--steps 40] [--out compile.json]

A GPT-2 is trained in one process by the engine, with whole backwards (`1f1b`) and with weight gradients put off
(`zb-h1`). Compiled and uncompiled engines take turns, step by step, so that both see the same machine. The first steps,
in which layers are compiled, do not count. Prints a table and writes JSON; fails if a compiled step is slower, or if a
loss differs by more than 1e-4. On two cores it takes about two minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pipekit.deepspeed.deepspeed_config import plan_deepspeed_config
from pipekit.distributed.mpu import ModelParallelUnit
from pipekit.distributed.processes import join_processes, leave_processes
from pipekit.engine.build import build_engine
from pipekit.engine.module import PipelineModule
from pipekit.launch.ports import choose_port
from pipekit.layout import Layout
from pipekit.models.gpt2 import GPT2Config
from pipekit.models.transformer import language_model_loss

VOCAB, SEQUENCE, MICRO_BATCH, MICRO_BATCHES = 512, 128, 4, 4
WARM_UP_STEPS = 3
SCHEDULES = ("1f1b", "zb-h1")
TOLERANCE = 1e-4


def build(schedule: str, *, compiled: bool, arguments: argparse.Namespace) -> Any:
    """Build the engine of one way to train."""
    config = GPT2Config(
        vocab_size=VOCAB,
        hidden_size=arguments.hidden_size,
        num_layers=arguments.num_layers,
        num_heads=4,
        max_positions=SEQUENCE,
    )
    specs = config.layer_specs()
    module = PipelineModule(
        specs,
        mpu=ModelParallelUnit(Layout(), placement=(0,)),
        boundaries=(0, len(specs)),
        loss_fn=language_model_loss,
        schedule=schedule,
        compile_layers=compiled,
    )
    return build_engine(
        module,
        deepspeed_config=plan_deepspeed_config(
            micro_batch_size=MICRO_BATCH,
            num_micro_batches=MICRO_BATCHES,
            precision="fp32",
            zero=1,
            gradient_clipping=1.0,
            extra={},
        ),
        build_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
    )


def batches(step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the micro-batches of a step."""
    generator = torch.Generator().manual_seed(step)
    for _ in range(MICRO_BATCHES):
        tokens = torch.randint(VOCAB, (MICRO_BATCH, SEQUENCE), generator=generator)
        yield tokens, (tokens * 3 + 1) % VOCAB


def measure(schedule: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Train both ways in turn, and return the medians of their steps and the largest difference of their losses."""
    engines = {compiled: build(schedule, compiled=compiled, arguments=arguments) for compiled in (False, True)}
    times_s: dict[bool, list[float]] = {False: [], True: []}
    losses: dict[bool, list[float]] = {False: [], True: []}
    for step in range(WARM_UP_STEPS + arguments.steps):
        for compiled, engine in engines.items():
            started_s = time.perf_counter()
            losses[compiled].append(float(engine.train_batch(batches(step))))
            times_s[compiled].append(time.perf_counter() - started_s)
    plain_s, compiled_s = (statistics.median(times_s[compiled][WARM_UP_STEPS:]) for compiled in (False, True))
    return {
        "plain_s": plain_s,
        "compiled_s": compiled_s,
        "speedup": plain_s / compiled_s,
        "first_step_s": times_s[True][0],
        "loss_difference": max(abs(a / b - 1) for a, b in zip(losses[True], losses[False], strict=True)),
    }


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("compile.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(choose_port(None)),
            TORCHINDUCTOR_CACHE_DIR=folder, TORCHINDUCTOR_COMPILE_THREADS="1",
        )  # fmt: skip
        join_processes(device="cpu", timeout_s=600.0, local_rank=0)
        results = {schedule: measure(schedule, arguments) for schedule in SCHEDULES}
        leave_processes()
    table = Table("schedule", "uncompiled", "compiled", "speed-up", "first step", "losses differ by")
    for schedule, found in results.items():
        table.add_row(
            schedule,
            f"{found['plain_s'] * 1e3:.0f} ms",
            f"{found['compiled_s'] * 1e3:.0f} ms",
            f"{found['speedup']:.2f}x",
            f"{found['first_step_s']:.1f} s",
            f"{found['loss_difference']:.1e}",
        )
    Console().print(table)
    arguments.out.write_text(
        json.dumps(
            {"torch": torch.__version__, **vars(arguments), "out": str(arguments.out), "results": results}, indent=1
        )
        + "\n"
    )
    slow = [schedule for schedule, found in results.items() if found["speedup"] < 1.0]
    apart = [schedule for schedule, found in results.items() if found["loss_difference"] > TOLERANCE]
    if slow or apart:
        raise SystemExit(
            f"slower when compiled: {slow or 'none'}; losses apart by more than {TOLERANCE}: {apart or 'none'}"
        )


if __name__ == "__main__":
    main()

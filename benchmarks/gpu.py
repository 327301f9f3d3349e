"""Training of a GPT on one GPU: speed, share of the device's peak, waits for the device, and memory against the plan.

    python benchmarks/gpu.py [--device cuda] [--micro-batch-sizes 1 4 8] [--steps 5] [--quick] [--kernels] [--json PATH]

A GPT of 1.3 billion parameters, bf16, sequences of 2048 tokens, 8 micro-batches a step, for each size of the
micro-batch; for the largest with activation checkpointing, too, and on a GPU for all with compiled layers. Each setting
has a process of its own, which trains as `pipekit train` does, on random tokens. MFU counts the operations of the
model, without those of recomputation, and divides by the peak that the table of devices has. Synchronizing calls are
those that torch warns of (`torch.cuda.set_sync_debug_mode`). The predicted step is that of layers timed beforehand
(`partition: profile`), or with `--quick` counted. Memory by the driver counts other processes of the device, too.
A step whose kernels are recorded gives the idle share.

`--kernels` times the choices that the engine makes: chunks of head and loss by their size, ways to add a bf16 gradient
to an fp32 sum, copies from pinned and from pageable memory, and half a block with and without `torch.compile`.

`--device cpu --quick` runs a tiny model in seconds, to try this out. Prints tables and writes JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pipekit.config import Config
from pipekit.config.load import parse_config
from pipekit.costs.example import Example, language_model_example
from pipekit.costs.sequence_flops import model_flops
from pipekit.distributed.processes import join_processes, leave_processes
from pipekit.launch.gpu_environment import gpu_environ
from pipekit.layers.specs import LayerSpec, build_layer
from pipekit.models import build_layers
from pipekit.models.transformer import language_model_loss
from pipekit.plan.decide import Decision, decide_run
from pipekit.plan.resources import Resources
from pipekit.plan.run_folder import RunFolder
from pipekit.predictions.devices import find_device
from pipekit.predictions.prediction import predict
from pipekit.tensor_parallel import chunked_head_loss
from pipekit.training.layers_run import LayersRun
from pipekit.training.layers_trial import LayersTrial
from pipekit.training.run_context import RunContext

LARGE: dict[str, dict[str, Any]] = {
    "model": {
        "family": "gpt2", "vocab_size": 50304, "hidden_size": 2048, "num_layers": 24, "num_heads": 16,
        "max_positions": 2048,
    },
    "train": {"sequence_length": 2048},
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "model": {"preset": "tiny", "vocab_size": 512, "num_layers": 1},
    "train": {"sequence_length": 64},
}
NUM_MICRO_BATCHES = 8
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Setting:
    """One way to train.

    Attributes:
        device: `cuda` or `cpu`.
        quick: whether the model is the tiny one.
        micro_batch_size: sequences of a micro-batch.
        checkpointing: whether activations are computed again in the backward pass.
        compile: whether layers are compiled.
        steps: steps to time, behind `WARM_UP_STEPS`.
    """

    device: str
    quick: bool
    micro_batch_size: int
    checkpointing: bool
    compile: bool
    steps: int

    def config(self, folder: Path) -> Config:
        """Return the configuration of a run in a folder."""
        sizes = TINY if self.quick else LARGE
        return parse_config(
            {
                "model": sizes["model"],
                "train": {
                    **sizes["train"],
                    "steps": WARM_UP_STEPS + self.steps + 2,
                    "micro_batch_size": self.micro_batch_size,
                    "global_batch_size": self.micro_batch_size * NUM_MICRO_BATCHES,
                    "precision": "bf16",
                    "activation_checkpointing": self.checkpointing,
                    "compile": self.compile,
                },
                "parallel": {"dp": 1, "partition": "parameters" if self.quick else "profile"},
                "run": {"dir": str(folder / "run"), "device": self.device},
            }
        )


class RandomTokens:
    """A dataset of random tokens.

    Args:
        vocab_size: tokens are below it.
        length: tokens of a sequence.
    """

    def __init__(self, vocab_size: int, length: int) -> None:
        self._tokens = torch.randint(vocab_size, (64, length + 1), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._tokens[index, :-1], self._tokens[index, 1:]


class RandomTrial(LayersTrial):
    """Trains the configuration's model on random tokens."""

    @classmethod
    def build_layers(cls, config: Config) -> list[LayerSpec]:
        return build_layers(config)

    @classmethod
    def example(cls, config: Config, micro_batch_size: int) -> Example:
        return language_model_example(micro_batch_size, config.train.sequence_length)

    def loss(self, outputs: Any, labels: Any) -> Tensor:
        return language_model_loss(outputs, labels)

    def build_train_dataset(self) -> RandomTokens:
        sizes = self.context.config
        return RandomTokens(sizes.model.known_vocab_size, sizes.train.sequence_length)


def measure(setting: Setting, folder: Path) -> dict[str, Any]:
    """Planned and measured time, memory and waits of a setting."""
    is_gpu = setting.device == "cuda"
    resources = Resources(
        num_cpus=os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        num_gpus=1 if is_gpu else None,
    )
    table_device = find_device(torch.cuda.get_device_name() if is_gpu else "cpu")
    decision = decide_run(setting.config(folder), RandomTrial, resources, prepared={})
    planned = predict(decision.model, decision.parallel_plan, table_device, decision.plan.boundaries)
    costs = decision.model.costs_of(setting.micro_batch_size)
    flops = NUM_MICRO_BATCHES * model_flops(costs)

    if is_gpu:
        # What the layers were timed with.
        torch.cuda.empty_cache()
    run = build_run(decision, join_processes(device=decision.plan.device, timeout_s=300.0, local_rank=0))
    steps = itertools.count()

    def train_step() -> float:
        return run.train_batch(None, 0, next(steps)).read()["loss"]

    for _ in range(WARM_UP_STEPS):
        train_step()
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
    times_s = []
    for _ in range(setting.steps):
        started_s = time.perf_counter()
        train_step()
        if is_gpu:
            torch.cuda.synchronize()
        times_s.append(time.perf_counter() - started_s)
    step_s = statistics.median(times_s)
    memory = memory_of_device() if is_gpu else dict.fromkeys(("allocated_bytes", "reserved_bytes", "driver_bytes"))
    with counted_syncs() as syncs:
        loss = train_step()
    with recorded_kernels(is_gpu) as recorded:
        train_step()
    leave_processes()
    train = decision.plan.config.train
    return {
        **asdict(setting),
        "num_parameters": decision.plan.num_parameters,
        "step_s": step_s,
        "predicted_step_s": planned.step_time_s,
        "tokens_per_s": train.global_batch_size * train.sequence_length / step_s,
        "mfu": flops / step_s / table_device.peak_flops.bf16,
        "idle_share": recorded.get("idle_share"),
        "longest_kernels_s": recorded.get("longest_kernels_s"),
        "syncs": len(syncs) if is_gpu else None,
        "synced_at": syncs,
        "planned_bytes": planned.memory_bytes,
        "planned_parts_bytes": asdict(planned.ranks[0].memory),
        **memory,
        "loss": loss,
    }


def build_run(decision: Decision, device: torch.device) -> LayersRun:
    """Return a run of one process."""
    plan = decision.plan
    mpu = RandomTrial.build_mpu(plan.layout, placement=plan.placement, timeout_s=plan.config.run.timeout_s)
    return LayersRun(RandomTrial(RunContext(plan, decision.specs, mpu, device, RunFolder(plan.config.run.dir))))


def memory_of_device() -> dict[str, int]:
    """Return the peaks of what torch has allocated and reserved, and what the driver counts now."""
    free, total = torch.cuda.mem_get_info()
    return {
        "allocated_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "driver_bytes": total - free,
    }


@contextmanager
def counted_syncs() -> Iterator[list[str]]:
    """Collect the warnings of calls in the block that wait for the GPU; none without one."""
    found: list[str] = []
    if not torch.cuda.is_available():
        yield found
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [f"{each.filename}:{each.lineno}" for each in caught if "synchronizing" in str(each.message)]


@contextmanager
def recorded_kernels(is_gpu: bool) -> Iterator[dict[str, Any]]:
    """Record the work of a GPU in the block: its share of idle time, and the kernels that take longest."""
    found: dict[str, Any] = {}
    if not is_gpu:
        yield found
        return
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        started_s = time.perf_counter()
        yield found
        torch.cuda.synchronize()
        total_s = time.perf_counter() - started_s
    events = [event for event in profiler.events() or () if event.device_type == DeviceType.CUDA]
    busy_us, last_us = 0.0, 0.0
    totals_s: dict[str, float] = defaultdict(float)
    for event in sorted(events, key=lambda event: event.time_range.start):
        start_us, end_us = event.time_range.start, event.time_range.end
        busy_us += max(0.0, end_us - max(start_us, last_us))
        last_us = max(last_us, end_us)
        totals_s[event.name] += (end_us - start_us) / 1e6
    found["idle_share"] = max(0.0, 1.0 - busy_us / 1e6 / total_s)
    found["longest_kernels_s"] = dict(sorted(totals_s.items(), key=lambda item: -item[1])[:20])


def run_alone(setting: Setting) -> dict[str, Any]:
    """Measure a setting in a process of its own; return why it failed where it did, as for want of memory."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        environ = {
            **os.environ, **gpu_environ(Path(folder), os.environ), "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
            "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "DS_ACCELERATOR": setting.device,
        }  # fmt: skip
        command = [sys.executable, __file__, "--measure", json.dumps({**asdict(setting), "folder": folder})]
        done = subprocess.run(command, env=environ, capture_output=True, text=True)
        out = Path(folder) / "measured.json"
        if done.returncode or not out.exists():
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            return {**asdict(setting), "error": lines[-1], "stderr": lines[-40:]}
        measured: dict[str, Any] = json.loads(out.read_text())
        return measured


def time_call(call: Callable[[], Any], device: torch.device, repeats: int = 10) -> float:
    """Return the seconds that a call takes, behind two that warm up."""

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(2):
        call()
    finish()
    started_s = time.perf_counter()
    for _ in range(repeats):
        call()
    finish()
    return (time.perf_counter() - started_s) / repeats


def measure_kernels(device: torch.device, *, quick: bool) -> dict[str, dict[str, float]]:
    """Return the seconds of each choice, by what is chosen."""
    vocab_size, width, num_tokens, num_layers = (512, 64, 256, 1) if quick else (50304, 2048, 8192, 24)
    dtype = torch.bfloat16
    hidden = torch.randn(1, num_tokens, width, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(vocab_size, width, device=device) / width**0.5).to(dtype).requires_grad_()
    labels = torch.randint(vocab_size, (1, num_tokens), device=device)

    def head_loss(chunk_tokens: int | None) -> None:
        hidden.grad = weight.grad = None
        if chunk_tokens is None:
            loss = F.cross_entropy(F.linear(hidden, weight).float().flatten(0, 1), labels.flatten())
        else:
            loss = chunked_head_loss(
                hidden, weight, labels, None, sequence_parallel=False, vocab_size=vocab_size, chunk_tokens=chunk_tokens
            )
        torch.autograd.backward(loss)

    heads = {"whole": time_call(lambda: head_loss(None), device)}
    for mebibytes in (64, 256, 1024, 2048):
        chunk_tokens = min(num_tokens, max(1, mebibytes * 2**20 // (4 * vocab_size)))
        heads[f"{mebibytes} MiB"] = time_call(lambda size=chunk_tokens: head_loss(size), device)  # type: ignore[misc]

    total = torch.zeros(num_layers, 12 * width * width, device=device)
    gradient = torch.ones_like(total, dtype=dtype)
    sums = {
        "one add_ of two types": time_call(lambda: total.add_(gradient), device),
        "to fp32, then add_": time_call(lambda: total.add_(gradient.float()), device),
        "add_ by the layer": time_call(
            lambda: [one.add_(other) for one, other in zip(total, gradient, strict=True)], device
        ),
        "_foreach_add_": time_call(lambda: torch._foreach_add_(list(total), list(gradient)), device),
    }

    tokens = torch.zeros(8 * 2048 * 8, dtype=torch.int64)
    copies = {"pageable": time_call(lambda: tokens.to(device, non_blocking=True), device)}
    if device.type == "cuda":
        pinned = tokens.pin_memory()
        copies["pinned"] = time_call(lambda: pinned.to(device, non_blocking=True), device)

    halves = {}
    block = dict(zip(("attention", "mlp"), RandomTrial.build_layers(_kernel_config(quick))[2:4], strict=True))
    inputs = torch.randn(1, 128 if quick else 2048, width, device=device, dtype=dtype, requires_grad=True)
    for name, spec in block.items():
        layer = build_layer(spec, name=name, seed=0).to(device=device, dtype=dtype)
        ways: dict[str, Callable[[Tensor], Any]] = {"eager": layer}
        if device.type == "cuda":
            ways["compiled"] = torch.compile(layer)
        for way, call in ways.items():
            halves[f"{name}, {way}"] = time_call(lambda call=call: call(inputs).sum().backward(), device)  # type: ignore[misc]
    return {"head and loss, chunks": heads, "accumulation": sums, "copy of tokens": copies, "half a block": halves}


def _kernel_config(quick: bool) -> Config:
    sizes = {"hidden_size": 64, "num_heads": 4} if quick else {"hidden_size": 2048, "num_heads": 16}
    model = {"family": "gpt2", "vocab_size": 512, "num_layers": 1, "max_positions": 2048, **sizes}
    return parse_config({"model": model, "train": {"steps": 1}})


def step_table(results: list[dict[str, Any]], title: str) -> Table:
    """Return a row for each setting."""
    columns = ("micro-batch", "way", "step", "predicted", "tokens/s", "MFU", "idle", "syncs", "planned")
    table = Table(*columns, "allocated", "reserved", "driver", title=title)

    def gb(value: int | None) -> str:
        return "-" if value is None else f"{value / 1e9:.2f} GB"

    for one in results:
        ways = [way for way in ("checkpointing", "compile") if one[way]]
        name = (str(one["micro_batch_size"]), ", ".join(ways) or "plain")
        if "error" in one:
            table.add_row(*name, one["error"])
            continue
        table.add_row(
            *(*name, f"{one['step_s']:.3f} s", f"{one['predicted_step_s']:.3f} s", f"{one['tokens_per_s']:,.0f}"),
            *(f"{100 * one['mfu']:.1f} %", "-" if one["idle_share"] is None else f"{100 * one['idle_share']:.0f} %"),
            "-" if one["syncs"] is None else str(one["syncs"]),
            *(gb(one[f"{key}_bytes"]) for key in ("planned", "allocated", "reserved", "driver")),
        )
    return table


def kernel_table(kernels: dict[str, dict[str, float]]) -> Table:
    """Return a row for each choice."""
    table = Table("what", "way", "time")
    for what, ways in kernels.items():
        for way, seconds in ways.items():
            table.add_row(what, way, f"{1e3 * seconds:.3f} ms")
    return table


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="%(default)s unless given")
    parser.add_argument("--micro-batch-sizes", type=int, nargs="+", help="1 4 8, or 1 2 with --quick, unless given")
    parser.add_argument("--steps", type=int, default=5, help="steps to time; %(default)s unless given")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try this out")
    parser.add_argument("--kernels", action="store_true", help="time the choices of the engine, too")
    parser.add_argument(
        "--json", type=Path, default=Path("gpu.json"), metavar="PATH", help="file to write; %(default)s"
    )
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.measure is not None:
        folder = Path(arguments.measure.pop("folder"))
        measured = measure(Setting(**arguments.measure), folder)
        (folder / "measured.json").write_text(json.dumps(measured))
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU; --device cpu --quick tries this benchmark out without one")
    sizes = arguments.micro_batch_sizes or ([1, 2] if arguments.quick else [1, 4, 8])
    ways = [*((size, False, False) for size in sizes), (sizes[-1], True, False)]
    if arguments.device == "cuda":
        ways += [(size, False, True) for size in sizes]
    settings = [Setting(arguments.device, arguments.quick, *way, arguments.steps) for way in ways]
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    report: dict[str, Any] = {"device": name, "torch": torch.__version__, "quick": arguments.quick, "settings": []}
    console = Console(width=None if sys.stdout.isatty() else 160)
    for setting in settings:
        with console.status(f"{setting}"):
            report["settings"].append(run_alone(setting))
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    console.print(step_table(report["settings"], f"{'tiny GPT' if arguments.quick else 'GPT of 1.3B'}, bf16, {name}"))
    if arguments.kernels:
        report["kernels"] = measure_kernels(device, quick=arguments.quick)
        console.print(kernel_table(report["kernels"]))
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"{arguments.json} has the figures", highlight=False)
    if any("error" in one for one in report["settings"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

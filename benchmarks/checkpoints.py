"""Checkpoints, measured: what checksums cost, what saves add to a run at once and in the background, and kills.

    python benchmarks/checkpoints.py [--parts checksums async kills] [--kills 50] [--seed 0] [--json checkpoints.json]

`checksums` lets an engine save and load a GPT of 200M parameters, 2.4 GB, with and without them, in turns, the files
dropped from the page cache before they are read. `async` trains the same GPT in a process of its own, with a checkpoint
every few steps that is written at once or in the background, against a run that saves at its end alone, in turns; what
the checkpoints add is compared. `kills` kills (SIGKILL) a small run that saves after every step at random moments, half
of them with `checkpoint.async`, starts it again each time, and compares its losses with those of a run that nobody
disturbed; kills that left a save unfinished are counted. Prints a table and writes JSON; exits with 1 where a
requirement is not met. Half an hour in all.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from rich.console import Console
from rich.table import Table

import pipekit.checkpoint.writer as writer_module
import pipekit.engine.load as load_module
from pipekit import PipelineEngine, PipelineModule, initialize, parse_config
from pipekit.checkpoint.manifest import Checksum, find_latest, list_checkpoints
from pipekit.models import build_layers
from pipekit.models.transformer.head import language_model_loss

CHECKSUM_LIMIT, ASYNC_LIMIT, LEAST_ADDED = 0.10, 0.10, 0.05
ROUNDS = 10
RUNS = 3
GPT: dict[str, Any] = {
    "model": {"hidden_size": 1024, "num_layers": 16, "num_heads": 16, "max_positions": 32},
    "train": {
        "steps": 40,
        "global_batch_size": 1,
        "micro_batch_size": 1,
        "sequence_length": 32,
        "precision": "fp32",
        "eval_interval": None,
    },
}
INTERVAL = 10
SMALL: dict[str, Any] = {
    "model": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_positions": 32},
    "train": {**GPT["train"], "steps": 1_000_000, "global_batch_size": 4},
}
SHARED: dict[str, Any] = {
    "run": {"device": "cpu"},
    "data": {"source": "text.txt", "vocab_size": 300, "cache_dir": "cache"},
}


class NoChecksum:
    """Stands in the place of a checksum where a save is to be without."""

    def update(self, data: memoryview) -> None:
        """Take bytes."""

    def hexdigest(self) -> str:
        """Nothing."""
        return ""


def build_engine() -> PipelineEngine:
    """Engine of the GPT in this process, which has made a step."""
    config = parse_config({**GPT, "model": {**GPT["model"], "vocab_size": SHARED["data"]["vocab_size"]}})
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed asks for it.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    module = PipelineModule(build_layers(config), num_stages=1, loss_fn=language_model_loss, device="cpu")
    settings = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}
    engine, *_ = initialize(model=module, config=settings)
    tokens = torch.randint(SHARED["data"]["vocab_size"], (1, GPT["train"]["sequence_length"]))
    engine.train_batch(iter([(tokens, tokens)]))
    return engine


def measure_checksums(folder: Path) -> dict[str, list[float]]:
    """Seconds of the engine's saves and loads, with checksums and without, in turns."""
    engine = build_engine()
    variants = {"with": (Checksum, load_module._verify_share), "without": (NoChecksum, lambda *arguments: None)}
    times: dict[str, list[float]] = {}

    def measure(name: str, call: Callable[[str], object]) -> None:
        writer_module.Checksum, load_module._verify_share = variants[name]  # type: ignore[misc, assignment]
        began_s = time.perf_counter()
        call(str(folder / "with" if call == engine.load_checkpoint else folder / name))
        times.setdefault(f"{call.__name__.partition('_')[0]} {name}", []).append(time.perf_counter() - began_s)

    for index in range(ROUNDS):
        # In turns: whoever comes first finds other pages in memory.
        order = [*variants][:: -1 if index % 2 else 1]
        for name in order:
            os.sync()
            measure(name, engine.save_checkpoint)
        for name in order:
            for file in (folder / "with").rglob("*.safetensors"):
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
                    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            measure(name, engine.load_checkpoint)
    writer_module.Checksum, load_module._verify_share = variants["with"]  # type: ignore[misc]
    dist.destroy_process_group()
    return times


def start(folder: Path, config: dict[str, Any], run: str, *overrides: str) -> subprocess.Popen[str]:
    """Start a run in a session of its own."""
    (folder / "c.yaml").write_text(yaml.safe_dump({**SHARED, **config}))
    command = [sys.executable, "-m", "pipekit", "train", "c.yaml", f"run.dir=runs/{run}", *overrides]
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for the end of a run that must succeed, and return its output."""
    output, _ = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"a run ended with {process.returncode}:\n{output}")
    return output


def measure_async(folder: Path) -> dict[str, float]:
    """Wall time of runs that save at their end alone, and also on the way, at once or in the background."""
    finish(start(folder, GPT, "warm-up", "train.steps=1"))
    variants = {
        "end alone": [],
        "at once": [f"checkpoint.interval={INTERVAL}"],
        "in the background": [f"checkpoint.interval={INTERVAL}", "checkpoint.async=true"],
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(RUNS):
        for name in [*variants][index:] + [*variants][:index]:
            run = name.replace(" ", "-")
            os.sync()
            began_s = time.perf_counter()
            finish(start(folder, GPT, run, "checkpoint.keep=1", *variants[name]))
            times[name].append(time.perf_counter() - began_s)
            subprocess.run(["rm", "-r", folder / "runs" / run], check=True)
    return {name: statistics.median(values) for name, values in times.items()}


def kill_and_resume(folder: Path, draw: random.Random, num_kills: int, run: str, *overrides: str) -> dict[str, Any]:
    """Kill a run at random moments, start it again each time, and compare its losses with an undisturbed run's."""
    metrics = folder / "runs" / run / "metrics.jsonl"
    options = ["checkpoint.interval=1", "scheduler.decay_steps=1000", *overrides]
    checkpoints = folder / "runs" / run / "checkpoints"
    resumed, saving, steps = 0, 0, 0
    for index in range(num_kills):
        left = unfinished(checkpoints)
        process = start(folder, SMALL, run, *options)
        deadline = time.monotonic() + 120
        while (last_step(metrics) <= steps or not (checkpoints / "latest").exists()) and time.monotonic() < deadline:
            if process.poll() is not None:
                raise SystemExit(f"start {index + 1} of {run} failed:\n{process.communicate()[0]}")
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        wait_for_ranks(folder / "runs" / run)
        saving += bool(unfinished(checkpoints) - left)
        resumed += index > 0 and "going on after step" in output
        steps = last_step(metrics)
    process = start(folder, SMALL, run, *options, f"train.steps={steps + 5}")
    resumed += "going on after step" in finish(process)
    finish(start(folder, SMALL, f"{run}-whole", "scheduler.decay_steps=1000", f"train.steps={steps + 5}"))
    losses = [losses_of(folder / "runs" / name / "metrics.jsonl") for name in (run, f"{run}-whole")]
    command = [sys.executable, "-m", "pipekit", "checkpoints", f"runs/{run}", "--verify"]
    verified = subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 0
    return {
        "kills": num_kills,
        "during_a_save": saving,
        "resumed": resumed,
        "steps": steps + 5,
        "same_losses": losses[0] == losses[1],
        "verified": verified,
    }


def unfinished(checkpoints: Path) -> set[tuple[str, int]]:
    """Names and inodes of what a save that was interrupted has left in a folder of checkpoints."""
    if not checkpoints.is_dir():
        return set()
    found = [path for path in checkpoints.iterdir() if path.name.startswith(".")]
    latest = find_latest(checkpoints)
    found += [path for path in list_checkpoints(checkpoints) if latest is None or path.name > latest.name]
    return {(path.name, path.stat().st_ino) for path in found}


def wait_for_ranks(run: Path) -> None:
    """Wait until no rank of a killed run is left."""
    while any(str(run.name) in line for line in rank_lines()):
        time.sleep(0.05)


def rank_lines() -> list[str]:
    """Command lines of all ranks on this machine."""
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listing.splitlines() if "pipekit.launch.rank" in line]


def last_step(metrics: Path) -> int:
    """Last step in a file of metrics; 0 where there is none."""
    return max(losses_of(metrics), default=0)


def losses_of(metrics: Path) -> dict[int, float]:
    """Losses by step; a line that is cut short does not count."""
    losses = {}
    for line in metrics.read_text().splitlines() if metrics.is_file() else []:
        if line.endswith("}"):
            record = json.loads(line)
            losses[record["step"]] = record["loss"]
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("checksums", "async", "kills")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="what to measure; all unless given")
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="number of kills; %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; %(default)s")
    parser.add_argument(
        "--json", type=Path, default=Path("checkpoints.json"), metavar="PATH", help="file to write; %(default)s"
    )
    arguments = parser.parse_args()
    console = Console(highlight=False)
    table = Table("", "measured", "limit", "met")
    report: dict[str, Any] = {}
    is_met = []

    def require(name: str, measured: str, limit: str, met: bool) -> None:
        table.add_row(name, measured, limit, "yes" if met else "NO")
        is_met.append(met)

    with tempfile.TemporaryDirectory(dir=arguments.json.resolve().parent) as temporary:
        folder = Path(temporary)
        draw = random.Random(arguments.seed)
        words = [f"word{index}" for index in range(200)]
        (folder / "text.txt").write_text("\n".join(" ".join(draw.choices(words, k=8)) for _ in range(3000)))
        if "checksums" in arguments.parts:
            every = report["checksums_s"] = measure_checksums(folder)
            times = {name: statistics.median(values) for name, values in every.items()}
            for what in ("save", "load"):
                cost = times[f"{what} with"] / times[f"{what} without"] - 1
                shown = f"{100 * cost:+.1f} % ({times[f'{what} without']:.2f} s without)"
                require(f"checksums, {what}", shown, f"{100 * CHECKSUM_LIMIT:.0f} %", cost <= CHECKSUM_LIMIT)
        if "async" in arguments.parts:
            times = report["async_s"] = measure_async(folder)
            at_once, background = (times[name] - times["end alone"] for name in ("at once", "in the background"))
            shown = f"{background:.1f} s of {at_once:.1f} s, in runs of {times['end alone']:.0f} s"
            limit = f"{100 * ASYNC_LIMIT:.0f} %, at once at least {100 * LEAST_ADDED:.0f} % of a run"
            # What saves add must stand out from the noise of a run.
            met = at_once >= LEAST_ADDED * times["end alone"] and background <= ASYNC_LIMIT * at_once
            require("added in the background, over at once", shown, limit, met)
        if "kills" in arguments.parts:
            report["kills"] = {}
            for name, overrides in (("at-once", []), ("background", ["checkpoint.async=true"])):
                half = (arguments.kills + (name == "at-once")) // 2
                found = report["kills"][name] = kill_and_resume(folder, draw, half, name, *overrides)
                met = found["resumed"] == half and found["same_losses"] and found["verified"]
                losses = "same losses" if found["same_losses"] else "OTHER LOSSES"
                shown = f"{found['resumed']} resumed, {losses}; {found['during_a_save']} kills during a save"
                require(f"kills, saved {name}", shown, f"{half}", met)
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    console.print(table)
    console.print(f"{arguments.json} has the figures")
    sys.exit(0 if all(is_met) else 1)


if __name__ == "__main__":
    main()

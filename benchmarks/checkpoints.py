"""Checkpoints, measured: what checksums cost, what saves add to a run at once and in the background, and kills.

    python benchmarks/checkpoints.py [--parts checksums async kills] [--kills 50] [--seed 0] [--json checkpoints.json]

`checksums` lets an engine save and load a GPT of 200M parameters, 2.4 GB, with and without them, in turns, the files
dropped from the page cache before they are read; what they cost is the median of the ratios of neighbours, since the
disk's speed varies more. `async` trains the same GPT on one thread and saves it at once and in
the background, in turns. What a save adds to the training is the time in the save itself, and what the steps until the
checkpoint is written take above the median of the four undisturbed ones next to it; medians over the saves are
compared. `kills` kills (SIGKILL) a small run that saves after every step at random moments, half of them with
`checkpoint.async`, starts it again each time, and compares its losses with those of a run that nobody disturbed; kills
that left a save unfinished are counted. Prints a table and writes JSON; exits with 1 where a requirement is not met.
Twenty minutes in all.
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
from functools import partial
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
from pipekit.checkpoint.manifest import Checksum, TrainingState, find_latest, list_checkpoints
from pipekit.engine.save import SnapshotMemory, save_checkpoint
from pipekit.models import build_layers
from pipekit.models.transformer.head import language_model_loss

CHECKSUM_LIMIT, ASYNC_LIMIT = 0.10, 0.10
ROUNDS = 12
SAVES = 7
# So many tokens that a step is bound by computation, and not by the optimizer's memory traffic, which a save shares.
GPT_TOKENS = 256
GPT: dict[str, Any] = {"hidden_size": 1024, "num_layers": 16, "num_heads": 16, "max_positions": GPT_TOKENS}
SMALL: dict[str, Any] = {
    "model": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_positions": 32},
    "train": {
        "steps": 1_000_000,
        "global_batch_size": 4,
        "micro_batch_size": 1,
        "sequence_length": 32,
        "precision": "fp32",
        "eval_interval": None,
    },
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
    """Engine of the GPT in this process, on one thread, which has made a step."""
    torch.set_num_threads(1)
    model = {**GPT, "vocab_size": SHARED["data"]["vocab_size"]}
    config = parse_config({"model": model, "train": {"steps": 1, "sequence_length": GPT_TOKENS}})
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed asks for it.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    module = PipelineModule(build_layers(config), num_stages=1, loss_fn=language_model_loss, device="cpu")
    settings = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}
    engine, *_ = initialize(model=module, config=settings)
    train_step(engine)
    return engine


def train_step(engine: PipelineEngine) -> float:
    """Seconds of a step on random tokens."""
    tokens = torch.randint(SHARED["data"]["vocab_size"], (1, GPT_TOKENS))
    began_s = time.perf_counter()
    engine.train_batch(iter([(tokens, tokens)]))
    return time.perf_counter() - began_s


def measure_checksums(engine: PipelineEngine, folder: Path) -> dict[str, list[float]]:
    """Seconds of the engine's saves and loads, with checksums and without, in turns."""
    variants = {"with": (Checksum, load_module._verify_share), "without": (NoChecksum, lambda *arguments: None)}
    times: dict[str, list[float]] = {}

    def measure(name: str, call: Callable[[str], object]) -> None:
        writer_module.Checksum, load_module._verify_share = variants[name]  # type: ignore[misc, assignment]
        began_s = time.perf_counter()
        call(str(folder / "with" if call == engine.load_checkpoint else folder / name))
        times.setdefault(f"{call.__name__.partition('_')[0]} {name}", []).append(time.perf_counter() - began_s)

    for index in range(ROUNDS):
        engine.save_checkpoint(str(folder / "warm-up"))  # The first save after loads is slower, whichever it is.
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
    return times


def measure_async(engine: PipelineEngine, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Seconds of the calls, the steps until all is written, and undisturbed steps around, for each way to save."""
    training = TrainingState(step=1, consumed_samples=1, seed=0, lr=1e-4, optimizer={})
    save = partial(save_checkpoint, engine, folder, name="checkpoint", training=training, config_yaml="{}\n")
    variants = {"at once": None, "in the background": SnapshotMemory()}
    saves: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    undisturbed = [train_step(engine) for _ in range(2)]
    for index in range(SAVES + 1):
        for name in [*variants][:: -1 if index % 2 else 1]:
            began_s = time.perf_counter()
            pending = save(background=variants[name])
            call_s, steps = time.perf_counter() - began_s, []
            while not pending.is_done:
                steps.append(train_step(engine))
            pending.wait()
            os.sync()
            before, undisturbed = undisturbed, [train_step(engine) for _ in range(2)]
            saves[name].append({"call_s": call_s, "steps_s": steps, "undisturbed_steps_s": before + undisturbed})
    for each in saves.values():
        del each[0]  # The first save of each finds no earlier checkpoint, or no memory, that it could use again.
        for one in each:
            usual_s = statistics.median(one["undisturbed_steps_s"])
            one["added_s"] = one["call_s"] + sum(one["steps_s"]) - len(one["steps_s"]) * usual_s
    return saves


def start(folder: Path, run: str, *overrides: str) -> subprocess.Popen[str]:
    """Start a small run in a session of its own."""
    (folder / "c.yaml").write_text(yaml.safe_dump({**SHARED, **SMALL}))
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


def kill_and_resume(folder: Path, draw: random.Random, num_kills: int, run: str, *overrides: str) -> dict[str, Any]:
    """Kill a run at random moments, start it again each time, and compare its losses with an undisturbed run's."""
    metrics = folder / "runs" / run / "metrics.jsonl"
    options = ["checkpoint.interval=1", "scheduler.decay_steps=1000", *overrides]
    checkpoints = folder / "runs" / run / "checkpoints"
    resumed, saving, steps = 0, 0, 0
    for index in range(num_kills):
        left = unfinished(checkpoints)
        process = start(folder, run, *options)
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
    process = start(folder, run, *options, f"train.steps={steps + 5}")
    resumed += "going on after step" in finish(process)
    finish(start(folder, f"{run}-whole", "scheduler.decay_steps=1000", f"train.steps={steps + 5}"))
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
        engine = None if arguments.parts == ["kills"] else build_engine()
        if engine is not None and "checksums" in arguments.parts:
            every = report["checksums_s"] = measure_checksums(engine, folder)
            for what in ("save", "load"):
                checked_s, plain_s = every[f"{what} with"], every[f"{what} without"]
                cost = statistics.median(a / b for a, b in zip(checked_s, plain_s, strict=True)) - 1
                shown = f"{100 * cost:+.1f} % ({statistics.median(plain_s):.2f} s without)"
                require(f"checksums, {what}", shown, f"{100 * CHECKSUM_LIMIT:.0f} %", cost <= CHECKSUM_LIMIT)
        if engine is not None and "async" in arguments.parts:
            saves = report["async"] = measure_async(engine, folder / "async")
            at_once, background = (
                statistics.median(save["added_s"] for save in saves[name]) for name in ("at once", "in the background")
            )
            call_s = statistics.median(save["call_s"] for save in saves["in the background"])
            share = f"{background:.2f} s of {at_once:.2f} s; {call_s:.2f} s in the call"
            shown = f"{100 * background / at_once:.1f} % ({share})"
            limit, met = f"{100 * ASYNC_LIMIT:.0f} %", background <= ASYNC_LIMIT * at_once
            require("added by a background save", shown, limit, met)
        if engine is not None:
            dist.destroy_process_group()
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

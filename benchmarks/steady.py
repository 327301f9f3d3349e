"""A long run's memory, threads and open files: flat, for every process of it, from the first half to the second.

    python benchmarks/steady.py [--hours 2] [--pause 0] [--out steady.json]

Trains a small GPT on two stages and two replicas with `pipekit train`, with an evaluation every 20 steps and a
checkpoint every 50, and reads of each of its processes twice a minute the resident memory, the threads and the open
files. Compares the medians of the second half of the time with those of the first, without the first two minutes.
Prints a table and writes JSON; exits with 1 where one grows by more than 1 %.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

LIMIT = 0.01
SAMPLE_S = 30.0
WARM_UP_S = 120.0
QUANTITIES = ("resident_kb", "threads", "open_files")

# Leaves cores to whoever else works on the machine.
TRIAL = """
import os, time
from pipekit.training.language_model import LanguageModelTrial

class Paced(LanguageModelTrial):
    def learning_rate(self, step):
        time.sleep(float(os.environ["PAUSE_S"]))
        return super().learning_rate(step)
"""

CONFIG: dict[str, Any] = {
    "run": {"device": "cpu", "trial": "paced:Paced", "dir": "run"},
    "model": {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "max_positions": 32},
    "parallel": {"pp": 2, "dp": 2},
    "train": {
        "steps": 100_000_000,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "sequence_length": 32,
        "precision": "fp32",
        "eval_interval": 20,
        "eval_batches": 2,
    },
    "data": {"source": "text.txt", "vocab_size": 300, "cache_dir": "cache"},
    "checkpoint": {"interval": 50, "keep": 2},
}


def processes_of(session: str) -> dict[str, int]:
    """Process numbers of a run by role: the launcher, its watcher, and the ranks."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            environ = (entry / "environ").read_bytes().split(b"\0")
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if f"STEADY={session}".encode() not in environ:
            continue
        rank = next((word[5:].decode() for word in environ if word.startswith(b"RANK=")), None)
        if rank is None:
            found["watcher" if command.startswith("/bin/sh") else "launcher"] = int(entry.name)
        elif "pipekit.launch.rank" in command:
            found[f"rank {rank}"] = int(entry.name)
    return found


def measure(pid: int) -> dict[str, int]:
    status = Path(f"/proc/{pid}/status").read_text()
    number = {name: int(re.search(rf"^{name}:\s+(\d+)", status, re.MULTILINE)[1]) for name in ("VmRSS", "Threads")}  # type: ignore[index]
    return dict(zip(QUANTITIES, (number["VmRSS"], number["Threads"], len(os.listdir(f"/proc/{pid}/fd"))), strict=True))


def train(folder: Path, hours: float, pause_s: float) -> tuple[list[dict[str, Any]], int]:
    """Train for so long, and return the samples and the number of steps."""
    words = ["def", "return", "class", "import", "for", "in", "range", "print", "yield", "while"]
    lines = [" ".join(words[(i * j + i // 3) % len(words)] for j in range(1, 9)) for i in range(3000)]
    (folder / "text.txt").write_text("\n".join(lines))
    (folder / "paced.py").write_text(TRIAL)
    (folder / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    session = str(os.getpid())
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PAUSE_S": str(pause_s), "STEADY": session}
    command = [str(Path(sys.executable).with_name("pipekit")), "train", "c.yaml"]
    samples: list[dict[str, Any]] = []
    metrics = folder / "run/metrics.jsonl"
    stderr = folder / "stderr.txt"
    with stderr.open("w") as file:
        launcher = subprocess.Popen(command, cwd=folder, env=environ, stdout=subprocess.DEVNULL, stderr=file)
    try:
        while not metrics.is_file() or not metrics.stat().st_size:
            if launcher.poll() is not None:
                raise SystemExit(stderr.read_text())
            time.sleep(0.5)
        start_s = time.monotonic()
        processes = processes_of(session)
        while (now_s := time.monotonic() - start_s) < hours * 3600:
            if launcher.poll() is not None:
                raise SystemExit(stderr.read_text())
            samples.append({"time_s": now_s, **{name: measure(pid) for name, pid in processes.items()}})
            time.sleep(min(SAMPLE_S, hours * 3600 / 100))
        num_steps = json.loads(metrics.read_text().splitlines()[-1])["step"]
    finally:
        launcher.send_signal(signal.SIGTERM)
        launcher.wait()
    return samples, num_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between steps")
    parser.add_argument("--out", type=Path, default=Path("steady.json"), help="JSON file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        samples, num_steps = train(Path(name), arguments.hours, arguments.pause)
    end_s = samples[-1]["time_s"]
    halves = (
        [sample for sample in samples if min(WARM_UP_S, end_s / 10) <= sample["time_s"] < end_s / 2],
        [sample for sample in samples if sample["time_s"] >= end_s / 2],
    )
    table = Table("process", "quantity", "first half", "second half", "change")
    rows = []
    for process in sorted(samples[0].keys() - {"time_s"}):
        for quantity in QUANTITIES:
            first, second = (statistics.median(sample[process][quantity] for sample in half) for half in halves)
            rows.append({"process": process, "quantity": quantity, "first": first, "second": second})
            table.add_row(process, quantity, f"{first:,.0f}", f"{second:,.0f}", f"{second / first - 1:+.2%}")
    arguments.out.write_text(json.dumps({"steps": num_steps, "rows": rows, "samples": samples}, indent=1) + "\n")
    Console().print(table)
    print(f"{num_steps} steps in {end_s / 3600:.2f} hours")
    sys.exit(0 if all(row["second"] <= row["first"] * (1 + LIMIT) for row in rows) else 1)


if __name__ == "__main__":
    main()

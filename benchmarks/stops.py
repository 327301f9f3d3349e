"""Signals that ask a run to stop at random moments of a step, a save, an evaluation and the data's preparation.

    python benchmarks/stops.py [--rounds 10] [--seed N] [--out stops.json]

Trains a small GPT with `pipekit train` on two ranks, and sends SIGTERM, SIGINT or SIGUSR1 to the launcher at a random
time of the moment. Checks the exit code, that all has ended within 30 s, and that a whole checkpoint of the last
finished step is there; then starts the same command again, which must train every other step once, to losses bit for
bit those of an uninterrupted run. Prints the seed and a table, and writes JSON; exits with 1 where a check fails. A
round takes half a minute to a minute on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from pipekit.checkpoint.manifest import find_latest
from pipekit.checkpoint.overview import find_faults
from pipekit.errors import ExitCode

END_LIMIT_S = 30.0
START_LIMIT_S = 180.0
STEPS = 24
MOMENTS = ("step", "save", "evaluation", "preparation")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

# Notes by a file that a moment has come, on the last stage.
TRIAL = """
import os, time
from pathlib import Path
from pipekit.training.language_model import LanguageModelTrial

class Marking(LanguageModelTrial):
    num_evaluated = 0

    def learning_rate(self, step):
        if step == int(os.environ["STEP"]):
            Path(os.environ["MARKS"], "step").touch()
        time.sleep(0.05)
        return super().learning_rate(step)

    def validation_metrics(self):
        def slow(outputs, labels):
            Marking.num_evaluated += 1
            if Marking.num_evaluated > 16:  # those before any step
                Path(os.environ["MARKS"], "evaluation").touch()
            time.sleep(0.05)
            return 0.0

        return {"slow": slow}
"""

CONFIG: dict[str, Any] = {
    "run": {"dir": "run", "timeout_s": 60, "device": "cpu", "trial": "trial:Marking"},
    "model": {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "max_positions": 32, "dropout": 0.1},
    "parallel": {"pp": 2},
    "train": {
        "steps": STEPS,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "sequence_length": 32,
        "precision": "fp32",
        "eval_interval": 8,
        "eval_batches": 4,
    },
    "data": {"source": "text.txt", "vocab_size": 300, "cache_dir": "cache"},
    "checkpoint": {"interval": 4, "keep": None},
}


def prepare(folder: Path, *, lines: int) -> None:
    """Write what a run needs into a new folder."""
    (folder / "marks").mkdir(parents=True)
    words = ["def", "return", "class", "import", "for", "in", "range", "print", "yield", "while"]
    text = "\n".join(" ".join(words[(i * j + i // 3) % len(words)] for j in range(1, 9)) for i in range(lines))
    (folder / "text.txt").write_text(text)
    (folder / "trial.py").write_text(TRIAL)
    (folder / "c.yaml").write_text(yaml.safe_dump(CONFIG))


def start(folder: Path, step: int = 0) -> subprocess.Popen[str]:
    """Start the run of a folder."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "STEP": str(step), "MARKS": str(folder / "marks")}
    with (folder / "console.txt").open("a") as console:
        command = [sys.executable, "-m", "pipekit", "train", "c.yaml"]
        return subprocess.Popen(
            command, cwd=folder, env=environ, stdout=console, stderr=console, start_new_session=True, text=True
        )


def records(folder: Path) -> list[dict[str, Any]]:
    """Metrics of a run, in the order in which they were written."""
    path = folder / "run" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def losses(folder: Path) -> list[list[Any]]:
    """Step and loss of each step of a run."""
    return [[record["step"], record["loss"]] for record in records(folder) if "loss" in record]


def wait_for(process: subprocess.Popen[str], condition: Callable[[], object], limit_s: float) -> bool:
    """Wait for a condition; False where the process has ended or the time is up."""
    deadline_s = time.monotonic() + limit_s
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline_s:
            return False
        time.sleep(0.002)
    return True


def play(folder: Path, moment: str, whole: list[list[Any]], validations: int, rng: random.Random) -> dict[str, Any]:
    """Stop a run at a moment, go on, and return what was checked."""
    prepare(folder, lines=150_000 if moment == "preparation" else 3000)
    signum = rng.choice(SIGNALS)
    process = start(folder, step=rng.randrange(2, STEPS - 3))
    checkpoints, marks = folder / "run" / "checkpoints", folder / "marks"
    moments: dict[str, Callable[[], object]] = {
        "step": (marks / "step").exists,
        "evaluation": (marks / "evaluation").exists,
        "save": lambda: any(checkpoints.glob(".step-*.tmp")),
        "preparation": lambda: "tokenizer ..." in (folder / "console.txt").read_text(),
    }
    has_come = wait_for(process, moments[moment], START_LIMIT_S)
    time.sleep(rng.uniform(0, 0.1 if moment != "save" else 0.01))
    process.send_signal(signum)
    asked_s = time.monotonic()
    try:
        process.wait(START_LIMIT_S)
    finally:
        process.kill()
    ended_s = time.monotonic() - asked_s
    trained = [step for step, _ in losses(folder)]
    newest = find_latest(checkpoints)
    is_early = moment == "preparation"
    checks = {
        "the moment came": has_come,
        "exit code": process.returncode == (128 + signum if is_early else ExitCode.STOPPED),
        "in time": ended_s < END_LIMIT_S,
    }
    if is_early:
        checks["nothing saved"] = newest is None and not trained
    else:
        checks["last step saved"] = newest is not None and int(newest.name.rpartition("-")[2]) == trained[-1]
        checks["whole"] = newest is not None and not find_faults(newest)
        checks["nothing left"] = not [path for path in checkpoints.iterdir() if path.name.startswith(".")]
    again = start(folder)
    again.wait(START_LIMIT_S)
    checks["goes on"] = again.returncode == 0
    if not is_early:
        checks["losses equal"] = losses(folder) == whole
        checks["evaluations"] = sum("val_loss" in record for record in records(folder)) == validations
    return {
        "moment": moment,
        "signal": signum.name,
        "step": trained[-1] if trained else 0,
        "exit_code": process.returncode,
        "ended_s": ended_s,
        "checks": checks,
        "console": (folder / "console.txt").read_text().splitlines() if not all(checks.values()) else [],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="rounds of each moment; %(default)s")
    parser.add_argument("--moments", nargs="+", default=list(MOMENTS), choices=MOMENTS)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--out", type=Path, default=Path("stops.json"), help="JSON file to write; %(default)s")
    arguments = parser.parse_args()
    seed = secrets.randbelow(10**6) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    rng = random.Random(seed)
    # A shell has commands in the background ignore it, and theirs inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / "whole"
        prepare(whole, lines=3000)
        if start(whole).wait(START_LIMIT_S):
            raise SystemExit((whole / "console.txt").read_text())
        validations = sum("val_loss" in record for record in records(whole))
        for moment in arguments.moments:
            for number in range(arguments.rounds):
                folder = Path(name) / f"{moment}-{number}"
                rounds.append(play(folder, moment, losses(whole), validations, rng))
                sys.stderr.write(f"{json.dumps(rounds[-1])}\n")
    arguments.out.write_text(json.dumps({"seed": seed, "rounds": rounds}, indent=1) + "\n")
    table = Table("signal during", "rounds", "all held", "ended after (s)", "not held")
    for moment in arguments.moments:
        own = [entry for entry in rounds if entry["moment"] == moment]
        missed = [name for entry in own for name, held in entry["checks"].items() if not held]
        times = [entry["ended_s"] for entry in own]
        held = sum(all(entry["checks"].values()) for entry in own)
        span = f"{min(times):.1f} to {max(times):.1f}"
        table.add_row(moment, str(len(own)), str(held), span, ", ".join(sorted(set(missed))) or "-")
    Console().print(table)
    sys.exit(0 if all(all(entry["checks"].values()) for entry in rounds) else 1)


if __name__ == "__main__":
    main()

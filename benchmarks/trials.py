"""Trials, measured: what the loop costs around a `train_batch`, and how soon a plain Python session trains its first.

    python benchmarks/trials.py [--rounds N] [--json trials.json]

The loop's cost is what a batch takes whose `train_batch` returns two metrics at once and does nothing else, with a
callback of every event, reports every 100 batches and a validation every 250, over a plain loop that calls the same
function. The first batch is timed in a fresh interpreter, from before `import pipekit` on, over what importing torch
and DeepSpeed takes. Medians over the rounds. Prints a table and writes JSON; exits with 1 where a requirement is not
met. Two minutes in all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import pipekit

CALL_LIMIT_S, FIRST_BATCH_LIMIT_S = 0.2e-3, 8.0
SHORT, LONG = 200, 2200
IMPORTS = "import torch, deepspeed"
SESSION = """
import sys
sys.path.insert(0, sys.argv[1])
import pipekit
from trials import TinyTrial
context = pipekit.TrialContext.from_config({"run": {"dir": sys.argv[2], "device": "cpu"}})
trial = TinyTrial(context)
trial.train_batch(iter(trial.build_training_data_loader().get_data_loader(repeat=True)), 0, 0)
"""


class Numbers:
    """Samples `(1,)`."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((1,), float(index))


class TinyTrial(pipekit.Trial):
    """Trains one linear layer."""

    def __init__(self, context: pipekit.TrialContext) -> None:
        self.context = context
        model = nn.Linear(1, 1)
        config = {"train_micro_batch_size_per_gpu": 1, "steps_per_print": None}
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        self.engine = context.wrap_model_engine(pipekit.initialize(model=model, optimizer=optimizer, config=config)[0])

    def train_batch(self, dataloader_iter: Iterator[Any] | None, epoch_idx: int, batch_idx: int) -> Any:
        assert dataloader_iter is not None
        loss = self.engine(next(dataloader_iter)).square().mean()
        self.engine.backward(loss)
        self.engine.step()
        return loss

    def evaluate_batch(self, dataloader_iter: Iterator[Any] | None, batch_idx: int) -> dict[str, Any]:
        return {"error": 0.5}

    def build_training_data_loader(self) -> Any:
        return pipekit.DataLoader(Numbers(), batch_size=1, shuffle=True)

    def build_validation_data_loader(self) -> Any:
        return pipekit.DataLoader(Numbers(), batch_size=64)


class Heard(pipekit.TrialCallback):
    """Counts events."""

    def __init__(self) -> None:
        self.count = 0

    def note(self, *arguments: Any) -> None:
        self.count += 1

    on_training_workload_end = on_training_epoch_start = on_training_epoch_end = note
    on_validation_start = on_validation_end = on_training_start = on_trial_shutdown = note


class IdleTrial(TinyTrial):
    """Returns metrics, and trains nothing."""

    def train_batch(self, dataloader_iter: Iterator[Any] | None, epoch_idx: int, batch_idx: int) -> Any:
        return {"loss": 0.5, "accuracy": 1.0}

    def build_callbacks(self) -> dict[str, pipekit.TrialCallback]:
        return {"heard": Heard()}


def measure_loop(trial: IdleTrial) -> dict[str, float]:
    """Seconds of a batch in the loop, and of a bare call; what comes once in a training is in both lengths."""
    arguments: dict[str, Any] = {"checkpoint_policy": "none", "latest_checkpoint": "never"}
    arguments["validation_period"] = pipekit.Batch(250)
    times = []
    for length in (SHORT, LONG):
        began_s = time.perf_counter()
        pipekit.Trainer(trial, trial.context).fit(max_length=pipekit.Batch(length), **arguments)
        times.append(time.perf_counter() - began_s)
    began_s = time.perf_counter()
    for batch in range(LONG - SHORT):
        trial.train_batch(None, 0, batch)
    return {"loop": (times[1] - times[0]) / (LONG - SHORT), "bare": (time.perf_counter() - began_s) / (LONG - SHORT)}


def measure_session(folder: Path) -> dict[str, float]:
    """Seconds of a fresh interpreter until its first batch, and until torch and DeepSpeed are imported."""
    seconds = {}
    for name, code in (("first batch", SESSION), ("imports", IMPORTS)):
        began_s = time.perf_counter()
        command = [sys.executable, "-c", code, str(Path(__file__).parent), str(folder / "session")]
        subprocess.run(command, capture_output=True, check=True)
        seconds[name] = time.perf_counter() - began_s
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="rounds; %(default)s")
    parser.add_argument("--json", type=Path, default=Path("trials.json"), metavar="PATH", help="%(default)s")
    arguments = parser.parse_args()
    rounds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = {"run": {"dir": str(folder / "idle"), "device": "cpu"}, "callbacks": {"progress": False}}
        trial = IdleTrial(pipekit.TrialContext.from_config(config))
        measure_session(folder)  # files that are read for the first time
        for _ in range(arguments.rounds):
            for key, value in {**measure_loop(trial), **measure_session(folder)}.items():
                rounds.setdefault(key, []).append(value)
    median = {key: statistics.median(values) for key, values in rounds.items()}
    is_met = [
        median["loop"] - median["bare"] <= CALL_LIMIT_S,
        median["first batch"] <= FIRST_BATCH_LIMIT_S,
    ]
    table = Table("", "measured", "limit", "met")
    shown = f"{1e3 * median['loop']:.3f} ms, {1e3 * median['bare']:.4f} ms of it in the call"
    table.add_row("an idle batch", shown, f"{1e3 * CALL_LIMIT_S:.1f} ms", "yes" if is_met[0] else "NO")
    shown = f"{median['first batch']:.1f} s, {median['imports']:.1f} s of it imports of torch and DeepSpeed"
    table.add_row("a session's first batch", shown, f"{FIRST_BATCH_LIMIT_S:.0f} s", "yes" if is_met[1] else "NO")
    Console().print(table)
    arguments.json.write_text(json.dumps({"rounds_s": rounds, "medians_s": median}, indent=1) + "\n")
    print(f"{arguments.json} has the figures")
    sys.exit(not all(is_met))


if __name__ == "__main__":
    main()

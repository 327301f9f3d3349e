"""Test bench of faults: random ones at random moments of a run, what the run says of them, and its recovery.

    python tests/faults/bench.py [--faults 200] [--seed 0] [--jobs 2] [--kinds NAME ...] [--out faults.json]

Each round trains a small GPT under a random layout, lets one fault strike at a random moment, and starts the same
command again. It checks that the run ends in time, with the exit code and the words that belong to the fault, that no
checkpoint that was there before is lost, that no process, lock or shared memory is left, and that all losses, before
the fault and after the recovery, are bit for bit those of an uninterrupted run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

if __name__ == "__main__":
    sys.path[:1] = [str(Path(__file__).resolve().parents[number]) for number in (1, 2)]

import fork_server
from faults.kinds import KINDS, Kind, Round, losses_of, processes_of, wait_until

LAYOUTS = {
    "pp=2": {"pp": 2},
    "dp=2": {"dp": 2},
    "tp=2": {"tp": 2},
    "pp=2 x dp=2": {"pp": 2, "dp": 2},
    "pp=2 x tp=2": {"pp": 2, "tp": 2},
    "dp=2, ZeRO 3": {"dp": 2, "zero": 3},
}
CONFIG: dict[str, Any] = {
    "run": {"dir": "run", "device": "cpu", "trial": "faulty:Faulty"},
    "model": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_positions": 16, "dropout": 0.1},
    "train": {
        "steps": 16,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "sequence_length": 16,
        "precision": "fp32",
        "eval_interval": 5,
        "eval_batches": 2,
    },
    "data": {"source": "text.txt", "vocab_size": 280, "cache_dir": "cache"},
    "checkpoint": {"interval": 3, "keep": 2},
}
# Steps last long enough to be struck in the middle.
TRIAL = """
import math, os, signal, time
from pipekit.training.language_model import LanguageModelTrial

class Faulty(LanguageModelTrial):
    def learning_rate(self, step):
        time.sleep(0.03)
        kind, rank, at = os.environ.get("FAULT", "none:0:0").split(":")
        if (self.context.mpu.global_rank, step + 1) == (int(rank), int(at)):
            if kind == "crash":
                raise ZeroDivisionError("on purpose")
            if kind == "slow":
                time.sleep(2.0)
            if kind == "clock":
                original = time.time
                time.time = lambda: original() - 1e8
            if kind == "abort":
                os.abort()
        return super().learning_rate(step)
"""
# Of a machine that does much else. What comes early is not waited for.
END_LIMIT_S = 180.0
LEFT_LIMIT_S = 60.0


@dataclass
class Outcome:
    """Result of a round; `faults` are the checks that did not hold, none if all is well."""

    number: int
    kind: str
    layout: str
    seed: int
    faults: list[str] = field(default_factory=list)
    said: str = ""
    seconds: float = 0.0


class Bench:
    """Workspace of rounds, with the losses of uninterrupted runs."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self._losses: dict[str, list[float]] = {}

    def make_workspace(self, name: str, layout: str) -> Path:
        """A folder with a text, a trial and a configuration."""
        folder = self.folder / name
        folder.mkdir()
        words = ["def", "return", "class", "import", "for", "in", "range", "print", "yield", "while"]
        lines = [" ".join(words[(i * j + i // 3) % len(words)] for j in range(1, 9)) for i in range(1000)]
        (folder / "text.txt").write_text("\n".join(lines))
        (folder / "faulty.py").write_text(TRIAL)
        (folder / "c.yaml").write_text(yaml.safe_dump({**CONFIG, "parallel": LAYOUTS[layout]}))
        return folder

    def uninterrupted_losses(self, layout: str) -> list[float]:
        """Losses of all steps under a layout, without a fault."""
        if layout not in self._losses:
            folder = self.make_workspace(f"uninterrupted {layout}", layout)
            done = fork_server.run_pipekit(["train", "c.yaml"], cwd=folder)
            assert done.returncode == 0, done.stderr
            self._losses[layout] = losses_of(folder / "run")
            shutil.rmtree(folder)
        return self._losses[layout]

    def play(self, number: int, kind: Kind, layout: str) -> Outcome:
        """One round: a run, its fault, its recovery."""
        outcome = Outcome(number, kind.name, layout, self.seed)
        started_s = time.monotonic()
        folder = self.make_workspace(f"round {number}", layout)
        rng = random.Random(f"{self.seed} {number}")
        world_size = 4 if " x " in layout else 2
        rank, step = rng.randrange(world_size), rng.randint(1, CONFIG["train"]["steps"] - 1)
        own = Round(folder, rng, world_size=world_size, rank=rank, step=step)
        try:
            self._strike(own, kind, outcome)
            self._recover(own, kind, layout, outcome)
        except (TimeoutError, subprocess.TimeoutExpired, OSError) as error:
            outcome.faults.append(f"{type(error).__name__}: {error}")
        finally:
            kind.clean_up(own)
            for pid in processes_of(folder):
                os.kill(pid, 9)
            if not outcome.faults:
                shutil.rmtree(folder)
        outcome.seconds = time.monotonic() - started_s
        return outcome

    def _strike(self, own: Round, kind: Kind, outcome: Outcome) -> None:
        kind.prepare(own)
        own.start(*kind.overrides(own), environ=kind.environ(own))
        kind.strike(own)
        there = own.published()
        done = own.command.wait(END_LIMIT_S)
        outcome.said = done.stderr
        if done.returncode not in kind.ends:
            outcome.faults.append(f"exit code {done.returncode} instead of {sorted(kind.ends)}")
        words = kind.says.format(rank=own.rank, step=own.step)
        if done.returncode and not re.search(words, done.stderr + done.stdout, re.DOTALL):
            outcome.faults.append(f"does not say {words!r}")
        if "Traceback" in done.stderr and not kind.shows_traceback:
            outcome.faults.append("shows a traceback")
        self._check_nothing_left(own, outcome)
        lost = [name for name in there if not (own.run / "checkpoints" / name / "manifest.json").is_file()]
        newer = own.published()
        if lost and not (newer and max(newer) > max(lost)):
            outcome.faults.append(f"lost {', '.join(lost)}")

    def _recover(self, own: Round, kind: Kind, layout: str, outcome: Outcome) -> None:
        kind.mend(own)
        own.start()
        done = own.command.wait(END_LIMIT_S)
        if done.returncode != 0:
            outcome.faults.append(f"the second start ends with {done.returncode}")
            outcome.said += f"\n--- second start ---\n{done.stderr}"
            return
        self._check_nothing_left(own, outcome)
        if losses_of(own.run) != self.uninterrupted_losses(layout):
            outcome.faults.append("losses differ from an uninterrupted run's")
        leftovers = [path.name for path in (own.run / "checkpoints").iterdir() if path.name.startswith(".")]
        if leftovers:
            outcome.faults.append(f"left {', '.join(leftovers)}")

    def _check_nothing_left(self, own: Round, outcome: Outcome) -> None:
        try:
            wait_until(lambda: not processes_of(own.folder), "the end of all processes", LEFT_LIMIT_S)
        except TimeoutError:
            outcome.faults.append(f"left processes {processes_of(own.folder)}")
        temporary = [path.name for path in own.temporary.iterdir()]
        if temporary:
            outcome.faults.append(f"left temporary files {', '.join(temporary)}")


def run_rounds(
    folder: Path,
    *,
    num_faults: int,
    seed: int,
    jobs: int,
    kinds: Sequence[Kind],
    layouts: Sequence[str] = tuple(LAYOUTS),
) -> list[Outcome]:
    """Play rounds with faults of the kinds in turn, and return what came of them, in their order."""
    bench = Bench(folder, seed)
    rng = random.Random(seed)
    choices = [(kinds[number % len(kinds)], rng.choice(layouts)) for number in range(num_faults)]
    for layout in dict.fromkeys(layout for _, layout in choices):
        bench.uninterrupted_losses(layout)
    shared_memory = set(os.listdir("/dev/shm"))
    with ThreadPoolExecutor(jobs) as pool:
        outcomes = list(pool.map(lambda item: bench.play(item[0], *item[1]), enumerate(choices)))
    left = set(os.listdir("/dev/shm")) - shared_memory
    if left and (left := _unmapped(left)):
        outcomes[-1].faults.append(f"shared memory is left: {', '.join(sorted(left))}")
    return outcomes


def _unmapped(names: set[str]) -> set[str]:
    """Those of the names in shared memory that no living process has mapped; others belong to programs beside."""
    maps = []
    for path in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            maps.append(path.read_text())
    # By number: a semaphore is mapped under another name than that under which it lies there.
    mapped = set(re.findall(r" (\d+) +/dev/shm/", "".join(maps)))
    left = set()
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            if str(os.stat(f"/dev/shm/{name}").st_ino) not in mapped:
                left.add(name)
    return left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200, help="number of rounds")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10_000))
    parser.add_argument("--jobs", type=int, default=2, help="rounds at the same time")
    parser.add_argument("--kinds", nargs="+", choices=sorted(KINDS), metavar="NAME", help="leave out for all")
    parser.add_argument("--out", type=Path, default=Path("faults.json"), help="JSON file to write")
    arguments = parser.parse_args()
    kinds = [kind for name, kind in KINDS.items() if kind.is_possible() and name in (arguments.kinds or KINDS)]
    print(f"seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        outcomes = run_rounds(
            Path(name), num_faults=arguments.faults, seed=arguments.seed, jobs=arguments.jobs, kinds=kinds
        )
    fork_server.stop()
    arguments.out.write_text(json.dumps([vars(outcome) for outcome in outcomes], indent=1) + "\n")
    counts = Counter(outcome.kind for outcome in outcomes)
    print(f"{'fault':36}{'rounds':>8}{'all held':>10}{'seconds':>16}")
    for name, count in counts.items():
        own = [outcome for outcome in outcomes if outcome.kind == name]
        seconds = [outcome.seconds for outcome in own]
        held = sum(not outcome.faults for outcome in own)
        print(f"{name:36}{count:>8}{held:>10}{f'{min(seconds):.1f} to {max(seconds):.1f}':>16}")
    for outcome in outcomes:
        for fault in outcome.faults:
            print(f"round {outcome.number}, {outcome.kind}, {outcome.layout}: {fault}")
    print(f"{sum(not outcome.faults for outcome in outcomes)} of {len(outcomes)} rounds held, seed {arguments.seed}")
    sys.exit(1 if any(outcome.faults for outcome in outcomes) else 0)


if __name__ == "__main__":
    main()

"""Tuning against an exhaustive search: how good a configuration `pipekit tune` finds, and in how many runs.

    python benchmarks/tune.py [--models deep wide vocabulary] [--devices 2 4] [--rounds 3] [--out tune.json]

For each model and number of processes, all candidates are run once. Then the search runs, with measurements of its own
and a fifth as many runs as there are candidates. What it finds and the fastest eight of the exhaustive search are then
run in turns, `--rounds` times, so that what else the machine does falls on all of them alike; each one's time is the
least that was measured, and the choice is judged by these. Ranks are forks of a process that has imported all, which
train like new interpreters and start at once. Prints a table, writes JSON after each setting, and exits with 1 where a
choice is more than 5 % slower than the best, or took more than a fifth of the runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests"))
from rich.console import Console
from rich.table import Table

import preloaded  # noqa: F401  (before there is a second thread)
from forked_ranks import RankForker
from pipekit.commands.tune_session import TuneSession, open_session
from pipekit.config import Config, parse_config
from pipekit.launch import local
from pipekit.tune.candidates import list_candidates
from pipekit.tune.search import Search

MODELS: dict[str, dict[str, Any]] = {
    "deep": {"hidden_size": 64, "num_layers": 16, "num_heads": 4},
    "wide": {"hidden_size": 320, "num_layers": 2, "num_heads": 8},
    "vocabulary": {"hidden_size": 96, "num_layers": 4, "num_heads": 4, "vocab_size": 16384},
}
TOLERANCE, SHARE, FINALISTS, STEPS = 0.05, 5, 8, 24
# It is the slower one wherever memory is not short, and would double the candidates.
FIXED = ["train.activation_checkpointing=false"]


def configure(name: str, num_devices: int, folder: Path) -> Config:
    """Return the configuration of a model; the batch is such that there are 30 to 60 candidates."""
    return parse_config(
        {
            "run": {"dir": str(folder / "run"), "device": "cpu", "timeout_s": 60, "threads_per_process": 1},
            "model": {"max_positions": 64, **MODELS[name]},
            "train": {"steps": 100, "global_batch_size": 16 // num_devices, "sequence_length": 64, "precision": "fp32"},
            "data": {"source": str(folder / "text.txt"), "vocab_size": 300, "cache_dir": str(folder / "cache")},
        }
    )


def measure_again(session: TuneSession, times: dict[int, float], chosen: int | None, rounds: int) -> None:
    """Measure the fastest candidates and the chosen one in turns, and keep the fastest of each one's times."""
    finalists = sorted(times, key=times.__getitem__)[:FINALISTS]
    if chosen in times and chosen not in finalists:
        finalists.append(chosen)
    for _ in range(rounds):
        for index in finalists:
            again_s = session.measure(index).step_time_s
            if again_s is not None:
                times[index] = min(times[index], again_s)


def compare(name: str, num_devices: int, rounds: int, console: Console) -> dict[str, Any]:
    """Return how the search and the plan alone compare with an exhaustive search."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        words = ["def", "return", "class", "import", "for", "in", "range", "print", "yield", "while"]
        lines = (" ".join(words[(i * j + i // 3) % len(words)] for j in range(1, 9)) for i in range(1000))
        (folder / "text.txt").write_text("\n".join(lines))
        config = configure(name, num_devices, folder)
        options: dict[str, Any] = {"num_devices": num_devices, "max_tp": num_devices, "fixed": FIXED}
        with open_session(config, **options, num_steps=STEPS, limit_s=120.0, tell=lambda *_: None) as session:
            number = len(session.choices)
            console.print(f"{name}, {num_devices} processes: {number} candidates", highlight=False)
            search = Search(list_candidates(session.choices))
            started_s = time.perf_counter()
            exhaustive = [session.measure(index) for index in range(number)]
            exhaustive_s, started_s = time.perf_counter() - started_s, time.perf_counter()
            search.run(session.measure, most_runs=number // SHARE)
            search_s = time.perf_counter() - started_s
            times = {i: each.step_time_s for i, each in enumerate(exhaustive) if each.step_time_s is not None}
            chosen = search.best
            measure_again(session, times, chosen, rounds)
            best = min(times, key=times.__getitem__)
            planned = [choice.prediction.step_time_s for choice in session.choices]
            by_plan = min(times, key=planned.__getitem__)
            return {
                "model": name,
                "devices": num_devices,
                "candidates": number,
                "failures": [each.text for each in exhaustive if each.step_time_s is None],
                "best": str(session.choices[best].prediction.plan),
                "best_s": times[best],
                "median_s": sorted(times.values())[len(times) // 2],
                "worst_s": max(times.values()),
                "chosen": None if chosen is None else str(session.choices[chosen].prediction.plan),
                "chosen_over_best": None if chosen not in times else times[chosen] / times[best],
                "plan_over_best": times[by_plan] / times[best],
                "runs": len(search.results),
                "search_s": search_s,
                "exhaustive_s": exhaustive_s,
                "table": [
                    {
                        "candidate": str(choice.prediction.plan),
                        "planned_s": choice.prediction.step_time_s,
                        "measured_s": times.get(i),
                        "searched_s": search.results[i].step_time_s if i in search.results else None,
                    }
                    for i, choice in enumerate(session.choices)
                ],
            }


def is_good(row: dict[str, Any]) -> bool:
    """True if the search has found one of the best, in few enough runs."""
    ratio = row["chosen_over_best"]
    return ratio is not None and ratio <= 1 + TOLERANCE and row["runs"] * SHARE <= row["candidates"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="%(default)s")
    parser.add_argument("--devices", nargs="+", type=int, default=[2, 4], help="numbers of processes; %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="further runs of the fastest; %(default)s")
    parser.add_argument("--out", type=Path, default=Path("tune.json"), help="JSON file; %(default)s")
    arguments = parser.parse_args()
    RankForker().replace_popen_of(local)
    console, rows = Console(), list[dict[str, Any]]()
    for name in arguments.models:
        for num_devices in arguments.devices:
            rows.append(compare(name, num_devices, arguments.rounds, console))
            arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    titles = (
        "model",
        "processes",
        "candidates",
        "runs",
        "best",
        "chosen over best",
        "plan's over best",
        "time of both",
    )
    table = Table(*titles)
    for row in rows:
        ratio = row["chosen_over_best"]
        table.add_row(
            row["model"],
            str(row["devices"]),
            str(row["candidates"]),
            str(row["runs"]),
            f"{1000 * row['best_s']:.1f} ms",
            "failed" if ratio is None else f"{ratio:.3f}",
            f"{row['plan_over_best']:.3f}",
            f"{row['search_s']:.0f} s, {row['exhaustive_s']:.0f} s",
        )
    console.print(table)
    sys.exit(not all(map(is_good, rows)))


if __name__ == "__main__":
    main()

"""A newcomer's first steps, measured: how soon the command answers, how long the example takes and what it learns,
whether every layout gives the same losses, and whether the export is the model that was trained.

    python benchmarks/first_run.py [--out first_run.json] [--steps N]

Prints a table and writes JSON. On two cores without a GPU it takes about five minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = "examples/gpt_stdlib.yaml"
LAYOUTS = {
    "pp=1": ["parallel.pp=1"],
    "pp=2": ["parallel.pp=2"],
    "pp=4": ["parallel.pp=4"],
    "pp=2 x dp=2, ZeRO 1": ["parallel.pp=2", "parallel.dp=2", "parallel.zero=1"],
}
REPEATS = 5
PARITY_STEPS = 20


def pipekit(*arguments: str, expect: int = 0) -> tuple[float, str]:
    """Run a command and return its wall time in seconds and what it printed."""
    started_s = time.perf_counter()
    done = subprocess.run(
        [str(Path(sys.executable).with_name("pipekit")), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != expect:
        raise SystemExit(f"pipekit {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return time.perf_counter() - started_s, done.stdout + done.stderr


def read_metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def measure_answers() -> dict[str, float]:
    """Median seconds until help, and until a mistake in the configuration is shown."""
    help_s = statistics.median(pipekit("--help")[0] for _ in range(REPEATS))
    error_s = statistics.median(pipekit("train", EXAMPLE, "train.setps=1", expect=2)[0] for _ in range(REPEATS))
    return {"help_s": help_s, "config_error_s": error_s}


def measure_example(folder: Path, steps: int | None) -> dict[str, Any]:
    """Train the example, export it, and sample from it."""
    run = folder / "example"
    overrides = [] if steps is None else [f"train.steps={steps}"]
    train_s, _ = pipekit("train", EXAMPLE, f"run.dir={run}", *overrides)
    val_losses = [record["val_loss"] for record in read_metrics(run) if "val_loss" in record]
    export_s, _ = pipekit("export", str(run), str(folder / "export"))
    generate_s, text = pipekit("generate", str(folder / "export"), "--prompt", "def ", "--max-new-tokens", "40")
    check = json.loads((folder / "export" / "export_check.json").read_text())
    return {
        "train_s": train_s,
        "first_val_loss": val_losses[0],
        "last_val_loss": val_losses[-1],
        "val_loss_reduction": 1 - val_losses[-1] / val_losses[0],
        "export_s": export_s,
        "max_logit_difference": check["max_logit_difference"],
        "reference": check["reference"],
        "generate_s": generate_s,
        "sample": text,
    }


def measure_parity(folder: Path) -> dict[str, float]:
    """Largest relative difference of the first losses from those of one process, by layout and embedding."""
    differences = {}
    for tied in ("true", "false"):
        reference: list[float] = []
        for name, overrides in LAYOUTS.items():
            run = folder / f"{tied}-{name.replace(' ', '')}"
            pipekit(
                *("train", EXAMPLE, f"run.dir={run}", f"train.steps={PARITY_STEPS}", "train.precision=fp32"),
                *("train.eval_interval=null", "checkpoint.interval=null", f"model.tied_embedding={tied}", *overrides),
            )
            losses = [record["loss"] for record in read_metrics(run)]
            assert len(losses) == PARITY_STEPS
            reference = reference or losses
            label = f"{name}, {'tied' if tied == 'true' else 'untied'}"
            differences[label] = max(abs(a - b) / b for a, b in zip(losses, reference, strict=True))
    return differences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("first_run.json"), help="JSON file to write")
    parser.add_argument("--steps", type=int, help="steps of the example, in place of its own number")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results: dict[str, Any] = {
            "num_cpus": os.cpu_count(),
            **measure_answers(),
            **measure_example(folder, arguments.steps),
            "loss_difference": measure_parity(folder),
        }
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")

    table = Table("figure", "measured", "wanted", title=f"first run, {results['num_cpus']} cores")
    table.add_row("pipekit --help", f"{results['help_s']:.2f} s", "at most 0.5 s")
    table.add_row("a mistake in the configuration", f"{results['config_error_s']:.2f} s", "at most 1 s")
    table.add_row("training the example", f"{results['train_s']:.0f} s", "at most 360 s")
    drop = f"{results['first_val_loss']:.3f} → {results['last_val_loss']:.3f}, -{results['val_loss_reduction']:.0%}"
    table.add_row("held-out loss", drop, "down by a third")
    table.add_row(f"logits against {results['reference']}", f"{results['max_logit_difference']:.1e}", "at most 1e-5")
    for label, difference in results["loss_difference"].items():
        table.add_row(f"first {PARITY_STEPS} losses, {label}", f"{difference:.1e}", "at most 1e-4")
    Console().print(table)
    Console().print(f"{arguments.out} has the figures; a sample: {results['sample'].strip()[:200]!r}", highlight=False)


if __name__ == "__main__":
    main()

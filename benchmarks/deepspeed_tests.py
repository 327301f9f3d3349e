"""DeepSpeed's own tests of its pipeline, run on pipekit by changing their imports.

    git clone https://github.com/deepspeedai/DeepSpeed
    python benchmarks/deepspeed_tests.py DeepSpeed --out deepspeed_tests.json

Copies the tests of a checkout of DeepSpeed into a temporary folder, where `PipelineModule`, `LayerSpec` and
`initialize` are imported from pipekit, and runs those that train a pipeline, on four CPU processes at most. Prints a
table with the outcome of each, writes JSON, and exits with 1 if a test fails that is not listed here as different by
design.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

TESTS = ("unit/pipe/test_pipe_module.py", "unit/runtime/pipe/test_pipe.py", "unit/checkpoint/test_pipeline.py")
TIMEOUT_S = 1500

IMPORTS = (
    (r"from deepspeed\.(pipe|runtime\.pipe\.module) import", "from pipekit import"),
    (r"\bdeepspeed\.initialize\(", "__import__('pipekit').initialize("),
)
PICTURES = "torch.utils.data.TensorDataset(torch.randn(2048, 3, 32, 32), torch.arange(2048) % 10)"
# What no pipeline has to do with: keys that DeepSpeed does not know, and ignores; a generator that torch lacks on CPUs;
# pictures, which torchvision would draw; data that each rank draws otherwise, which pipekit refuses; and the names of
# sparse gradients, which DeepSpeed's own engine has no longer.
CORRECTIONS = (
    (r'"grandient_accumulation_steps": 1,', ""),
    (r" *config\['local_rank'\] = dist\.get_rank\(\)\n", ""),
    (r" *assert saved_model\.sparse_tensor_module_names.*\n", ""),
    (r"with get_accelerator\(\)\.random\(\)\.fork_rng\(.*\):", "with torch.random.fork_rng(devices=[]):"),
    (r"( +)trainset = cifar_trainset\(fp16=fp16\)", rf"\1trainset = {PICTURES}"),
    (r"( +)n_samples = 1024\n", r"\1n_samples = 1024\n\1torch.manual_seed(0)\n"),
    (r"( +)(data_loader = random_dataloader\(model=ds_model)", r"\1torch.manual_seed(0)\n\1\2"),
)
REENTRANT = "reads attributes of DeepSpeed's reentrant checkpointing"
# Tests that fail, the words with which they do, and the reason.
BY_DESIGN = {
    "test_set_checkpoint_interval": ("no attribute 'is_checkpointable_results'", REENTRANT),
    "test_setter_keeps_reentrant_input_grads": ("no attribute 'is_checkpointable_results_interval'", REENTRANT),
    "test_non_reentrant_checkpointing_does_not_need_input_grads": ("AssertionError", REENTRANT),
    "test_setter_honors_non_reentrant_when_the_config_disables_checkpointing": ("AssertionError", REENTRANT),
    "test_checkpoint_pipe_engine[0]": (
        "keys = step, step",
        "expects the count of updates in the state of one parameter alone, where FusedAdam keeps it; all have it",
    ),
    "test_checkpoint_pipe_engine[1]": ("fp16 is not supported", "fp16, which DeepSpeed refuses on CPUs"),
}


def copy_tests(source: Path, folder: Path) -> None:
    """Copy DeepSpeed's tests, with their imports changed."""
    shutil.copytree(source / "tests", folder, dirs_exist_ok=True)
    for path in folder.rglob("*.py"):
        text = changed = path.read_text(encoding="utf-8")
        for pattern, replacement in (*IMPORTS, *CORRECTIONS):
            changed = re.sub(pattern, replacement, changed)
        if changed != text:
            path.write_text(changed, encoding="utf-8")


def run_pytest(folder: Path, *arguments: str) -> str:
    """Run pytest in a folder; return its output."""
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "LOCAL_SIZE": "4",
        "OMP_NUM_THREADS": "1",
        "DS_UNITTEST_TIMEOUT": str(TIMEOUT_S // 3),
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-o",
        "addopts=",
        "--color=no",
        "-p",
        "no:xdist",
        "-W",
        "ignore",
        *arguments,
    ]
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
    ).stdout


def list_groups(folder: Path) -> Iterator[str]:
    """Classes of tests, and tests that stand alone."""
    for file in TESTS:
        for node in ast.parse((folder / file).read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name.lower().startswith("test"):
                yield f"{file}::{node.name}"


def run_tests(folder: Path) -> list[dict[str, str]]:
    """Run the tests, each group in a process of its own; return name, outcome and message of each."""
    results = []
    for group in list_groups(folder):
        report = folder / "report.xml"
        report.unlink(missing_ok=True)
        output = run_pytest(folder, f"--junitxml={report}", group)
        cases = list(xml.etree.ElementTree.parse(report).iter("testcase")) if report.is_file() else []
        found = [read_outcome(group, case) for case in cases if case.get("name")]
        # A group of which nothing is told has ended before its tests did.
        results += found or [{"test": group, "outcome": "failed", "message": output[-2000:]}]
        for result in found:
            print(result["outcome"], result["test"], flush=True)
    return results


def read_outcome(group: str, case: xml.etree.ElementTree.Element) -> dict[str, str]:
    """Return name, outcome and message of a test by its report."""
    name = "::".join(dict.fromkeys([*group.split("::")[1:], str(case.get("name"))]))
    marks = {child.tag: child.get("message", "") for child in case}
    outcome = "failed" if marks.keys() & {"failure", "error"} else "skipped" if "skipped" in marks else "passed"
    message = marks.get("failure") or marks.get("error") or marks.get("skipped") or ""
    for part, (words, reason) in BY_DESIGN.items():
        if outcome == "failed" and part in name and words in message:
            outcome, message = "by design", reason
    return {"test": name, "outcome": outcome, "message": " ".join(message.split())}


def main() -> None:
    """Run the tests, and write the table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("deepspeed", type=Path, help="checkout of DeepSpeed")
    parser.add_argument("--out", type=Path, help="file for the outcomes as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        copy_tests(arguments.deepspeed, Path(folder))
        results = run_tests(Path(folder))
    table = Table("test", "outcome", "reason")
    for result in results:
        table.add_row(result["test"], result["outcome"], result["message"][:200])
    Console().print(table)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    sys.exit(1 if any(result["outcome"] == "failed" for result in results) else 0)


if __name__ == "__main__":
    main()

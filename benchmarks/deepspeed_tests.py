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
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
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
# Tests that fail, the words with which they do, and the reason.
BY_DESIGN = {
    "TestPipeModuleCheckpointInterval": ("", "reads attributes of DeepSpeed's reentrant checkpointing"),
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


def run_tests(folder: Path) -> list[dict[str, str]]:
    """Run the tests; return name, outcome and message of each."""
    report = folder / "report.xml"
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "LOCAL_SIZE": "4",
        "OMP_NUM_THREADS": "1",
        "DS_UNITTEST_TIMEOUT": str(TIMEOUT_S // 3),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-W", "ignore", f"--junitxml={report}", *TESTS]
    with (folder / "output.txt").open("w") as output:
        subprocess.run(command, cwd=folder, env=environment, stdout=output, stderr=output, timeout=TIMEOUT_S)
    if not report.is_file():
        sys.exit((folder / "output.txt").read_text()[-3000:])
    results = []
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        marks = {child.tag: child.get("message", "") for child in case}
        outcome = "failed" if marks.keys() & {"failure", "error"} else "skipped" if "skipped" in marks else "passed"
        message = marks.get("failure") or marks.get("error") or marks.get("skipped") or ""
        for part, (words, reason) in BY_DESIGN.items():
            if outcome == "failed" and part in name and words in message:
                outcome, message = "by design", reason
        results.append({"test": name, "outcome": outcome, "message": " ".join(message.split())})
    return results


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

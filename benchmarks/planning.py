"""Predictions and partitions, measured: the steps that the planner foresees, and what a cut by time is worth.

    python benchmarks/planning.py [--predictions] [--partitions] [--rounds N] [--quick] [--json PATH]

`--predictions` compares the step time that `pipekit plan` predicts with the measured one: of emulated devices, four
ranks whose layers sleep for their time in place of computing it, and of a GPT on two ranks of one thread each. What
each layer costs is measured beforehand in one process alone, and nothing else is known of the machine but the `cpu` of
the table of devices. Stages are cut as `partition: profile` cuts them.

`--partitions` trains a GPT whose head costs as much as several of its blocks, which an even cut by parameters or by
layers puts all on the last rank: our engine with `profile`, and with `parameters` and `uniform` to show what the cut
alone brings, against raw DeepSpeed's `PipelineEngine` with its own `parameters` and `uniform`, all under 1F1B.

Without either, both are run. All contenders of a setting take turns, each with the machine for itself; a step takes
from the first rank's begin to the last rank's end, and each figure is the median over the rounds. Prints tables and
writes JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pipekit.partitioners import partition
from pipelines.command import describe_machine, make_console, start_pool
from pipelines.jobs import find_deepspeed_boundaries, profile, run_setting
from pipelines.plan_report import (
    Compared,
    check_partitions,
    check_predictions,
    layer_table,
    partition_json,
    partition_table,
    prediction_json,
    prediction_table,
)
from pipelines.profiled import ProfiledModel
from pipelines.ranks import RankPool
from pipelines.report import requirement_json, requirement_table
from pipelines.requirements import Requirement
from pipelines.settings import (
    BIG_VOCABULARY,
    EMULATED_SETTINGS,
    GPT_SETTINGS,
    EmulatedSetting,
    GPTSetting,
    Setting,
    plan_table,
)
from pipelines.turns import Contender, Results

EMULATED_SCHEDULES = ("1f1b", "interleaved-1f1b", "zb-h1", "zb-v")
GPT_SCHEDULES = ("1f1b", "zb-h1")
PREDICTED_SETTINGS: tuple[Setting, ...] = (EMULATED_SETTINGS[0], *GPT_SETTINGS)
DEEPSPEED_PARTITIONS = ("parameters", "uniform")
OUR_PARTITIONS = ("profile", *DEEPSPEED_PARTITIONS)
ROUNDS = 5
QUICK_ROUNDS = 2


def plan_contender(setting: Setting, schedule: str, model: ProfiledModel, *, method: str = "profile") -> Contender:
    """Return our engine under a schedule, cut by one of our partitions."""
    table = plan_table(schedule, pp=setting.pp, num_micro_batches=setting.num_micro_batches)
    boundaries = tuple(partition(method, model.partition_inputs(setting, table), table.num_stages))
    return Contender("pipekit", schedule, method, boundaries, table)


def measure_predictions(pool: RankPool, setting: Setting, rounds: int) -> list[Compared]:
    """Return what the planner foresaw of a setting, and what was measured."""
    model: ProfiledModel = pool.run(1, profile, setting)[0]
    schedules = EMULATED_SCHEDULES if isinstance(setting, EmulatedSetting) else GPT_SCHEDULES
    order = [plan_contender(setting, schedule, model) for schedule in schedules]
    predictions = [model.predict(setting, contender.schedule, contender.boundaries) for contender in order]
    results = run_setting(pool, setting, order, rounds)
    return [
        Compared(contender, prediction, results[contender])
        for contender, prediction in zip(order, predictions, strict=True)
    ]


def measure_partitions(
    pool: RankPool, setting: GPTSetting, model: ProfiledModel, rounds: int
) -> tuple[Results, dict[Contender, tuple[int, ...]]]:
    """Return what each partition was measured at, DeepSpeed's and ours, and the boundaries that each chose."""
    chosen = pool.run(setting.pp, find_deepspeed_boundaries, setting, DEEPSPEED_PARTITIONS)[0]
    theirs = [Contender("DeepSpeed", "1f1b", method) for method in DEEPSPEED_PARTITIONS]
    ours = [plan_contender(setting, "1f1b", model, method=method) for method in OUR_PARTITIONS]
    boundaries = {**dict(zip(theirs, chosen, strict=True)), **{contender: contender.boundaries for contender in ours}}
    return run_setting(pool, setting, [*theirs, *ours], rounds), boundaries


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictions", action="store_true", help="compare predictions only")
    parser.add_argument("--partitions", action="store_true", help="compare partitions only")
    parser.add_argument("--rounds", type=int, metavar="N", help=f"rounds of each setting; {ROUNDS} unless given")
    parser.add_argument("--quick", action="store_true", help=f"leave bf16 out, {QUICK_ROUNDS} rounds")
    parser.add_argument(
        "--json", type=Path, default=Path("planning.json"), metavar="PATH", help="file to write; %(default)s"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    both = arguments.predictions == arguments.partitions
    report: dict[str, Any] = {"machine": describe_machine(), "rounds": rounds, "predictions": [], "partitions": []}
    requirements: list[Requirement] = []

    def write() -> None:
        report["requirements"] = [requirement_json(requirement) for requirement in requirements]
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")

    console = make_console()
    with start_pool(console) as (pool, status):
        for setting in PREDICTED_SETTINGS[: 2 if arguments.quick else None] if both or arguments.predictions else ():
            status.update(f"{setting}")
            compared = measure_predictions(pool, setting, rounds)
            console.print(prediction_table(setting, compared))
            requirements += check_predictions(setting, compared)
            report["predictions"].append(prediction_json(setting, compared))
            write()
        if both or arguments.partitions:
            setting = BIG_VOCABULARY
            status.update(f"{setting}")
            model: ProfiledModel = pool.run(1, profile, setting)[0]
            console.print(layer_table(setting, model))
            results, boundaries = measure_partitions(pool, setting, model, rounds)
            console.print(partition_table(setting, results, boundaries))
            requirements += check_partitions(setting, results)
            report["partitions"].append(partition_json(setting, model, results, boundaries))
            write()
    console.print(requirement_table(requirements))
    console.print(f"{arguments.json} has the figures", highlight=False)


if __name__ == "__main__":
    main()

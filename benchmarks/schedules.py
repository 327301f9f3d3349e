"""Pipeline schedules, measured: ours against DeepSpeed's `PipelineEngine` and `torch.distributed.pipelining`'s.

    python benchmarks/schedules.py [--emulated] [--gpt] [--rounds N] [--settings NAME ...] [--schedules NAME ...]
                                   [--quick] [--json PATH]

`--emulated` runs pipelines of four and of eight ranks whose layers sleep for their time in place of computing it, so
that they measure truly on a few cores. Efficiency is the share of the step in which a rank's layers sleep. The
simulator is given the times of the layers, and those of a message and of what an action takes beside them, which are
calibrated on 1F1B beforehand.

`--gpt` trains a GPT on two ranks of one thread each. Efficiency is the share of the limit in the step, and the limit is
what the same layers take when each rank does its stage's forwards and backwards beside the other, with nothing to send,
nobody to wait for and no update: the mean over the ranks, for their most even cut.

Without either, both are run. All contenders of a setting take turns, each with the machine for itself; a step takes
from the first rank's begin to the last rank's end, and each figure is the median over the rounds. Those of the GPT that
are not ours live in processes of their own: our engine sets how the C library of its process keeps memory, and theirs
do not. The limit lives with ours. Prints tables and writes JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pipekit.schedules import SCHEDULE_NAMES
from pipelines.command import describe_machine, make_console, start_pool
from pipelines.jobs import calibrate, run_setting
from pipelines.report import requirement_json, requirement_table, setting_json, setting_table
from pipelines.requirements import Requirement, check
from pipelines.settings import EMULATED_SETTINGS, GPT_SETTINGS, SETTINGS, EmulatedSetting, Setting
from pipelines.turns import Contender

EMULATED_SCHEDULES = (*SCHEDULE_NAMES, "auto:2", "auto:2:2")
GPT_SCHEDULES = ("zb-h1", "zb-v", "auto:1:2")
ROUNDS = 5
QUICK_ROUNDS = 2


def choose_settings(arguments: argparse.Namespace) -> list[Setting]:
    """Return the settings that the options ask for."""
    neither = not (arguments.emulated or arguments.gpt)
    chosen: list[Setting] = []
    if arguments.emulated or neither:
        chosen += EMULATED_SETTINGS[:1] if arguments.quick else EMULATED_SETTINGS
    if arguments.gpt or neither:
        chosen += GPT_SETTINGS[:1] if arguments.quick else GPT_SETTINGS
    if arguments.settings:
        return [setting for setting in SETTINGS if setting.name in arguments.settings]
    return chosen


def choose_contenders(setting: Setting, arguments: argparse.Namespace) -> list[Contender]:
    """Return who takes part in a setting."""
    if isinstance(setting, EmulatedSetting):
        return setting.contenders(arguments.schedules or EMULATED_SCHEDULES)
    return setting.contenders(arguments.schedules or GPT_SCHEDULES, num_cuts=1 if arguments.quick else None)


def parse_arguments() -> argparse.Namespace:
    settings = [setting.name for setting in SETTINGS]
    schedules = list(dict.fromkeys((*EMULATED_SCHEDULES, *GPT_SCHEDULES)))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emulated", action="store_true", help="run the emulated devices only")
    parser.add_argument("--gpt", action="store_true", help="run the GPT only")
    parser.add_argument("--rounds", type=int, metavar="N", help=f"rounds of each setting; {ROUNDS} unless given")
    parser.add_argument(
        "--settings", nargs="+", choices=settings, metavar="NAME", help=f"run these only, of {', '.join(settings)}"
    )
    parser.add_argument(
        "--schedules",
        nargs="+",
        metavar="NAME",
        help=f"run ours with these only, of {', '.join(schedules)}; auto:2 puts two stages on each "
        "rank, and auto:2:2 lets it hold twice the activations that 1F1B does",
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"one setting of each kind, one cut, {QUICK_ROUNDS} rounds"
    )
    parser.add_argument(
        "--json", type=Path, default=Path("schedules.json"), metavar="PATH", help="file to write; %(default)s"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    report: dict[str, Any] = {"machine": describe_machine(), "rounds": rounds, "settings": []}
    requirements: list[Requirement] = []
    console = make_console()
    with start_pool(console) as (pool, status):
        for setting in choose_settings(arguments):
            status.update(f"{setting}")
            if isinstance(setting, EmulatedSetting):
                setting = setting.calibrated(pool.run(setting.pp, calibrate, setting)[0])
            order = choose_contenders(setting, arguments)
            results = run_setting(pool, setting, order, rounds)
            console.print(setting_table(setting, results))
            requirements += check(setting, results)
            report["settings"].append(setting_json(setting, results))
            report["requirements"] = [requirement_json(requirement) for requirement in requirements]
            arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    console.print(requirement_table(requirements))
    console.print(f"{arguments.json} has the figures", highlight=False)


if __name__ == "__main__":
    main()

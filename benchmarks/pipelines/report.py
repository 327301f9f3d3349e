"""Tables for the terminal, and the same as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from pipelines.requirements import Requirement, limit_s
from pipelines.settings import GPTSetting, Setting
from pipelines.turns import Contender, Result, Results, fastest, of_system


def ratios(setting: Setting, results: Results, contender: Contender) -> dict[str, float]:
    """Return how a contender compares: with the peers' best, with the ideal, and with our simulator."""
    step_s = results[contender].step_s
    found = {
        "speedup_over_deepspeed": fastest(of_system(results, "DeepSpeed"))[1].step_s / step_s,
        "speedup_over_torch": fastest(of_system(results, "torch"))[1].step_s / step_s,
    }
    if isinstance(setting, GPTSetting):
        return {**found, "efficiency": limit_s(results) / step_s}
    found["efficiency"] = setting.work_s / step_s
    if contender.table is not None:
        found["simulated_s"] = setting.simulated_s(contender)
        found["measured_over_simulated"] = step_s / found["simulated_s"]
    return found


def setting_table(setting: Setting, results: Results) -> Table:
    """Return what was measured in a setting, a row for each contender."""
    table = Table("", "schedule", "cut", "step", "over DeepSpeed", "over torch", "efficiency", title=str(setting))
    is_gpt = isinstance(setting, GPTSetting)
    for column in ("loss",) if is_gpt else ("simulated", "measured/simulated"):
        table.add_column(column)
    for contender, result in results.items():
        names = contender.system, contender.schedule, contender.partition
        if contender.system == "limit":
            table.add_row(*names, "ranks " + " ".join(f"{seconds:.3f}" for seconds in result.ranks_s) + " s")
            continue
        found = ratios(setting, results, contender)
        cells = [f"{result.step_s:.3f} s"]
        cells += [f"{found[key]:.2f}x" for key in ("speedup_over_deepspeed", "speedup_over_torch")]
        cells.append(f"{found['efficiency']:.3f}")
        if is_gpt:
            cells.append("" if result.loss is None else f"{result.loss:.4f}")
        elif "simulated_s" in found:
            cells += [f"{found['simulated_s']:.3f} s", f"{found['measured_over_simulated']:.3f}"]
        table.add_row(*names, *cells)
    return table


def requirement_table(requirements: Sequence[Requirement]) -> Table:
    """Return what is asked, a row for each figure."""
    table = Table("setting", "figure", "measured", "wanted", "", title="what is asked")
    for requirement in requirements:
        wanted = f"at {'least' if requirement.at_least else 'most'} {requirement.wanted:.2f}"
        mark = "[green]met[/]" if requirement.is_met else "[red]missed[/]"
        table.add_row(requirement.setting, requirement.what, f"{requirement.measured:.3f}", wanted, mark)
    return table


def setting_json(setting: Setting, results: Results) -> dict[str, Any]:
    """Return every time and every ratio of a setting."""

    def entry(contender: Contender, result: Result) -> dict[str, Any]:
        names = {"system": contender.system, "schedule": contender.schedule, "cut": contender.partition}
        compared = {} if contender.system == "limit" else ratios(setting, results, contender)
        return {**names, "step_s": result.step_s, **compared, **asdict(result)}

    ideal_s = limit_s(results) if isinstance(setting, GPTSetting) else setting.work_s
    contenders = [entry(contender, result) for contender, result in results.items()]
    return {"setting": setting.name, "title": str(setting), "ideal_s": ideal_s, "contenders": contenders}


def requirement_json(requirement: Requirement) -> dict[str, Any]:
    """Return a requirement and whether it is met."""
    return {**asdict(requirement), "is_met": requirement.is_met}

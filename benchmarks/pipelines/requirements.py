"""Requirements of our schedules, and whether they are met."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipelines.settings import EmulatedSetting, GPTSetting, Setting
from pipelines.turns import Contender, Results, fastest, of_system

ZB_H1_SPEEDUP = {4: 1.20, 8: 1.22}
"""Over DeepSpeed on emulated devices, by the number of ranks, as is the next."""
BEST_SPEEDUP = {4: 1.30, 8: 1.35}
BEST_SPEEDUP_OVER_TORCH = {4: 1.06, 8: 1.10}
"""Over the best of torch's schedules on emulated devices, zero-bubble ones among them."""
ONE_F_ONE_B_SPEEDUP = 1.0
SIMULATION_ERROR = {0.05: 0.03, 0.02: 0.06}
"""Largest difference of a measured step from the simulated one, by the seconds of a forward."""
GPT_SPEEDUP = {"DeepSpeed": 1.15, "torch": 1.06, "limit": 0.92}
"""Over the best of each, and the share of the limit's speed."""


@dataclass(frozen=True)
class Requirement:
    """A figure and what it must reach.

    Attributes:
        setting: where it was measured.
        what: the figure.
        measured: its value.
        wanted: the bound.
        at_least: whether the bound is a lower one.
    """

    setting: str
    what: str
    measured: float
    wanted: float
    at_least: bool = True

    @property
    def is_met(self) -> bool:
        """True if the bound holds."""
        return self.measured >= self.wanted if self.at_least else self.measured <= self.wanted


def check(setting: Setting, results: Results) -> list[Requirement]:
    """Return what is asked of our schedules in a setting, as far as they were run."""
    if not of_system(results, "pipekit"):
        return []
    return list(_check_gpt(setting, results) if isinstance(setting, GPTSetting) else _check_emulated(setting, results))


def _check_emulated(setting: EmulatedSetting, results: Results) -> Iterator[Requirement]:
    name, ours = str(setting), of_system(results, "pipekit")
    peer_s = fastest(of_system(results, "DeepSpeed"))[1].step_s
    for contender, result in ours.items():
        wanted = {"1f1b": ONE_F_ONE_B_SPEEDUP, "zb-h1": ZB_H1_SPEEDUP[setting.pp]}.get(contender.schedule)
        if wanted is not None:
            yield Requirement(name, f"{contender.schedule}: speed over DeepSpeed", peer_s / result.step_s, wanted)
    best, result = fastest(ours)
    what = f"best, {best.schedule}: speed over DeepSpeed"
    yield Requirement(name, what, peer_s / result.step_s, BEST_SPEEDUP[setting.pp])
    torch_best, torch_result = fastest(of_system(results, "torch"))
    what = f"best, {best.schedule}: speed over torch's {torch_best.schedule}"
    yield Requirement(name, what, torch_result.step_s / result.step_s, BEST_SPEEDUP_OVER_TORCH[setting.pp])

    def error(contender: Contender) -> float:
        return abs(ours[contender].step_s / setting.simulated_s(contender) - 1)

    worst = max(ours, key=error)
    what = f"worst, {worst.schedule}: measured off simulated"
    yield Requirement(name, what, error(worst), SIMULATION_ERROR[setting.forward_s], at_least=False)


def _check_gpt(setting: GPTSetting, results: Results) -> Iterator[Requirement]:
    best, ours = fastest(of_system(results, "pipekit"))
    times_s = {
        "DeepSpeed": fastest(of_system(results, "DeepSpeed"))[1].step_s,
        "torch": fastest(of_system(results, "torch"))[1].step_s,
        "limit": limit_s(results),
    }
    for name, wanted in GPT_SPEEDUP.items():
        figure = "share of the limit" if name == "limit" else f"speed over {name}"
        what = f"best, {best.schedule} cut {best.partition}: {figure}"
        yield Requirement(str(setting), what, times_s[name] / ours.step_s, wanted)


def limit_s(results: Results) -> float:
    """Return the mean of the ranks' own times without a pipeline."""
    (limit,) = of_system(results, "limit").values()
    return sum(limit.ranks_s) / len(limit.ranks_s)

"""Tables to test with: every generator at random sizes, and a simulation that shares no code with the library's."""

from __future__ import annotations

from hypothesis import strategies as st

from pipekit.schedules import (
    Action,
    Schedule,
    plan_1f1b,
    plan_gpipe,
    plan_interleaved_1f1b,
    plan_zb_h1,
    plan_zb_v,
)

NAMES = ("gpipe", "1f1b", "interleaved-1f1b", "zb-h1", "zb-v")


def plan(name: str, pp: int, num_micro_batches: int) -> Schedule:
    """Return a generator's table; interleaved 1F1B gets `num_micro_batches` groups."""
    if name == "interleaved-1f1b":
        return plan_interleaved_1f1b(pp=pp, stages_per_rank=2, num_micro_batches=pp * num_micro_batches)
    if name == "zb-v":
        return plan_zb_v(pp=pp, num_micro_batches=num_micro_batches)
    planner = {"gpipe": plan_gpipe, "1f1b": plan_1f1b, "zb-h1": plan_zb_h1}[name]
    return planner(num_stages=pp, num_micro_batches=num_micro_batches)


schedules = st.builds(plan, st.sampled_from(NAMES), st.integers(1, 6), st.integers(1, 8))


def rank_of(schedule: Schedule) -> dict[int, int]:
    return {action.stage: rank for rank, actions in enumerate(schedule.ranks) for action in actions}


def longest_path_s(schedule: Schedule, seconds: dict[str, float], transfer_s: float) -> float | None:
    """Return when the last action ends, by going over the whole table again and again; None where it never does."""
    ranks = rank_of(schedule)
    last = max(ranks)
    ends: dict[str, float] = {}
    moved = True
    while moved:
        moved = False
        for actions in schedule.ranks:
            free_s = 0.0
            for action in actions:
                if str(action) not in ends:
                    begins = [free_s]
                    for stage, kinds in needed(action, last):
                        found = [ends[key] for kind in kinds if (key := f"{stage}{kind}{action.micro_batch}") in ends]
                        if not found:
                            break
                        crosses = ranks[stage] != ranks[action.stage]
                        begins.append(found[0] + (transfer_s if crosses else 0.0))
                    else:
                        ends[str(action)] = max(begins) + seconds[action.kind]
                        moved = True
                if str(action) not in ends:
                    break
                free_s = ends[str(action)]
    if any(str(action) not in ends for actions in schedule.ranks for action in actions):
        return None
    return max(ends.values())


def needed(action: Action, last_stage: int) -> list[tuple[int, str]]:
    if action.kind == "F":
        return [(action.stage - 1, "F")] if action.stage else []
    if action.kind == "W":
        return [(action.stage, "I")]
    return [(action.stage, "F")] + ([(action.stage + 1, "BI")] if action.stage < last_stage else [])

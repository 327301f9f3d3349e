"""Tables to test with: every generator at random sizes, and a simulation that shares no code with the library's."""

from __future__ import annotations

from collections import Counter

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
from pipekit.schedules.dependencies import needs
from pipekit.schedules.messages import plan_messages
from pipekit.schedules.operations import Operation

Rows = list[list[Operation]]

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


def post_ahead(schedule: Schedule, ahead: int) -> Rows:
    """Operations that post `ahead` receives from each peer before their use, which hang over NCCL in many tables."""
    rows: Rows = []
    messages = plan_messages(schedule)
    target_of = {action: target for (_, target), sent in messages.items() for action in sent}
    for rank, actions in enumerate(schedule.ranks):
        row: list[Operation] = []
        unposted = {source: list(sent) for (source, target), sent in messages.items() if target == rank}
        posted: Counter[int] = Counter()

        def post(source: int, limit: int, row: list[Operation] = row, posted: Counter[int] = posted,
                 unposted: dict[int, list[object]] = unposted) -> None:  # type: ignore[assignment]  # fmt: skip
            while unposted[source] and posted[source] < limit:
                row.append(Operation("post", unposted[source].pop(0), source))  # type: ignore[arg-type]
                posted[source] += 1

        for source in unposted:
            post(source, ahead)
        for action in actions:
            for other in needs(action, schedule):
                source = schedule.placement[other.stage]
                if source == rank:
                    continue
                while not any(each.kind == "post" and each.action == other for each in row):
                    post(source, posted[source] + 1)
                row.append(Operation("receive", other, source))
                posted[source] -= 1
                post(source, ahead)
            row.append(Operation("run", action))
            if action in target_of:
                row.append(Operation("send", action, target_of[action]))
        rows.append(row)
    return rows

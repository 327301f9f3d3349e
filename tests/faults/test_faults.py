"""Random faults in runs: each is told by its name, nothing is left of it, and the run goes on as if it had not been."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from faults.bench import LAYOUTS, run_rounds
from faults.kinds import KINDS

pytestmark = pytest.mark.distributed


def play(folder: Path, seed: int, num_faults: int, *names: str, layouts: Sequence[str] = tuple(LAYOUTS)) -> None:
    kinds = [kind for name, kind in KINDS.items() if kind.is_possible() and (not names or name in names)]
    outcomes = run_rounds(folder, num_faults=num_faults, seed=seed, jobs=2, kinds=kinds, layouts=layouts)
    assert [(outcome.kind, outcome.layout, outcome.faults) for outcome in outcomes if outcome.faults] == []


def test_a_kill_in_a_save_loses_nothing(tmp_path: Path) -> None:
    play(tmp_path, 3, 1, "a rank is killed in a save", layouts=["pp=2"])


@pytest.mark.slow
def test_kills_in_a_save_lose_nothing(tmp_path: Path) -> None:
    play(tmp_path, 3, 2, "a rank is killed in a save", "the launcher is killed in a save")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_kind_of_fault_loses_nothing(tmp_path: Path) -> None:
    play(tmp_path, 5, 2 * len(KINDS))

"""Bad input of every kind: one message, exit code 2, soon, in little memory, with nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults.bad_inputs import CASES
from faults.try_inputs import Outcome, try_inputs

NAMES = [case.name for case in CASES]


def table(outcomes: list[Outcome]) -> str:
    return "\n".join(f"{end.name}: {', '.join(end.faults)}\n    {end.output[:500]!r}" for end in outcomes)


def test_the_cases_have_different_names() -> None:
    assert len(set(NAMES)) == len(NAMES) >= 400


@pytest.mark.distributed
def test_some_bad_inputs_of_every_kind_are_refused(tmp_path: Path) -> None:
    bad = [end for end in try_inputs(NAMES[::15], tmp_path) if end.faults]
    assert not bad, table(bad)


@pytest.mark.slow
@pytest.mark.distributed
def test_every_bad_input_is_refused(tmp_path: Path) -> None:
    outcomes = try_inputs(NAMES, tmp_path)
    bad = [end for end in outcomes if end.faults]
    most_s, most_bytes = max(end.cpu_s for end in outcomes), max(end.num_bytes for end in outcomes)
    print(f"{len(outcomes)} bad inputs, {len(bad)} not as they should be; at most {most_s:.1f} s, {most_bytes:,} bytes")
    assert not bad, table(bad)

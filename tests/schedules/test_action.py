"""Actions and tables as text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipekit.errors import ConfigError
from pipekit.schedules import Action, Schedule


@given(st.integers(0, 1000), st.sampled_from("FBIW"), st.integers(0, 1000))
def test_a_printed_action_parses_back(stage: int, kind: str, micro_batch: int) -> None:
    action = Action(stage, kind, micro_batch)  # type: ignore[arg-type]
    assert str(action) == f"{stage}{kind}{micro_batch}"
    assert Action.parse(str(action)) == action


@pytest.mark.parametrize("text", ["", "F3", "0F", "0X3", "0F3F", "-1F0", "0f3"])
def test_text_that_is_not_an_action_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="as in 0F3"):
        Action.parse(text)


def test_peak_in_flight_counts_what_is_held() -> None:
    actions = tuple(Action.parse(text) for text in ["0F0", "0F1", "0I0", "0F2", "0W0", "0B1", "0B2"])
    assert Schedule("by hand", 3, (actions,)).peak_in_flight(0) == 3
    assert str(Schedule("by hand", 3, (actions[:2],))) == "0F0 0F1"

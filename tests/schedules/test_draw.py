"""Pictures of timelines."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from pipekit.errors import PipekitError
from pipekit.schedules import Action, Costs, Schedule, Span, Timeline, plan_1f1b, plan_zb_v, simulate
from pipekit.schedules.draw import draw_picture, draw_text, ink_on

TIMELINE = simulate(plan_1f1b(num_stages=2, num_micro_batches=3), Costs.uniform(2))
V = simulate(plan_zb_v(pp=2, num_micro_batches=3), Costs.uniform(4))


def test_a_row_is_drawn_to_scale() -> None:
    # 12 seconds on 48 columns: 4 a forward, 8 a backward.
    assert draw_text(TIMELINE, width=48).split("\n") == [
        "rank 0 F0--F1--........B0------F2--B1------....B2------",
        "rank 1 ....F0--B0------F1--B1------F2--B2------........",
        "F forward, B backward; step 12 s, bubble 25 %",
    ]


def test_later_stages_of_a_rank_are_small_letters() -> None:
    text = draw_text(V, width=76)
    assert "f0" in text
    assert "F0" in text
    assert "small on a rank's later stages" in text


@pytest.mark.parametrize("width", [10, 37, 200])
def test_rows_are_as_wide_as_they_are_asked_to_be(width: int) -> None:
    *rows, _ = draw_text(V, width=width).split("\n")
    assert {len(row) for row in rows} == {len("rank 0 ") + width}


def test_an_svg_holds_every_micro_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    path = tmp_path / "p.svg"
    draw_picture(path, {"simulated": V, "measured": TIMELINE})
    texts = [element.text for element in ElementTree.parse(path).iter() if element.tag.endswith("text")]
    # Three kinds of actions on four stages, and two on two.
    assert [texts.count(str(micro_batch)) for micro_batch in range(3)][1:] == [16, 16]
    assert any("simulated: step" in (text or "") for text in texts)
    assert {"rank 0", "rank 1"} <= set(texts)


def test_the_same_timelines_give_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        draw_picture(tmp_path / f"{name}.svg", {"simulated": TIMELINE})
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_numbers_stand_out_on_their_boxes() -> None:
    assert [ink_on(colour) for colour in ("#56B4E9", "#009E73", "#3C7EA3", "#006F50")] == ["#1A1A1A"] * 2 + [
        "white"
    ] * 2


def test_numbers_that_do_not_fit_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    spans = (Span(Action(0, "F", 77), 0.0, 0.001), Span(Action(0, "B", 77), 0.001, 10.0))
    schedule = Schedule("mine", 78, (tuple(span.action for span in spans),))
    draw_picture(tmp_path / "p.svg", {"measured": Timeline(schedule, (spans,))})
    texts = [element.text for element in ElementTree.parse(tmp_path / "p.svg").iter() if element.tag.endswith("text")]
    assert texts.count("77") == 1


def test_a_png_is_a_png(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    draw_picture(path, {"simulated": TIMELINE})
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_other_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PipekitError, match=r"a picture ends in \.svg or \.png"):
        draw_picture(tmp_path / "p.gif", {"simulated": TIMELINE})


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(PipekitError, match=r'pip install "pipekit\[plot\]"'):
        draw_picture(tmp_path / "p.svg", {"simulated": TIMELINE})
    assert list(tmp_path.iterdir()) == []

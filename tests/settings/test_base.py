"""Bounds of numbers, paths that cannot exist, and the length of messages."""

from __future__ import annotations

from typing import Annotated

import pytest
from pydantic import TypeAdapter, ValidationError

from pipekit.settings.base import FolderText, at_least, at_most, config_error, show

BOUNDED = TypeAdapter(Annotated[float, at_least(0.5, "less is noise", allows_zero=True), at_most(2, "more is a slip")])


def test_numbers_outside_their_bounds_are_refused_with_the_reason() -> None:
    assert [BOUNDED.validate_python(value) for value in (0, 0.5, 2)] == [0, 0.5, 2]
    with pytest.raises(ValidationError, match=r"must be at least 0\.5: less is noise"):
        BOUNDED.validate_python(0.4)
    with pytest.raises(ValidationError, match="must be at most 2: more is a slip"):
        BOUNDED.validate_python(2.5)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("a\x1b[2J", "control character"),
        ("a\nb", "control character"),
        ("a/" + "b" * 256, "is too long"),
        ("a/" * 1751, "is too long"),
        ("~no_such_user/x", "there is no user ~no_such_user"),
    ],
)
def test_a_path_that_no_file_can_have_is_refused(text: str, rule: str) -> None:
    with pytest.raises(ValidationError, match=rule):
        TypeAdapter(FolderText).validate_python(text)


def test_only_the_home_folder_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    folders = ["~/runs/a", "runs/~a", "./runs//a", "b" * 255]
    assert [TypeAdapter(FolderText).validate_python(text) for text in folders] == ["/home/me/runs/a", *folders[1:]]


def test_ten_of_many_mistakes_are_shown_and_the_rest_is_counted() -> None:
    assert str(config_error(["one mistake"])) == "one mistake"
    heading, *lines = str(config_error(f"mistake {number}" for number in range(1234))).splitlines()
    assert heading == "1,234 mistakes in the configuration:"
    assert lines == [*(f"  mistake {number}" for number in range(10)), "  and 1,224 more"]
    assert "more" not in str(config_error(f"mistake {number}" for number in range(10)))


def test_a_long_line_is_cut_in_the_middle_and_moves_no_cursor() -> None:
    text = str(config_error([f"begin\x1b[2J{'x' * 1000}end"]))
    assert text.startswith("begin\\x1b[2Jxxx")
    assert text.endswith("xxxend")
    assert len(text) == 405


def test_large_values_are_shown_in_one_short_line() -> None:
    for value in ("x" * 10**6, list(range(10**6)), dict.fromkeys(range(1000), "x" * 1000), "\x1b\n" * 100):
        assert len(show(value)) <= 80
        assert show(value).isprintable()

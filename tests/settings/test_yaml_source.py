"""Lines are those of the file, and what is written is read back."""

from __future__ import annotations

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipekit.settings import yaml_source
from pipekit.settings.yaml_source import read_yaml, write_yaml

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8", exclude_characters="\r\x85\u2028\u2029"), max_size=20)
    | st.sampled_from(
        ["on", "no", "1e3", "3e-4", "0x1f", "010", "2024-01-01", "1:30", "null", "~", "", "<<", "=", "- a"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc_", min_size=1), inner, max_size=3),
    max_leaves=8,
)


@given(plain)
def test_written_yaml_reads_back_to_the_same_value(value: object):
    source = read_yaml(write_yaml({"value": value}))
    assert source.faults == []
    assert source.value == {"value": value}


@given(st.dictionaries(st.text("abc", min_size=1), st.text("xyz0123456789.eE+-", max_size=8), max_size=4))
def test_other_readers_agree_on_what_is_written(value: dict[str, str]):
    assert yaml.safe_load(write_yaml(value)) == value


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_any_number_that_python_prints_is_read(number: float):
    assert read_yaml(f"x: {number!r}").value == {"x": number}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1e3", 1000.0),
        ("-.5", -0.5),
        ("+1.", 1.0),
        ("0x10", 16),
        ("0o17", 15),
        ("010", 10),
        ("1_000", 1000),
        ("-7", -7),
        (".inf", math.inf),
        ("true", True),
        ("FALSE", False),
        ("on", "on"),
        ("no", "no"),
        ("2024-01-01", "2024-01-01"),
        ("1:30", "1:30"),
        ("~", None),
        ("", None),
        ("e3", "e3"),
        ("1e", "1e"),
        (".", "."),
        ("1.2.3", "1.2.3"),
        ("'5'", "5"),
        ("-", "-"),
    ],
)
def test_plain_words(text: str, value: object):
    source = read_yaml(f"x: [{text}]" if text not in ("", "-") else f"x: '{text}'" if text else "x:")
    got = source.value["x"]
    got = got[0] if isinstance(got, list) else got
    assert got == value
    assert type(got) is type(value)


def test_lines_of_nested_keys():
    source = read_yaml("# title\na:\n  b: 1\n\n  c: {d: 2,\n      e: 3}\nf: [1, {g: 2}]\n")
    assert source.lines == {
        ("a",): 2,
        ("a", "b"): 3,
        ("a", "c"): 5,
        ("a", "c", "d"): 5,
        ("a", "c", "e"): 6,
        ("f",): 7,
        ("f", "1", "g"): 7,
    }


def test_keys_are_text():
    assert read_yaml("1: a\ntrue: b\n").value == {"1": "a", "true": "b"}


def bomb(levels: int) -> str:
    """Ten references to ten references and so on, `levels` deep, to ten values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels + 1)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: " + "[" * 100 + "]" * 100, 1, "values nested more than 100 deep, which no configuration needs"),
        (f"a: [{'1, ' * 1000}]", 1, "the text has more than 1,000 values, which no configuration needs"),
        (
            bomb(2),
            1,
            "with its aliases written out, the text has more than 1,000 values, which no configuration needs",
        ),
        ("a:\n  b: " + "9" * 101, 2, "'99999999999999999999...': a number of 101 characters, and none here has more"),
        ("a: !!int x", 1, "'x': is no whole number"),
        ("a: !!float x", 1, "'x': is no number"),
        ("a: !!bool maybe", 1, "'maybe': is neither true nor false"),
        ("a: !!set {b}", 1, "the tag tag:yaml.org,2002:set is not read here; remove it"),
        ("a: !!timestamp 2020-01-01", 1, "the tag tag:yaml.org,2002:timestamp is not read here; remove it"),
    ],
)
def test_what_no_configuration_holds_is_refused(
    text: str, line: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(yaml_source, "_MAX_NODES", 1000)
    ((found_line, found),) = read_yaml(text).faults
    assert found.startswith(message)
    assert found_line == line


def test_what_is_large_and_has_a_meaning_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml_source, "_MAX_NODES", 1000)
    assert read_yaml("a: " + "[" * 98 + "]" * 98).faults == []
    assert read_yaml(f"a: [{'1, ' * 600}]").faults == [], "values are counted once, not as nodes and once more"
    assert read_yaml(bomb(1)).faults == []
    assert read_yaml("a: " + "9" * 100).value == {"a": int("9" * 100)}

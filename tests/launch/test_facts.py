"""Facts that all hosts must share: what they are about, and how a host that differs is named."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pipekit.errors import LaunchError
from pipekit.launch.facts import check_same, host_facts

CONFIG = "model: {builder: 'own.layers:build', args: {}}\ntrain: {steps: 2}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a configuration and a package that it names."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own/__init__.py").write_text("")
    (tmp_path / "own/layers.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "c.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return [topic for topic in before if before[topic] != after[topic]]


def test_facts_are_versions_code_and_configuration(folder: Path) -> None:
    facts = host_facts("train", ["c.yaml"])
    assert list(facts) == [
        "the version of Python",
        "the version of pipekit",
        "the version of torch",
        "the version of deepspeed",
        "the code of pipekit",
        "the configuration",
        "the code of own.layers",
    ]
    assert facts["the version of Python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts == host_facts("train", ["c.yaml"])
    assert changed(facts, host_facts("train", ["c.yaml", "train.steps=3"])) == ["the configuration"]
    # The whole package counts, and nothing of it is imported.
    (folder / "own/beside.py").write_text("x = 1")
    assert changed(facts, host_facts("train", ["c.yaml"])) == ["the code of own.layers"]


def test_another_way_to_write_a_configuration_is_no_difference(folder: Path) -> None:
    facts = host_facts("train", ["c.yaml"])
    (folder / "c.yaml").write_text(f"# a comment\n{CONFIG}")
    assert host_facts("train", ["c.yaml", "train.steps=2"]) == facts


def test_of_a_script_its_file_counts(folder: Path) -> None:
    (folder / "s.py").write_text("print(1)")
    facts = host_facts("s.py", ["--x"])
    (folder / "s.py").write_text("print(2)")
    assert changed(facts, host_facts("s.py", [])) == ["the script s.py"]
    with pytest.raises(LaunchError, match=r"missing.py: no such file"):
        host_facts("missing.py", [])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["1", "2", "1"], "b: the version of torch differs from that of a (2 and 1); install the same on all hosts"),
        (["1", "2", "2"], "a: the version of torch differs from that of b (1 and 2); install the same on all hosts"),
        (
            ["1", "2", "1", "3", "1"],
            "b: the version of torch differs from that of a (2 and 1), and so does d; install the same on all hosts",
        ),
    ],
)
def test_the_host_that_differs_from_most_is_named(values: list[str], message: str) -> None:
    facts = {name: {"x": "", "the version of torch": value} for name, value in zip("abcde", values, strict=False)}
    with pytest.raises(LaunchError) as caught:
        check_same(facts)
    assert str(caught.value) == message


def test_hashes_are_not_shown_and_facts_of_some_hosts_only_are_compared_among_these() -> None:
    with pytest.raises(LaunchError, match=r"^b: the configuration differs from that of a; copy it to all hosts, or"):
        check_same({"a": {"the configuration": "1f"}, "b": {"the configuration": "2e"}})
    check_same({"a": {"x": "1", "y": "1"}, "b": {"x": "1", "y": "1"}, "this machine": {"x": "1"}})

"""Partitioners of installed packages, on a distribution that is made for the test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipekit.config import parse_config
from pipekit.errors import ConfigError, LayoutError
from pipekit.partitioners import PartitionInputs, installed_partitioners, partition

CODE = """
def head_alone(inputs, num_stages):
    num_layers = len(inputs.type_names)
    return [*range(num_stages - 1), num_layers - 1, num_layers]

def wrong(inputs, num_stages):
    return [0, 9]

def no_list(inputs, num_stages):
    return ["a"] * 3

no_function = 3
"""

POINTS = """
[pipekit.partitioners]
head-alone = {module}:head_alone
wrong = {module}:wrong
no-list = {module}:no_list
no-function = {module}:no_function
not-there = {module}:absent
no-module = {module}_absent:f
parameters = {module}:wrong

[another.group]
other = {module}:head_alone
"""

MODULE = "partitioner_of_a_test"
INPUTS = PartitionInputs(["Layer"] * 5, lambda: [1] * 5)
BASE = {"model": {"preset": "tiny"}, "train": {"steps": 3}}


def install(folder: Path, name: str, points: str) -> None:
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / f"{MODULE}.py").write_text(CODE)
    install(tmp_path, "head_alone", POINTS.format(module=MODULE))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop(MODULE, None)


def test_they_are_named_and_the_configuration_takes_them_without_importing_them(installed: Path) -> None:
    assert set(installed_partitioners()) >= {"head-alone", "wrong", "not-there"}
    assert "other" not in installed_partitioners()
    config = parse_config(BASE, ["parallel.partition=head-alone"])
    assert config.parallel.partition == "head-alone"
    assert MODULE not in sys.modules


def test_the_boundaries_are_what_they_return(installed: Path) -> None:
    assert partition("head-alone", INPUTS, 2) == [0, 4, 5]
    assert partition("head-alone", INPUTS, 3) == [0, 1, 4, 5]


def test_pipekits_own_come_first(installed: Path) -> None:
    assert partition("parameters", INPUTS, 2) == [0, 3, 5]


def test_what_they_return_is_checked(installed: Path) -> None:
    with pytest.raises(LayoutError) as caught:
        partition("wrong", INPUTS, 2)
    assert str(caught.value) == (
        "parallel.partition=wrong: its result [0, 9] has 2 entries, and parallel.pp=2 needs 3; try [0, 2, 5]"
    )
    with pytest.raises(LayoutError, match=r"its result \['a', 'a', 'a'\] must be a list of whole numbers; try"):
        partition("no-list", INPUTS, 2)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("no-function", "is no function but 3; name a function"),
        ("not-there", "cannot be imported: module 'partitioner_of_a_test' has no attribute 'absent'"),
        ("no-module", "cannot be imported: No module named 'partitioner_of_a_test_absent'"),
    ],
)
def test_what_cannot_be_loaded_is_told(installed: Path, name: str, fault: str) -> None:
    with pytest.raises(LayoutError, match=f"parallel.partition={name} is installed as {MODULE}.*{fault}"):
        partition(name, INPUTS, 2)


def test_one_name_of_two_packages_is_refused(installed: Path) -> None:
    install(installed / "more", "another", "[pipekit.partitioners]\nhead-alone = elsewhere:f\n")
    sys.path.insert(0, str(installed / "more"))
    try:
        with pytest.raises(LayoutError, match=rf"installed more than once, as .*{MODULE}:head_alone.*; uninstall one"):
            partition("head-alone", INPUTS, 2)
    finally:
        sys.path.remove(str(installed / "more"))


def test_an_unknown_name_is_refused_with_those_that_are_installed(installed: Path) -> None:
    for refused in (
        lambda: partition("best", INPUTS, 2),
        lambda: parse_config(BASE, ["parallel.partition=best"]),
    ):
        with pytest.raises(
            (LayoutError, ConfigError), match=r"manual or one that is installed \(.*head-alone.*wrong.*\)"
        ):
            refused()


def test_without_any_the_message_says_so() -> None:
    if not installed_partitioners():
        with pytest.raises(LayoutError, match=r"manual or one that you install \(there are none\)"):
            partition("best", INPUTS, 2)

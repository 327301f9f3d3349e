"""Stages written in letters."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipekit.errors import LayoutError
from pipekit.layers.specs import layer_names
from pipekit.models.gpt2 import GPT2Config
from pipekit.partitioners import stage_spec_boundaries
from pipekit.partitioners.stage_spec import read_stage_spec

NAMES = layer_names(GPT2Config(preset="gpt2", num_layers=4).layer_specs())  # 2 layers, 4 blocks of 2, 2 layers


def spell(spec: str) -> str:
    return "|".join("".join(item.letter for item in stage) for stage in read_stage_spec(spec))


@pytest.mark.parametrize(
    ("spec", "spelled"),
    [
        ("t", "t"),
        ("Et*3|(tt|)*2,tL", "Ettt|tt|tt|tL"),
        ("Et * 3 | ( t t | ) * 2 , t L", "Ettt|tt|tt|tL"),
        ("E,(t|)*3,L", "Et|t|t|L"),
        ("((t*2h)*2|)*2t", "tthtth|tthtth|t"),
        ("t|*1t", "t|t"),
        ("E()t", "Et"),
        ("t*0012", "t" * 12),
    ],
)
def test_repeats_are_written_out(spec: str, spelled: str) -> None:
    assert spell(spec) == spelled


@pytest.mark.parametrize(
    ("spec", "boundaries"),
    [
        ("Et*4L", [0, 12]),
        ("Et*2|t*2L", [0, 6, 12]),
        ("E|t*4|L", [0, 2, 10, 12]),
        ("Eth|httL", [0, 5, 12]),
        ("E(h|)*8L", [0, 3, 4, 5, 6, 7, 8, 9, 10, 12]),
        ("Eh*4|ttL", [0, 6, 12]),
    ],
)
def test_letters_stand_for_layers(spec: str, boundaries: list[int]) -> None:
    assert stage_spec_boundaries(spec, NAMES, len(boundaries) - 1) == boundaries


@given(st.lists(st.integers(1, 3), min_size=1, max_size=6), st.booleans(), st.booleans(), st.data())
def test_whole_blocks_go_where_they_are_put(blocks: list[int], before: bool, behind: bool, data: st.DataObject) -> None:
    names = ["first"] * before + [f"b.{i}.{part}" for i, size in enumerate(blocks) for part in range(size)]
    names += ["last"] * behind
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(blocks) - 1)), max_size=len(blocks) - 1)))
    edges = [0, *cuts, len(blocks)] if len(blocks) > 1 else [0, 1]
    spec = "E" * before + "|".join("t" * (end - start) for start, end in pairwise(edges)) + "L" * behind
    expected = [sum(blocks[:edge]) + before for edge in edges]
    expected[0], expected[-1] = 0, len(names)
    assert stage_spec_boundaries(spec, names, len(edges) - 1) == expected


def test_layers_between_blocks_go_with_the_one_before() -> None:
    names = ["a.0.x", "a.0.y", "bridge", "a.1.x", "b.0", "b.1.deep.2", "end"]
    assert stage_spec_boundaries("t|t|t|tL", names, 4) == [0, 3, 4, 5, 7]


def test_layers_without_names_of_their_own_are_blocks() -> None:
    assert stage_spec_boundaries("t*3|t*2", [f"layers.{i}" for i in range(5)], 2) == [0, 3, 5]


@pytest.mark.parametrize(
    ("spec", "position", "fault"),
    [
        ("", "0", "stage 0 is empty"),
        ("Ex", "2 (x)", "no such letter; use E, t, h, L, |, * with a number, ( and )"),
        ("Et-", "3 (-)", "no such letter"),
        ("*3", "1 (*)", "* must follow a letter, | or a group in parentheses"),
        ("t*2*2", "4 (*)", "* must follow a letter"),
        ("(*2t)", "2 (*)", "* must follow a letter"),
        ("t*", "2 (*)", "* must be followed by how often, 1 or more; for example t*3"),
        ("t*0", "2 (*)", "* must be followed by how often"),
        ("t*-1", "2 (*)", "* must be followed by how often"),
        ("t(t", "2 (()", "there is no ) to this ("),
        ("t)t", "2 ())", "there is no ( to this )"),
        ("t||t", "3 (|)", "stage 1 is empty; put a letter into it, or leave out a |"),
        ("|t", "1 (|)", "stage 0 is empty"),
        ("t|", "2 (|)", "stage 1 is empty"),
        ("((t*1000)*1000)*1000", "10 (*)", "this makes more than 100000 letters"),
        ("t*" + "9" * 5000, "2 (*)", "this makes more than 100000 letters"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_position(spec: str, position: str, fault: str) -> None:
    with pytest.raises(LayoutError) as caught:
        read_stage_spec(spec)
    assert str(caught.value).startswith(f"parallel.boundaries={spec} at position {position}: {fault}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "Ett|tt",
            "at position 6 (t): the stages must end with L, for what is behind the last block: final_norm, embed",
        ),
        ("Ett|tL", "at position 6 (L): L comes after 3 of the model's 4 blocks"),
        ("Ett|t", "at position 5 (t): the stages end after 3 of the model's 4 blocks"),
        ("Eth|L", "at position 5 (L): L comes after 1 of the model's 4 blocks and 1 layer of the next"),
        ("Eth|ttL", "at position 5 (t): a block is begun, and not ended; write h before this t"),
        (
            "tt|ttL",
            "at position 1 (t): the stages must begin with E, for what is before the first block: embed, position",
        ),
        ("Ett|tttL", "at position 7 (t): the model has 4 blocks, and all are taken"),
        ("Ett|tthL", "at position 7 (h): the model has 4 blocks, and all are taken"),
        ("Ett|EttL", "at position 5 (E): E must come first, and once"),
        ("Ett|ttLL", "at position 8 (L): L must come last, and once"),
        ("Et*4L", "makes 1 stage, and there must be 2"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_with_what_does(spec: str, message: str) -> None:
    with pytest.raises(LayoutError) as caught:
        stage_spec_boundaries(spec, NAMES, 2)
    assert str(caught.value) == f"parallel.boundaries={spec} {message}; for example Et*2|t*2L"


@pytest.mark.parametrize(("spec", "letter"), [("Et|t", "E"), ("t|tL", "L")])
def test_a_letter_for_layers_that_are_not_there_is_refused(spec: str, letter: str) -> None:
    with pytest.raises(LayoutError, match=rf"{letter} stands for the layers .*, and the model has none; leave it out"):
        stage_spec_boundaries(spec, ["a.0", "a.1"], 2)


def test_a_long_block_says_how_many_layers_are_left() -> None:
    with pytest.raises(LayoutError, match=r"write h\*3 before this t$"):
        stage_spec_boundaries("ht|t|t", ["a.0.x", "a.0.y", "a.0.z", "a.0.w", "a.1"], 3)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(LayoutError, match="no layer's name has a number in it"):
        stage_spec_boundaries("Et", ["first", "second"], 1)

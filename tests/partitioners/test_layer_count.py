"""Stages of equally many layers, of any type or of one."""

from __future__ import annotations

from itertools import pairwise

import pytest

from pipekit.errors import LayoutError
from pipekit.models.gpt2 import GPT2Config
from pipekit.partitioners import partition_by_type, partition_uniform

GPT2 = [spec.type_name for spec in GPT2Config(preset="gpt2").layer_specs()]


@pytest.mark.parametrize("pattern", ["AttentionHalf", "attention", "^Att.*half$"])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 6, 12])
def test_matching_layers_are_shared_out(pattern: str, num_stages: int) -> None:
    boundaries = partition_by_type(GPT2, pattern, num_stages)
    matches = [GPT2[start:end].count("AttentionHalf") for start, end in pairwise(boundaries)]
    assert matches == [12 // num_stages] * num_stages


def test_other_layers_stay_with_the_matching_one_before_them() -> None:
    boundaries = partition_by_type(GPT2, "attention", 4)
    assert [GPT2[start] for start in boundaries[1:-1]] == ["AttentionHalf"] * 3


def test_patterns_may_have_alternatives() -> None:
    boundaries = partition_by_type(GPT2, "attention|mlp", 5)
    sizes = [sum("Half" in name for name in GPT2[start:end]) for start, end in pairwise(boundaries)]
    assert sorted(sizes) == [4, 5, 5, 5, 5]


@pytest.mark.parametrize("num_stages", [2, 3, 4, 5])
def test_no_stage_is_empty_where_fewer_layers_match(num_stages: int) -> None:
    boundaries = partition_by_type(["A", "A", "B", "A", "A"], "b", num_stages)
    assert len(boundaries) == num_stages + 1
    assert all(start < end for start, end in pairwise(boundaries))


def test_a_pattern_without_a_match_is_refused_with_the_types() -> None:
    with pytest.raises(LayoutError) as caught:
        partition_by_type(GPT2, "transformer", 2)
    assert str(caught.value) == (
        "parallel.partition=type:transformer matches no layer; the layers' types are TokenEmbedding, "
        "PositionEmbedding, AttentionHalf, MLPHalf, FinalNorm"
    )


def test_what_is_no_expression_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"type:\( is no regular expression: missing \)"):
        partition_by_type(GPT2, "(", 2)


def test_fewer_layers_than_stages_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"try parallel\.pp=2 or lower"):
        partition_by_type(["A", "A"], "a", 3)


@pytest.mark.parametrize("num_layers", range(1, 30))
def test_stages_differ_by_one_layer_at_most(num_layers: int) -> None:
    for num_stages in range(1, num_layers + 1):
        boundaries = partition_uniform(num_layers, num_stages)
        sizes = [end - start for start, end in pairwise(boundaries)]
        assert sum(sizes) == num_layers
        assert max(sizes) - min(sizes) <= 1
        assert sizes == sorted(sizes, reverse=True), "the earlier stages take the layers that are left over"


def test_fewer_layers_than_stages_are_refused_by_uniform() -> None:
    with pytest.raises(LayoutError, match=r"try parallel\.pp=2 or lower"):
        partition_uniform(2, 3)

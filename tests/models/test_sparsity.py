"""Layouts of sparse attention, against those that DeepSpeed makes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipekit.config import parse_config
from pipekit.errors import ConfigError
from pipekit.models.sparsity import BlockLayouts, SparseAttention

# Drawn by the classes of DeepSpeed 0.14 with attention="unidirectional" and num_heads=2, a drawing for each head.
THEIRS: list[tuple[dict[str, Any], int, list[str]]] = [
    (
        {
            "mode": "fixed",
            "num_local_blocks": 4,
            "num_global_blocks": 2,
            "different_layout_per_head": True,
            "num_different_global_patterns": 2,
        },
        11,
        [
            "# ## ### #### ..### ..#### ..##### ..###### ..##..### ..##..#### ..##..#####",
            "# ## ### #### ##..# ##..## ##..### ##..#### ##..##..# ##..##..## ##..##..###",
        ],
    ),
    (
        {
            "mode": "variable",
            "local_window_blocks": [1, 2],
            "global_block_indices": [1, 5],
            "global_block_end_indices": [3, 7],
        },
        11,
        ["# .# .## .### .#### .##..# .##..## .##..### .##..#### .##..##..# .##..##..##"],
    ),
    (
        {"mode": "bigbird", "num_sliding_window_blocks": 3, "num_global_blocks": 2, "num_random_blocks": 0},
        8,
        ["# ## ### #### ##.## ##..## ##...## ##....##"],
    ),
    (
        {"mode": "bslongformer", "num_sliding_window_blocks": 3, "global_block_indices": [0, 3]},
        8,
        ["# ## ### #### #..## #..### #..#.## #..#..##"],
    ),
]


@pytest.mark.parametrize(("settings", "num_blocks", "theirs"), THEIRS, ids=lambda value: str(value)[:20])
def test_layouts_are_those_of_deepspeed(settings: dict[str, Any], num_blocks: int, theirs: list[str]) -> None:
    layouts = BlockLayouts(SparseAttention(block=4, **settings), num_heads=2, num_positions=4 * num_blocks - 1)
    drawn = [layouts.drawing(layout).replace(" ", ".").replace("\n", " ") for layout in range(layouts.num_layouts)]
    assert drawn == theirs


@pytest.mark.parametrize(("mode", "count"), [("bigbird", 2), ("variable", 3)])
def test_random_blocks_are_drawn_from_those_before(mode: Any, count: int) -> None:
    options: dict[str, Any] = {"mode": mode, "different_layout_per_head": True}
    drawn, again, without = (
        BlockLayouts(SparseAttention(num_random_blocks=number, **options), 3, 320).tables()
        for number in (count, count, 0)
    )
    assert np.array_equal(drawn, again)
    assert drawn.shape == (3, 20, 20)
    assert not np.array_equal(drawn[0], drawn[1])
    more = (drawn & ~without).sum(-1)
    assert more.max() == count
    assert not np.triu(drawn, 1).any()
    assert np.diagonal(drawn, axis1=1, axis2=2).all(), "a token attends to itself at the least"
    other = BlockLayouts(SparseAttention(num_random_blocks=count, seed=1, **options), 3, 320).tables()
    assert not np.array_equal(drawn, other)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"mode": "sparse"}, "mode=sparse: must be sliding_window, .* or bslongformer"),
        ({"mode": "fixed", "window": 3}, "mode=fixed has no window; leave that out .it has block, .*patterns"),
        ({"mode": "sliding_window"}, "needs window, a number of tokens; for example window: 256"),
        ({"mode": "fixed", "num_global_blocks": 3}, "3 does not divide num_local_blocks=4; try 1, 2 or 4"),
        ({"mode": "fixed", "num_different_global_patterns": 2}, "=2 needs different_layout_per_head: true"),
        (
            {"mode": "fixed", "different_layout_per_head": True, "num_different_global_patterns": 5},
            "=5 is more than the 4 places .* try 4 or less",
        ),
        ({"mode": "bslongformer", "global_block_end_indices": [2, 3]}, r"for each of .*=.0.; for example .1."),
        ({"mode": "variable", "attention": "bidirectional"}, "attention=bidirectional: must be unidirectional"),
    ],
)
def test_settings_that_do_not_fit_say_what_to_type(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"model.sparse_attention.*{message}"):
        parse_config({"model": {"preset": "tiny", "sparse_attention": model}, "train": {"steps": 1}})


def test_a_family_with_a_window_of_its_own_has_one_setting_for_it() -> None:
    model = {"preset": "mistral-nemo", "sparse_attention": {"mode": "sliding_window", "window": 64}}
    with pytest.raises(ConfigError, match=r"write model\.sliding_window=64 instead"):
        parse_config({"model": model, "train": {"steps": 1}})


def test_transformers_has_no_such_model() -> None:
    model = parse_config(
        {"model": {"preset": "tiny", "sparse_attention": {"mode": "fixed"}}, "train": {"steps": 1}}
    ).model
    reason = model.no_export_reason()
    assert reason == "has model.sparse_attention.mode=fixed, and GPT2LMHeadModel knows no such attention"

"""Sparse attention: the setting of a built-in family, and the blocks of keys that each block of queries attends to.

Modes, their parameters and defaults are those of DeepSpeed, all `unidirectional`: a token attends to no later token.

Source: `sparsity_config.py` of DeepSpeed 0.14; Child et al. 2019, "Generating Long Sequences with Sparse Transformers";
Zaheer et al. 2020, "Big Bird: Transformers for Longer Sequences"; Beltagy et al. 2020, "Longformer: The Long-Document
Transformer".
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from pipekit.rng import fold_seed
from pipekit.settings.base import Section, alternatives

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Numbers = Annotated[tuple[NonNegativeInt, ...], Field(strict=False, min_length=1)]
Sizes = Annotated[tuple[PositiveInt, ...], Field(strict=False, min_length=1)]

_OF_BLOCKS: dict[str, Any] = {"block": 16, "different_layout_per_head": False}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "sliding_window": {"window": None},
    "fixed": {**_OF_BLOCKS, "num_local_blocks": 4, "num_global_blocks": 1, "num_different_global_patterns": 1},
    "variable": {
        **_OF_BLOCKS,
        "num_random_blocks": 0,
        "local_window_blocks": (4,),
        "global_block_indices": (0,),
        "global_block_end_indices": None,
        "seed": 0,
    },
    "bigbird": {
        **_OF_BLOCKS,
        "num_random_blocks": 1,
        "num_sliding_window_blocks": 3,
        "num_global_blocks": 1,
        "seed": 0,
    },
    "bslongformer": {
        **_OF_BLOCKS,
        "num_sliding_window_blocks": 3,
        "global_block_indices": (0,),
        "global_block_end_indices": None,
    },
}


class SparseAttention(Section):
    """Sparse attention: a token attends only to some earlier tokens, which saves computation and memory."""

    mode: Literal["sliding_window", "fixed", "variable", "bigbird", "bslongformer"]
    """`sliding_window`: the last `window` tokens. The others cut the sequence into blocks: `fixed` and `variable` into
    local windows of blocks, and `bigbird` and `bslongformer` let a window slide over them; some blocks are global, to
    which all later ones attend."""

    window: PositiveInt | None = Field(default=None, examples=[256])
    """`sliding_window`: size of the attention window in tokens, including the token itself."""

    attention: Literal["unidirectional"] = "unidirectional"
    """A token attends to no later token, as in any language model."""

    block: PositiveInt | None = Field(default=None, examples=[64])
    """Tokens in a block; default 16."""

    different_layout_per_head: bool | None = None
    """Each head draws its own random blocks, and with `num_different_global_patterns` heads differ in their global
    blocks; default false."""

    num_local_blocks: PositiveInt | None = Field(default=None, examples=[4])
    """`fixed`: number of blocks in a local window; default 4."""

    num_global_blocks: PositiveInt | None = Field(default=None, examples=[1])
    """`fixed`: number of global blocks at the end of each local window. `bigbird`: number of global blocks at the
    beginning of the sequence. Default 1."""

    num_different_global_patterns: PositiveInt | None = Field(default=None, examples=[4])
    """`fixed`: with `different_layout_per_head`, the number of positions in a local window whose blocks are global,
    each for different heads; default 1."""

    local_window_blocks: Sizes | None = Field(default=None, examples=[[2, 4]])
    """`variable`: number of blocks in each local window, from the first; the last number is for all further windows.
    Default [4]."""

    global_block_indices: Numbers | None = Field(default=None, examples=[[0]])
    """`variable`, `bslongformer`: global blocks, or the first blocks of global ranges; default [0]."""

    global_block_end_indices: Sizes | None = Field(default=None, examples=[[2]])
    """`variable`, `bslongformer`: exclusive ends of the ranges that begin at `global_block_indices`; by default each
    range is one block."""

    num_sliding_window_blocks: PositiveInt | None = Field(default=None, examples=[3])
    """`bigbird`, `bslongformer`: number of blocks of a sliding window that is centred on each block; later blocks are
    not attended to. Default 3."""

    num_random_blocks: NonNegativeInt | None = Field(default=None, examples=[1])
    """`variable`, `bigbird`: number of random earlier blocks that each block attends to; default 0, 1 for `bigbird`."""

    seed: NonNegativeInt | None = Field(default=None, examples=[0])
    """`variable`, `bigbird`: seed of the random blocks; default 0."""

    @model_validator(mode="after")
    def _fits_its_mode(self) -> SparseAttention:
        known = _DEFAULTS[self.mode]
        given = [name for name, value in self if value is not None and name not in ("mode", "attention")]
        if extra := [name for name in given if name not in known]:
            raise ValueError(
                f"mode={self.mode} has no {alternatives(extra)}; leave that out (it has {alternatives(known, 'and')})"
            )
        if self.mode == "sliding_window" and self.window is None:
            raise ValueError("mode=sliding_window needs window, a number of tokens; for example window: 256")
        if self.mode == "fixed":
            self._check_fixed()
        starts, ends = self.value("global_block_indices"), self.value("global_block_end_indices")
        if ends is not None and (len(starts) != len(ends) or any(a >= b for a, b in zip(starts, ends, strict=True))):
            raise ValueError(
                f"global_block_end_indices={list(ends)} must have a larger number for each of "
                f"global_block_indices={list(starts)}; for example {[start + 1 for start in starts]}"
            )
        return self

    def _check_fixed(self) -> None:
        local, count, patterns = map(
            self.value, ("num_local_blocks", "num_global_blocks", "num_different_global_patterns")
        )
        if local % count:
            fitting = [number for number in range(1, local + 1) if local % number == 0]
            raise ValueError(
                f"num_global_blocks={count} does not divide num_local_blocks={local}; try {alternatives(fitting)}"
            )
        if patterns > 1 and not self.different_layout_per_head:
            raise ValueError(
                f"num_different_global_patterns={patterns} needs different_layout_per_head: true, for one layout of "
                "all heads has one pattern"
            )
        if patterns > local // count:
            raise ValueError(
                f"num_different_global_patterns={patterns} is more than the {local // count} places that "
                f"num_global_blocks={count} have in num_local_blocks={local}; try {local // count} or less"
            )

    def value(self, name: str) -> Any:
        """Value of a parameter, by default that of the mode."""
        given = getattr(self, name)
        return _DEFAULTS[self.mode].get(name) if given is None else given


@dataclass(frozen=True)
class BlockLayouts:
    """Layouts of the blocks of a model's attention heads.

    A shorter sequence uses the beginning of the layout of the longest one, so a token attends to the same tokens in
    sequences of any length, and in generation.

    Attributes:
        settings: settings of any mode except `sliding_window`.
        num_heads: number of query heads of the whole model.
        num_positions: longest sequence in tokens.

    Example:
        >>> settings = SparseAttention(mode="fixed", block=8, num_local_blocks=2)
        >>> print(BlockLayouts(settings, num_heads=2, num_positions=48).drawing())
        #
        ##
         ##
         ###
         # ##
         # ###
    """

    settings: SparseAttention
    num_heads: int
    num_positions: int

    @property
    def block(self) -> int:
        """Tokens in a block."""
        block: int = self.settings.value("block")
        return block

    @property
    def num_layouts(self) -> int:
        """Number of different layouts; head h has the layout with index h modulo this number."""
        settings = self.settings
        if not settings.value("different_layout_per_head"):
            return 1
        return (
            self.num_heads
            if settings.value("num_random_blocks")
            else settings.value("num_different_global_patterns") or 1
        )

    def tables(self) -> NDArray[np.bool_]:
        """Layouts `(L, N, N)` over N blocks, True if a row's block of queries attends to a column's block of keys."""
        return _tables(self)

    def drawing(self, layout: int = 0) -> str:
        """Draw a layout, with a line for each block of queries."""
        return "\n".join("".join(" #"[int(seen)] for seen in row).rstrip() for row in self.tables()[layout])


@lru_cache(maxsize=4)
def _tables(layouts: BlockLayouts) -> NDArray[np.bool_]:
    import numpy as np

    num_blocks = -(-layouts.num_positions // layouts.block)
    return np.stack([_table(layouts.settings, layout, num_blocks) for layout in range(layouts.num_layouts)])


def _table(settings: SparseAttention, layout: int, num_blocks: int) -> NDArray[np.bool_]:
    import numpy as np

    queries, keys = np.arange(num_blocks)[:, None], np.arange(num_blocks)
    if settings.mode in ("fixed", "variable"):
        windows = _local_windows(settings, num_blocks)
        seen = windows[:, None] == windows
    else:
        seen = abs(queries - keys) <= settings.value("num_sliding_window_blocks") // 2
    is_global = _global_blocks(settings, layout, num_blocks)
    seen = seen | is_global
    if settings.mode in ("bigbird", "bslongformer"):
        seen |= is_global[:, None]
    if count := settings.value("num_random_blocks"):
        generator = random.Random(fold_seed(settings.value("seed"), "sparse attention", layout))
        for row in range(num_blocks):
            seen[row, generator.sample(range(row + 1), min(count, row + 1))] = True
    table: NDArray[np.bool_] = seen & (keys <= queries)
    return table


def _local_windows(settings: SparseAttention, num_blocks: int) -> NDArray[np.int_]:
    """Number of the local window of each block."""
    import numpy as np

    sizes = list(settings.value("local_window_blocks") or [settings.value("num_local_blocks")])
    sizes += [sizes[-1]] * num_blocks
    return np.repeat(np.arange(len(sizes)), sizes)[:num_blocks]


def _global_blocks(settings: SparseAttention, layout: int, num_blocks: int) -> NDArray[np.bool_]:
    import numpy as np

    blocks, count = np.arange(num_blocks), settings.value("num_global_blocks")
    are_global: NDArray[np.bool_]
    if settings.mode == "bigbird":
        are_global = blocks < count
        return are_global
    if settings.mode == "fixed":
        local = settings.value("num_local_blocks")
        place, whole = local - (1 + layout) * count, num_blocks - num_blocks % local
        # A last window that is shorter has its global blocks at the same place, or at its end.
        last = max(0, min(whole + place, num_blocks - count))
        in_last = (blocks >= last) & (blocks < last + count) & (whole < num_blocks)
        are_global = ((blocks < whole) & (blocks % local // count == place // count)) | in_last
        return are_global
    starts = settings.value("global_block_indices")
    ends = settings.value("global_block_end_indices") or [start + 1 for start in starts]
    ranges = [(blocks >= start) & (blocks < end) for start, end in zip(starts, ends, strict=True)]
    are_global = np.any(ranges, axis=0)
    return are_global

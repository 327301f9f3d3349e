"""Stage specs: a partition written in letters, such as `Et*3|(tt|)*2tL`.

Source: the pipeline layout of Megatron-LM, `megatron/core/transformer/pipeline_parallel_layer_layout.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, NoReturn

from pipekit.errors import LayoutError

_LETTERS = "Eth|L"
_MAX_ITEMS = 100_000  # far beyond any model; a repeat of a repeat must not fill the memory


class Item(NamedTuple):
    """A letter of a stage spec, and its position in the string, counted from 1."""

    letter: str
    position: int


def read_stage_spec(spec: str) -> list[list[Item]]:
    """Parse a stage spec into the letters of each stage, with every repeat written out.

    `E` is all layers before the first block, `t` a block, `h` one layer of a block, `L` all layers after the last
    block; `|` ends a stage. `*` and a number repeat the letter, or the group in parentheses, before them. Commas and
    blanks are ignored.

    Raises:
        LayoutError: if the spec cannot be parsed, or a stage has no letter.

    Example:
        >>> ["".join(item.letter for item in stage) for stage in read_stage_spec("Et*3|(tt|)*2,tL")]
        ['Ettt', 'tt', 'tt', 'tL']
    """
    stages: list[list[Item]] = [[]]
    ends: list[Item] = []
    for item in _expand(spec):
        if item.letter == "|":
            ends.append(item)
            stages.append([])
        else:
            stages[-1].append(item)
    for stage, items in enumerate(stages):
        if not items:
            position = ends[stage].position if stage < len(ends) else len(spec)
            _refuse(spec, position, f"stage {stage} is empty; put a letter into it, or leave out a |")
    return stages


def stage_spec_boundaries(spec: str, layer_names: Sequence[str], num_stages: int) -> list[int]:
    """Boundaries of the stages of a stage spec.

    A block consists of the layers whose logical names begin with the same `<prefix>.<number>`, and of any layers
    between them and the next block.

    Args:
        spec: see `read_stage_spec`.
        layer_names: logical name of each layer.
        num_stages: required number of stages.

    Raises:
        LayoutError: if the spec cannot be parsed, or does not assign every layer to one stage, in order.

    Example:
        >>> stage_spec_boundaries("Eth|htL", ["embed", "h.0.a", "h.0.b", "h.1.a", "h.1.b", "h.2", "head"], 2)
        [0, 4, 7]
    """
    stages = read_stage_spec(spec)
    starts = _block_starts(layer_names)
    if len(starts) == 1:
        raise LayoutError(
            f"parallel.boundaries={spec} speaks of blocks, and no layer's name has a number in it, such as "
            "blocks.0; give a list of layer indices"
        )
    instead = _example(starts, len(layer_names), num_stages)
    if len(stages) != num_stages:
        made = "1 stage" if len(stages) == 1 else f"{len(stages)} stages"
        raise LayoutError(f"parallel.boundaries={spec} makes {made}, and there must be {num_stages}{instead}")
    boundaries = [0]
    for items in stages:
        layer_idx = boundaries[-1]
        for item in items:
            try:
                layer_idx = _advance(item.letter, layer_idx, starts, layer_names)
            except LayoutError as error:
                _refuse(spec, item.position, f"{error}{instead}")
        boundaries.append(layer_idx)
    if boundaries[-1] < len(layer_names):
        if boundaries[-1] < starts[-1]:
            fault = f"the stages end {_progress(boundaries[-1], starts)}"
        else:
            fault = (
                f"the stages must end with L, for what is behind the last block: {_named(layer_names[starts[-1] :])}"
            )
        _refuse(spec, len(spec), f"{fault}{instead}")
    return boundaries


def _advance(letter: str, layer_idx: int, starts: Sequence[int], layer_names: Sequence[str]) -> int:
    """Index of the layer behind those that a letter takes, of which the first is `layer_idx`.

    Raises:
        LayoutError: if the letter cannot stand there; it says why, and not where.
    """
    before, behind = starts[0], starts[-1]
    if letter == "E":
        if not before:
            raise LayoutError("E stands for the layers before the first block, and the model has none; leave it out")
        if layer_idx:
            raise LayoutError("E must come first, and once")
        return before
    if layer_idx < before:
        raise LayoutError(
            f"the stages must begin with E, for what is before the first block: {_named(layer_names[:before])}"
        )
    if letter == "L":
        if behind == len(layer_names):
            raise LayoutError("L stands for the layers behind the last block, and the model has none; leave it out")
        if layer_idx != behind:
            raise LayoutError(
                "L must come last, and once" if layer_idx > behind else f"L comes {_progress(layer_idx, starts)}"
            )
        return len(layer_names)
    if layer_idx >= behind:
        raise LayoutError(f"the model has {len(starts) - 1} blocks, and all are taken")
    if letter == "h":
        return layer_idx + 1
    if layer_idx not in starts:
        left = min(start for start in starts if start > layer_idx) - layer_idx
        raise LayoutError(f"a block is begun, and not ended; write h{f'*{left}' if left > 1 else ''} before this t")
    return starts[starts.index(layer_idx) + 1]


def _expand(spec: str) -> list[Item]:
    """Return the letters with every repeat written out."""
    groups: list[tuple[list[Item], int]] = [([], 0)]  # the groups that are open, with where they began
    last: list[Item] | None = None  # what a repeat would repeat
    position = 0
    while position < len(spec):
        character, position = spec[position], position + 1
        if character == "," or character.isspace():
            continue
        if character == "(":
            groups.append(([], position))
            last = None
        elif character == "*":
            number = re.match(r"\s*([0-9]{1,9})", spec[position:])
            if last is None:
                _refuse(spec, position, "* must follow a letter, | or a group in parentheses")
            if number is None or not int(number[1]):
                _refuse(spec, position, "* must be followed by how often, 1 or more; for example t*3")
            times = int(number[1])
            if (times - 1) * len(last) + len(groups[-1][0]) > _MAX_ITEMS:
                _refuse(spec, position, f"this makes more than {_MAX_ITEMS} letters")
            groups[-1][0].extend(last * (times - 1))
            position += number.end()
            last = None
        elif character == ")" and len(groups) == 1:
            _refuse(spec, position, "there is no ( to this )")
        elif character == ")" or character in _LETTERS:
            last = groups.pop()[0] if character == ")" else [Item(character, position)]
            groups[-1][0].extend(last)
        else:
            _refuse(spec, position, "no such letter; use E, t, h, L, |, * with a number, ( and )")
    if len(groups) > 1:
        _refuse(spec, groups[-1][1], "there is no ) to this (")
    return groups[0][0]


def _block_starts(layer_names: Sequence[str]) -> list[int]:
    """Return the first layer of each block, and the first behind the last block.

    Example:
        >>> _block_starts(["embed", "h.0.a", "h.0.b", "h.1", "head"])
        [1, 3, 4]
    """
    starts: list[int] = []
    behind, current = len(layer_names), None
    for layer_idx, name in enumerate(layer_names):
        found = re.match(r"(.*?\.\d+)(?:\.|$)", name)
        if found and found[1] != current:
            starts.append(layer_idx)
            current = found[1]
        if found:
            behind = layer_idx + 1
    return [*starts, behind]


def _progress(layer_idx: int, starts: Sequence[int]) -> str:
    whole = sum(start <= layer_idx for start in starts) - 1
    num_more = layer_idx - starts[whole]
    part = f" and {num_more} layer{'s' * (num_more > 1)} of the next" if num_more else ""
    return f"after {whole} of the model's {len(starts) - 1} blocks{part}"


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" and others" if len(names) > 3 else "")


def _example(starts: Sequence[int], num_layers: int, num_stages: int) -> str:
    """Suggestion for a mistake where whole blocks are enough for every stage."""
    num_blocks = len(starts) - 1
    if num_blocks < num_stages:
        return ""
    cuts = [stage * num_blocks // num_stages for stage in range(num_stages + 1)]
    stages = "|".join(f"t*{end - start}" if end - start > 1 else "t" for start, end in pairwise(cuts))
    return f"; for example {'E' * (starts[0] > 0)}{stages}{'L' * (starts[-1] < num_layers)}"


def _refuse(spec: str, position: int, fault: str) -> NoReturn:
    character = f" ({spec[position - 1]})" if 0 < position <= len(spec) else ""
    raise LayoutError(f"parallel.boundaries={spec} at position {position}{character}: {fault}")

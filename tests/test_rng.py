"""Seeds."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from pipekit.rng import fold_seed

PATHS = st.lists(st.integers() | st.text(st.characters(exclude_characters="/:")), max_size=4)


def test_seeds_stay_as_they_are_from_version_to_version() -> None:
    assert fold_seed(1234, "init", "embed") == 3946882067969067238
    assert fold_seed(0) == int(hashlib.blake2b(b"0", digest_size=8).hexdigest(), 16) // 2


@given(st.integers(), PATHS)
def test_seeds_fit_torch(seed: int, path: list[int | str]) -> None:
    assert 0 <= fold_seed(seed, *path) < 2**63


@given(st.tuples(st.integers(), PATHS), st.tuples(st.integers(), PATHS))
def test_another_seed_or_path_gives_another_seed(
    one: tuple[int, list[int | str]], two: tuple[int, list[int | str]]
) -> None:
    assert (fold_seed(one[0], *one[1]) == fold_seed(two[0], *two[1])) == (one == two)


def test_numbers_and_texts_differ_and_paths_do_not_run_together() -> None:
    seeds = [fold_seed(1, 2), fold_seed(1, "2"), fold_seed(12), fold_seed(1, 1, 12), fold_seed(1, 11, 2)]
    assert len(set(seeds)) == len(seeds)


def test_neighbouring_uses_share_no_bits_in_common() -> None:
    seeds = [fold_seed(1, "layer", step, 0, 0) for step in range(256)]
    for bit in range(63):
        assert 80 < sum(seed >> bit & 1 for seed in seeds) < 176  # half of 256, within six standard deviations

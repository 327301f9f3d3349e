from __future__ import annotations

import contextlib
import pickle
import random

import numpy as np
import pytest
import torch

from pipekit.data.randomness import OwnRandomness

Draws = list[tuple[float, float, float]]


def draw(count: int) -> Draws:
    return [(float(torch.rand(())), float(np.random.rand()), random.random()) for _ in range(count)]


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_blocks_continue_each_other_and_so_do_the_draws_outside(seed: int) -> None:
    seed_all(seed)
    inside = draw(3)
    seed_all(5)
    outside = draw(4)
    seed_all(5)
    own, found = OwnRandomness(seed), []
    assert draw(1) == outside[:1]
    with own:
        found += draw(1)
    assert draw(2) == outside[1:3]
    with contextlib.suppress(KeyError), own:
        found += draw(1)
        raise KeyError
    assert draw(1) == outside[3:]
    with pickle.loads(pickle.dumps(own)):
        found += draw(1)
    assert found == inside
    with own.reseed(seed):
        assert draw(3) == inside

"""Mixtures: every source has its share after any number of samples, wherever a run was interrupted."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from pipekit.data.mixture import (
    LONGEST_PATTERN,
    MixedSource,
    Mixture,
    MixtureOrder,
    Phase,
    Weights,
    lowest_terms,
    plan_pattern,
    whole_weights,
)
from pipekit.errors import DataError

PATTERNS = st.lists(st.integers(0, 60), min_size=1, max_size=7).filter(any).map(lowest_terms)


@settings(max_examples=50, deadline=None)
@given(weights=PATTERNS)
@example(weights=(1,))
@example(weights=(0, 1))
@example(weights=(499, 499, 1, 1))
def test_each_source_has_its_share_after_any_number_of_samples_to_within_one(weights: Weights) -> None:
    pattern, length = plan_pattern(weights), sum(weights)
    counts = np.cumsum(pattern[:, None] == np.arange(len(weights)), axis=0)
    assert counts[-1].tolist() == list(weights)
    shares_times_length = np.arange(1, length + 1)[:, None] * np.array(weights)
    assert (np.abs(counts * length - shares_times_length) < length).all()


def test_weights_are_ratios_of_what_is_written() -> None:
    assert whole_weights([0.7, 0.2, 0.1], [1, 1, 1]) == (7, 2, 1)
    assert whole_weights([2, 1, 0], [9, 9, 9]) == (2, 1, 0)
    assert whole_weights([0.125, 0.25], [1, 1]) == (1, 2)


def test_auto_shares_what_the_numbers_leave_by_size() -> None:
    assert whole_weights(["auto", "auto"], [300, 100]) == (3, 1)
    assert whole_weights([0.6, "auto", "auto"], [7, 300, 100]) == (6, 3, 1)


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 10**12), min_size=1, max_size=6))
@example(sizes=[1, 10**12, 1, 1])
@example(sizes=[99_999_999_999] * 3 + [1])
def test_ratios_that_need_a_longer_pattern_are_rounded_to_parts_of_it(sizes: list[int]) -> None:
    weights = whole_weights(["auto"] * len(sizes), sizes)
    assert sum(weights) <= LONGEST_PATTERN
    for weight, size in zip(weights, sizes, strict=True):
        share = Fraction(size, sum(sizes))
        assert weight >= 1
        lost = abs(Fraction(weight, sum(weights)) - share) * LONGEST_PATTERN
        assert lost < 1 + len(sizes) * (size == max(sizes)), "the largest gives the small ones their part"


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    num_sources = draw(st.integers(1, 4))
    sources = tuple(
        MixedSource(f"source {index}", draw(st.integers(1, 30)), draw(st.sampled_from([None, None, 0.5, 1, 2.5, 3])))
        for index in range(num_sources)
    )
    weights = st.lists(st.sampled_from([0, 0.1, 0.3, 1, 2]), min_size=num_sources, max_size=num_sources).filter(any)
    whole = weights.map(lambda numbers: whole_weights(numbers, [1] * num_sources))
    steps = sorted(draw(st.sets(st.integers(1, 15), max_size=3)))
    return Mixture(
        sources, tuple((step, draw(whole)) for step in [0, *steps]), draw(st.integers(0, 99)), draw(st.booleans())
    )


def split_by_source(mixture: Mixture | MixtureOrder, samples: Any) -> list[list[int]]:
    """The samples of each source, counted from its own first."""
    ends = np.cumsum([source.num_samples for source in mixture.sources])
    where = np.searchsorted(ends, samples, side="right")
    return [
        (np.asarray(samples)[where == index] - (ends[index] - source.num_samples)).tolist()
        for index, source in enumerate(mixture.sources)
    ]


@settings(max_examples=40, deadline=None)
@given(mixture=mixtures(), batch_size=st.sampled_from([1, 4, 6]), data=st.data())
def test_a_run_that_goes_on_reads_what_it_would_have_read(
    mixture: Mixture, batch_size: int, data: st.DataObject
) -> None:
    goes_on_unchanged(mixture, batch_size, data)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(mixture=mixtures(), batch_size=st.sampled_from([1, 4, 6]), data=st.data())
def test_many_runs_that_go_on_read_what_they_would_have_read(
    mixture: Mixture, batch_size: int, data: st.DataObject
) -> None:
    goes_on_unchanged(mixture, batch_size, data)


def goes_on_unchanged(mixture: Mixture, batch_size: int, data: st.DataObject) -> None:
    whole = mixture.order(batch_size=batch_size)
    num_steps = int(min(25, whole.end // batch_size))
    samples = whole.indices(0, num_steps * batch_size)
    order, step = whole, 0
    while step < num_steps:
        length = data.draw(st.integers(1, num_steps - step))
        # Any two parts of it, as two replicas read them.
        middle = data.draw(st.integers(step * batch_size, (step + length) * batch_size))
        parts = [order.indices(step * batch_size, middle - step * batch_size)]
        parts += [order.indices(middle, (step + length) * batch_size - middle)]
        assert np.concatenate(parts).tolist() == samples[step * batch_size : (step + length) * batch_size].tolist()
        step += length
        position = step * batch_size
        assert order.counts(position) == whole.counts(position)
        order = mixture.order(step=step, position=position, batch_size=batch_size, phase=order.phase_at(position))
        assert order.end == whole.end


@settings(max_examples=30, deadline=None)
@given(mixture=mixtures(), batch_size=st.sampled_from([1, 4, 6]))
def test_each_source_is_read_epoch_by_epoch_and_within_its_limit(mixture: Mixture, batch_size: int) -> None:
    order = mixture.order(batch_size=batch_size)
    length = int(min(300, order.end))
    read = split_by_source(mixture, order.indices(0, length))
    assert [len(samples) for samples in read] == list(order.counts(length).values())
    for source, samples in zip(mixture.sources, read, strict=True):
        assert len(samples) <= source.most_samples
        for first in range(0, len(samples) - source.num_samples + 1, source.num_samples):
            assert sorted(samples[first : first + source.num_samples]) == list(range(source.num_samples))
        if not mixture.shuffle:
            assert samples == [index % source.num_samples for index in range(len(samples))]


@settings(max_examples=30, deadline=None)
@given(mixture=mixtures(), step=st.integers(0, 14), batch_size=st.sampled_from([1, 4]))
def test_stages_and_limits_that_change_between_two_starts_leave_the_past_as_it_was(
    mixture: Mixture, step: int, batch_size: int
) -> None:
    position = step * batch_size
    first = mixture.order(batch_size=batch_size)
    assume(position <= first.end)
    counts = first.counts(position)
    weights = tuple(reversed(mixture.stages[0][1]))
    changed = Mixture(
        tuple(MixedSource(each.name, each.num_samples) for each in mixture.sources), ((0, weights),), mixture.seed
    )
    order = changed.order(step=step, position=position, batch_size=batch_size, phase=first.phase_at(position))
    assert order.counts(position) == counts
    later = order.counts(position + sum(weights))
    if order.phase_at(position).start == position:
        assert [later[name] - counts[name] for name in counts] == list(weights)


def test_a_stage_begins_after_its_step_also_with_batches_of_another_size() -> None:
    sources = (MixedSource("web", 50), MixedSource("code", 50))
    mixture = Mixture(sources, ((0, (1, 0)), (3, (0, 1))), seed=1)
    first = mixture.order(batch_size=4)
    # After two steps of 4 samples, the third and last of the first stage has 10.
    order = mixture.order(step=2, position=8, batch_size=10, phase=first.phase_at(8))
    assert order.counts(18) == {"web": 18, "code": 0}
    assert order.counts(28) == {"web": 18, "code": 10}


def test_a_source_that_has_been_read_leaves_its_place_to_the_others() -> None:
    sources = (MixedSource("web", 1000), MixedSource("code", 10, epochs=2), MixedSource("math", 1000))
    order = Mixture(sources, ((0, (2, 1, 1)),), seed=1).order(batch_size=8)
    alone = order.phases[1]
    assert alone.weights == (2, 0, 1)
    assert order.counts(alone.start - 1)["code"] == 19
    web, code, math = alone.counts
    assert code == 20
    assert order.counts(alone.start + 300) == {"web": web + 200, "code": 20, "math": math + 100}


def test_a_mixture_whose_sources_have_all_been_read_ends() -> None:
    sources = (MixedSource("web", 30, epochs=1), MixedSource("code", 10, epochs=2), MixedSource("math", 7))
    order = Mixture(sources, ((0, (1, 1, 0)),), seed=1).order(batch_size=8)
    assert order.end == 50
    assert split_by_source(order, order.indices(0, 50))[0] != list(range(30))
    with pytest.raises(
        DataError, match="give 50 samples within their epochs, and the run needs more; raise the epochs"
    ):
        order.indices(48, 3)


def test_a_source_keeps_its_order_under_any_weights() -> None:
    sources = (MixedSource("web", 40), MixedSource("code", 30))
    read = [
        split_by_source(order, order.indices(0, 200))[0][:30]
        for weights in ((1, 1), (1, 3), (5, 2))
        for order in [Mixture(sources, ((0, weights),), seed=3).order(batch_size=8)]
    ]
    assert read[0] == read[1] == read[2]


def test_the_order_of_a_mixture_is_fixed_for_good() -> None:
    # A checkpoint holds only positions: another order in a later version would repeat and lose samples.
    sources = (MixedSource("web", 5), MixedSource("code", 3, epochs=1), MixedSource("math", 4))
    order = Mixture(sources, ((0, (3, 2, 1)), (2, (1, 0, 1))), seed=1234).order(batch_size=6)
    assert order.phases == (
        Phase(0, (3, 2, 1), (0, 0, 0)),
        Phase(8, (3, 0, 1), (4, 3, 1)),
        Phase(12, (1, 0, 1), (7, 3, 2)),
    )
    assert order.indices(0, 18).tolist() == [4, 5, 3, 7, 1, 10, 2, 6, 0, 4, 3, 8, 2, 11, 0, 9, 1, 11]


def test_a_far_position_costs_no_more_than_a_near_one() -> None:
    sources = (MixedSource("web", 10**12), MixedSource("code", 10**11, epochs=4))
    order = Mixture(sources, ((0, (7, 3)),), seed=0).order(batch_size=1024)
    position = 10**12
    assert order.counts(position) == {"web": 7 * 10**11, "code": 3 * 10**11}
    assert order.indices(position, 8).size == 8
    assert order.end == math.inf

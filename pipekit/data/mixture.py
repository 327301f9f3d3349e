"""Mixture: the source and its sample at each position of a run over several sources, computed without a table.

While the weights stay the same, a pattern of sources repeats itself. In it, and so after any number of samples, each
source has given its share to within one sample.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import NonNegativeInt

from pipekit.data.order import SampleOrder
from pipekit.errors import CheckpointError, DataError
from pipekit.rng import fold_seed

LONGEST_PATTERN = 100_000
"""Most samples after which the sources of a mixture follow each other in the same order again."""

Weights = tuple[int, ...]
"""A whole number for each source, in lowest terms; their sum is the length of the pattern."""


def whole_weights(weights: Sequence[float | Literal["auto"]], sizes: Sequence[int]) -> Weights:
    """Return weights as whole numbers in the same ratios, in lowest terms, whose sum is at most `LONGEST_PATTERN`.

    Decimal numbers are taken as they are written. Ratios that need a longer pattern are rounded to parts of it, and no
    weight above 0 to 0. The weights `auto` share what the numbers leave of 1, in proportion to their sizes.

    Example:
        >>> whole_weights([0.7, 0.2, 0.1], sizes=[1, 1, 1]), whole_weights(["auto", "auto", 0.25], sizes=[100, 200, 9])
        ((7, 2, 1), (1, 2, 1))
    """
    numbers = [None if weight == "auto" else Fraction(repr(weight)) for weight in weights]
    left = Fraction(1) - sum(number for number in numbers if number is not None)
    auto_size = sum(size for size, number in zip(sizes, numbers, strict=True) if number is None)
    exact = [left * size / auto_size if number is None else number for size, number in zip(sizes, numbers, strict=True)]
    total = sum(exact, Fraction(0))
    whole = lowest_terms([round(weight * math.lcm(*(each.denominator for each in exact))) for weight in exact])
    if sum(whole) <= LONGEST_PATTERN:
        return whole
    parts = [weight * LONGEST_PATTERN / total for weight in exact]
    floors = [max(math.floor(part), int(part > 0)) for part in parts]
    # The rest goes to those that have lost most; where each small one has got a part, the largest has given it.
    by_loss = sorted(range(len(parts)), key=lambda index: floors[index] - parts[index])
    rest = LONGEST_PATTERN - sum(floors)
    for index in by_loss[: max(0, rest)]:
        floors[index] += 1
    floors[max(range(len(floors)), key=floors.__getitem__)] += min(0, rest)
    return lowest_terms(floors)


def lowest_terms(weights: Sequence[int]) -> Weights:
    """Return weights without a common divisor."""
    divisor = math.gcd(*weights) or 1
    return tuple(weight // divisor for weight in weights)


@lru_cache(maxsize=16)
def plan_pattern(weights: Weights) -> npt.NDArray[np.int64]:
    """Return the source `(sum(weights),)` of each sample of a pattern in which source `i` stands `weights[i]` times.

    Among the first `n` samples, source `i` stands less than one time more or less often than `n * weights[i] /
    sum(weights)`: its sample `k` has a place from `(k - 1) * sum(weights) / weights[i]` up to `k * sum(weights) /
    weights[i]`, and of those whose place has begun, the one whose place ends first comes first.

    Source: Tijdeman, The Chairman Assignment Problem, Discrete Mathematics 32, 1980; Steiner and Yeomans, Level
        Schedules for Mixed-Model, Just-in-Time Processes, Management Science 39, 1993 (by earliest deadlines).

    Example:
        >>> plan_pattern((3, 2, 1)).tolist()
        [0, 1, 0, 1, 0, 2]
    """
    length = sum(weights)
    begins = [(0, index) for index, weight in enumerate(weights) if weight]
    given = [0] * len(weights)
    ready: list[tuple[int, int]] = []
    pattern = np.empty(length, dtype=np.int64)
    for place in range(length):
        while begins and begins[0][0] <= place:
            _, index = heapq.heappop(begins)
            heapq.heappush(ready, (-(-(given[index] + 1) * length // weights[index]), index))
        _, index = heapq.heappop(ready)
        pattern[place] = index
        given[index] += 1
        if given[index] < weights[index]:
            heapq.heappush(begins, (given[index] * length // weights[index], index))
    return pattern


@dataclass(frozen=True)
class MixedSource:
    """One source of a mixture: its name, its number of samples, and the most epochs that it may be read.

    `fingerprint` identifies its samples, so that a changed source is not taken for the one that was read before.
    """

    name: str
    num_samples: int
    epochs: float | None = None
    fingerprint: str = ""

    @property
    def most_samples(self) -> float:
        """The most samples of it in a run; infinite where there is no limit."""
        return math.inf if self.epochs is None else math.floor(Fraction(repr(self.epochs)) * self.num_samples)


@dataclass(frozen=True)
class SourceState:
    """Place up to which a source has been read, as a checkpoint holds it.

    Attributes:
        samples: of it before the position from which the sources have had their weights.
        weight: its share of the samples from there on, as a whole number.
        fingerprint: identifies its samples.
    """

    samples: NonNegativeInt
    weight: NonNegativeInt
    fingerprint: str = ""


@dataclass(frozen=True)
class MixtureState:
    """Places up to which the sources of a mixture have been read, by their names; mixed so from `start` on."""

    start: NonNegativeInt
    sources: Mapping[str, SourceState]


@dataclass(frozen=True)
class Phase:
    """Positions from `start` on in which the sources have the same weights; `counts` samples of each came before."""

    start: int
    weights: Weights
    counts: tuple[int, ...]

    def counts_at(self, position: int) -> tuple[int, ...]:
        """Return the samples of each source before a position of this phase."""
        if position == self.start:
            return self.counts
        rounds, rest = divmod(position - self.start, sum(self.weights))
        in_part = np.bincount(plan_pattern(self.weights)[:rest], minlength=len(self.weights)).tolist()
        return tuple(
            count + rounds * weight + part
            for count, weight, part in zip(self.counts, self.weights, in_part, strict=True)
        )

    def end(self, sources: Sequence[MixedSource]) -> float:
        """Return the position at which the first source has given all that it may; infinite where none ever has."""
        pattern, ends = plan_pattern(self.weights), [math.inf]
        for index, (source, count, weight) in enumerate(zip(sources, self.counts, self.weights, strict=True)):
            if weight and source.most_samples < math.inf:
                rounds, rest = divmod(int(source.most_samples) - count - 1, weight)
                ends.append(self.start + rounds * pattern.size + int(np.flatnonzero(pattern == index)[rest]) + 1)
        return min(ends)


@dataclass(frozen=True)
class MixtureOrder:
    """The order in which a run goes through the samples of several sources.

    Samples are counted through all sources, in their order: those of the second follow those of the first. Those of
    each source come in a `SampleOrder` of its own, whatever the weights are.

    Attributes:
        sources: the sources.
        phases: of the positions that can be asked for, in order; the last one never ends by itself.
        end: position at which every source that is read has given all that it may; infinite where none has a limit.
    """

    sources: tuple[MixedSource, ...]
    phases: tuple[Phase, ...]
    end: float
    seed: int
    shuffle: bool = True

    @property
    def num_samples(self) -> int:
        """Samples of all sources together."""
        return sum(source.num_samples for source in self.sources)

    def indices(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """Return the samples `(count,)` at positions `start` to `start + count - 1` of the run.

        Raises:
            DataError: if the sources have given all that they may before.
        """
        if start + count > self.end:
            raise DataError(
                f"the sources of data.mixture give {self.end:,} samples within their epochs, and the run needs more; "
                "raise the epochs, or lower train.steps"
            )
        samples = np.empty(count, dtype=np.int64)
        ends = [phase.start for phase in self.phases[1:]] + [start + count]
        for phase, end in zip(self.phases, ends, strict=True):
            first, last = max(start, phase.start), min(start + count, end)
            if first < last:
                samples[first - start : last - start] = self._indices_of(phase, first, last)
        return samples

    def _indices_of(self, phase: Phase, first: int, last: int) -> npt.NDArray[np.int64]:
        pattern = plan_pattern(phase.weights)
        where = pattern[np.arange(first - phase.start, last - phase.start) % pattern.size]
        samples, base = np.empty(last - first, dtype=np.int64), 0
        for index, (source, before) in enumerate(zip(self.sources, phase.counts_at(first), strict=True)):
            its = where == index
            order = SampleOrder(source.num_samples, fold_seed(self.seed, "source", source.name), self.shuffle)
            samples[its] = base + order.indices(before, int(its.sum()))
            base += source.num_samples
        return samples

    def phase_at(self, position: int) -> Phase:
        """Return the phase of a position."""
        return next(phase for phase in reversed(self.phases) if phase.start <= position)

    def counts(self, position: int) -> dict[str, int]:
        """Return the number of samples of each source before a position."""
        names = (source.name for source in self.sources)
        return dict(zip(names, self.phase_at(position).counts_at(position), strict=True))

    def state(self, position: int) -> MixtureState:
        """Return the state of the mixture that a checkpoint at a position has to hold."""
        phase = self.phase_at(position)
        return MixtureState(
            phase.start,
            {
                source.name: SourceState(samples=count, weight=weight, fingerprint=source.fingerprint)
                for source, count, weight in zip(self.sources, phase.counts, phase.weights, strict=True)
            },
        )


@dataclass(frozen=True)
class Mixture:
    """Sources, and their weights after each number of steps.

    Attributes:
        sources: the sources, in the order of the datasets.
        stages: weights, and the steps after which they begin, in order; the first after 0.
        seed: of the order of each source's samples.
        shuffle: False reads each source as it stands.
    """

    sources: tuple[MixedSource, ...]
    stages: tuple[tuple[int, Weights], ...]
    seed: int
    shuffle: bool = True

    def order(
        self,
        *,
        step: int = 0,
        position: int = 0,
        batch_size: int | Callable[[int], int],
        phase: Phase | None = None,
    ) -> MixtureOrder:
        """Return the order of a run that goes on after `step` steps, which have consumed `position` samples.

        Of what came before, `phase` tells all: the stages that are over, and the limits, may have been other ones.

        Args:
            step: steps made.
            position: samples consumed by them.
            batch_size: samples of each step from there on, or a function that returns those of so many steps together.
            phase: the phase of `position`; None at the start of a run.
        """
        begun = [weights for after, weights in self.stages if after <= step][-1]
        each = batch_size
        samples_of = each if callable(each) else lambda num_steps: num_steps * each
        coming = [(position + samples_of(after - step), weights) for after, weights in self.stages if after > step]
        phases = [phase or Phase(position, (0,) * len(self.sources), (0,) * len(self.sources))]
        for (start, weights), (end, _) in pairwise([(position, begun), *coming, (math.inf, begun)]):
            while start < end:
                counts = phases[-1].counts_at(int(start))
                active = lowest_terms(
                    [
                        weight if count < source.most_samples else 0
                        for source, weight, count in zip(self.sources, weights, counts, strict=True)
                    ]
                )
                if not any(active):
                    return MixtureOrder(self.sources, tuple(phases), start, self.seed, self.shuffle)
                if active != phases[-1].weights:
                    phases = [before for before in phases if before.start < start]
                    phases.append(Phase(int(start), active, counts))
                start = phases[-1].end(self.sources)
        return MixtureOrder(self.sources, tuple(phases), math.inf, self.seed, self.shuffle)

    def phase_of(self, state: MixtureState, position: int) -> Phase:
        """Return the phase of a position at which a checkpoint has left a mixture, maybe of other sources.

        Sources that have come since have given no sample, and those that have gone are forgotten.

        Raises:
            CheckpointError: if a source has changed.
        """
        for source in self.sources:
            then = state.sources.get(source.name)
            if then is not None and then.fingerprint != source.fingerprint:
                raise CheckpointError(
                    f"the source {source.name} of data.mixture gives other samples than when the checkpoint was saved, "
                    f"whose {then.samples:,} samples of it mean nothing now; restore it, or give it another name"
                )
        then_weights = tuple(each.weight for each in state.sources.values())
        before = Phase(state.start, then_weights, tuple(each.samples for each in state.sources.values()))
        names = [source.name for source in self.sources]
        mixed = [name for name, each in state.sources.items() if each.weight]
        if mixed == [name for name in names if name in mixed]:
            weights, counts, start = dict(zip(state.sources, then_weights, strict=True)), before.counts, state.start
        else:  # The pattern is another one, also where only the order has changed.
            weights, counts, start = {}, before.counts_at(position), position
        known = dict(zip(state.sources, counts, strict=True))
        return Phase(start, tuple(weights.get(name, 0) for name in names), tuple(known.get(name, 0) for name in names))

"""Sequential model-based search: candidates measured one after another, each chosen by what the others have taught.

The plan foresees the time of every candidate. Where it is wrong, it is wrong for candidates that are alike in the same
way: a device is slower than its table says, small micro-batches cost more, one schedule loses more in waiting. So the
logarithm of measured over planned time is taken for a Gaussian process over the properties of the candidates, which
corrects the planned times of those that are not measured yet, and knows how sure each correction is.

Source: Jones, Schonlau and Welch, Efficient Global Optimization of Expensive Black-Box Functions, section 4, for the
expected improvement; Rasmussen and Williams, Gaussian Processes for Machine Learning, algorithm 2.1, for the process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

_Array = NDArray[np.float64]

# Standard deviations of the logarithm of measured over planned time: of what all candidates have in common, of what
# each property adds, of what a combination of properties adds, and of a measurement.
_COMMON, _PROPERTY, _COMBINATION, _NOISE = 1.0, 0.25, 0.15, 0.03
# Two numbers are hardly alike if one is four times the other.
_OCTAVES = 2.0
# A candidate that fails, or takes too long, is learnt from as one that is slower by this factor than the slowest.
_FAILED_FACTOR = 2.0
# The last runs go to the candidates that are expected to be fastest, however sure that is.
_LAST_RUNS = 2
MARGIN = 0.01


@dataclass(frozen=True)
class Candidate:
    """A configuration that can be measured, as far as the search needs it.

    Attributes:
        planned_s: planned seconds of a step.
        memory_bytes: planned memory of the fullest rank.
        properties: what candidates are told apart by: numbers, compared by their ratios, and names.
        stands_in_for: index of the candidate that differs from this one only by needing more memory and sending fewer
            messages. This one is measured only if that one ran out of memory, or was ruled out.
    """

    planned_s: float
    memory_bytes: float
    properties: Mapping[str, float | str]
    stands_in_for: int | None = None


@dataclass(frozen=True)
class Measured:
    """Result of measuring a candidate.

    Attributes:
        step_time_s: seconds of a step; None where the run has failed.
        failure: why it has; "memory" where there was too little of it.
        text: the failure in words.
        peak_bytes: measured memory of the fullest rank; None where it is not known.
    """

    step_time_s: float | None
    failure: Literal["memory", "other"] | None = None
    text: str = ""
    peak_bytes: int | None = None


@dataclass
class Search:
    """State of a search, which can be read at any moment, also after an interruption.

    Attributes:
        candidates: all that there are. Of those with the same planned time that differ in one property alone, the
            earlier is measured first.
        margin: the search ends soon after no candidate is expected to be faster than the best by more than this share.
        results: what was measured, by the index of the candidate, in the order of the runs.
    """

    candidates: Sequence[Candidate]
    margin: float = MARGIN
    results: dict[int, Measured] = field(default_factory=dict)

    @property
    def best(self) -> int | None:
        """Index of the fastest candidate that was measured; None while there is none."""
        times = {index: result.step_time_s for index, result in self.results.items() if result.step_time_s is not None}
        return min(times, key=times.__getitem__) if times else None

    def ruled_out(self) -> set[int]:
        """Unmeasured candidates that need as much memory by the plan as one that did not get it, or more."""
        limits = [self.candidates[i].memory_bytes for i, result in self.results.items() if result.failure == "memory"]
        least = min(limits, default=math.inf)
        return {i for i, each in enumerate(self.candidates) if each.memory_bytes >= least} - self.results.keys()

    def corrected_s(self) -> list[float]:
        """Planned seconds of each candidate, corrected by what was measured of all."""
        mean, _ = self._correct(range(len(self.candidates)))
        return [float(value) for value in np.exp(mean)]

    def choose(self) -> int | None:
        """Index of the candidate from which the most is to be gained; None where none is expected to be worth a run."""
        left = self._left()
        if not left:
            return None
        mean, deviation = self._correct(left)
        if self.best is None:
            return left[int(np.argmin(mean))]
        best_s = self.results[self.best].step_time_s
        assert best_s is not None
        gains = [_expected_gain(math.log(best_s) - m, s) for m, s in zip(mean, deviation, strict=True)]
        chosen = int(np.argmax(gains))
        return left[chosen] if gains[chosen] > self.margin else None

    def run(self, measure: Callable[[int], Measured], *, most_runs: int) -> None:
        """Measure candidates until none is worth a run, or `most_runs` have been measured.

        The last two runs, and two once none is worth a run, go to those that are expected to be fastest.

        Args:
            measure: called with the index of a candidate.
            most_runs: limit on the number of candidates that are measured.
        """
        num_checks = 0
        while len(self.results) < most_runs:
            is_near_end = len(self.results) >= most_runs - _LAST_RUNS
            chosen = None if is_near_end else self.choose()
            if chosen is None:
                left = self._left()
                if not left or (num_checks == _LAST_RUNS and not is_near_end):
                    return
                mean, _ = self._correct(left)
                chosen = left[int(np.argmin(mean))]
                num_checks += 1
            self.results[chosen] = measure(chosen)

    def _left(self) -> list[int]:
        """Indices of the candidates to choose from."""
        ruled_out, left = self.ruled_out(), list[int]()
        lacking = ruled_out | {i for i, result in self.results.items() if result.failure == "memory"}
        for i in sorted(set(range(len(self.candidates))) - self.results.keys() - ruled_out):
            original = self.candidates[i].stands_in_for
            if original is not None and original not in lacking:
                continue
            if not any(_is_variant(self.candidates[i], self.candidates[earlier]) for earlier in left):
                left.append(i)
        return left

    def _correct(self, indices: Sequence[int]) -> tuple[_Array, _Array]:
        """Mean and standard deviation of the logarithm of each candidate's seconds."""
        planned = np.log([self.candidates[i].planned_s for i in indices])
        observed = self._observed()
        known = list(observed)
        prior = np.full(len(indices), _COMMON**2 + _COMBINATION**2 + self._num_properties * _PROPERTY**2)
        if not known:
            return planned, np.sqrt(prior)
        ratios = np.array([math.log(observed[i] / self.candidates[i].planned_s) for i in known])
        # Without one, the mean ratio would be drawn towards the plan's own.
        centre = float(np.median(ratios))
        covariance = self._covariance(known, known) + _NOISE**2 * np.eye(len(known))
        across = self._covariance(indices, known)
        solved = np.linalg.solve(covariance, np.column_stack([ratios - centre, across.T]))
        mean = planned + centre + across @ solved[:, 0]
        variance = prior - np.einsum("ij,ji->i", across, solved[:, 1:])
        return mean, np.sqrt(np.maximum(variance, 1e-12))

    def _observed(self) -> dict[int, float]:
        """Seconds to learn from, by the index of the candidate."""
        times = {i: result.step_time_s for i, result in self.results.items() if result.step_time_s is not None}
        for i, result in self.results.items():
            if result.failure == "other" and times:
                times[i] = _FAILED_FACTOR * max(max(times.values()), self.candidates[i].planned_s)
        return times

    @property
    def _num_properties(self) -> int:
        return len(self.candidates[0].properties)

    def _covariance(self, first: Sequence[int], second: Sequence[int]) -> _Array:
        alike = np.array(
            [[_alikeness(self.candidates[i], self.candidates[j]) for j in second] for i in first], dtype=np.float64
        )
        combined: _Array = alike.prod(axis=2)
        return np.asarray(_COMMON**2 + _PROPERTY**2 * alike.sum(axis=2) + _COMBINATION**2 * combined)


def _is_variant(one: Candidate, other: Candidate) -> bool:
    """True if the plan cannot tell two candidates apart by time, and they differ in one property alone."""
    differing = [name for name, value in one.properties.items() if value != other.properties[name]]
    return one.planned_s == other.planned_s and len(differing) == 1


def _alikeness(one: Candidate, other: Candidate) -> list[float]:
    """Likeness of two candidates in each property: from 0 to 1, which is equal."""
    return [_alike(value, other.properties[name]) for name, value in one.properties.items()]


def _alike(one: float | str, other: float | str) -> float:
    if isinstance(one, str) or isinstance(other, str):
        return float(one == other)
    return math.exp(-0.5 * (math.log2(one / other) / _OCTAVES) ** 2)


def _expected_gain(lead: float, deviation: float) -> float:
    """Expected part of a time that a candidate saves whose logarithm is below by `lead`, give or take `deviation`.

    Example:
        >>> round(_expected_gain(0.1, 1e-6), 6), round(_expected_gain(0.0, 0.1), 3), _expected_gain(-1.0, 0.01) < 1e-9
        (0.1, 0.04, True)
    """
    z = lead / deviation
    density = math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return lead * 0.5 * math.erfc(-z / math.sqrt(2)) + deviation * density

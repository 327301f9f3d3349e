"""Loss spikes: how far a loss stands above the last ones, in units of their spread."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable

# Fewer losses have no spread that one could trust.
_FEWEST_LOSSES = 20
# Of a normal distribution, the standard deviation is so many median deviations.
_DEVIATIONS = 1.4826
# Of the median: losses that are equal for a while are not spikes as soon as one differs.
_LEAST_SPREAD = 1e-3


class SpikeDetector:
    """Tells a loss that stands far above the last ones, by its robust z-score.

    The score is the distance from the median of the last losses, divided by their median absolute deviation times
    1.4826, which is the standard deviation where losses are normally distributed. Unlike mean and standard deviation,
    neither moves much with a few spikes among them. A lasting change of the losses is no spike any more once it fills
    half of the window.

    Args:
        window: number of losses to compare with.
        threshold: score above which a loss is a spike.

    Example:
        >>> detector = SpikeDetector(window=50, threshold=10.0)
        >>> scores = [detector.add(2.0 + 0.01 * (step % 5)) for step in range(50)]
        >>> max(score for score in scores if score is not None) < 2
        True
        >>> detector.add(2.5) > 10
        True
    """

    def __init__(self, *, window: int, threshold: float) -> None:
        self.threshold = threshold
        self.losses: deque[float] = deque(maxlen=window)

    def add(self, loss: float) -> float | None:
        """Return the score of a loss, and count it among the last ones from now on; None while there are too few.

        A loss that is not finite has no score, and is not counted.
        """
        if not math.isfinite(loss):
            return None
        score = self.score(loss)
        self.losses.append(loss)
        return score

    def score(self, loss: float) -> float | None:
        """Return the score of a loss among the last ones, negative where it is below their median."""
        assert self.losses.maxlen is not None
        if len(self.losses) < min(_FEWEST_LOSSES, self.losses.maxlen):
            return None
        median = statistics.median(self.losses)
        spread = _DEVIATIONS * statistics.median(abs(each - median) for each in self.losses)
        return (loss - median) / max(spread, _LEAST_SPREAD * abs(median), math.ulp(0.0))

    def restore(self, losses: Iterable[float]) -> None:
        """Compare with these losses from now on, the oldest first."""
        self.losses.clear()
        self.losses.extend(losses)

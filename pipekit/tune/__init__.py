"""Settings found by short runs: the learning rate, and the fastest layout."""

TIMING_TASK = "time"
"""Word by which a rank is told to time steps."""

"""The parts of `benchmarks/schedules.py`: the processes, what they run, and how they take turns."""

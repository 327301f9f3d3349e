"""Hangs: heartbeats of the ranks, a warning when a step stalls, and a report that names the rank at fault."""

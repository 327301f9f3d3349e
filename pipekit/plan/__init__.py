"""The plan of a run: every decision that is made before the processes start."""

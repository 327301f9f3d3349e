"""The plan of a run: every decision, made before the processes start."""

"""Settings found by short runs: the learning rate."""

"""Layer specs: a model as a list of them, its names, shapes and parameters."""

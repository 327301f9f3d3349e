"""Layer specs: a model as a list of specs, with its layer names, shapes and parameters."""

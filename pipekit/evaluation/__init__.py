"""Evaluation: perplexity on text, and tasks of lm-eval, for runs, checkpoints, exports and a model that is trained."""

"""Trained models outside of a run: export and sampling."""

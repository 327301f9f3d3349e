"""Fixtures that all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest

from gloo_workers import GlooWorkers

# How long an example takes depends on what else the machine does.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def gloo() -> Iterator[GlooWorkers]:
    """Processes that talk over gloo, shared by the whole session."""
    workers = GlooWorkers()
    yield workers
    workers.close()

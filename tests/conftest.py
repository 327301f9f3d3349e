"""Fixtures that all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gloo_workers import GlooWorkers


@pytest.fixture(scope="session")
def gloo() -> Iterator[GlooWorkers]:
    """Processes that talk over gloo, shared by the whole session."""
    workers = GlooWorkers()
    yield workers
    workers.close()

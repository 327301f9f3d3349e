"""Determined's names for trials on DeepSpeed: `import pipekit.compat.determined as det` in place of `determined`.

A file of trials runs with that one line changed; docs/determined.md has the differences.
"""

from __future__ import annotations

from pipekit.compat.determined import pytorch as pytorch
from pipekit.compat.determined.config import trial_config as trial_config

LOG_FORMAT = "%(asctime)s %(levelname)s [%(process)s] %(name)s: %(message)s"
"""Format for `logging.basicConfig`."""


def get_cluster_info() -> None:
    """Return None, as everywhere outside a cluster of Determined's."""

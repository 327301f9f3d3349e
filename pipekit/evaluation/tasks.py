"""Tasks of lm-eval: which are to be run and how, and their results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipekit.errors import ConfigError


def check_extra() -> None:
    """Check that lm-eval is installed.

    Raises:
        ConfigError: if not.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError("tasks need lm-eval, which is not installed; run pip install 'pipekit[eval]'")


@dataclass(frozen=True)
class TaskSettings:
    """Tasks to run, and how.

    Attributes:
        tasks: names, patterns with `*`, or paths of YAML files.
        include_path: folder of one's own tasks, beside those of lm-eval.
        num_fewshot: examples in front of each question; None as the task has it.
        limit: questions of each task at most; None for all.
        batch_size: rows of a forward.
        apply_chat_template: whether questions are put as messages of a chat.
        keeps_samples: whether `TaskResults` has every question and answer.
    """

    tasks: tuple[str, ...]
    include_path: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8
    apply_chat_template: bool = False
    keeps_samples: bool = False


@dataclass(frozen=True)
class TaskResults:
    """Results of tasks.

    Attributes:
        metrics: of each task and group by its name: values such as `acc` and `acc_stderr`.
        num_questions: of each task.
        num_truncated: requests whose context did not fit, so that its beginning was left out.
        samples: every question of each task with its answers, as lm-eval logs them; empty unless asked for.
    """

    metrics: Mapping[str, Mapping[str, float]]
    num_questions: Mapping[str, int]
    num_truncated: int
    samples: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)

    def numbers(self) -> dict[str, float]:
        """Each metric by a name of its own, such as `arc_easy_acc`, without standard errors."""
        return {
            f"{task}_{name}": value
            for task, values in self.metrics.items()
            for name, value in values.items()
            if "_stderr" not in name
        }

    def as_record(self) -> dict[str, Any]:
        """Metrics and counts as plain data, for JSON; a metric that is no number, such as a standard error of one
        question, is None."""
        tasks = {
            task: {name: value if math.isfinite(value) else None for name, value in values.items()}
            for task, values in self.metrics.items()
        }
        return {"tasks": tasks, "questions": dict(self.num_questions), "truncated": self.num_truncated}

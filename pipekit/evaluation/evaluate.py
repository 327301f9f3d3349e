"""Evaluation of a trained model: perplexity on texts, and tasks of lm-eval, as one record."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipekit.data.tokenizer import load_tokenizer, write_hf_tokenizer
from pipekit.evaluation.models import AskedModel
from pipekit.evaluation.perplexity import Perplexity, measure_perplexity
from pipekit.evaluation.tasks import TaskResults, TaskSettings
from pipekit.evaluation.texts import EvaluatedSource, Text


@dataclass(frozen=True)
class Evaluation:
    """Results of an evaluation.

    Attributes:
        source: folder of the checkpoint or the export.
        step: steps that the model was trained for; None of an export.
        window: tokens that the model saw at once for the perplexity.
        stride: tokens from one window to the next.
        texts: perplexity on each text.
        tasks: results of tasks; None where there were none.
    """

    source: str
    step: int | None
    window: int = 0
    stride: int = 0
    texts: tuple[Perplexity, ...] = ()
    tasks: TaskResults | None = None

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Evaluation:
        """Evaluation of its fields as JSON keeps them."""
        texts, tasks = fields["texts"], fields["tasks"]
        read = {"texts": tuple(Perplexity(**text) for text in texts), "tasks": tasks and TaskResults(**tasks)}
        return cls(**fields | read)

    def metrics(self) -> dict[str, float]:
        """Every number by one name, as trackers show it: `loss` of the only text, and such as `arc_easy_acc`."""
        found: dict[str, float] = {}
        for text in self.texts:
            prefix = "" if len(self.texts) == 1 else f"{text.name}_"
            found |= {f"{prefix}{name}": getattr(text, name) for name in ("loss", "perplexity", "bits_per_byte")}
        return found if self.tasks is None else found | self.tasks.numbers()

    def as_record(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        record: dict[str, Any] = {"step": self.step, "source": self.source}
        if self.texts:
            record |= {"window": self.window, "stride": self.stride}
            record["texts"] = [text.as_record() for text in self.texts]
        if self.tasks is not None:
            record |= self.tasks.as_record()
        return record


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation.

    Attributes:
        window: tokens that the model sees at once for the perplexity.
        stride: tokens from one window to the next.
        batch_size: sequences that are computed together.
        tasks: tasks of lm-eval; None where there are none.
    """

    window: int
    stride: int
    batch_size: int
    tasks: TaskSettings | None = None

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> EvaluationSettings:
        """Settings of their fields as JSON keeps them."""
        tasks = record["tasks"]
        if tasks is not None:
            path = tasks["include_path"]
            read = {"tasks": tuple(tasks["tasks"]), "include_path": None if path is None else Path(path)}
            tasks = TaskSettings(**tasks | read)
        return cls(**record | {"tasks": tasks})


def evaluate_model(
    model: AskedModel,
    source: EvaluatedSource,
    texts: Sequence[Text],
    settings: EvaluationSettings,
    *,
    on_progress: Callable[[str, float | None], None] = lambda message, fraction: None,
) -> Evaluation:
    """Measure the perplexity of texts, and run tasks; see `measure_perplexity` and `evaluate_tasks`."""
    tokenizer = load_tokenizer(source.tokenizer_file)
    window, stride = settings.window, settings.stride
    measured = tuple(
        measure_perplexity(
            text,
            model.score,
            tokenizer=tokenizer,
            window=window,
            stride=stride,
            batch_size=settings.batch_size,
            on_progress=lambda done, name=text.name: on_progress(f"reading {name}", done),  # type: ignore[misc]
        )
        for text in texts
    )
    tasks = None
    if settings.tasks is not None:
        tasks = evaluate_tasks(model, settings.tasks, tokenizer_file=source.tokenizer_file, on_progress=on_progress)
    return Evaluation(str(source.path), source.step, window, stride, measured, tasks)


def evaluate_tasks(
    model: AskedModel,
    settings: TaskSettings,
    *,
    tokenizer_file: Path,
    on_progress: Callable[[str, float | None], None],
) -> TaskResults:
    """Run tasks of lm-eval; see `pipekit.evaluation.harness.run_tasks`."""
    from transformers import AutoTokenizer

    from pipekit.evaluation.harness import run_tasks

    with tempfile.TemporaryDirectory() as folder:
        # As an export has it.
        write_hf_tokenizer(tokenizer_file, folder, model.longest_sequence)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return run_tasks(model, tokenizer, settings, on_progress=on_progress)

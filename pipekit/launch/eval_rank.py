"""A process of `pipekit eval --pp --tp`: `python -m pipekit.launch.eval_rank FILE`."""

from __future__ import annotations

import sys
from dataclasses import asdict

from pipekit.launch.model_ranks import ModelPart, run_part


def evaluate(part: ModelPart) -> None:
    """Evaluate the model on the task's texts and tasks; rank 0 writes the results."""
    from pathlib import Path

    from pipekit.evaluation.evaluate import EvaluationSettings, evaluate_model
    from pipekit.evaluation.models import AskedModel, GeneratorModel, ask_together
    from pipekit.evaluation.texts import EvaluatedSource, find_texts

    settings = EvaluationSettings.from_record(part.task["settings"])
    config = part.task["config"]

    def measure(model: AskedModel) -> None:
        read = EvaluatedSource.read(Path(part.task["source"]), None if config is None else Path(config))
        texts = find_texts(read, part.task["data"]) if part.task["has_texts"] else []
        part.write_result(asdict(evaluate_model(model, read, texts, settings)))

    ask_together(GeneratorModel(part.generator), measure, leads=part.leads)


if __name__ == "__main__":
    run_part(sys.argv[1:], evaluate)

"""lm-eval during a training: tasks on the current model at validations, also for a model in a pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from pipekit.config.callbacks_config import LmEvalConfig
from pipekit.distributed.processes import gather_objects, run_together, tell_object
from pipekit.engine.training_engine import TrainingEngine
from pipekit.errors import ConfigError
from pipekit.evaluation.evaluate import Evaluation, evaluate_tasks
from pipekit.evaluation.models import AskedModel, GeneratorModel, ask_together
from pipekit.evaluation.scoring import token_scores
from pipekit.evaluation.tasks import TaskResults, TaskSettings, check_extra
from pipekit.inference.generator import Generator
from pipekit.inference.language_model import LanguageModel
from pipekit.inference.load_model import StoredModel
from pipekit.line_files import LineFile
from pipekit.plan.run_folder import trim_records
from pipekit.training.ema import ema_weights
from pipekit.training.shipped.shipped_callback import ShippedCallback

if TYPE_CHECKING:
    from pipekit.training.context import TrialContext
    from pipekit.training.layers_run import LayersRun
    from pipekit.training.trial import Trial


class LmEval(ShippedCallback):
    """Callback that runs tasks of lm-eval, and reports their metrics with the validation, such as `val_arc_easy_acc`.

    Rank 0 sends requests, and all ranks compute. Each evaluation is a line of `evaluations.jsonl` in the run folder.

    Args:
        context: context of the trial.
        settings: the tasks, and when to run them.
    """

    def __init__(self, context: TrialContext, settings: LmEvalConfig) -> None:
        super().__init__(context)
        check_extra()
        self.settings = settings
        self._file: LineFile | None = None

    def check(self, trial: Trial, *, evaluates: bool) -> None:
        hooks = getattr(trial, "hooks", None)
        tokenizer_file = getattr(hooks, "tokenizer_file", None)
        if tokenizer_file is None:
            raise ConfigError(
                f"callbacks.lm_eval: {type(hooks or trial).__name__} trains no language model with a tokenizer; leave "
                "lm_eval out"
            )
        self._run, self._tokenizer_file = cast("LayersRun", trial), Path(tokenizer_file)
        settings, train = self.settings, self._run.config.train
        self._tasks = TaskSettings(
            settings.tasks,
            None if settings.include_path is None else Path(settings.include_path),
            settings.num_fewshot,
            settings.limit,
            batch_size=train.global_batch_size,
        )
        run_together(self._find_tasks)

    def _find_tasks(self) -> None:
        if self.is_first:
            from pipekit.evaluation.harness import find_tasks

            find_tasks(self._tasks)

    def on_trial_startup(self, first_batch_idx: int, checkpoint_uuid: str | None) -> None:
        if self.is_first:
            trim_records(self.context.folder.evaluations, first_batch_idx)

    def validation_metrics(self) -> dict[str, float]:
        step, settings = self.context.num_trained_batches, self.settings
        if settings.every is not None and step % settings.every and step != self._run.config.train.steps:
            return {}
        run = self._run
        with ema_weights(run.engine) if run.config.train.eval_ema else nullcontext():
            found = ask_together(self._live_model(), self._ask, leads=self.is_first)
        if found is not None:
            if self._file is None:
                self._file = LineFile(self.context.folder.evaluations, self.context.warn)
            evaluation = Evaluation(str(self.context.folder.path), step, tasks=found)
            self._file.write(json.dumps(evaluation.as_record()) + "\n")
        return tell_object(None if found is None else found.numbers())

    def on_trial_shutdown(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _ask(self, model: AskedModel) -> TaskResults:
        activity = self.context.activity

        def note(message: str, fraction: float | None) -> None:
            activity.note(f"lm-eval: {message}")

        return evaluate_tasks(model, self._tasks, tokenizer_file=self._tokenizer_file, on_progress=note)

    def _live_model(self) -> LiveModel:
        config = self._run.config
        longest = config.model.longest_sequence or config.train.sequence_length
        return LiveModel(self._run.engine, longest_sequence=longest, tokenizer_file=self._tokenizer_file)


class LiveModel(GeneratorModel):
    """Interface for evaluations to the model that an engine trains. All ranks call the same methods.

    The rows of a batch are distributed over replicas and micro-batches.

    Args:
        engine: engine that trains the model.
        longest_sequence: longest sequence of the model in tokens.
        tokenizer_file: the model's `tokenizer.json`.
    """

    def __init__(self, engine: TrainingEngine, *, longest_sequence: int, tokenizer_file: Path) -> None:
        self._engine = engine
        tp = engine.mpu.layout.tp
        # Tensor-parallel ranks may share out the sequence.
        self.longest_sequence = longest_sequence // tp * tp
        stored = StoredModel(tokenizer_file.parent, [], self.longest_sequence, tokenizer_file, None, {}, _read_nothing)
        super().__init__(Generator(cast("LanguageModel", self), stored))

    # What a Generator asks of its model.

    has_cache = False

    def next_logits(self, contexts: Sequence[Sequence[int]]) -> Tensor:
        """Logits `(B, V)` of the token that follows each of B contexts, in fp32 and host memory."""
        lengths = torch.tensor([len(context) for context in contexts])
        inputs = torch.zeros(len(contexts), int(lengths.max()), dtype=torch.int64)
        for row, context in zip(inputs, contexts, strict=True):
            row[: len(context)] = torch.tensor(context)
        labels = (lengths - 1)[:, None].expand_as(inputs)
        return self._forward(inputs, labels, _last_logits)[0]

    def forget(self) -> None:
        """Do nothing: no state is kept between calls."""

    def score(self, inputs: Tensor, lengths: Sequence[int], targets: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of candidate tokens."""
        log_probabilities, are_likeliest = self._forward(inputs, targets, token_scores)
        return log_probabilities[:, : inputs.shape[1]], are_likeliest[:, : inputs.shape[1]]

    def _forward(
        self, inputs: Tensor, labels: Tensor, pick: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """Results of `pick`, which is called with logits and labels, for all rows `(B, ...)`, on all ranks."""
        engine, layout = self._engine, self._engine.mpu.layout
        size, tp = engine.micro_batch_size, layout.tp
        num_rows, length = inputs.shape
        num_micro_batches = -(-num_rows // (size * layout.dp))
        rows = torch.arange(num_micro_batches * layout.dp * size).clamp(max=num_rows - 1)
        padding = (0, -length % tp)
        inputs = torch.nn.functional.pad(inputs, padding)[rows]
        labels = torch.nn.functional.pad(labels, (0, 0) * (labels.ndim - 2) + padding)[rows]
        own = range(engine.mpu.data_parallel_rank, num_micro_batches * layout.dp, layout.dp)
        picked: list[tuple[Tensor, ...]] = []

        def read() -> Iterator[tuple[Tensor, Tensor]]:
            for index in own:
                taken = slice(index * size, (index + 1) * size)
                yield inputs[taken], labels[taken]

        def observe(outputs: Any, own_labels: Any) -> None:
            picked.append(tuple(part.cpu() for part in pick(outputs, own_labels)))

        data = read() if engine.mpu.should_build_data_loader else None
        engine.observe_batch(data, observe, num_micro_batches=num_micro_batches)
        speaks = engine.mpu.is_last_stage and engine.mpu.tensor.rank == 0
        found = gather_objects(dict(zip(own, picked, strict=True)) if speaks else {})
        by_index = {index: parts for each in found for index, parts in each.items()}
        ordered = [by_index[index] for index in sorted(by_index)]
        return tuple(torch.cat(parts)[:num_rows] for parts in zip(*ordered, strict=True))


def _last_logits(logits: Tensor, last: Tensor) -> tuple[Tensor]:
    """Logits of the place that each row of `last` names."""
    return (logits[torch.arange(len(logits), device=logits.device), last[:, 0]].float(),)


def _read_nothing(name: str, shard: object) -> Tensor:
    raise AssertionError(f"{name} is in memory")

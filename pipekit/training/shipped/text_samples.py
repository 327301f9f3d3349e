"""Text samples: continuations of prompts by a language model, after each validation."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

import torch

from pipekit.config.callbacks_config import TextSamplesConfig
from pipekit.errors import ConfigError
from pipekit.line_files import LineFile
from pipekit.plan.run_folder import trim_records
from pipekit.training.shipped.shipped_callback import ShippedCallback
from pipekit.training.trial import Trial, makes_text

if TYPE_CHECKING:
    from pipekit.training.context import TrialContext

_logger = logging.getLogger(__name__)


class TextSamples(ShippedCallback):
    """Callback that continues prompts with the trial's `generate_text`, and appends the texts to `samples.jsonl`.

    Every rank calls `generate_text`, because an engine under ZeRO-3 or a pipeline needs all ranks; the first rank's
    text is kept. Each line has the batch, the prompt and the text.

    Args:
        context: context of the trial.
        settings: the prompts.
    """

    def __init__(self, context: TrialContext, settings: TextSamplesConfig) -> None:
        super().__init__(context)
        self.settings = settings
        self._file: LineFile | None = None

    def check(self, trial: Trial, *, evaluates: bool) -> None:
        if not makes_text(trial):
            raise ConfigError(
                f"callbacks.text_samples: {type(trial).__name__} has no generate_text(prompt), which continues a text; "
                "write one, or leave text_samples out"
            )
        if not evaluates:
            raise ConfigError(
                f"callbacks.text_samples: {type(trial).__name__} has no evaluation, after which text is sampled; write "
                "evaluate_batch and build_validation_data_loader, or leave text_samples out"
            )
        self._trial = trial

    def on_trial_startup(self, first_batch_idx: int, checkpoint_uuid: str | None) -> None:
        if self.is_first:
            trim_records(self.context.folder.samples, first_batch_idx)

    def on_validation_epoch_end(self, outputs: list[dict[str, float]]) -> None:
        # Here plain modules are in evaluation mode.
        with torch.no_grad():
            texts = [self._trial.generate_text(prompt) for prompt in self.settings.prompts]
        if not self.is_first:
            return
        batch = self.context.num_trained_batches
        if self._file is None:
            self._file = LineFile(self.context.folder.samples, self.context.warn)
        for prompt, text in zip(self.settings.prompts, texts, strict=True):
            self._file.write(json.dumps({"step": batch, "prompt": prompt, "text": text}, ensure_ascii=False) + "\n")
            _logger.info("batch %d: %s", batch, text)

    def on_trial_shutdown(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

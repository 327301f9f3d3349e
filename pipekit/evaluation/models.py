"""Models as evaluations ask them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from pipekit.errors import PipekitError
from pipekit.evaluation.scoring import token_scores
from pipekit.inference.generator import Generator


class AskedModel(Protocol):
    """Interface of a model that is evaluated."""

    @property
    def longest_sequence(self) -> int:
        """Most tokens that the model sees at once."""

    def score(self, inputs: Tensor, lengths: Sequence[int], targets: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of candidate tokens: a `pipekit.evaluation.scoring.TokenScorer`."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        stop: Sequence[str],
        seed: int,
    ) -> list[list[int]]:
        """New tokens of each prompt, until their text holds a string of `stop`; see `Generator.generate`."""


class GeneratorModel:
    """Model of a `Generator`; where that is spread over processes, all of them call the same methods.

    Args:
        generator: the model.
    """

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self.longest_sequence = generator.longest_sequence

    def score(self, inputs: Tensor, lengths: Sequence[int], targets: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of candidate tokens.

        Raises:
            PipekitError: if the model, such as one's own, does not return logits.
        """
        logits = self._generator.logits(inputs, lengths)
        if not isinstance(logits, Tensor) or logits.shape[:-1] != inputs.shape:
            what = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise PipekitError(
                f"{self._generator.stored.path}: the model returns {what} for {tuple(inputs.shape)} tokens, and an "
                "evaluation needs their logits (B, S, V)"
            )
        log_probabilities, are_likeliest = token_scores(logits, targets.to(logits.device))
        return log_probabilities.cpu(), are_likeliest.cpu()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        stop: Sequence[str],
        seed: int,
    ) -> list[list[int]]:
        """New tokens of each prompt."""
        found = self._generator.generate(
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop=stop,
            seed=seed,
            batch_size=len(prompts),
        )
        return [each.token_ids for each in found]

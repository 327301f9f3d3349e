"""Models as evaluations ask them: of one process, or of several, of which the first asks for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor

from pipekit.distributed.processes import tell_object
from pipekit.errors import PipekitError
from pipekit.evaluation.scoring import token_scores
from pipekit.inference.generator import Generator

Result = TypeVar("Result")


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

    def generate(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
        """New tokens of each prompt."""
        found = self._generator.generate(prompts, **options, batch_size=len(prompts))
        return [each.token_ids for each in found]


class LeadingModel:
    """Model of several processes as the first of them asks it: it tells the others, which `follow`, what to compute.

    Args:
        model: this process's part.
    """

    def __init__(self, model: AskedModel) -> None:
        self._model = model
        self.longest_sequence = model.longest_sequence

    def score(self, inputs: Tensor, lengths: Sequence[int], targets: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of candidate tokens."""
        tell_object(("score", [inputs, list(lengths), targets], {}))
        return self._model.score(inputs, lengths, targets)

    def generate(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
        """New tokens of each prompt."""
        given = [list(prompt) for prompt in prompts]
        tell_object(("generate", [given], options))
        return self._model.generate(given, **options)


def ask_together(model: AskedModel, evaluate: Callable[[AskedModel], Result], *, leads: bool) -> Result | None:
    """Evaluate a model of several processes: rank 0 calls `evaluate`, and all others compute what it asks for.

    Args:
        model: this process's part.
        evaluate: called with the model on rank 0 alone.
        leads: True on rank 0.

    Returns:
        What `evaluate` returned, on rank 0; None on the others.
    """
    if leads:
        try:
            return evaluate(LeadingModel(model))
        finally:
            tell_object(None)
    failure = None
    asked: Any
    while (asked := tell_object(None)) is not None:
        method, arguments, options = asked
        try:
            getattr(model, method)(*arguments, **options)
        except PipekitError as error:
            # Rank 0 has the same one, and says how it goes on.
            failure = failure or error
    if failure is not None:
        raise failure
    return None

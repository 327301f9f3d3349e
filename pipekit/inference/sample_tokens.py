"""Sampling from a language model: temperature, top-k, top-p, and the tokens that follow one prompt or several."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipekit.errors import ConfigError, PipekitError

NextLogits = Callable[[Sequence[Sequence[int]]], Tensor]
"""Logits `(B, V)` in host memory of the token that follows each of B contexts."""

# By which no difference of fp32 numbers is divided to more than fp64 holds.
_LEAST_TEMPERATURE = 1e-250


@dataclass(frozen=True)
class Sampling:
    """Sampling of a token: temperature, top-k and top-p (nucleus).

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token each time.
        top_k: draw among the `top_k` likeliest only, and all that are as likely as the last of them; None among all.
        top_p: draw among the likeliest whose probabilities, after `top_k`, first add up to this; None among all.

    Raises:
        ConfigError: if a number is out of range.

    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration" (top-p).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(
                f"temperature={self.temperature} must be at least 0; 0 takes the likeliest token each time"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k} must be at least 1; leave it out to draw among all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(
                f"top_p={self.top_p} must be above 0 and at most 1; leave it out to draw among all tokens"
            )

    def draw(self, logits: Tensor, generator: random.Random) -> int:
        """Draw a token from its logits `(V,)` in host memory.

        Raises:
            PipekitError: if they are not numbers.
        """
        # By numpy, whose calls cost a fraction of torch's where there is so little to do.
        scores = logits.numpy()
        likeliest = int(scores.argmax())  # the first nan where there is one
        largest = float(scores[likeliest])
        if not math.isfinite(largest):
            raise PipekitError(
                "the model's logits are nan or infinite: its training diverged; try an earlier checkpoint"
            )
        if self.temperature == 0:
            return likeliest
        tokens: Any = None
        if self.top_k is not None and self.top_k < len(scores):
            tokens = np.flatnonzero(scores >= np.partition(scores, -self.top_k)[-self.top_k])
            scores = scores[tokens]
        # In fp64 and from the largest down, so that no temperature overflows to more than a weight of zero.
        weights = np.exp((scores.astype(np.float64) - largest) / max(self.temperature, _LEAST_TEMPERATURE))
        if self.top_p is not None:
            order = np.argsort(-weights, kind="stable")
            sums = weights[order].cumsum()
            weights[order[sums - weights[order] >= self.top_p * sums[-1]]] = 0.0
        sums = weights.cumsum()
        # The first token whose sum reaches a number above 0 and at most the whole: never one of weight 0.
        drawn = int(sums.searchsorted((1 - generator.random()) * sums[-1]))
        return drawn if tokens is None else int(tokens[drawn])


def context_start(num_tokens: int, max_positions: int) -> int:
    """Index of the first token that a model still sees, of `num_tokens`.

    Whenever they have become more than `max_positions`, the oldest half of what it sees is forgotten.

    Example:
        >>> [context_start(num_tokens, 4) for num_tokens in range(3, 10)]
        [0, 0, 2, 2, 4, 4, 6]
    """
    half = max(1, max_positions // 2)
    return max(0, -(-(num_tokens - max_positions) // half) * half)


def continue_prompts(
    next_logits: NextLogits,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    max_positions: int,
    sampling: Sampling,
    seeds: Sequence[int],
    end_token_ids: Sequence[Collection[int]] | None = None,
    is_done: Callable[[int], bool] = lambda index: False,
) -> Iterator[tuple[int, int]]:
    """Yield index and token, one after the other, of the tokens that follow each of several prompts.

    Each prompt has draws of its own, by its own seed, so that it goes on as it would alone.

    Args:
        next_logits: the model.
        prompts: at least one token id each.
        max_new_tokens: how many to draw at most for each prompt.
        max_positions: how many tokens the model sees at most; see `context_start`.
        sampling: how to draw.
        seeds: one for each prompt.
        end_token_ids: of each prompt, tokens with which it does not go on, and which are not returned.
        is_done: asked after each token whether its prompt does not go on.

    Raises:
        ConfigError: before the first token, if a prompt is empty or `max_new_tokens` is below 0.
        PipekitError: if the model's logits are not numbers.
    """
    if not all(prompts):
        raise ConfigError("the prompt is empty; give one token at least, such as the one that ends a document")
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens={max_new_tokens} must be at least 0")
    generators = [random.Random(seed) for seed in seeds]
    tokens = [list(prompt) for prompt in prompts]
    going_on = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        if not going_on:
            return
        contexts = [tokens[index][context_start(len(tokens[index]), max_positions) :] for index in going_on]
        logits = next_logits(contexts)
        ended = set()
        for index, own in zip(going_on, logits.unbind(), strict=True):
            token = sampling.draw(own, generators[index])
            if end_token_ids is not None and token in end_token_ids[index]:
                ended.add(index)
                continue
            tokens[index].append(token)
            yield index, token
            if is_done(index):
                ended.add(index)
        going_on = [index for index in going_on if index not in ended]


def sample_tokens(
    model: Callable[[Tensor], Tensor],
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    max_positions: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    end_token_id: int | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[int]:
    """Yield the tokens that follow a prompt, until `end_token_id` or `max_new_tokens`, each from the whole text.

    Args:
        model: `(B, S)` token ids to `(B, S, V)` logits.
        prompt: at least one token id.
        max_new_tokens, max_positions: see `continue_prompts`.
        temperature, top_k, top_p: see `Sampling`.
        device: that of the model.

    Raises:
        ConfigError: before the first token, if the prompt is empty or a number is out of range.
        PipekitError: if the model's logits are not numbers.
    """

    @torch.no_grad()
    def next_logits(contexts: Sequence[Sequence[int]]) -> Tensor:
        return model(torch.tensor(contexts, dtype=torch.int64, device=device))[:, -1].float().cpu()

    drawn = continue_prompts(
        next_logits,
        [prompt],
        max_new_tokens=max_new_tokens,
        max_positions=max_positions,
        sampling=Sampling(temperature, top_k, top_p),
        seeds=[seed],
        end_token_ids=None if end_token_id is None else [[end_token_id]],
    )
    return (token for _, token in drawn)

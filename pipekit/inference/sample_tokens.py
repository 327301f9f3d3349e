"""Sampling from a language model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from pipekit.errors import ConfigError, PipekitError


@torch.no_grad()
def sample_tokens(
    model: Callable[[Tensor], Tensor],
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    max_positions: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    end_token_id: int | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[int]:
    """Yield the tokens that follow a prompt, until `end_token_id` or `max_new_tokens`.

    Args:
        model: `(B, S)` token ids to `(B, S, V)` logits.
        prompt: at least one token id.
        max_new_tokens: how many to draw at most.
        max_positions: how many tokens the model sees; older ones are forgotten.
        temperature: divides the logits; 0 takes the likeliest token each time.
        top_k: draw among the `top_k` likeliest only, and all that are as likely as the last of them; None among all.

    Raises:
        ConfigError: before the first token, if the prompt is empty or a number is out of range.
        PipekitError: if the model's logits are not numbers.
    """
    if not prompt:
        raise ConfigError("the prompt is empty; give one token at least, such as the one that ends a document")
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens={max_new_tokens} must be at least 0")
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature={temperature} must be at least 0; 0 takes the likeliest token each time")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k={top_k} must be at least 1; leave it out to draw among all tokens")
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        context = torch.tensor([tokens[-max_positions:]], dtype=torch.int64, device=device)
        logits = model(context)[0, -1].float().cpu()  # (V,)
        if logits.isnan().any():
            raise PipekitError("the model's logits are nan: its training diverged; try an earlier checkpoint")
        token = _draw(logits, temperature, top_k, generator)
        if token == end_token_id:
            return
        tokens.append(token)
        yield token


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < logits.numel():
        threshold = logits.topk(top_k).values[-1]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    # In fp64 and from the largest down, so that no temperature overflows.
    probabilities = torch.softmax((logits.double() - logits.max()) / temperature, dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))

"""Sampling from a language model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def generate_tokens(
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
        top_k: draw among the `top_k` likeliest only; None among all.
        seed: of the draws.
        end_token_id: stops before this token.
        device: where the model is.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        context = torch.tensor([tokens[-max_positions:]], dtype=torch.int64, device=device)
        logits = model(context)[0, -1].float().cpu()  # (V,)
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
    probabilities = torch.softmax(logits / temperature, dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))

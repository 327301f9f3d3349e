"""Language model for inference: logits of texts, and of the next tokens by a key-value cache."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pipekit.errors import ConfigError
from pipekit.layers.sequential import SequentialModel
from pipekit.models.transformer.block import Attention
from pipekit.models.transformer.cache import KeyValueCache, caching_modules, supports_cache
from pipekit.tensor_parallel import whole_outputs


class StageLink(Protocol):
    """Ties between the stages of a model that is a pipeline over several processes.

    Attributes:
        is_first: True if this process has the first layers.
        is_last: True if it has the last.
    """

    is_first: bool
    is_last: bool

    def receive(self, key: Hashable) -> Any:
        """Activations from the stage before; `key` is the same for all that have these shapes."""

    def send(self, activations: Any, key: Hashable) -> None:
        """Send activations to the next stage."""

    def share(self, logits: Tensor | None, key: Hashable) -> Tensor:
        """Logits of the last stage, on every rank."""

    def all_agree(self, value: bool) -> bool:
        """True if the value is true on every rank."""


class LanguageModel:
    """A model that scores tokens, all of it or the stage of one process.

    Where every layer supports it, keys and values of what has been read are kept, and only new tokens are computed.
    Other models, such as one's own, compute the whole text for each token. All ranks of a pipeline call the same
    methods with the same arguments, and get the same results.

    Args:
        model: the layers of this process, in evaluation mode.
        longest_sequence: most tokens that a sequence may have.
        device: that of the layers.
        link: to the other stages, if there are any.

    Attributes:
        layers: those of this process.
        has_cache: False where every token computes the whole text again.
    """

    def __init__(
        self,
        model: SequentialModel,
        *,
        longest_sequence: int,
        device: torch.device | str,
        link: StageLink | None = None,
    ) -> None:
        self.longest_sequence, self.device = longest_sequence, torch.device(device)
        self.layers, self._link = model, link
        # Called directly, where modules are.
        self._steps = [getattr(step, "_compiled_call_impl", None) or step for step in model.steps]
        functions = [step.func if isinstance(step, partial) else step for step in model.steps]
        own = all(map(supports_cache, functions))
        self.has_cache = own if link is None else link.all_agree(own)
        self._modules = caching_modules(model.layers)
        rotaries = [module.rotary for module in self._modules if isinstance(module, Attention) and module.rotary]
        self._turning_lengths = {rotary.turns_at for rotary in rotaries if rotary.turns_at is not None}
        self._cache: KeyValueCache | None = None
        self._read: list[Sequence[int]] = []  # the tokens that are in the cache

    @torch.inference_mode()
    def logits(self, token_ids: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Logits `(B, S, V)` of texts.

        Args:
            token_ids: `(B, S)` int64, padded on the right with any token.
            lengths: tokens of each text; all S unless given. What is returned for padding means nothing.

        Raises:
            ConfigError: if S is more than the model's longest sequence.
        """
        if token_ids.shape[1] > self.longest_sequence:
            raise ConfigError(
                f"a text of {token_ids.shape[1]} tokens is longer than the model's longest sequence, "
                f"{self.longest_sequence} tokens; cut it into shorter ones"
            )
        token_ids = token_ids.to(self.device)
        if lengths is None or not self._turning_lengths:
            return self._forward(token_ids)
        # How positions are rotated depends on the length of the text.
        scores = [self._forward(row[None, :length])[0] for row, length in zip(token_ids, lengths, strict=True)]
        padded = scores[0].new_zeros((*token_ids.shape, scores[0].shape[-1]))
        for row, own in zip(padded, scores, strict=True):
            row[: len(own)] = own
        return padded

    @torch.inference_mode()
    def next_logits(self, contexts: Sequence[Sequence[int]]) -> Tensor:
        """Logits `(B, V)` of the token that follows each of B contexts, in fp32 and host memory.

        Contexts that go on from those of the call before cost their new tokens alone, also where some are gone.
        """
        if not self.has_cache:
            rows = [self._forward(self._tensor([context]))[:, -1] for context in contexts]
            return torch.cat(rows).to("cpu", torch.float32)
        kept = self._find_kept(contexts)
        if kept is None:
            longest = max(map(len, contexts))
            padding = [longest - len(context) for context in contexts]
            self._cache = KeyValueCache(padding, self.device)
            new = [[0] * pad + list(context) for pad, context in zip(padding, contexts, strict=True)]
        else:
            assert self._cache is not None
            if len(kept) < len(self._read):
                self._cache.keep(kept)
            new = [list(context[len(self._read[row]) :]) for row, context in zip(kept, contexts, strict=True)]
        self._read = list(contexts)
        return self._forward(self._tensor(new), cache=self._cache)[:, -1].to("cpu", torch.float32)

    def forget(self) -> None:
        """Free the memory of keys and values."""
        self._cache, self._read = None, []

    def _find_kept(self, contexts: Sequence[Sequence[int]]) -> list[int] | None:
        """Places in the cache of what each context goes on from, all by as many tokens; None where one is not there."""
        kept: list[int] = []
        place, num_new = 0, 0
        for context in contexts:
            for read in self._read[place:]:
                place += 1
                growth = len(context) - len(read)
                if growth > 0 and growth == (num_new or growth) and context[: len(read)] == read:
                    break
            else:
                return None
            num_new = growth
            kept.append(place - 1)
            if any(len(read) <= length < len(context) for length in self._turning_lengths):
                return None
        return kept

    def _forward(self, token_ids: Tensor, *, cache: KeyValueCache | None = None) -> Tensor:
        """Logits of all tokens, or with a cache of the last ones alone."""
        link, activations = self._link, token_ids
        # The shapes of all that passes on follow from it.
        key = (*token_ids.shape, cache is None)
        if link is not None and not link.is_first:
            activations = link.receive(key)
        *steps, last = self._steps
        num_tokens = token_ids.shape[1]
        with nullcontext() if cache is None else cache.reading(self._modules, num_tokens):
            for step in steps:
                activations = step(activations)
            if cache is not None and num_tokens > 1 and (link is None or link.is_last):
                activations = activations[:, -1:]
            activations = last(activations)
        if link is None:
            return whole_outputs(activations)  # type: ignore[no-any-return]
        if not link.is_last:
            link.send(activations, key)
        return link.share(whole_outputs(activations) if link.is_last else None, key)

    def _tensor(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return torch.from_numpy(np.array(rows, dtype=np.int64)).to(self.device)

"""Key-value cache for generation: the keys and values of the tokens so far, so that each token is read only once.

Shapes: B sequences, S new tokens, T tokens that are attended to, K heads of keys and values, E head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pipekit.models.transformer.rotary import Rotary
from pipekit.models.transformer.sparse import HeadLayouts

_SPARE_TOKENS = 128

_Result = TypeVar("_Result")


@dataclass
class _Kept:
    """Keys and values `(B, K, capacity, E)` of one attention layer, of which those before `end` are there."""

    keys: Tensor
    values: Tensor
    end: int


class KeyValueCache:
    """Key-value cache: keys and values of every attention layer of a model, for a batch of growing sequences.

    Sequences end together: shorter ones are padded on the left. A layer whose attention has a window keeps little more
    than the tokens in its window.

    Args:
        padding: number of padding tokens on the left of each sequence.
        device: device of the model.

    Attributes:
        num_slots: number of tokens of each sequence that have been read, including padding.
        padding: `(B)`; None if no sequence is padded.
        reads: S, the number of tokens that are being read; 0 outside of `reading`, where layers do not use the cache.
        sees_all: True if one token of each sequence is being read, which attends to all earlier tokens that are kept.
    """

    def __init__(self, padding: Sequence[int], device: torch.device | str) -> None:
        self.num_slots, self.reads, self.sees_all = 0, 0, False
        self.padding = torch.tensor(padding, device=device) if any(padding) else None
        self._device = device
        self._layers: dict[nn.Module, _Kept] = {}
        self._readers: Sequence[nn.Module] = ()
        # What all layers compute alike, for the tokens that are being read.
        self._shared: dict[object, Any] = {}

    def reading(self, modules: Sequence[nn.Module], num_tokens: int) -> KeyValueCache:
        """Context manager in which modules with a `cache` use this one to read the next tokens of all sequences.

        Args:
            modules: the modules from `caching_modules`.
            num_tokens: number of tokens of each sequence.
        """
        self._readers, self.reads = modules, num_tokens
        self.sees_all = num_tokens == 1 and self.padding is None
        return self

    def __enter__(self) -> None:
        self._shared.clear()
        for module in self._readers:
            module.__dict__["cache"] = self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for module in self._readers:
            del module.__dict__["cache"]
        if kind is None:
            self.num_slots += self.reads
        self.reads = 0

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only the sequences at the given indices of the batch."""
        index = torch.tensor(rows, device=self._device)
        self.padding = None if self.padding is None else self.padding[index]
        for kept in self._layers.values():
            kept.keys, kept.values = kept.keys[index], kept.values[index]

    def positions(self) -> Tensor:
        """Positions of the tokens that are being read, `(1, S)`, or `(B, S)` if sequences are padded."""

        def compute() -> Tensor:
            slots = torch.arange(self.num_slots, self.num_slots + self.reads, device=self._device).unsqueeze(0)
            return slots if self.padding is None else (slots - self.padding.unsqueeze(1)).clamp(min=0)

        return self._once("positions", compute)

    def rotation(self, rotary: Rotary, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines `(B or 1, 1, S, R)` for the tokens that are being read."""

        def compute() -> tuple[Tensor, Tensor]:
            positions, end = self.positions(), self.num_slots + self.reads
            if self.padding is None or rotary.turns_at is None:
                cos, sin = rotary.angles(positions, end, dtype)
            else:
                lengths = (end - self.padding).tolist()
                rows = [rotary.angles(*row, dtype) for row in zip(positions, lengths, strict=True)]
                cos, sin = (torch.stack(parts) for parts in zip(*rows, strict=True))
            return cos.unsqueeze(1), sin.unsqueeze(1)

        return self._once((rotary.size, rotary.base, id(rotary.scaling), dtype), compute)

    def extend(self, layer: nn.Module, keys: Tensor, values: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        """Add keys and values `(B, K, S, E)` of the tokens that are being read to those of a layer.

        Returns:
            Keys and values `(B, K, T, E)` that these tokens may attend to: all, or as far back as the window reaches.
        """
        kept = self._layers.get(layer)
        held = 0 if kept is None else kept.end
        needed = held if window is None else min(held, window - 1)
        if kept is None or kept.end + self.reads > kept.keys.shape[2]:
            # Of the first tokens, the next ones see no more than a window either.
            begin = 0 if kept is not None or window is None else max(0, self.reads - window + 1)
            shape = (*keys.shape[:2], needed + self.reads - begin + _SPARE_TOKENS, keys.shape[3])
            grown = _Kept(keys.new_empty(shape), values.new_empty(shape), needed)
            if kept is not None:
                grown.keys[:, :, :needed] = kept.keys[:, :, held - needed : held]
                grown.values[:, :, :needed] = kept.values[:, :, held - needed : held]
            self._layers[layer] = grown
            if kept is None:
                grown.end = self.reads - begin
                grown.keys[:, :, : grown.end], grown.values[:, :, : grown.end] = (
                    keys[:, :, begin:],
                    values[:, :, begin:],
                )
                return keys, values
            kept = grown
        end = kept.end + self.reads
        kept.keys.narrow(2, kept.end, self.reads).copy_(keys)
        kept.values.narrow(2, kept.end, self.reads).copy_(values)
        first, kept.end = kept.end - needed, end
        return kept.keys.narrow(2, first, end - first), kept.values.narrow(2, first, end - first)

    def mask(self, num_keys: int, window: int | None, layouts: HeadLayouts | None = None) -> Tensor | None:
        """Attention mask `(S, T)` or `(B or 1, H or 1, S, T)`, True if a new token attends to one of the last T.

        None if each attends to all of them. The `layouts` give the blocks to which tokens attend.
        """
        if self.sees_all and layouts is None:
            return None

        def compute() -> Tensor:
            end = self.num_slots + self.reads
            queries = torch.arange(self.num_slots, end, device=self._device).unsqueeze(1)
            keys = torch.arange(end - num_keys, end, device=self._device)
            seen = queries >= keys
            if window is not None:
                seen &= queries - keys < window
            padding = 0 if self.padding is None else self.padding.view(-1, 1)
            if layouts is not None:
                places = [(slots.view(1, -1) - padding).clamp(min=0) for slots in (queries, keys)]
                seen = seen & layouts.sees(*places)
            if self.padding is None:
                return seen
            # What pads a sequence attends to itself, so that its weights are numbers; nobody else reads it.
            return seen & ((keys >= self.padding.view(-1, 1, 1, 1)) | (queries == keys))

        return self._once(("mask", num_keys, window, layouts), compute)

    def _once(self, key: object, compute: Callable[[], _Result]) -> _Result:
        if key not in self._shared:
            self._shared[key] = compute()
        result: _Result = self._shared[key]
        return result


def caching_modules(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Modules of layers that use a `KeyValueCache`, by its attribute `cache`."""
    return [module for layer in layers for module in layer.modules() if hasattr(type(module), "cache")]


def supports_cache(layer: object) -> bool:
    """True if a layer, or a tied layer's `forward_fn`, can read only the new tokens, with a `KeyValueCache`.

    It declares this with `supports_cache = True` in its own class; an inherited value does not count, since a subclass
    may not support it.
    """
    own = vars(layer) if callable(layer) and hasattr(layer, "__code__") else vars(type(layer))
    return own.get("supports_cache") is True

"""Generator: text and scores from the model of a run, a checkpoint or an export."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pipekit.checkpoint.manifest import TOKENIZER_FILE
from pipekit.config import ModelConfigSource
from pipekit.data.tokenizer import TextTokenizer, load_tokenizer
from pipekit.errors import ConfigError, PipekitError
from pipekit.inference.direct_calls import call_directly
from pipekit.inference.language_model import LanguageModel
from pipekit.inference.load_model import StoredModel, open_model
from pipekit.inference.prompts import encode_text, end_token_ids
from pipekit.inference.sample_tokens import Sampling, continue_prompts
from pipekit.inference.text_stream import TextStream

FinishReason = Literal["end", "stop", "length"]
"""Why a text has ended: by the token that ends a document, at a stop string, or at the limit of new tokens."""


@dataclass
class Generation:
    """Text that a model has generated from a prompt, and why it has ended.

    Attributes:
        token_ids: tokens that it has drawn, up to the one that ends the text.
        text: their text before a stop string; empty without a tokenizer.
        finish_reason: why it has ended.
    """

    token_ids: list[int]
    text: str = ""
    finish_reason: FinishReason = "length"


@dataclass(slots=True)
class Piece:
    """A piece of text as it comes: of which prompt, and why the text has ended with it, if it has."""

    index: int
    text: str
    token_id: int | None = None
    finish_reason: FinishReason | None = None


class Generator:
    """A trained model that scores texts and goes on from them, with a key-value cache where its layers support one.

    Where the model is spread over several processes, all of them call the same methods with the same arguments, and get
    the same results.

    Args:
        model: the model.
        stored: its files.

    Attributes:
        tokenizer: its tokenizer; None where there is none, and there are tokens alone.
        longest_sequence: most tokens that the model sees at once. Of a longer text it sees the newest: the oldest half
            is forgotten each time that it is full.
        has_cache: False where every token computes the whole text again.
    """

    def __init__(self, model: LanguageModel, stored: StoredModel) -> None:
        self.model, self.stored = model, stored
        self.tokenizer: TextTokenizer | None = None
        self._end_token_ids: list[int] = []
        if stored.tokenizer_file is not None:
            self.tokenizer = load_tokenizer(stored.tokenizer_file)
            self._end_token_ids = end_token_ids(stored.tokenizer_file)
        self.longest_sequence, self.has_cache = model.longest_sequence, model.has_cache

    @classmethod
    def open(
        cls,
        source: Path,
        *,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        trust_code: bool = False,
        config: ModelConfigSource | None = None,
    ) -> Generator:
        """Open the model of a run, a checkpoint or an export in this process.

        Args:
            source: the run's folder, one of its checkpoints, or an exported folder.
            device: what to compute on.
            trust_code: whether code that a checkpoint names as `model.builder` may run.
            config: configuration of a checkpoint's model, where it does not tell that; see `load_model_config`.

        Raises:
            PipekitError: if there is no model or no such device, or a file cannot be read.
        """
        return cls.build(open_model(source, given=config, trust_code=trust_code), device=device)

    @classmethod
    def build(cls, stored: StoredModel, *, device: Literal["auto", "cpu", "cuda"] = "auto") -> Generator:
        """Build a model whose files are open in this process; see `open`."""
        if device == "cuda" and not torch.cuda.is_available():
            raise PipekitError("--device cuda: no GPU is present; use --device auto or cpu")
        place = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
        model = stored.build().to(place)
        call_directly(model)
        return cls(LanguageModel(model, longest_sequence=stored.longest_sequence, device=place), stored)

    def logits(self, token_ids: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Logits `(B, S, V)` of texts, on the model's device; see `LanguageModel.logits`."""
        return self.model.logits(token_ids, lengths)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: Sequence[str] = (),
        seed: int | Sequence[int] = 0,
        batch_size: int = 16,
        end_token_ids: Sequence[Sequence[int]] | None = None,
    ) -> list[Generation]:
        """Continue prompts, each as it would go on alone.

        Args:
            prompts: token ids, at least one each.
            max_new_tokens: tokens to draw at most for each.
            temperature, top_k, top_p: see `Sampling`.
            stop: strings before which a text ends.
            seed: one for all prompts, or one for each.
            batch_size: prompts that are computed together.
            end_token_ids: of each prompt, tokens that end its text besides those that do by the model's files.

        Raises:
            ConfigError: before the first token, if a prompt is empty or a number is out of range.
            PipekitError: if the model's logits are not numbers.
        """
        results: list[Generation] = []
        seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
        for first in range(0, len(prompts), batch_size):
            batch = slice(first, first + batch_size)
            results += [Generation([]) for _ in prompts[batch]]
            for piece in self.stream(
                prompts[batch],
                max_new_tokens=max_new_tokens,
                sampling=Sampling(temperature, top_k, top_p),
                stop=stop,
                seeds=seeds[batch],
                end_token_ids=None if end_token_ids is None else end_token_ids[batch],
            ):
                result = results[first + piece.index]
                result.text += piece.text
                result.finish_reason = piece.finish_reason or result.finish_reason
                if piece.token_id is not None:
                    result.token_ids.append(piece.token_id)
        self.model.forget()
        return results

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        stop: Sequence[str] = (),
        seeds: Sequence[int],
        end_token_ids: Sequence[Sequence[int]] | None = None,
    ) -> Iterator[Piece]:
        """Continue prompts together, and yield each piece of text as it comes; see `generate`.

        The last piece of each prompt says why it has ended.
        """
        tokenizer = self.tokenizer
        if stop and (tokenizer is None or "" in stop):
            raise ConfigError(
                "stop: without a tokenizer there is no text to find a string in; leave it out"
                if tokenizer is None
                else "stop: an empty string is found everywhere; leave it out"
            )
        streams = [] if tokenizer is None else [TextStream(tokenizer, prompt, stop=stop) for prompt in prompts]
        drawn = [0] * len(prompts)
        for index, token in continue_prompts(
            self.model.next_logits,
            prompts,
            max_new_tokens=max_new_tokens,
            max_positions=self.longest_sequence,
            sampling=sampling,
            seeds=seeds,
            end_token_ids=[{*self._end_token_ids, *own} for own in end_token_ids or [()] * len(prompts)],
            is_done=lambda index: bool(streams) and streams[index].has_stopped,
        ):
            drawn[index] += 1
            yield Piece(index, streams[index].push(token) if streams else "", token)
        for index in range(len(prompts)):
            has_stopped = bool(streams) and streams[index].has_stopped
            reason: FinishReason = "stop" if has_stopped else "end" if drawn[index] < max_new_tokens else "length"
            yield Piece(index, streams[index].finish() if streams else "", finish_reason=reason)

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt; those of an empty one begin a document.

        Raises:
            PipekitError: if there is no tokenizer.
        """
        if self.tokenizer is None:
            raise no_tokenizer(self.stored.path)
        return encode_text(self.tokenizer, text)


def no_tokenizer(path: Path) -> PipekitError:
    """Error of a model that has no tokenizer."""
    return PipekitError(f"{path}: holds no {TOKENIZER_FILE}, so its tokens cannot be turned into text")

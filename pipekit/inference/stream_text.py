"""Text from a trained model: a run, a checkpoint, or an exported folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

from pipekit.checkpoint.manifest import TOKENIZER_FILE, resolve_checkpoint
from pipekit.config import ModelConfigSource
from pipekit.data.tokenizer import TextTokenizer, load_tokenizer
from pipekit.errors import ConfigError, PipekitError
from pipekit.inference.load_model import load_exported_model, load_model
from pipekit.inference.sample_tokens import sample_tokens
from pipekit.layers.sequential import SequentialModel
from pipekit.models.imported import HF_CONFIG_FILE


def stream_text(
    source: Path,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    trust_code: bool = False,
    config: ModelConfigSource | None = None,
) -> Iterator[str]:
    """Yield the prompt, then the text that follows it piece by piece.

    Args:
        source: a run's folder, one of its checkpoints, or an exported folder.
        prompt: text to go on from; empty begins a document.
        max_new_tokens, temperature, top_k, seed: see `sample_tokens`.
        device: what to compute on.
        trust_code: whether code that a checkpoint names as `model.builder` may run.
        config: configuration of a checkpoint's model, where it does not tell that; see `load_model_config`.

    Raises:
        PipekitError: if there is no model, no tokenizer, or no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise PipekitError("--device cuda: no GPU is present; use --device auto or cpu")
    place = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    model, tokenizer, max_positions = _load(source, config, trust_code=trust_code)
    model.to(place)
    prompt_ids = tokenizer.encode(prompt) or [tokenizer.end_token_id]
    yield prompt
    # The prompt is decoded along: a tokenizer may write a first token otherwise than one that follows another.
    token_ids = list(prompt_ids)
    shown = tokenizer.decode(token_ids)
    for token_id in sample_tokens(
        model,
        prompt_ids,
        max_new_tokens=max_new_tokens,
        max_positions=max_positions,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        end_token_id=tokenizer.end_token_id,
        device=place,
    ):
        token_ids.append(token_id)
        # A character of several bytes may come in several tokens; what there is of the last one waits for the rest.
        text = tokenizer.decode(token_ids).rstrip("�")
        if len(text) > len(shown):
            yield text[len(shown) :]
            shown = text


def _load(
    source: Path, given: ModelConfigSource | None, *, trust_code: bool
) -> tuple[SequentialModel, TextTokenizer, int]:
    """Model, tokenizer and longest sequence of an exported folder, or of a run or checkpoint."""
    if (source / HF_CONFIG_FILE).is_file():
        if given is not None:
            raise ConfigError(f"--config: {source} is an export, which describes its model itself; leave --config out")
        folder = source
        model, family = load_exported_model(folder)
        max_positions = family.longest_sequence
        tokenizer_file: Path | None = folder / TOKENIZER_FILE
    else:
        folder = resolve_checkpoint(source)
        model, config, tokenizer_file = load_model(folder, given=given, trust_code=trust_code)
        max_positions = config.model.longest_sequence or config.train.sequence_length
    if tokenizer_file is None or not tokenizer_file.is_file():
        raise PipekitError(f"{folder}: holds no {TOKENIZER_FILE}, so its tokens cannot be turned into text")
    return model, load_tokenizer(tokenizer_file), max_positions

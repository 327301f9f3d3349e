"""Proof of an export: the logits that `transformers` computes with it, against those of the checkpoint's own layers."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipekit.data.tokenizer import TextTokenizer
from pipekit.errors import PipekitError
from pipekit.inference.safetensors_folder import SafetensorsFolder

LayerOutputs = Callable[[Tensor], Iterator[tuple[str, Any]]]
"""Runs a model on token ids, and yields the name and the outputs of each layer."""

# Both sides compute in fp32 with the exported weights; what differs is the order of additions.
_TOLERANCE = 1e-5

# Prose, names, code and numbers: what the pieces of a vocabulary are made of.
_SAMPLE = """The harbour was quiet when Ms. O'Neill (42) counted 1,250 crates; "Naïve," she said, "but not wrong!"
def area(radius: float) -> float:
    return 3.14159 * radius ** 2  # in m²

| year | price in € |
|------|-----------:|
| 1998 |      19.99 |
Москва, 東京, München, القاهرة; https://example.org/?q=a+b&n=7 → 🙂
"""


class ExportMismatchError(PipekitError):
    """An export computes something else than the checkpoint."""


def prove_tokenizer(folder: Path, tokenizer: TextTokenizer, special_ids: Mapping[str, int | None]) -> list[int]:
    """Compare a text's token ids, and the special tokens, with those of the tokenizer that `transformers` reads.

    Returns:
        The token ids of the text.

    Raises:
        ExportMismatchError: if they differ.
    """
    import transformers

    with _quiet_transformers():
        theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        found = list(theirs(_SAMPLE, add_special_tokens=False)["input_ids"])
    name = f"{type(theirs).__name__} of transformers {transformers.__version__}"
    for key, token_id in special_ids.items():
        if (read := getattr(theirs, key)) != token_id and token_id is not None:
            raise ExportMismatchError(f"{key} is {token_id}, and {name} has {read}; see tokenizer_config.json")
    ours = tokenizer.encode(_SAMPLE)
    if ours != found:
        place = next((i for i, pair in enumerate(zip(ours, found, strict=False)) if pair[0] != pair[1]), len(found))
        seen, other = (tokenizer.decode(ids[place : place + 5], skip_special_tokens=False) for ids in (ours, found))
        raise ExportMismatchError(
            f"{name} splits the text {seen!r} into other tokens than the training did: {ours[place : place + 5]} "
            f"in training, {found[place : place + 5]} ({other!r}) in transformers; check tokenizer_class in "
            "tokenizer_config.json"
        )
    return ours


def compare_logits(
    folder: Path, hf_class: str, run_ours: LayerOutputs, prompt: Tensor, *, vocab_size: int, layer_by_layer: bool
) -> tuple[float, float]:
    """Largest absolute difference between the logits of an export and of its model, and what rounding explains of it.

    Args:
        folder: the export.
        hf_class: class of `transformers` that reads it.
        run_ours: runs the layers of the model, with the weights that were exported, on token ids.
        prompt: token ids `(B, S)`.
        vocab_size: number of token ids that the export knows; further ones of the model are left out.
        layer_by_layer: whether `transformers` computes with the weights of one layer in memory at a time.

    Raises:
        ExportMismatchError: if the difference is larger than that; the message names the first layer that differs.
    """
    with _quiet_transformers():
        model = _open_streamed(folder, hf_class) if layer_by_layer else _open_whole(folder, hf_class)
        with torch.no_grad():
            theirs = model(prompt).logits.float()  # (B, S, V)
        ((_, outputs),) = deque(run_ours(prompt), maxlen=1)
        ours = outputs[..., :vocab_size]
        tolerance = _TOLERANCE * max(1.0, float(ours.abs().max()))
        difference = float(theirs.sub_(ours).abs_().max()) if theirs.shape == ours.shape else float("inf")
        if not difference <= tolerance:
            raise ExportMismatchError(
                f"the exported logits are {difference:.3g} from the checkpoint's, and rounding explains at most "
                f"{tolerance:.2g}; {_first_difference(model, run_ours, prompt)}"
            )
    return difference, tolerance


def _first_difference(model: nn.Module, run_ours: LayerOutputs, prompt: Tensor) -> str:
    """First layer that differs, by our outputs, in their order, and those of their blocks."""
    theirs = _hidden_states(model, prompt)
    agreed, matched, after = "", 0, ""
    for name, ours in run_ours(prompt):
        after = after or name
        if not isinstance(ours, Tensor):
            continue
        for index in range(matched, len(theirs)):
            if _is_close(ours, theirs[index]):
                agreed, matched, after = name, index + 1, ""
                break
    if matched == len(theirs):
        return f"all blocks agree; the difference is in what follows {agreed}"
    return f"the first difference is {f'after {agreed}, ' if agreed else ''}in {after} or the rest of its block"


def _open_whole(folder: Path, hf_class: str) -> Any:
    import transformers

    reader = getattr(transformers, hf_class)
    return reader.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def _open_streamed(folder: Path, hf_class: str) -> Any:
    """Model of a class of `transformers` whose modules read their weights when they are called."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    with _parameters_on_meta():
        model = getattr(transformers, hf_class)(config).eval()
    stored = SafetensorsFolder(folder)
    stored_names = _stored_names(model, stored)
    tensors = model.state_dict(keep_vars=True)
    if unknown := stored_names.keys() - tensors.keys():
        raise ExportMismatchError(f"{hf_class} has no {stored_names[min(unknown)]}")
    # Tied tensors are stored once.
    origins = {id(tensors[name]): stored_name for name, stored_name in stored_names.items()}
    for name, tensor in tensors.items():
        if id(tensor) not in origins:
            raise ExportMismatchError(f"{hf_class} needs {name}, which was not exported")
        if not tensor.is_meta:
            tensor.copy_(stored[origins[id(tensor)]])
    for module in model.modules():
        if own := dict(module.named_parameters(recurse=False)):
            names = {key: origins[id(parameter)] for key, parameter in own.items()}
            module.register_forward_pre_hook(partial(_take_weights, stored=stored, names=names))
            module.register_forward_hook(partial(_drop_weights, placeholders=own))
    return model


def _stored_names(model: Any, stored: SafetensorsFolder) -> dict[str, str]:
    """Name of each stored tensor by its name in a class of `transformers`, which may have another since version 5."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:
        return {name: name for name in stored}
    renamings = [change for change in get_model_conversion_mapping(model) if isinstance(change, WeightRenaming)]
    tensors = model.state_dict()
    return {rename_source_key(name, renamings, [], model.base_model_prefix, tensors)[0]: name for name in stored}


@torch.no_grad()
def _hidden_states(model: nn.Module, prompt: Tensor) -> list[Tensor]:
    """Outputs of the embedding, of each block and of the last norm, in order."""
    last: list[Any] = []
    blocks = max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len, default=None)
    # Their list has the output of the last norm in place of the last block's.
    hook = blocks[-1].register_forward_hook(lambda *call: last.append(call[-1])) if blocks else None
    try:
        states = list(model(prompt, output_hidden_states=True).hidden_states or ())
    finally:
        if hook is not None:
            hook.remove()
    output = last[0][0] if last and isinstance(last[0], tuple) else last[0] if last else None
    return [*states[:-1], output, *states[-1:]] if isinstance(output, Tensor) else states


def _take_weights(module: nn.Module, _: Any, *, stored: SafetensorsFolder, names: Mapping[str, str]) -> None:
    for key, name in names.items():
        module._parameters[key] = nn.Parameter(stored.read(name, torch.float32), requires_grad=False)


def _drop_weights(module: nn.Module, *_: Any, placeholders: Mapping[str, nn.Parameter]) -> None:
    module._parameters.update(placeholders)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Build modules whose parameters have no storage, and whose buffers, which constructors compute, have theirs."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _is_close(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and bool(
        (ours - theirs).abs().max() <= 10 * _TOLERANCE * max(1.0, float(theirs.abs().max()))
    )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep `transformers` from writing warnings and progress bars."""
    from transformers.utils import logging

    verbosity, shows_progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_progress:
            logging.enable_progress_bar()

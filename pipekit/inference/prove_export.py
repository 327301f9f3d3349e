"""Proof of an export: the logits that `transformers` computes with it, against those of the checkpoint's own layers."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipekit.checkpoint.manifest import checksum
from pipekit.checkpoint.writer import tensor_bytes
from pipekit.data.tokenizer import TextTokenizer
from pipekit.errors import PipekitError
from pipekit.inference.safetensors_folder import SafetensorsFolder
from pipekit.layers.sequential import run_layers
from pipekit.layers.specs import LayerSpec

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


def read_back(folder: Path, checksums: Mapping[str, str]) -> None:
    """Read every tensor of a folder once, and compare it with the checksum of what was written.

    Raises:
        ExportMismatchError: if a tensor differs, or is not there; the message names it.
    """
    stored = SafetensorsFolder(folder)
    for name in sorted(checksums.keys() | stored.keys()):
        if name not in checksums or name not in stored or checksum(tensor_bytes(stored[name])) != checksums[name]:
            raise ExportMismatchError(f"{name} is not what was written; the disk may be at fault")


def prove_tokenizer(folder: Path, tokenizer: TextTokenizer, special_ids: Mapping[str, int | None]) -> list[int]:
    """Compare a text's token ids, and the special tokens, with those of the tokenizer that `transformers` reads.

    Returns:
        The token ids of the text.

    Raises:
        ExportMismatchError: if they differ.
    """
    transformers = _quiet_transformers()
    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    name = f"{type(theirs).__name__} of transformers {transformers.__version__}"
    for key, token_id in special_ids.items():
        if (found := getattr(theirs, key)) != token_id and token_id is not None:
            raise ExportMismatchError(f"{key} is {token_id}, and {name} has {found}; see tokenizer_config.json")
    ours = tokenizer.encode(_SAMPLE)
    found = list(theirs(_SAMPLE, add_special_tokens=False)["input_ids"])
    if ours != found:
        place = next((i for i, pair in enumerate(zip(ours, found, strict=False)) if pair[0] != pair[1]), len(found))
        seen, other = (tokenizer.decode(ids[place : place + 5], skip_special_tokens=False) for ids in (ours, found))
        raise ExportMismatchError(
            f"{name} cuts the text {seen!r} into other tokens than the training did ({ours[place : place + 5]} there, "
            f"{found[place : place + 5]} ({other!r}) in transformers); see the tokenizer_class in tokenizer_config.json"
        )
    return ours


class LogitsProof:
    """Comparison of the logits of an export with those of the model that it was made from.

    Args:
        folder: the export.
        hf_class: class of `transformers` that reads it.
        specs: the model, whose tensors `read` returns by logical name, rounded as they were exported.
        seed: as `pipekit.layers.sequential.run_layers` takes it.
        vocab_size: number of token ids that the export knows; further ones of the model are left out.
    """

    def __init__(
        self,
        folder: Path,
        hf_class: str,
        specs: Sequence[LayerSpec],
        *,
        read: Callable[[str], Tensor],
        seed: int | None,
        vocab_size: int,
    ) -> None:
        self._folder, self._hf_class, self._vocab_size = folder, hf_class, vocab_size
        self._run_ours = partial(run_layers, specs, read=read, seed=seed)

    def compare(self, prompt: Tensor, *, layer_by_layer: bool) -> tuple[float, float]:
        """Largest absolute difference of a logit, and what the order of additions explains.

        Args:
            prompt: token ids `(B, S)`.
            layer_by_layer: whether `transformers` computes with the weights of one layer in memory at a time.

        Raises:
            ExportMismatchError: if the difference is larger; the message names the first layer that differs.
        """
        model = self._open_streamed() if layer_by_layer else self._open_whole()
        with torch.no_grad():
            theirs = model(prompt).logits.float()  # (B, S, V)
        ((_, outputs),) = deque(self._run_ours(prompt), maxlen=1)
        ours = outputs[..., : self._vocab_size]
        tolerance = _TOLERANCE * max(1.0, float(ours.abs().max()))
        difference = float(theirs.sub_(ours).abs_().max()) if theirs.shape == ours.shape else float("inf")
        if not difference <= tolerance:
            raise ExportMismatchError(
                f"the exported logits are {difference:.3g} from the checkpoint's, and rounding explains "
                f"{tolerance:.2g} at most; {self._locate(model, prompt)}"
            )
        return difference, tolerance

    def _locate(self, model: nn.Module, prompt: Tensor) -> str:
        """First layer that differs, by our outputs, in their order, and those of their blocks."""
        theirs = _hidden_states(model, prompt)
        agreed, matched, after = "", 0, ""
        for name, ours in self._run_ours(prompt):
            after = after or name
            if not isinstance(ours, Tensor):
                continue
            for index in range(matched, len(theirs)):
                if _is_close(ours, theirs[index]):
                    agreed, matched, after = name, index + 1, ""
                    break
        if matched == len(theirs):
            return f"all blocks agree, so it is what follows {agreed}"
        return f"the first difference is {f'behind {agreed}, ' if agreed else ''}in {after} or the rest of its block"

    def _open_whole(self) -> Any:
        transformers = _quiet_transformers()
        model = getattr(transformers, self._hf_class).from_pretrained(
            self._folder, dtype=torch.float32, local_files_only=True
        )
        return model.eval()

    def _open_streamed(self) -> Any:
        """Build the class of `transformers` without weights; each module reads its own when it is called."""
        transformers = _quiet_transformers()
        config = transformers.AutoConfig.from_pretrained(self._folder, local_files_only=True)
        with _parameters_on_meta():
            model = getattr(transformers, self._hf_class)(config).eval()
        stored = SafetensorsFolder(self._folder)
        stored_names = _stored_names(model, stored)
        tensors = model.state_dict(keep_vars=True)
        if unknown := stored_names.keys() - tensors.keys():
            raise ExportMismatchError(f"{self._hf_class} has no {stored_names[min(unknown)]}")
        # Tied tensors are stored once.
        origins = {id(tensors[name]): stored_name for name, stored_name in stored_names.items()}
        for name, tensor in tensors.items():
            if id(tensor) not in origins:
                raise ExportMismatchError(f"{self._hf_class} needs {name}, which was not exported")
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


def _quiet_transformers() -> Any:
    import transformers

    warnings.filterwarnings("ignore", module="transformers")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers

"""Models made by hand, as checkpoints and as public ones come, without processes and without a training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from chat_templates import TEMPLATES, without_blocks
from chat_templates import write_chat_tokenizer as write_marked_tokenizer
from pipekit.checkpoint.manifest import Manifest, TensorEntry, TrainingState
from pipekit.config import Config, parse_config
from pipekit.data.tokenizer import train_tokenizer
from pipekit.inference.hugging_face import to_hf
from pipekit.layers.sequential import SequentialModel
from pipekit.models import build_layers
from pipekit.models.family import TransformerFamily

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TEXT = "def function(argument):\n    return argument + 1\n"


def small_tokenizer() -> Tokenizer:
    """Return a tokenizer of less than 300 tokens."""
    return train_tokenizer([TEXT] * 20, vocab_size=300).backend


def random_model(**settings: Any) -> tuple[Config, dict[str, Tensor]]:
    """Return a small model whose logits are far from zero, as a configuration and its logical tensors.

    Args:
        **settings: of its `model` section, besides sizes.
    """
    sizes = {"vocab_size": 301, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "ffn_size": 48, "max_positions": 24}
    model = {**sizes, "init_std": 0.3, **settings}
    config = parse_config({"model": model, "train": {"steps": 1, "sequence_length": 24}})
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in SequentialModel(build_layers(config)).logical_tensors().items():
        tensors[name] = tensor.detach().clone()
        if tensor.ndim == 1:  # norms and biases that are all ones or zeros would hide a mix-up
            tensors[name] += 0.1 * torch.randn(tensor.shape, generator=generator)
    return config, tensors


def write_hf_folder(folder: Path, *, with_tokenizer: bool = True, **settings: Any) -> None:
    """Write a small random Llama as the files in which public models come.

    Args:
        folder: the folder to make.
        with_tokenizer: whether a tokenizer is among the files.
        **settings: of its `model` section, besides the sizes of `random_model`.
    """
    config, tensors = random_model(**{"family": "llama", **settings})
    assert isinstance(config.model, TransformerFamily)
    folder.mkdir(parents=True)
    stored = config.model.hf_config(end_token_id=0, dtype="float32")
    (folder / "config.json").write_text(json.dumps(stored))
    save_file(dict(to_hf(config.model, tensors)), folder / "model.safetensors", metadata={"format": "pt"})
    if with_tokenizer:
        small_tokenizer().save(str(folder / "tokenizer.json"))


def write_chat_tokenizer(folder: Path, *, template: str | None = CHAT_TEMPLATE) -> Path:
    """Write a tokenizer with a chat template as transformers saves one, and return its file."""
    from transformers import PreTrainedTokenizerFast

    backend = small_tokenizer()
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder / "tokenizer.json"


def examples_at_work(folder: Path) -> Path:
    """Make a working directory in which every shipped example can be trained, and return it.

    It has the examples, the pages of the docs, text and conversations of one's own, and small random models in place of
    the public ones that a user downloads.
    """
    for name in ("examples", "docs"):
        (folder / name).symlink_to(Path(__file__).resolve().parents[1] / name)
    sizes = {"max_positions": 512, "num_kv_heads": 2, "tied_embedding": True}
    write_hf_folder(folder / "downloads/SmolLM2-135M", **sizes)
    chat_model = folder / "downloads/SmolLM2-135M-Instruct"
    write_hf_folder(chat_model, with_tokenizer=False, vocab_size=306, **sizes)
    write_marked_tokenizer(chat_model, without_blocks(TEMPLATES["chatml"]))
    (folder / "my_chats").mkdir()
    for name, numbers in (("train", range(40)), ("held_out", range(40, 43))):
        chats = [
            [
                {"role": "user", "content": f"What does f_{number} do?"},
                {"role": "assistant", "content": f"It returns {number}."},
            ]
            for number in numbers
        ]
        lines = (json.dumps({"messages": messages}) + "\n" for messages in chats)
        (folder / f"my_chats/{name}.jsonl").write_text("".join(lines))
    (folder / "my_text").mkdir()
    for number in range(40):
        (folder / f"my_text/{number}.txt").write_text(TEXT.replace("function", f"f_{number}") * 40)
    return folder


def write_checkpoint(
    run: Path,
    config: Config,
    tensors: Mapping[str, Tensor],
    *,
    step: int = 5,
    tokenizer: Tokenizer | Literal["small"] | None = "small",
    script: str | None = None,
    base: Mapping[str, str] | None = None,
) -> Path:
    """Write a checkpoint of one file into a run's folder, and return its path.

    With `script` it is one that a script's own training loop would have left, with that as its `config.yaml`; with
    `base`, the record of the weights that adapters are added to, the tensors are those of adapters.
    """
    folder = run / f"checkpoints/step-{step:08d}"
    folder.mkdir(parents=True)
    file = "weights-0000.safetensors"
    save_file(dict(tensors), folder / file)
    (folder / "config.yaml").write_text(script or config.to_yaml())
    if tokenizer is not None:
        (small_tokenizer() if tokenizer == "small" else tokenizer).save(str(folder / "tokenizer.json"))
    client_state = {"client_state": {}, "lr_scheduler": None} if script else {}
    state = TrainingState(
        step=step,
        consumed_samples=8 * step,
        seed=1,
        lr=0.1,
        optimizer={},
        client_state=client_state,
        base=base or {},
    )
    write_manifest(folder, {name: {"weights": (file, tensor)} for name, tensor in tensors.items()}, state)
    return folder


def write_manifest(
    folder: Path, tensors: Mapping[str, Mapping[str, tuple[str, Tensor]]], training: TrainingState
) -> Manifest:
    """Write the manifest of what a folder holds, and return it.

    Args:
        folder: the checkpoint.
        tensors: by logical name and kind, the file that holds the tensor, and the tensor.
        training: the state of the training.
    """
    entries = {
        name: TensorEntry(
            tuple(kinds["weights"][1].shape),
            str(kinds["weights"][1].dtype).removeprefix("torch."),
            {kind: file for kind, (file, _) in kinds.items()},
            checksums={
                kind: xxhash.xxh3_128_hexdigest(tensor.numpy().tobytes()) for kind, (_, tensor) in kinds.items()
            },
        )
        for name, kinds in tensors.items()
    }
    files = [path for path in folder.iterdir() if path.name != "manifest.json"]
    others = [path for path in files if path.suffix != ".safetensors"]
    manifest = Manifest(
        training,
        entries,
        {path.name: path.stat().st_size for path in files},
        file_checksums={path.name: _checksum(path.read_bytes()) for path in others},
    )
    (folder / "manifest.json").write_text(manifest.to_json())
    return manifest


def _checksum(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)

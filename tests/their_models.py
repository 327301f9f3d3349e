"""Random models of `transformers`, beside what pipekit makes of their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from pipekit.inference.hugging_face import to_hf
from pipekit.inference.load_model import open_model
from pipekit.models.family import TransformerFamily
from pipekit.models.imported import read_hf_folder
from tensor_parallel.outcomes import tokens_and_labels


def assert_their_model_is_ours(config: TransformerFamily, folder: Path, *, dtype: torch.dtype, rtol: float) -> None:
    """Let transformers write a random model, read it, and compare settings, logits, and the bits of all tensors.

    Args:
        config: settings of the model.
        folder: to write into.
        dtype: number format in which both compute.
        rtol: largest difference of the logits, by their norm.
    """
    torch.manual_seed(5)
    stored = transformers.AutoConfig.for_model(**config.hf_config(end_token_id=0, dtype="float32"))
    theirs: Any = transformers.AutoModelForCausalLM.from_config(stored).to(dtype).eval()
    theirs.save_pretrained(folder)
    ours, read = open_model(folder).build(), read_hf_folder(folder)
    assert read == config
    tokens, _ = tokens_and_labels()
    with torch.no_grad():
        expected, actual = theirs(tokens).logits, ours.to(dtype)(tokens)
    assert float((actual - expected).norm() / expected.norm()) <= rtol
    files, back = load_file(folder / "model.safetensors"), dict(to_hf(read, ours.logical_tensors()))
    assert back.keys() == files.keys()
    for name, tensor in back.items():
        assert torch.equal(tensor, files[name]), name

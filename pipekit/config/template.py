"""Template of a new configuration file: the keys that a first run needs, each with its description as a comment."""

from __future__ import annotations

import textwrap
from typing import Any, Literal

from pipekit.config.load import parse_config
from pipekit.config.schema import Config
from pipekit.errors import ConfigError
from pipekit.settings.yaml_source import write_yaml

Offload = Literal["none", "cpu", "nvme"]

_HEAD = """\
# Configuration of a pipekit run. Check it with `pipekit plan`, then start it with `pipekit train`.
# docs/configuration.md and `pipekit schema` describe all other keys and their defaults.
"""


def config_template(
    *,
    zero: int = 1,
    offload: Offload = "none",
    nvme_dir: str | None = None,
    pp: int = 1,
    folder: str | None = None,
    lora: int | None = None,
) -> str:
    """Text of a working YAML file, with the description of each key as a comment above it.

    Args:
        zero: ZeRO stage, 0 to 3.
        offload: memory for optimizer states, and with ZeRO-3 for weights too: `none` keeps them on the device, `cpu`
            in host memory, `nvme` in files.
        nvme_dir: folder for these files.
        pp: pipeline-parallel degree.
        folder: folder of a Hugging Face model to fine-tune; None trains a small model from scratch.
        lora: rank of LoRA adapters to train instead of its weights; None trains the weights.

    Raises:
        ConfigError: if the arguments are incompatible, or pipekit does not support the model in the folder.

    Example:
        >>> print(config_template(zero=2, offload="cpu").split("parallel:\\n")[1].split("\\n\\n")[0])
          # Pipeline-parallel degree: the number of ranks that a model is spread over.
          pp: 1
    """
    if (offload == "nvme") != (nvme_dir is not None):
        raise ConfigError("--offload=nvme and --nvme-dir=DIR need each other: the folder is for the offloaded files")
    if lora is not None and folder is None:
        raise ConfigError(f"--lora={lora} needs a model to adapt; add --from FOLDER")
    values = _values(zero, offload, pp)
    if folder is not None:
        values = _from_folder(values, folder, lora)
    if nvme_dir is not None:
        values["parallel"]["nvme_dir"] = nvme_dir
    parse_config(values)
    parts = [_HEAD]
    for name, section in values.items():
        field = Config.model_fields[name]
        lines = [*_comment(field.description, ""), f"{name}:"]
        # The model is a union of families; the parsed one has the fields of its family.
        fields = type(getattr(parse_config(values), name)).model_fields
        for key, value in section.items():
            lines += _comment(fields[key].description, "  ")
            lines += [f"  {line}" for line in write_yaml({key: value}).splitlines()] + [""]
        parts.append("\n".join(lines))
    return "\n".join(parts).rstrip("\n") + "\n"


def _values(zero: int, offload: Offload, pp: int) -> dict[str, dict[str, Any]]:
    kept = {"none": "none", "cpu": "parameters" if zero == 3 else "optimizer", "nvme": "nvme"}[offload]
    return {
        "model": {"family": "gpt2", "preset": "tiny"},
        "parallel": {"pp": pp, "dp": "auto", "zero": zero, "offload": kept},
        "train": {
            "steps": 300,
            "global_batch_size": 16,
            "micro_batch_size": 4,
            "sequence_length": 128,
            "precision": "auto",
            "gradient_clipping": 1.0,
        },
        "optimizer": {"type": "adamw", "lr": 1e-3, "weight_decay": 0.1},
        "scheduler": {"type": "cosine", "warmup_steps": 30},
        "data": {"source": "python-stdlib", "vocab_size": 2048},
        "checkpoint": {"interval": "15m", "keep": 2},
        "logging": {"interval": 10, "tensorboard": False},
    }


def _from_folder(values: dict[str, dict[str, Any]], folder: str, lora: int | None) -> dict[str, dict[str, Any]]:
    """Values that fine-tune the model of a folder, at a low learning rate."""
    model: dict[str, Any] = {"family": "auto", "init_from": folder}
    longest = parse_config({"model": model, "train": {"steps": 1, "sequence_length": 1}}).model.longest_sequence
    adapters: dict[str, dict[str, Any]] = {} if lora is None else {"lora": {"rank": lora, "alpha": 2.0 * lora}}
    found = {"model": model, **adapters, **values}
    found["model"] = model
    found["train"] = {**values["train"], "sequence_length": min(512, longest or 512)}
    found["optimizer"] = {
        "type": "adamw",
        "lr": 1e-4 if lora is None else 2e-4,
        "weight_decay": 0.1 if lora is None else 0.0,
    }
    found["data"] = {"source": "my_text"}
    return found


def _comment(description: str | None, indent: str) -> list[str]:
    text = " ".join((description or "").split())
    return [f"{indent}# {line}" for line in textwrap.wrap(text, 100 - len(indent))]

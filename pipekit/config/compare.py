"""Comparison of two configurations: can one run go on from the other?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipekit.config.schema import Config


def conflicting_keys(saved: Config, new: Config) -> list[str]:
    """Return the keys in which `new` describes another run than `saved`, so that it cannot go on from it.

    These are the model, its adapters, the data, `train.sequence_length` and `train.seed`. Everything else, such as the
    layout, the number of steps or the learning rate, may change from one start to the next; so may the sources and
    weights of a mixture, of which checkpoints hold the state. A `model.vocab_size` of `auto` agrees with any number,
    and of a preset only the sizes matter.
    """
    before, after = _identity(saved), _identity(new)
    if "auto" in (before.get("model.vocab_size"), after.get("model.vocab_size")):
        before.pop("model.vocab_size", None)
        after.pop("model.vocab_size", None)
    keys = [*before, *(key for key in after if key not in before)]
    absent = object()
    return [key for key in keys if before.get(key, absent) != after.get(key, absent)]


def _identity(config: Config) -> dict[str, Any]:
    model = config.model.model_dump(exclude={"preset", "init_from", "export_vocab_size"})
    values = {f"model.{key}": value for key, value in model.items()}
    data = config.data.model_dump(exclude={"cache_dir", "source", "mixture", "stages", "validation", "workers"})
    values |= {f"data.{key}": value for key, value in data.items()}
    data_source = [(entry.sources, entry.limit) for entry in config.data.entries]
    values["data.source"] = data_source if config.data.mixture is None else "a mixture"
    values |= {f"lora.{key}": getattr(config.lora, key) for key in ("rank", "alpha", "rslora", "targets")}
    values["train.sequence_length"] = config.train.sequence_length
    values["train.seed"] = config.train.seed
    return values

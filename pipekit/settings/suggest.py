"""Suggestions for mistyped words: did you mean ...?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

_FOREIGN_NAMES = {
    "train.global_batch_size": "batch_size train_batch_size gradient_accumulation_steps",
    "train.micro_batch_size": "micro_batch train_micro_batch_size_per_gpu per_device_train_batch_size",
    "train.steps": "max_steps num_steps train_iters train_steps iterations",
    "train.sequence_length": "seq_len seq_length max_seq_len max_seq_length cutoff_len block_size",
    "train.gradient_clipping": "grad_clip clip_grad max_grad_norm",
    "train.activation_checkpointing": "gradient_checkpointing",
    "train.precision": "fp16 bf16 dtype mixed_precision",
    "train.eval_interval": "eval_steps eval_every val_interval",
    "model.max_positions": "context_length n_positions",
    "model.hidden_size": "n_embd d_model",
    "model.num_layers": "n_layer",
    "model.num_heads": "n_head num_attention_heads",
    "model.ffn_size": "d_ff",
    "parallel.zero": "stage zero_stage zero_optimization",
    "parallel.pp": "num_stages pipeline_parallel_size",
    "parallel.tp": "tensor_parallel_size",
    "parallel.dp": "data_parallel_size",
    "optimizer.lr": "learning_rate",
    "scheduler.warmup_steps": "warmup",
    "scheduler.min_lr_ratio": "min_lr",
    "data.source": "dataset data_path path",
    "data.mixture": "datasets blend sources weights data_weights",
    "data.workers": "num_workers dataloader_num_workers",
    "run.dir": "output_dir",
    "checkpoint.interval": "save_interval save_steps save_every",
    "profile.steps": "profile",
    "logging.interval": "log_interval logging_steps log_every",
    "lora.rank": "r lora_rank lora_r",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.rslora": "use_rslora",
    "lora.targets": "target_modules",
}

_MAX_WORD = 100  # what is longer is no misspelt word, and would take long to compare

SYNONYMS = {name: key for key, names in _FOREIGN_NAMES.items() for name in names.split()}
"""Names of settings in other training programs, and the key of each here."""


def closest(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice that is most similar to `word`, or None if none is similar.

    Example:
        >>> closest("setps", ["seed", "steps"])
        'steps'
    """
    if len(word) > _MAX_WORD:
        return None
    import difflib  # only needed once something is wrong

    matches = difflib.get_close_matches(word.lower(), list(choices), n=1, cutoff=0.6)
    return matches[0] if matches else None


def suggest_key(key: str, parents: tuple[str, ...], sections: Mapping[str, Iterable[str]]) -> str:
    """Return a suggestion for an unknown key, first from its own section, then from the others.

    `parents` are the keys above it, none for a section; `sections` are the keys of every section by its dotted path.
    """
    prefix = ".".join(parent for parent in parents if not parent.isdecimal())  # positions in a list of sections
    own = list(sections.get(prefix, ()))
    synonym = SYNONYMS.get(key, "")
    ours = synonym if _is_key(synonym, sections) else None
    if parents and ours:
        return f"here it is {ours}"
    if parents and (meant := _find_by_words(key, sections)):
        return f"did you mean '{meant}'?"
    match = closest(key, own)
    elsewhere = [path for path, keys in sections.items() if path not in ("", prefix) and key in keys]
    if match and (parents or not (elsewhere or ours)):
        return f"did you mean '{'.'.join((*parents, match))}'?"
    if elsewhere:
        return "it belongs in " + " or ".join(f"{path}.{key}" for path in elsewhere)
    if ours:
        return f"here it is {ours}"
    everything = {k: path for path, keys in sections.items() if path not in ("", prefix) for k in keys}
    match = closest(key, everything)
    if match and parents and len(key) > 3:
        return f"did you mean '{everything[match]}.{match}'?"
    return f"{f'{prefix} has' if prefix else 'the sections are'} {', '.join(own)}"


def _is_key(path: str, sections: Mapping[str, Iterable[str]]) -> bool:
    section, _, key = path.rpartition(".")
    return key in sections.get(section, ())


def _find_by_words(key: str, sections: Mapping[str, Iterable[str]]) -> str | None:
    """Return the only dotted key that has each word of an unknown one, in its own name or in that of its section.

    Example:
        >>> _find_by_words("checkpoint_interval", {"train": ["steps", "eval_interval"], "checkpoint": ["interval"]})
        'checkpoint.interval'
    """
    words = key.lower().split("_")
    if len(words) < 2:
        return None
    found = []
    for section, keys in sections.items():
        for own in keys:
            known = [*section.split("."), *own.split("_")]
            if all(any(_is_same_word(word, other) for other in known) for word in words):
                found.append(f"{section}.{own}".lstrip("."))
    return found[0] if len(found) == 1 else None


def _is_same_word(word: str, other: str) -> bool:
    """True of equal words, and of one that is the beginning of the other, as `log` is of `logging`."""
    return word == other or (min(len(word), len(other)) >= 3 and (word.startswith(other) or other.startswith(word)))

"""Suggestions for mistyped words: did you mean ...?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

SYNONYMS: dict[str, str] = {
    "learning_rate": "optimizer.lr",
    "warmup": "scheduler.warmup_steps",
    "min_lr": "scheduler.min_lr_ratio",
    "batch_size": "train.global_batch_size",
    "train_batch_size": "train.global_batch_size",
    "micro_batch": "train.micro_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "max_steps": "train.steps",
    "num_steps": "train.steps",
    "train_iters": "train.steps",
    "iterations": "train.steps",
    "seq_len": "train.sequence_length",
    "seq_length": "train.sequence_length",
    "block_size": "train.sequence_length",
    "context_length": "model.max_positions",
    "n_positions": "model.max_positions",
    "grad_clip": "train.gradient_clipping",
    "clip_grad": "train.gradient_clipping",
    "max_grad_norm": "train.gradient_clipping",
    "gradient_checkpointing": "train.activation_checkpointing",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "dtype": "train.precision",
    "n_embd": "model.hidden_size",
    "d_model": "model.hidden_size",
    "n_layer": "model.num_layers",
    "n_head": "model.num_heads",
    "num_attention_heads": "model.num_heads",
    "d_ff": "model.ffn_size",
    "stage": "parallel.zero",
    "zero_stage": "parallel.zero",
    "zero_optimization": "parallel.zero",
    "num_stages": "parallel.pp",
    "pipeline_parallel_size": "parallel.pp",
    "tensor_parallel_size": "parallel.tp",
    "data_parallel_size": "parallel.dp",
    "output_dir": "run.dir",
    "save_interval": "checkpoint.interval",
    "log_interval": "logging.interval",
    "dataset": "data.source",
    "data_path": "data.source",
    "path": "data.source",
}
"""Names of settings in other training programs, and the key of each here."""


def closest(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice that `word` most resembles, or None where nothing is near.

    Example:
        >>> closest("setps", ["seed", "steps"])
        'steps'
    """
    import difflib  # only needed once something is wrong

    matches = difflib.get_close_matches(word.lower(), list(choices), n=1, cutoff=0.6)
    return matches[0] if matches else None


def suggest_key(key: str, parents: tuple[str, ...], sections: Mapping[str, Iterable[str]]) -> str:
    """Return a suggestion for an unknown key, looked for in its own section first, then in the others.

    Args:
        key: the unknown key.
        parents: the keys above it; empty for a section.
        sections: the keys of every section, by the section's dotted path.
    """
    prefix = ".".join(parents)
    own = list(sections.get(prefix, ()))
    match = closest(key, own)
    if match and (parents or key not in SYNONYMS):
        return f"did you mean '{'.'.join((*parents, match))}'?"
    elsewhere = [path for path, keys in sections.items() if path not in ("", prefix) and key in keys]
    if elsewhere:
        return "it belongs in " + " or ".join(f"{path}.{key}" for path in elsewhere)
    if key in SYNONYMS:
        return f"here it is {SYNONYMS[key]}"
    everything = {k: path for path, keys in sections.items() if path not in ("", prefix) for k in keys}
    match = closest(key, everything)
    if match and parents and len(key) > 3:
        return f"did you mean '{everything[match]}.{match}'?"
    return f"{f'{prefix} has' if prefix else 'the sections are'} {', '.join(own)}"

"""Model card of an export: what the model is, what trained it, and how to load it."""

from __future__ import annotations

from pathlib import Path

from pipekit.checkpoint.manifest import Manifest
from pipekit.config import Config
from pipekit.config.growth import tokens_of_steps

CARD_FILE = "README.md"


def model_card(
    folder: str, config: Config, manifest: Manifest, *, hf_class: str, num_parameters: int, has_text: bool, proof: str
) -> str:
    """Model card in Markdown, with the metadata that Hugging Face's hub reads.

    Args:
        folder: name of the folder that the card is in.
        config: of the run.
        manifest: of the checkpoint.
        hf_class: class of `transformers` that reads the model.
        num_parameters: of the exported model.
        has_text: whether it has a tokenizer.
        proof: sentence on what was compared.
    """
    training, train = manifest.training, config.train
    pipekit = f"pipekit {manifest.written_by['pipekit']}" if "pipekit" in manifest.written_by else "pipekit"
    tokens, up_to = training.consumed_samples * train.sequence_length, ""
    if train.curriculum is not None:
        tokens, up_to = tokens_of_steps(train, training.step), "up to "
    losses = {"Loss": "loss", "Validation loss": "val_loss"}
    facts = {
        "Steps": f"{training.step:,}",
        "Samples": f"{training.consumed_samples:,} of {up_to}{train.sequence_length:,} tokens",
        "Tokens": f"{tokens:,}",
        **({"Data": ", ".join(_sources(config))} if has_text else {}),
        "Optimizer": f"{config.optimizer.type}, peak learning rate {config.optimizer.lr:g}, "
        f"{config.scheduler.type} schedule, global batch size {train.global_batch_size:,}",
        **({"Precision": train.precision} if train.precision != "auto" else {}),
        **{title: f"{training.metrics[key]:.4f}" for title, key in losses.items() if key in training.metrics},
    }
    if training.step == 0:
        facts = {"Steps": "0: the weights are those that the run began with"}
    lines = [
        "---",
        "library_name: transformers",
        *(["pipeline_tag: text-generation"] if has_text else []),
        "tags:",
        "- pipekit",
        "---",
        "",
        f"# {Path(config.run.dir).name}",
        "",
        f"A `{hf_class}` of {num_parameters:,} parameters, trained with {pipekit}.",
        "",
        "## Training",
        "",
        "| | |",
        "|---|---|",
        *(f"| {title} | {fact} |" for title, fact in facts.items()),
        "",
        "## Check",
        "",
        proof,
        "",
        "## Use",
        "",
        "```python",
        *(_use_with_text(folder) if has_text else _use(folder)),
        "```",
        "",
    ]
    return "\n".join(lines)


def _sources(config: Config) -> list[str]:
    # Whoever reads the card has no use for the paths of the machine that trained the model.
    return [f"`{Path(path).name}`" for entry in config.data.entries for path in entry.sources]


def _use_with_text(folder: str) -> list[str]:
    return [
        "from transformers import pipeline",
        "",
        f'generate = pipeline("text-generation", model="{folder}")',
        'print(generate("Once upon a time")[0]["generated_text"])',
    ]


def _use(folder: str) -> list[str]:
    return ["from transformers import AutoModelForCausalLM", "", f'AutoModelForCausalLM.from_pretrained("{folder}")']

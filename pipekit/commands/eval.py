"""`pipekit eval`: perplexity on any text and lm-eval tasks, for a run, a checkpoint or an export."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipekit.commands.shared_options import AsJson, ModelConfigFile, Stages, TensorRanks, TrustCode
from pipekit.progress import ProgressLines

if TYPE_CHECKING:
    from pipekit.evaluation.evaluate import Evaluation
    from pipekit.evaluation.texts import EvaluatedSource


def command(
    source: Annotated[
        Path, typer.Argument(help="Folder of a run, one of its checkpoints, or an export.", show_default=False)
    ],
    data: Annotated[
        list[str] | None,
        typer.Argument(
            help="Text for the perplexity, such as data.source=other.txt; by default the run's held-out text.",
            show_default=False,
        ),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="lm-eval tasks, such as arc_easy,mmlu_*; needs the extra `eval`.")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with your own tasks.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question; by default as the task sets it.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of questions per task.")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Ask the questions as chat messages.")
    ] = False,
    samples: Annotated[
        Path | None, typer.Option(help="Write every question and its answers to this file, as JSON lines.")
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens that the model sees at once for the perplexity; by default as in training."),
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens between the starts of windows; by default a whole window.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of sequences to compute together.")] = 8,
    pp: Stages = 1,
    tp: TensorRanks = 1,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Device to compute on.")] = "auto",
    as_json: AsJson = False,
    trust_code: TrustCode = False,
    config: ModelConfigFile = None,
) -> None:
    """Evaluate a model: perplexity, bits per byte, lm-eval tasks."""
    from dataclasses import asdict

    from pipekit.config.stored_code import check_stored_code
    from pipekit.errors import ConfigError
    from pipekit.evaluation.evaluate import Evaluation, EvaluationSettings, evaluate_model
    from pipekit.evaluation.models import GeneratorModel
    from pipekit.evaluation.tasks import TaskSettings, check_extra
    from pipekit.evaluation.texts import EvaluatedSource, find_texts
    from pipekit.inference.generator import Generator
    from pipekit.inference.load_model import open_model
    from pipekit.launch.model_ranks import SpreadModel, run_on_ranks

    of_tasks = {"--include-path": include_path, "--num-fewshot": num_fewshot, "--limit": limit, "--samples": samples}
    given = [name for name, value in of_tasks.items() if value is not None]
    if tasks is None and (given or apply_chat_template):
        raise ConfigError(
            f"{(given or ['--apply-chat-template'])[0]}: applies to tasks, and none are given; add --tasks"
        )
    if samples is not None and not samples.absolute().parent.is_dir():
        raise ConfigError(f"--samples {samples}: no such folder; make it, or give another path")
    if config is not None:
        check_stored_code(config, trust_code=trust_code)
    read = EvaluatedSource.read(source, config)
    say = ProgressLines.on_stderr()
    asked = None
    if tasks is not None:
        check_extra()
        from pipekit.evaluation.harness import find_tasks

        asked = TaskSettings(
            tuple(name.strip() for name in tasks.split(",") if name.strip()),
            include_path,
            num_fewshot,
            limit,
            batch_size,
            apply_chat_template,
            keeps_samples=samples is not None,
        )
        find_tasks(asked)
    stored = open_model(read.path, given=config, trust_code=trust_code)
    spread = SpreadModel(str(read.path), None if config is None else str(config), trust_code, pp, tp)
    if pp * tp > 1:
        spread.check(stored)
    has_texts = bool(data) or tasks is None
    window = read.window(stored.longest_sequence) if window is None else window
    stride = window if stride is None else stride
    if has_texts and window > stored.longest_sequence:
        raise ConfigError(f"--window {window}: the model sees at most {stored.longest_sequence} tokens; give fewer")
    if stride > window:
        raise ConfigError(f"--stride {stride}: must be at most the window, {window} tokens, or tokens would be skipped")
    texts = find_texts(read, data or (), on_progress=say) if has_texts else []
    settings = EvaluationSettings(window, stride, batch_size, asked)
    if pp * tp == 1:
        model = GeneratorModel(Generator.build(stored, device=device))
        found = evaluate_model(model, read, texts, settings, on_progress=say)
    else:
        say(f"evaluating in {pp * tp} processes")
        task = {
            "source": str(read.path),
            "config": spread.config,
            "data": list(data or ()),
            "has_texts": has_texts,
            "settings": asdict(settings),
        }
        fields = run_on_ranks("pipekit.launch.eval_rank", "pipekit eval", spread, task, device=device)
        found = Evaluation.from_fields(fields)
    _tell(found, read, as_json, samples)


def _tell(found: Evaluation, source: EvaluatedSource, as_json: bool, samples: Path | None) -> None:
    """Write an evaluation to the run folder and its trackers, and show it."""
    record = found.as_record()
    if samples is not None and found.tasks is not None:
        lines = [
            json.dumps({"task": task, **sample}, default=str)
            for task, asked in found.tasks.samples.items()
            for sample in asked
        ]
        from pipekit.files import write_atomically
        from pipekit.storage import storing

        with storing(samples):
            write_atomically(samples, "".join(f"{line}\n" for line in lines))
    if source.run is not None and source.config is not None:
        from pipekit.training.loggers import log_evaluation

        log_evaluation(source.run, source.config, record, found.metrics())
    if as_json:
        sys.stdout.write(json.dumps(record, indent=1) + "\n")
        return
    from pipekit.commands.eval_tables import show_evaluation
    from pipekit.training.console import make_console

    show_evaluation(found, make_console())

"""Console output of a run: a table of the plan, a live line or plain ones, and a summary at the end."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from io import TextIOWrapper
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.table import Table

from pipekit.config import Config
from pipekit.config.growth import describe_batch
from pipekit.costs.sequence_flops import show_flops_per_s
from pipekit.line_files import LossyOutput
from pipekit.models.custom import CustomModelConfig
from pipekit.number_text import bytes_text, count_text
from pipekit.plan.plan import Plan
from pipekit.plan.run_folder import RunFolder
from pipekit.training.step_line import LinePart, StepLine, show_time
from pipekit.training.trial_callbacks import TrialCallback

if TYPE_CHECKING:
    from pipekit.training.trial_loop import TrialResult

_PLAIN_WIDTH = 120
# A smaller fraction of a step, waited for data, is not worth a word.
_TOLD_WAIT = 0.05
# How early the last part that an evaluation's own line shows is left out of the live one.
_KEPT_LEAVE_OUT = 2


def make_console(stream: TextIO | None = None) -> Console:
    """Return a console on `stream`, or on stdout; plain and of a fixed width where there is no terminal."""
    stream = stream or sys.stdout
    if not stream.isatty():
        return Console(file=stream, highlight=False, soft_wrap=True, width=_PLAIN_WIDTH)
    # A rank's own stdout is its log by then; the width is that of the terminal it writes to.
    return Console(file=stream, highlight=False, width=os.get_terminal_size(stream.fileno()).columns or None)


@contextlib.contextmanager
def chatter_to(log: Path) -> Iterator[TextIO]:
    """Send all that this process writes to stdout and stderr into `log`, and yield the stdout that was.

    Libraries print and log as they please; so do programs that they start.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with (
        log.open("ab") as file,
        TextIOWrapper(os.fdopen(os.dup(1), "wb"), encoding="utf-8", line_buffering=True) as terminal,
    ):
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        own = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (
            TextIOWrapper(LossyOutput(descriptor), encoding="utf-8", errors="replace", write_through=True)  # type: ignore[type-var]
            for descriptor in (1, 2)
        )
        try:
            yield terminal
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = own
            terminal.flush()
            for descriptor, original in zip((1, 2), saved, strict=True):
                os.dup2(original, descriptor)
                os.close(original)


def show_plan(plan: Plan, console: Console) -> None:
    """Print the table of a run: model, layout, and a row for each stage with its layers."""
    config = plan.config
    batch, layout, start_step = plan.batch, plan.layout, plan.start.step if plan.start else 0
    sharding = ", sequence parallel" if config.parallel.sequence_parallel and layout.tp > 1 else ""
    facts = facts_table(
        ("model", f"{config.model.description}, {plan.num_parameters:,} parameters, {len(plan.layer_names)} layers"),
        (
            "layout",
            f"{layout}, {layout.world_size} {_plural(layout.world_size, 'process')}, ZeRO {config.parallel.zero}"
            f"{sharding}",
        ),
        *([] if plan.chosen is None else [("chosen", plan.chosen)]),
        ("device", f"{plan.device}, {plan.precision}"),
        (
            "batch",
            f"{describe_batch(config.train)}: {batch.num_micro_batches} "
            f"micro-{_plural(batch.num_micro_batches, 'batch')} of {batch.micro_batch_size} on each of {batch.dp} "
            f"{_plural(batch.dp, 'replica')}, {config.parallel.schedule}",
        ),
        *([("samples", text) for text in _describe_samples(plan)]),
        ("steps", f"{start_step} to {config.train.steps}" if start_step else f"{config.train.steps}"),
        ("folder", config.run.dir),
    )
    stages = Table(box=None, padding=(0, 2), header_style="bold")
    stages.add_column("stage", justify="right")
    several = len(plan.placement) > plan.layout.pp
    if several:
        stages.add_column("rank", justify="right")
    stages.add_column("parameters" if plan.layout.tp == 1 else "parameters on a rank", justify="right")
    stages.add_column("layers", overflow="fold")
    for stage, layers in enumerate(plan.stages):
        where = [str(stage), str(plan.placement[stage])] if several else [str(stage)]
        names = plan.layer_names[layers.start : layers.stop]
        stages.add_row(*where, f"{plan.stage_parameters[stage]:,}", _show_layers(names))
    for table in (facts, stages):
        console.print()
        print_table(table, console)
    console.print()
    show_export_limit(config, console)


def _describe_samples(plan: Plan) -> list[str]:
    """Counts of samples, padding and truncation, a line for each source whose samples are not plain windows."""
    counts: dict[str, str] = plan.prepared.get("samples", {})
    return list(counts.values()) if len(counts) == 1 else [f"{name}: {text}" for name, text in counts.items()]


def show_export_limit(config: Config, console: Console) -> None:
    """Print why a model cannot be exported to `transformers`, where it cannot."""
    if reason := config.model.no_export_reason():
        console.print(f"pipekit export takes this model with --raw alone: it {reason}", markup=False)


def facts_table(*rows: tuple[str, str], style: str = "bold cyan") -> Table:
    """Table of names and what they are, without a frame."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style=style, no_wrap=True)
    table.add_column()
    for row in rows:
        table.add_row(*row)
    return table


def print_table(table: Table, console: Console) -> None:
    """Print a table, without the padding at its right where there is no terminal."""
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as capture:
        console.print(table)
    # Where lines are kept, the padding of the last column is only in the way.
    console.print("\n".join(line.rstrip() for line in capture.get().splitlines()), markup=False)


def _show_layers(names: Sequence[str]) -> str:
    """Return layer names with whole blocks in a row drawn together.

    Example:
        >>> _show_layers(["embed", "blocks.0.attention", "blocks.0.mlp", "blocks.1.attention", "blocks.1.mlp", "head"])
        'embed, blocks.0-1, head'
    """
    shown: list[str] = []
    # Of the row of whole blocks that is under way: its stem, its first and its last number.
    stem, first, last = "", "", ""
    for block, members in groupby(names, key=lambda name: name if name[-1].isdigit() else name.rpartition(".")[0]):
        layers = list(members)
        own_stem, _, number = block.rpartition(".")
        is_block = number.isdigit() and (len(layers) > 1 or layers == [block])
        if is_block and last and own_stem == stem:
            shown[-1], last = f"{stem}.{first}-{number}", number
        elif is_block:
            stem, first, last = own_stem, number, number
            shown.append(block)
        else:
            shown, last = shown + layers, ""
    return ", ".join(shown)


def _plural(count: int, noun: str) -> str:
    ending = "es" if noun.endswith(("s", "ch")) else "s"
    return noun if count == 1 else noun + ending


class ConsoleProgress(TrialCallback):
    """Shows each step on a live line of a terminal, elsewhere on plain lines every `interval` steps, and a summary.

    Evaluations and checkpoints have lines of their own, which stay.
    """

    def __init__(self, console: Console, plan: Plan, *, interval: int) -> None:
        self._console = console
        self._interval = interval
        self._folder = RunFolder(plan.config.run.dir)
        self._has_page = plan.config.logging.report
        self._num_steps = plan.config.train.steps
        self._model, self._adapts = plan.config.model, plan.config.lora.rank is not None
        self._has_tokenizer = "tokenizer_path" in plan.prepared
        self._width = len(str(self._num_steps))
        self._step = self._start_step = 0
        self._first_val_loss: float | None = None
        self._val_loss: float | None = None
        self._line: StepLine | None = None
        self._mean_step_s: float | None = None
        self._step_s = self._waited_s = self._mean_wait = 0.0
        self._sources: dict[str, dict[str, float]] = {}

    def on_trial_startup(self, first_batch_idx: int, checkpoint_uuid: str | None) -> None:
        self._step = self._start_step = first_batch_idx
        if first_batch_idx:
            self._console.print(f"going on after step {first_batch_idx}")
        if self._console.is_terminal:
            self._line = StepLine("step", first_batch_idx, self._num_steps)
            self._line.show(self._console)

    def on_warning(self, message: str) -> None:
        self._console.print(f"warning: {message}", style="yellow", markup=False)

    def on_profile(self, text: str) -> None:
        self._console.print(text, markup=False)

    def on_rollback(self, batch: int) -> None:
        if self._line is not None:
            self._line.done = batch

    def on_validation_start(self) -> None:
        if self._line is not None:
            self._line.parts = [*self._line.parts, LinePart("evaluating", 1)]

    def on_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        self._step = step
        val_loss, step_time_s = metrics.get("val_loss"), metrics.get("step_time_s")
        if val_loss is not None:
            self._val_loss = val_loss
            self._first_val_loss = val_loss if self._first_val_loss is None else self._first_val_loss
        if step_time_s is not None:
            mean = self._mean_step_s
            self._mean_step_s = step_time_s if mean is None else 0.9 * mean + 0.1 * step_time_s
            if mean is not None:  # The first step waits for what no other has read ahead, and for workers to start.
                wait = metrics.get("data_wait", 0.0)
                self._mean_wait = 0.9 * self._mean_wait + 0.1 * wait
                self._step_s += step_time_s
                self._waited_s += wait * step_time_s
        for key, value in metrics.items():
            kind, _, source = key.partition("/")
            if source:
                self._sources.setdefault(source, {})[kind] = value
        parts = self._describe(metrics)
        remaining_s = None if self._mean_step_s is None else self._mean_step_s * (self._num_steps - step)
        if self._line is not None:
            self._line.done, self._line.parts, self._line.remaining_s = step, parts, remaining_s
        is_told = step % self._interval == 0 or step in (1, self._num_steps)
        if val_loss is not None or (is_told and self._line is None):
            # On a terminal the live line below has the rest.
            texts = [part.text for part in parts if self._line is None or part.leave_out <= _KEPT_LEAVE_OUT]
            if remaining_s is not None and self._line is None:
                texts.append(f"ETA {show_time(remaining_s)}")
            self._print_step(step, "  ".join(texts))

    def _describe(self, metrics: dict[str, Any]) -> list[LinePart]:
        parts = []
        if "loss" in metrics:
            parts += [LinePart(f"loss {metrics['loss']:.4f}"), LinePart(f"lr {metrics['lr']:.2e}", 3)]
            parts += [LinePart(f"{metrics['tokens_per_s']:,.0f} tokens/s", 8)]
            if "mfu" in metrics:
                parts.append(LinePart(f"MFU {metrics['mfu']:.1%}", 9))
            elif "flops_per_s" in metrics:
                parts.append(LinePart(show_flops_per_s(metrics["flops_per_s"]), 9))
            if "tokens" in metrics:
                parts.append(LinePart(f"{count_text(metrics['tokens'])} tokens", 11))
            if "peak_memory_bytes" in metrics:
                parts.append(LinePart(bytes_text(metrics["peak_memory_bytes"]), 10))
        if self._val_loss is not None:
            parts.append(LinePart(f"val loss {self._val_loss:.4f}", _KEPT_LEAVE_OUT))
        if self._mean_wait >= _TOLD_WAIT:
            parts.append(LinePart(f"waited for data: {self._mean_wait:.0%} of the step", 5))
        return parts

    def _print_step(self, step: int, text: str) -> None:
        self._console.print(f"step {step:>{self._width}}/{self._num_steps}  {text}", markup=False)

    def on_checkpoint_upload_end(self, uuid: str) -> None:
        self._print_step(int(uuid.rpartition("-")[2]), f"saved {self._folder.checkpoints / uuid}")

    def on_training_end(self, result: TrialResult) -> None:
        self.on_trial_shutdown()
        if self._start_step >= result.batch:
            self._console.print(describe_finished(self._folder.path, result.batch, self._num_steps))
            return
        run = shlex.quote(str(self._folder.path))
        self._console.print()
        what = (
            f"steps {self._start_step + 1} to {result.batch}"
            if self._start_step
            else f"{result.batch} {_plural(result.batch, 'step')}"
        )
        ended = f"Trained {what} in {show_time(result.time_s)}"
        if self._val_loss is not None:
            ended += f": validation loss {self._first_val_loss:.3f} → {self._val_loss:.3f}"
        self._console.print(f"[bold green]{ended}[/]")
        if self._waited_s >= _TOLD_WAIT * self._step_s > 0:
            self._console.print(
                f"waited for data: {self._waited_s / self._step_s:.0%} of the steps; more data.workers read it faster, "
                "if there are cores and the disk gives it"
            )
        files = facts_table(
            *((f"source {name}", _show_source(values)) for name, values in self._sources.items()),
            ("checkpoint", str(result.checkpoint)),
            ("metrics", str(self._folder.metrics)),
            *([("page", str(self._folder.report))] if self._has_page else []),
            ("logs", str(self._folder.logs)),
        )
        print_table(files, self._console)
        self._console.print("\nWhat next:")
        next_steps = Table.grid(padding=(0, 2))
        next_steps.add_column(no_wrap=True)
        next_steps.add_column(style="dim")
        trust = "--trust-code " if isinstance(self._model, CustomModelConfig) else ""
        export, written = f"pipekit export {trust}", "a Hugging Face folder, its logits checked"
        if self._adapts:
            export = f"{export}--merge "
        elif self._model.no_export_reason():
            export, written = "pipekit export --raw ", "its tensors, with a loader beside them"
        if self._has_tokenizer:
            next_steps.add_row(f"  pipekit generate {trust}{run}", "sample from it")
        next_steps.add_row(f"  {export}{run} {run}/export", written)
        if self._adapts:
            adapter = export.replace("--merge", "--adapter")
            next_steps.add_row(f"  {adapter}{run} {run}/adapter", "its adapters alone, as peft has them")
        next_steps.add_row(
            f"  pipekit train {run}/config.yaml train.steps={2 * result.batch}", "go on, under any layout"
        )
        print_table(next_steps, self._console)

    def on_trial_shutdown(self) -> None:
        if self._line is not None:
            self._line.end()
            self._line = None


def describe_finished(run_dir: Path, step: int, num_steps: int) -> str:
    """Message of a run that had been trained before it was started."""
    return (
        f"{run_dir} has trained {step} of {num_steps} steps already; set train.steps higher to go on, or run.dir to "
        "start another run"
    )


def _show_source(metrics: Mapping[str, float]) -> str:
    """Return the outcome of a source of a mixture, by its metrics.

    Example:
        >>> _show_source({"samples": 1500, "epochs": 0.25, "val_loss": 2.0})
        '1,500 samples, 0.25 epochs, validation loss 2.000'
    """
    parts = [f"{metrics['samples']:,} samples, {metrics['epochs']:.2f} epochs"] if "samples" in metrics else []
    parts += [f"validation loss {metrics['val_loss']:.3f}"] if "val_loss" in metrics else []
    return ", ".join(parts)

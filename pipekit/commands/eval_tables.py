"""Evaluation on a terminal: one row per text, and one per metric of each task."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipekit.evaluation.evaluate import Evaluation
from pipekit.evaluation.perplexity import Perplexity
from pipekit.evaluation.tasks import TaskResults
from pipekit.training.console import facts_table, print_table


def show_evaluation(found: Evaluation, console: Console) -> None:
    """Print an evaluation in 80 columns."""
    step = "" if found.step is None else f", step {found.step}"
    facts = facts_table(("model", escape(f"{found.source}{step}")))
    if found.texts:
        overlap = f", {found.stride} tokens apart" if found.stride < found.window else ""
        facts.add_row("text", f"in windows of {found.window} tokens{overlap}")
    print_table(facts, console)
    if found.texts:
        console.print()
        print_table(texts_table(found.texts), console)
    if found.tasks is not None:
        console.print()
        print_table(tasks_table(found.tasks), console)
        if found.tasks.num_truncated:
            count = found.tasks.num_truncated
            console.print(
                f"{count:,} {'request was' if count == 1 else 'requests were'} longer than the model can see at once; "
                f"the beginning of {'its' if count == 1 else 'their'} context was cut off"
            )


def texts_table(texts: tuple[Perplexity, ...]) -> Table:
    """Table of the perplexity on each text."""
    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("text", overflow="fold")
    for name in ("tokens", "loss", "perplexity", "bits per byte"):
        table.add_column(name, justify="right", no_wrap=True)
    for text in texts:
        table.add_row(
            escape(text.name),
            f"{text.num_tokens:,}",
            f"{text.loss:.4f}",
            f"{text.perplexity:.4g}",
            f"{text.bits_per_byte:.4f}",
        )
    return table


def tasks_table(tasks: TaskResults) -> Table:
    """Table of the metrics of each task, each with its standard error."""
    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("task", overflow="fold")
    table.add_column("questions", justify="right", no_wrap=True)
    table.add_column("metric", overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("± error", justify="right", no_wrap=True)
    for task, metrics in tasks.metrics.items():
        count = tasks.num_questions.get(task)
        cells = [escape(task), "" if count is None else f"{count:,}"]
        for name, value in metrics.items():
            if "_stderr" in name:
                continue
            error = metrics.get(f"{name}_stderr")
            table.add_row(*cells, escape(name), f"{value:.4f}", "" if error is None else f"{error:.4f}")
            cells = ["", ""]
    return table

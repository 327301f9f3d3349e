"""The tables of optimizers and schedules in the docs are those of the code."""

from __future__ import annotations

import inspect
from pathlib import Path

from pipekit.optimizers.learning_rates import SCHEDULES, SECTION_KEYS, takes
from pipekit.optimizers.table import OPTIMIZERS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "optimizers.md"


def optimizer_rows() -> list[str]:
    rows = []
    for name, kind in OPTIMIZERS.items():
        if kind.refusal:
            continue
        settings = ", ".join(f"`{key}` {list(v) if isinstance(v, tuple) else v}" for key, v in kind.settings.items())
        states = [*kind.states, *(f"{state} with {key}" for key, state in kind.setting_states.items())]
        if kind.vector_states is not None:
            states = [f"{', '.join(kind.states)} of matrices", f"{', '.join(kind.vector_states)} of other weights"]
        path = kind.path.replace(":", ".")
        rows.append(f"| `{name}` | `{path}` | {settings or 'none'} | {', '.join(states) or 'none'} | {kind.source} |")
    return rows


def refused_rows() -> list[str]:
    return [f"| `{name}` | {kind.refusal} |" for name, kind in OPTIMIZERS.items() if kind.refusal]


def schedule_rows() -> list[str]:
    rows = []
    for name, schedule in SCHEDULES.items():
        keys = [f"`{key}`" for key in SECTION_KEYS if takes(schedule, key)]
        own = [key for key in inspect.signature(schedule.rate).parameters if key not in ("step", "peak", *SECTION_KEYS)]
        args = ", ".join(f"`{key}`" for key in own)
        rows.append(f"| `{name}` | {schedule.summary} | {', '.join(keys) or 'none'} | {args or 'none'} |")
    return rows


def test_the_page_has_the_rows_of_the_code() -> None:
    written = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert written == [*optimizer_rows(), *refused_rows(), *schedule_rows()]

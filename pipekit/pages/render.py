"""Rendering of a page: one file with its styles, its charting library and its data inside, which loads nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader

from pipekit.number_text import bytes_text, count_text, days_text, seconds_text

_SCRIPTS = ("chart.umd.min.js", "charts.js")


def render(template: str, **values: Any) -> str:
    """HTML of a template of `pipekit/pages/templates`.

    A browser runs the page's own scripts alone, which the page names by their checksums, so that no text of a
    configuration or a sample can become code.

    Args:
        template: file name of the template.
        values: its variables.
    """
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("pipekit.pages"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    forms: dict[str, Callable[[Any], str]] = {"count": count_text, "bytes": bytes_text, "seconds": seconds_text}
    forms |= {"days": days_text, "whole": "{:,.0f}".format, "figure": "{:.4g}".format}
    forms |= {"percent": lambda share: f"{100 * share:.3g} %"}
    for name, form in forms.items():
        environment.filters[name] = lambda number, form=form: "-" if number is None else form(number)
    templates = files("pipekit.pages") / "templates"
    scripts = [(templates / name).read_text(encoding="utf-8") for name in _SCRIPTS]
    environment.globals["scripts"] = scripts
    environment.globals["checksums"] = [
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts
    ]
    return environment

"""Pages of the site that are not in this folder: the README and its neighbours, the commands, and the public names.

A hook of mkdocs, which `mkdocs.yml` names. The pages here are written for GitHub; the hook turns their links into those
of the site, and warns of a page that the site shows otherwise than GitHub does.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import griffe
import typer
from markdown_it import MarkdownIt
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import pipekit
from pipekit.cli import app

ROOT = Path(__file__).resolve().parents[1]
NEIGHBOURS = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files above this folder that are pages of the site, with their names there."""

COMMANDS_PAGE = "reference/commands.md"
_BLOCKS = ("table", "tr", "li", "pre", "blockquote", "h1", "h2", "h3", "h4", "img")
_log = logging.getLogger("mkdocs.hooks.site_pages")


class ExampleSections(griffe.Extension):
    """An extension of griffe: the sections `Example:` of docstrings are shown as code, like `Examples:`."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rename the section in the docstring of an object."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of commands and of public names at the head of the reference."""
    (reference,) = (section["Reference"] for section in config.nav if "Reference" in section)
    pages = [{f"pipekit.{room}" if room else "pipekit": _room_page(room)} for room in public_names()]
    reference[:0] = [{"Commands": COMMANDS_PAGE}, {"Python": pages}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in this folder."""
    for name, page in NEIGHBOURS.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    files.append(File.generated(config, COMMANDS_PAGE, content=commands_page()))
    for room, names in public_names().items():
        files.append(File.generated(config, _room_page(room), content=names_page(room, names)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that lead out of a page's folder on GitHub into those of the site."""
    name = page.file.src_uri
    if name.startswith("reference/"):
        return markdown
    folder = "" if name in NEIGHBOURS.values() else "docs"
    return site_links(markdown, folder=folder, source_url=f"{config.repo_url.rstrip('/')}/blob/main")


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Warn of a page with other tables, lists, headings or code blocks than GitHub shows."""
    if not page.file.src_uri.startswith("reference/"):
        github = MarkdownIt("commonmark").enable("table").render(page.markdown or "")
        ours, theirs = ({tag: len(re.findall(rf"<{tag}[ >]", text)) for tag in _BLOCKS} for text in (html, github))
        for tag in _BLOCKS:
            if ours[tag] != theirs[tag]:
                _log.warning("%s: %d <%s> in the site, %d on GitHub", page.file.src_uri, ours[tag], tag, theirs[tag])
    return html


def site_links(markdown: str, *, folder: str, source_url: str) -> str:
    """Return a page with links to other pages as the site has them, and links to code leading to `source_url`.

    Args:
        markdown: the page, with links as GitHub reads them.
        folder: the folder of the page in the repository, `""` or `"docs"`.
        source_url: address of the repository's files.
    """

    def replace(match: re.Match[str]) -> str:
        path, mark, anchor = match[1].partition("#")
        if not path or "://" in path:
            return match[0]
        parts: list[str] = [folder] if folder else []
        for part in path.split("/"):
            parts = parts[:-1] if part == ".." else [*parts, part]
        target = "/".join(parts)
        if target in NEIGHBOURS:
            return f"]({NEIGHBOURS[target]}{mark}{anchor})"
        if target.startswith("docs/"):
            return f"]({target.removeprefix('docs/')}{mark}{anchor})"
        return f"]({source_url}/{target})"

    code = r"(```.*?^```$)"
    pieces = re.split(code, markdown, flags=re.MULTILINE | re.DOTALL)
    pieces[::2] = [re.sub(r"\]\(([^)\s]+)\)", replace, piece) for piece in pieces[::2]]
    return "".join(pieces)


def public_names() -> dict[str, list[str]]:
    """Public names of pipekit by the package or module that holds them, `""` for modules at its top."""
    rooms: dict[str, list[str]] = {}
    for name in pipekit.__all__:
        home = pipekit._HOMES[name].split(".")
        room = home[1] if hasattr(import_module(".".join(home[:2])), "__path__") else ""
        rooms.setdefault(room, []).append(name)
    return dict(sorted(rooms.items()))


def _room_page(room: str) -> str:
    return f"reference/{room or 'pipekit'}.md"


def names_page(room: str, names: list[str]) -> str:
    """Page of the public names of a package, which mkdocstrings fills from their docstrings."""
    if room:
        title, about = f"pipekit.{room}", (import_module(f"pipekit.{room}").__doc__ or "").strip()
    else:
        title, about = "pipekit", "Names of the modules at the top of the library."
    entries = [f"::: {pipekit._HOMES[name]}.{name}\n    options:\n      heading: pipekit.{name}\n" for name in names]
    return "\n\n".join([f"# {title}", about, *entries])


def commands_page() -> str:
    """Page of all commands, with their arguments, options and defaults."""
    group = typer.main.get_command(app)
    return "\n\n".join(["# Commands", "As `pipekit COMMAND --help` shows them.", *_sections(group, "pipekit", 2)])


def _sections(group: Any, path: str, level: int) -> Iterator[str]:
    for name, command in sorted(group.commands.items()):
        full = f"{path} {name}"
        yield f"{'#' * level} `{full}`"
        yield (command.help or "").replace("\b\n", "")
        if hasattr(command, "commands"):
            yield from _sections(command, full, level + 1)
            continue
        rows = [_row(parameter) for parameter in command.params if parameter.name != "help"]
        if rows:
            yield "\n".join(["| argument | meaning | default |", "|---|---|---|", *rows])


def _row(parameter: Any) -> str:
    names = [name for name in (*parameter.opts, *parameter.secondary_opts) if name.startswith("-")]
    shown = ", ".join(f"`{name}`" for name in names or [parameter.metavar or parameter.name.upper()])
    default = "" if parameter.default in (None, False, "") or parameter.required else f"`{parameter.default}`"
    meaning = (parameter.help or "").replace("|", "\\|").replace("\n", " ")
    return f"| {shown} | {meaning} | {default} |"

"""The documentation as a site: its strict build, and the links and pages that its hook makes."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import pipekit
from test_docs import COMMANDS

pytest.importorskip("mkdocs")

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "https://example.org/blob/main"


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    """The hook, which is no module of the library."""
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs/site_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("folder", "link", "expected"),
    [
        ("", "docs/data.md#sources", "data.md#sources"),
        ("", "docs/schedules.svg", "schedules.svg"),
        ("", "CONTRIBUTING.md", "contributing.md"),
        ("", "LICENSE", f"{SOURCE}/LICENSE"),
        ("docs", "data.md", "data.md"),
        ("docs", "#here", "#here"),
        ("docs", "../README.md#start", "index.md#start"),
        ("docs", "../examples/dcgan.py", f"{SOURCE}/examples/dcgan.py"),
        ("docs", "https://arxiv.org", "https://arxiv.org"),
    ],
)
def test_links_of_github_become_those_of_the_site(hook: ModuleType, folder: str, link: str, expected: str) -> None:
    code = "```python\nlayers[0](docs/data.md)\n```"
    page = f"See [this]({link}).\n\n{code}\n"
    assert hook.site_links(page, folder=folder, source_url=SOURCE) == f"See [this]({expected}).\n\n{code}\n"


def test_a_page_that_the_site_shows_otherwise_than_github_is_a_warning(
    hook: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    import markdown

    split = "- one\n\n  of two paragraphs\n  1. and a list\n- two\n"
    for text, warned in (("- one\n- two\n", False), (split, True)):
        page = SimpleNamespace(markdown=text, file=SimpleNamespace(src_uri="a.md"))
        hook.on_page_content(markdown.markdown(text), page=page, config=None, files=None)
        assert bool(caplog.records) is warned


def test_the_page_of_commands_has_a_section_for_each(hook: ModuleType) -> None:
    page = hook.commands_page()
    for name, command in COMMANDS.items():
        assert f"\n## `pipekit {name}`\n" in page
        for parameter in (each for each in command.params if each.name != "help"):
            shown = (
                parameter.opts[-1]
                if parameter.opts[-1].startswith("-")
                else parameter.metavar or parameter.name.upper()
            )
            assert f"`{shown}`" in page


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_asks_for_nothing_from_elsewhere(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    pages = {page.relative_to(site).as_posix(): page.read_text() for page in site.rglob("*.html")}
    written = {f"{page.stem}.html" for page in (ROOT / "docs").glob("*.md")}
    assert pages.keys() >= written | {"index.html", "contributing.html", "changelog.html", "reference/commands.html"}
    for name, text in pages.items():
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*\ssrc="(.*?)"|<link rel="stylesheet" href="(.*?)"', text)
        assert loaded
        assert not [each for each in loaded if "//" in "".join(each)], name
    # The inventory by which other projects link here names what the reference describes.
    inventory = zlib.decompress((site / "objects.inv").read_bytes().split(b"zlib.\n", 1)[1]).decode()
    described = {line.split()[0] for line in inventory.splitlines()}
    assert described >= {f"{pipekit._HOMES[name]}.{name}" for name in pipekit.__all__}

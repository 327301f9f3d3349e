"""Content of a page of HTML, for tests."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any

_VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Content of a page; a tag that is not closed in order is an error."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice: {tag} {attrs}"
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        (self.scripts if self.open and self.open[-1] == "script" else self.texts).append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    @property
    def charts(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.scripts[0])
        return found


def check_is_closed(html: str) -> None:
    """Check that a page loads nothing, and that a browser would run its two own scripts and no other."""
    page = Page(html)
    assert {tag for tag, _ in page.tags}.isdisjoint({"link", "img", "iframe", "object"})
    for _, attributes in page.tags:
        assert set(attributes).isdisjoint({"src", "href", "xlink:href", "onclick", "onload"})
    policy = next(each["content"] for tag, each in page.tags if "Content-Security-Policy" in each.values())
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")
    library, own = page.scripts[1:]
    checksums = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (library, own)]
    assert re.findall(r"'sha256-([^']+)'", policy) == checksums
    assert "Released under the MIT License" in library
    assert not re.search(r"https?:|url\(|@import|javascript:", html.replace(library, ""))

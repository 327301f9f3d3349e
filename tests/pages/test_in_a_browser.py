"""Pages as a browser shows them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BROWSER = os.environ.get("PIPEKIT_TEST_BROWSER")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(find_spec("playwright") is None, reason="needs playwright: pip install playwright")
@pytest.mark.skipif(BROWSER is None, reason="needs a browser that listens: PIPEKIT_TEST_BROWSER=http://127.0.0.1:9333")
def test_nothing_is_cut_or_overlaps_at_any_width_in_light_and_dark(tmp_path: Path) -> None:
    assert BROWSER is not None
    out = tmp_path / "pages.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/pages.py", "--browser", BROWSER, "--out", str(out)],
        cwd=ROOT,
        # Playwright leaves a folder where temporary files are.
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode in (0, 1), done.stderr
    results = json.loads(out.read_text())
    assert {(each["width"], each["scheme"]) for each in results} == {
        *((width, scheme) for width in (360, 800, 1280) for scheme in ("light", "dark")),
        (720, "paper"),
    }
    assert [each for each in results if each["faults"]] == []
    assert max(each["bytes"] for each in results) < 2e6

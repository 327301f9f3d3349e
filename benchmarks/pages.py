"""Pages of plans and runs in a browser: nothing is cut or overlaps, at three widths, in light and dark, and on paper.

    pip install playwright
    chromium --headless --remote-debugging-port=9333 about:blank &
    python benchmarks/pages.py [RUN...] [--browser http://127.0.0.1:9333] [--out pages.json] [--pictures folder]

Each page is opened at 360, 800 and 1,280 pixels with both colour schemes, and as it is printed. A page fails where its
document is wider than the screen, where text lies outside of the screen or on other text, where a chart is missing, or
where the browser reports an error. Without RUN, the pages are those of runs that are written for it: one of 100,000
steps, three side by side, one without a metric, and of two plans. Prints a table and writes JSON; it takes a minute. It
exits with 1 if a page has a fault.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from pipekit.commands.plan import PlanOptions, plan_report
from pipekit.config import parse_config
from pipekit.pages.plan_page import render_html
from pipekit.pages.run_page import write_run_page
from pipekit.pages.run_record import RunRecord

WIDTHS = (360, 800, 1280)
SCHEMES = ("light", "dark")
VIEWS = [(width, scheme) for width in WIDTHS for scheme in SCHEMES] + [(720, "paper")]
"""Widths and colour schemes; paper has the width of a page of A4."""

FAULTS = """() => {
  const faults = [], width = innerWidth, paper = matchMedia("print").matches;
  const whole = document.documentElement.scrollWidth;
  if (whole > width) faults.push(`the document is ${whole} wide`);
  const boxes = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const parent = node.parentElement;
    if (!node.data.trim() || parent.closest("script, style, noscript, details:not([open]) > :not(summary)")) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const text = node.data.trim().slice(0, 40), scrolls = !paper && parent.closest(".scroll") !== null;
    for (const { left, right, top, bottom } of range.getClientRects())
      if (right - left > 0.5) boxes.push({ left, right, top, bottom, text, scrolls });
  }
  for (const each of boxes)
    if (!each.scrolls && (each.left < -0.5 || each.right > width + 0.5)) faults.push(`cut: ${each.text}`);
  boxes.sort((a, b) => a.top - b.top);
  boxes.forEach((a, index) => {
    for (let next = index + 1; next < boxes.length && boxes[next].top < a.bottom - 2; next++) {
      const b = boxes[next];
      if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 && a.bottom - b.top > 4 && a.text !== b.text)
        faults.push(`overlap: ${a.text} / ${b.text}`);
    }
  });
  for (const canvas of document.querySelectorAll("canvas")) {
    const box = canvas.getBoundingClientRect();
    if ((paper || !canvas.closest(".scroll")) && box.right > width + 0.5) faults.push(`cut: ${canvas.ariaLabel}`);
    const data = canvas.width && canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    if (!data || !data.some((value) => value)) faults.push(`not drawn: ${canvas.ariaLabel}`);
  }
  return faults;
}"""
"""Faults of the page that a browser shows, in words."""


def write_run(folder: Path, *, steps: int, seed: int = 0, changes: Mapping[str, Any] | None = None) -> Path:
    """Write the folder of a run that never was: its configuration, metrics, events, texts and a profiled step."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    config = {"run": {"dir": str(folder)}, "model": {"preset": "gpt2"}, "train": {"steps": steps or 1000, "seed": seed}}
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, **(changes or {})}))
    layout = {"pp": 4, "dp": 2, "tp": 1}
    (folder / "plan.json").write_text(json.dumps({"layout": layout, "num_parameters": 124439808, "precision": "bf16"}))
    if not steps:
        return folder
    every = max(1, steps // 100)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            loss = 2.9 + 8 * math.exp(-step / steps * 9) + random.normal() * 0.05
            loss += 6 * (step == steps * 2 // 3)
            record = {"step": step, "loss": loss, "lr": 6e-4 * min(1, step / (steps * 0.02)) * (1 - 0.9 * step / steps)}
            record |= {"grad_norm": abs(random.normal()) + 0.4, "tokens_per_s": 152e3 * (1 + random.normal() * 0.02)}
            record |= {"step_time_s": 3.4, "data_wait": abs(random.normal()) * 0.01, "peak_memory_bytes": 6.1e9}
            record |= {"samples": 512 * step, "tokens": 524288 * step, "flops": 4e14 * step, "flops_per_s": 1.2e14}
            if step % every == 0:
                record |= {"val_loss": loss + 0.1, "val_loss/code": loss - 0.2, "val_loss/books": loss + 0.4}
                record |= {"eval_time_s": 12.0, "save_time_s": 3.0}
            file.write(json.dumps(record) + "\n")
    events = [(0, "start", "pp 4, dp 2, tp 1 on 8 ranks; 1f1b, 8 micro-batches; bf16")]
    events += [(step, "checkpoint", f"step-{step:08d}") for step in range(every, steps + 1, every * 10)]
    spike = f"step {steps * 2 // 3}: the loss of 9 is a spike, 41.2 spreads above the median of the last ones"
    events += [(steps * 2 // 3, "warning", f"{spike} (samples 341248 to 341759)"), (steps, "end", "")]
    lines = [
        {"time": f"2026-11-{1 + step * 20 // steps:02d}T08:30:05+00:00", "step": step, "event": kind, "text": text}
        for step, kind, text in sorted(events, key=lambda event: event[0])
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    fault = "rank 2 (stage 2) has not been heard from for 14 s, and was last seen in step 132, computing 2F3"
    stall = f"step 132 has lasted 14 s (10 usual steps take 14 s): {fault}; rank 1 and rank 3 wait for it"
    (folder / "logs").mkdir()
    record = {"time": "2026-11-01T08:45:05+00:00", "text": stall}
    (folder / "logs" / "stalls.jsonl").write_text(json.dumps(record) + "\n")
    (folder / "spikes.jsonl").write_text(json.dumps({"step": steps * 2 // 3, "loss": 9.0, "score": 41.2}) + "\n")
    sample = {
        "step": steps,
        "prompt": "Once upon a time",
        "text": "Once upon a time there was a " + "very " * 30 + "end",
    }
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    text = {"name": "data/books.txt", "loss": 2.71, "perplexity": 15.0, "bits_per_byte": 0.98}
    (folder / "evaluations.jsonl").write_text(json.dumps({"step": steps, "texts": [text]}) + "\n")
    from pipekit.schedules import Costs, plan_1f1b, simulate
    from pipekit.step_profile.timelines import save_timelines

    schedule = plan_1f1b(num_stages=4, num_micro_batches=8)
    timelines = [simulate(schedule, Costs.uniform(4, forward_s=seconds)) for seconds in (0.11, 0.1)]
    save_timelines(*timelines, folder / "profile" / f"step-{min(steps, 13):08d}")
    for rank in range(4):
        pairs = [[0.0, (8 - rank) * 1e9], [1.0, (9 - rank) * 1e9]]
        (folder / "profile" / f"memory-rank-{rank}.json").write_text(json.dumps({"seconds_and_bytes": pairs}))
    return folder


def write_plans(folder: Path) -> dict[str, Path]:
    """Write the pages of a plan of one layout and of a search among layouts."""
    model = {
        "model": {"preset": "gpt2-xl"},
        "train": {"steps": 1000, "global_batch_size": 512, "sequence_length": 1024},
    }
    parallel = {"pp": 4, "dp": 2, "schedule": "interleaved-1f1b", "stages_per_rank": 2}
    one = parse_config({**model, "parallel": parallel, "data": {"source": str(folder)}})
    whole = {"num_tokens": 3 * 10**11, "price": 2.5}
    found = {
        "plan": plan_report(one, PlanOptions(device="a100-80gb")),
        "plan of 64 devices": plan_report(one, PlanOptions(num_devices=64, device="a100-80gb", **whole)),
    }
    paths = {name: folder / f"{name.replace(' ', '-')}.html" for name in found}
    for name, report in found.items():
        paths[name].write_text(render_html(report), encoding="utf-8")
    return paths


def write_pages(folder: Path) -> dict[str, Path]:
    """Write all pages, and return their paths by their names."""
    runs = {
        "run of 100,000 steps": [write_run(folder / "long", steps=100_000)],
        "three runs": [write_run(folder / f"run-{seed}-of-three", steps=2000, seed=seed) for seed in range(3)],
        "run without metrics": [write_run(folder / "empty", steps=0)],
    }
    pages = write_plans(folder)
    for name, folders in runs.items():
        pages[name] = folder / f"{name.replace(' ', '-')}.html"
        began_s = time.perf_counter()
        write_run_page([RunRecord.read(each) for each in folders], pages[name])
        Console().print(f"{name}: written in {time.perf_counter() - began_s:.2f} s", highlight=False)
    return pages


def measure(pages: Mapping[str, Path], *, browser: str, pictures: Path | None = None) -> list[dict[str, Any]]:
    """Faults of each page at each width and scheme, in a browser that listens at an address."""
    from playwright.sync_api import sync_playwright

    results = []
    with sync_playwright() as started:
        context = started.chromium.connect_over_cdp(browser).contexts[0]
        page = context.pages[0] if context.pages else context.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        for name, path in pages.items():
            for width, scheme in VIEWS:
                is_paper = scheme == "paper"
                errors.clear()
                page.set_viewport_size({"width": width, "height": 900})
                page.emulate_media(color_scheme="light" if is_paper else scheme, media="screen")
                began_s = time.perf_counter()
                page.goto(path.absolute().as_uri())
                page.wait_for_selector("html[data-drawn]", state="attached")
                seconds = time.perf_counter() - began_s
                if is_paper:
                    page.emulate_media(color_scheme="light", media="print")
                faults = [*page.evaluate(FAULTS), *errors]
                size = path.stat().st_size
                results.append(
                    {"page": name, "width": width, "scheme": scheme, "bytes": size, "s": seconds, "faults": faults}
                )
                if pictures is not None:
                    picture = pictures / f"{name.replace(' ', '-').replace(',', '')}-{width}-{scheme}.png"
                    height = page.evaluate("document.documentElement.scrollHeight")
                    page.set_viewport_size({"width": width, "height": height})
                    page.wait_for_timeout(300)  # charts follow the size of the screen
                    page.screenshot(path=picture)
        page.goto("about:blank")
    return results


def main() -> None:
    """Write pages, measure them and show the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    parser.add_argument("--browser", default="http://127.0.0.1:9333")
    parser.add_argument("--out", type=Path, default=Path("pages.json"))
    parser.add_argument("--pictures", type=Path)
    options = parser.parse_args()
    if options.pictures is not None:
        options.pictures.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        if options.runs:
            pages = {"given runs": Path(folder) / "runs.html"}
            write_run_page([RunRecord.read(run) for run in options.runs], pages["given runs"])
        else:
            pages = write_pages(Path(folder))
        results = measure(pages, browser=options.browser, pictures=options.pictures)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    table = Table("page", "size", *(f"{width} px, {scheme}" for width, scheme in VIEWS))
    for name in pages:
        own = [each for each in results if each["page"] == name]
        cells = [f"{len(each['faults'])} faults" if each["faults"] else "whole" for each in own]
        table.add_row(name, f"{own[0]['bytes'] / 1e6:.2f} MB", *cells)
    console = Console()
    console.print(table)
    for each in results:
        for fault in each["faults"][:5]:
            console.print(f"{each['page']}, {each['width']} px, {each['scheme']}: {fault}", markup=False)
    sys.exit(any(each["faults"] for each in results))


if __name__ == "__main__":
    main()

"""Every kind of report in a real browser, started once: Chromium by Playwright, judged by axe-core as well.

`PYTHONPATH=. python tests/deploy/measure_report.py` takes the screenshots that are looked at, and times the opening.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deploy.report import report
from deploy.write_report import ReportSpec, write_report
from tests.deploy.report_history import long_history
from tests.deploy.report_manifests import cpu_manifest, gpu_manifest, hostile_manifest, minimal_manifest, write_samples

CHROMIUM = shutil.which("chromium", path="/usr/bin") or shutil.which("chromium")
WIDTHS = (375, 768, 1280)
THEMES = ("light", "dark")
RUNS = 100

playwright = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")


@dataclass(frozen=True)
class Seen:
    """What the browser found in a page."""

    overflow: int
    empty: list[str]
    drawings: int
    requests: list[str]
    console: list[str]
    faults: list[str]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, bundles: dict[str, Path]) -> dict[str, Path]:
    """A page of each kind."""
    folder = tmp_path_factory.mktemp("pages")
    found = {}
    for name, make in (("gpu", gpu_manifest), ("cpu", cpu_manifest), ("empty", minimal_manifest)):
        (folder / name).mkdir()
        write_samples(folder / name)
        report(make(), folder / name)
        found[name] = folder / name / "report.html"
    (folder / "hostile").mkdir()
    report(hostile_manifest(), folder / "hostile")
    found["hostile"] = folder / "hostile" / "report.html"
    history = long_history(folder / "gpusq.db", bundles["cpu"] / "engine.onnx", RUNS)
    spec = ReportSpec(history=history, batches=(1, 32), claims="yolov8-aerial")
    given = {
        "demonstration": [str(bundles["a100"])],
        "measured": [str(bundles["cpu"])],
        "history": [str(history)],
        "two": [str(bundles["a100"]), str(bundles["a100"] / "model.onnx")],
    }
    for name, paths in given.items():
        found[name] = write_report(paths, folder / f"{name}.html", spec).page
    return found


LOOK = """() => ({
  overflow: document.documentElement.scrollWidth - innerWidth,
  drawings: document.querySelectorAll(".drawing").length,
  empty: [...document.querySelectorAll(".drawing")].filter((drawing) => {
    const data = drawing.querySelectorAll(".area .line, .area .mark, .area .bar, .area .tile");
    return ![...data].some((one) => one.getBoundingClientRect().width > 0);
  }).map((drawing) => drawing.getAttribute("aria-label")),
})"""


def look(browser: Any, page: Path, width: int, theme: str, *, judge: bool = False) -> Seen:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
    try:
        tab = context.new_page()
        console: list[str] = []
        requests: list[str] = []
        tab.on("console", lambda message: console.append(message.text))
        tab.on("pageerror", lambda error: console.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(page.as_uri())
        found = tab.evaluate(LOOK)
        return Seen(
            **found,
            requests=[url for url in requests if url != page.as_uri()],
            console=list(console),
            faults=faults(tab) if judge else [],
        )
    finally:
        context.close()


def faults(tab: Any) -> list[str]:
    """What axe-core calls serious or critical."""
    tab.evaluate((Path(importlib.import_module(axe.__name__).__file__ or "").parent / "axe.min.js").read_text())
    found = tab.evaluate("axe.run()")["violations"]
    return [f"{each['id']}: {each['nodes'][0]['html']}" for each in found if each["impact"] in ("serious", "critical")]


KINDS = ("gpu", "cpu", "empty", "hostile", "demonstration", "measured", "history", "two")


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_fits_is_whole_and_loads_nothing(kind: str, browser: Any, pages: dict[str, Path]) -> None:
    for width in WIDTHS:
        seen = look(browser, pages[kind], width, "light")
        assert seen.overflow <= 0
        assert seen.empty == []
        assert seen.drawings or kind == "empty"
        assert (seen.requests, seen.console) == ([], [])


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("kind", ["gpu", "measured", "two"])
def test_axe_finds_no_serious_fault(kind: str, theme: str, browser: Any, pages: dict[str, Path]) -> None:
    assert look(browser, pages[kind], 1280 if theme == "light" else 375, theme, judge=True).faults == []


def test_a_kernel_says_what_it_is_to_pointer_and_keyboard(browser: Any, pages: dict[str, Path]) -> None:
    tab = browser.new_page()
    tab.goto(pages["gpu"].as_uri())
    tab.hover('[data-tip][aria-label*="blocks.0.attn.qkv"]')
    assert "modules: blocks.0.attn.qkv" in tab.inner_text("#tip")
    tab.focus('#plot-plan [data-tip][tabindex="0"]')
    tab.keyboard.press("ArrowRight")
    assert "2. gemm, int8" in tab.inner_text("#tip")
    tab.keyboard.press("Escape")
    assert tab.is_hidden("#tip")
    tab.close()


def test_a_hundred_bundles_make_a_small_page(pages: dict[str, Path]) -> None:
    assert pages["history"].stat().st_size < 400_000


BAD: dict[str, Callable[[str], str]] = {
    "overflow": lambda page: page.replace("<main", '<canvas width="1500"></canvas><main'),
    "console": lambda page: page.replace("<main", '<img alt="" src="https://example.invalid/x.png"><main'),
    "faults": lambda page: page.replace("<main", '<img src="data:,"><main'),
    "empty": lambda page: page.replace('class="bar ', 'class="'),
}


@pytest.mark.parametrize("what", BAD)
def test_the_tests_would_notice(what: str, browser: Any, pages: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text(BAD[what](pages["gpu"].read_text(encoding="utf-8")), encoding="utf-8")
    seen = look(browser, tmp_path / "bad.html", 375, "light", judge=what == "faults")
    found = getattr(seen, what)
    assert found > 0 if what == "overflow" else found

"""Screenshots of report pages at three widths in both themes, and how long each takes to open: measured here.

PYTHONPATH=. python tests/deploy/measure_report.py shots PAGE.html ...
PYTHONPATH=. python tests/deploy/measure_report.py shots --history MODEL.onnx    100 bundles in a history, as a page
"""

from __future__ import annotations

import importlib
import statistics
import sys
from pathlib import Path

from deploy.write_report import write_report
from tests.deploy.report_history import long_history

CHROMIUM = "/usr/bin/chromium"
REPEATS = 5


def measure(folder: Path, page: Path) -> None:
    """Take the screenshots of one page, and print the median time from its request to its load event."""
    playwright = importlib.import_module("playwright.sync_api")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for theme in ("light", "dark"):
            for width in (375, 768, 1280):
                tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
                times = []
                for _ in range(REPEATS):
                    tab.goto(page.absolute().as_uri(), wait_until="load")
                    times.append(tab.evaluate("performance.getEntriesByType('navigation')[0].loadEventStart"))
                tab.screenshot(path=folder / f"{page.stem}-{theme}-{width}.png", full_page=True)
                tab.close()
                print(f"{page.name} {theme} {width}: opens in {statistics.median(times):.0f} ms")
        browser.close()


def main(folder: Path, arguments: list[str]) -> None:
    """Measure the pages, or the page of a history that is made here."""
    folder.mkdir(exist_ok=True)
    if arguments[0] == "--history":
        db = long_history(folder / "gpusq.db", Path(arguments[1]), 100)
        arguments = [str(write_report([str(db)], folder / "history.html").page)]
    for page in arguments:
        measure(folder, Path(page))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

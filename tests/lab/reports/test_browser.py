"""A page in a browser: nothing on its console, nothing wider than a phone, a filter that works."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.lab.reports.made_up import comparison, single

from svdalign.lab.reports import comparison_page, run_page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason=f"needs a browser, one of {', '.join(NAMES)}"
)

#: Shows the page at the width of a phone and writes down what it finds there.
FRAME = """<!doctype html><iframe id="f" src="report.html" width="375" height="800"></iframe>
<p id="found"></p><script>
const frame = document.querySelector("#f"), found = document.querySelector("#found");
frame.onload = () => {
  const page = frame.contentDocument, root = page.documentElement;
  const shown = () => [...page.querySelectorAll('[data-method="1"]')]
    .filter((part) => getComputedStyle(part).display !== "none").length;
  const before = shown(), box = page.querySelector('.key input[value="1"]');
  if (box) box.click();
  const ids = [...page.querySelectorAll("svg [id]")].length;
  found.textContent = `width ${root.scrollWidth} of ${root.clientWidth} before ${before} after ` +
    `${shown()} background ${getComputedStyle(page.body).backgroundColor}.`;
};
</script>"""


def look(folder: Path, page: str, *options: str) -> tuple[str, str]:
    """What the frame found, and what browsers write to their consoles."""
    (folder / "report.html").write_text(page, encoding="utf-8")
    (folder / "frame.html").write_text(FRAME, encoding="utf-8")
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--allow-file-access-from-files", "--enable-logging=stderr",
            f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=2000", *options,
            "--dump-dom", (folder / "frame.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    found = re.search(r'<p id="found">(.*?)</p>', done.stdout)
    assert found, done.stderr
    return found[1], "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def test_a_comparison(tmp_path: Path) -> None:
    found, console = look(tmp_path, comparison_page(comparison()))
    assert console == ""
    measured = re.match(r"width (\d+) of (\d+) before (\d+) after (\d+) background (.*)\.", found)
    assert measured, found
    assert int(measured[1]) <= int(measured[2]) <= 375
    assert int(measured[3]) > 10
    assert int(measured[4]) == 0
    dark, _ = look(tmp_path, comparison_page(comparison()),
                   "--blink-settings=preferredColorScheme=0")  # fmt: skip
    assert "background rgb(20, 24, 30)" in dark
    assert measured[5] == "rgb(247, 247, 244)"


def test_a_run_with_long_names(tmp_path: Path) -> None:
    long = "a_name_without_any_space_" * 8
    results = single(config={**single()["config"], "model": long, "options": {long: long}})
    found, console = look(tmp_path, run_page(results, long))
    assert console == ""
    measured = re.match(r"width (\d+) of (\d+) ", found)
    assert measured, found
    assert int(measured[1]) <= int(measured[2])

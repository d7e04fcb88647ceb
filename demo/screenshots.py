"""Take screenshots of HTML pages in headless Chromium, print them, and check that no page is wider than its window.

usage: python demo/screenshots.py FOLDER

Each page of FOLDER is shown at 400 and 1200 pixels, in light and in dark, and is printed to a PDF file. The exit code
is 1 if a page is too wide. If Chromium is not installed, the command that installs it is printed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = (400, 1200)
SCHEMES = {"light": ("--blink-settings=preferredColorScheme=1",), "dark": ("--blink-settings=preferredColorScheme=0",)}
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files")
SHEET = re.compile(rb"/Type */Page\b")
MEASURE = """<!DOCTYPE html><body style="margin: 0">
<iframe src="{page}" style="width: {width}px; height: 600px; border: 0"></iframe><script>onload = () => {{
  const root = document.querySelector("iframe").contentDocument.documentElement;
  document.title = root.scrollWidth + " " + root.scrollHeight;
}};</script></body>"""


def run(browser: str, profile: str, *arguments: str) -> str:
    """Run the browser once and return what it prints."""
    command = [browser, *FLAGS, f"--user-data-dir={profile}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def measure(browser: str, profile: str, page: Path, width: int) -> tuple[int, int]:
    """Return the width and height in pixels that the contents of a page take in a window of `width` pixels."""
    frame = Path(profile, "frame.html")
    frame.write_text(MEASURE.format(page=page.as_uri(), width=width))
    found = re.search(r"<title>(\d+) (\d+)</title>", run(browser, profile, "--dump-dom", frame.as_uri()))
    if found is None:
        raise SystemExit(f"{page}: the browser did not measure the page")
    return int(found[1]), int(found[2])


def take_screenshots(browser: str, page: Path) -> bool:
    """Write the screenshots of one page beside it. Returns True if it fits into each width."""
    fits = True
    with tempfile.TemporaryDirectory() as profile:
        for width in WIDTHS:
            needed, height = measure(browser, profile, page, width)
            fits &= needed <= width
            print(f"{page.name}: {needed} of {width} pixels wide{'' if needed <= width else ': TOO WIDE'}")
            for scheme, flags in SCHEMES.items():
                picture = page.with_name(f"{page.stem}-{width}-{scheme}.png")
                size = f"--window-size={width},{min(height, 16000)}"
                run(browser, profile, *flags, size, f"--screenshot={picture}", page.as_uri())
        printed = page.with_suffix(".pdf")
        run(browser, profile, "--no-pdf-header-footer", f"--print-to-pdf={printed}", page.as_uri())
        print(f"{printed.name}: {len(SHEET.findall(printed.read_bytes()))} sheets")
    return fits


def main() -> int:
    folder = Path(sys.argv[1]).resolve()
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        print("no screenshots, because Chromium is not installed: sudo apt-get install chromium")
        return 0
    return 0 if all([take_screenshots(browser, page) for page in sorted(folder.glob("*.html"))]) else 1


if __name__ == "__main__":
    sys.exit(main())

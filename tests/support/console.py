"""Run the commands of a page and compare their output with what the page shows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

BLOCK = re.compile(r"^```(?:console|yaml title=\"([\w.]+)\")\n(.*?)^```", re.M | re.S)
NUMBER = re.compile(r"[-+x]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
ACTIVATE = 'swsurgery() { "$PYTHON" -m swsurgery "$@"; }\n'


def run_page(page: Path, folder: Path, environment: dict[str, str], tolerance: float = 0.05) -> int:
    """Run every command of a page's console blocks in a folder, and return the number of commands.

    A line `$ COMMAND` is run by bash, and the lines below it must be its output. A line `...` stands for any lines. A
    number may differ by the relative tolerance if the words around it are equal. A YAML block with a title is written
    to a file of this name first.
    """
    count = 0
    for title, text in BLOCK.findall(page.read_text()):
        if title:
            (folder / title).write_text(text)
            continue
        for command, expected in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.M):
            shown = run_command(command, folder, environment)
            assert matches(expected.splitlines(), shown.splitlines(), tolerance), f"$ {command}\n{shown}"
            count += 1
    return count


def run_command(command: str, folder: Path, environment: dict[str, str]) -> str:
    """Run a command with bash, and return what it prints on stdout."""
    done = subprocess.run(
        ["bash", "-c", ACTIVATE + command],
        cwd=folder, env=environment | {"PYTHON": sys.executable}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode in (0, 1), f"$ {command}\n{done.stderr}"
    return done.stdout


def matches(expected: list[str], shown: list[str], tolerance: float) -> bool:
    """Tell whether lines are as expected; `...` stands for any number of lines."""
    if not expected:
        return not shown
    if expected[0] == "...":
        return any(matches(expected[1:], shown[at:], tolerance) for at in range(len(shown) + 1))
    return bool(shown) and same_line(expected[0], shown[0], tolerance) and matches(expected[1:], shown[1:], tolerance)


def same_line(expected: str, shown: str, tolerance: float) -> bool:
    """Tell whether two lines have the same words, and numbers within the tolerance."""
    if re.sub(r"\s+", " ", NUMBER.sub("#", expected)) != re.sub(r"\s+", " ", NUMBER.sub("#", shown)):
        return False
    pairs = zip(NUMBER.findall(expected), NUMBER.findall(shown), strict=True)
    return all(a == b or close(a, b, tolerance) for a, b in pairs)


def close(expected: str, shown: str, tolerance: float) -> bool:
    """Compare a measured number, which has a decimal point; all other numbers must be equal."""
    if "." not in expected or "." not in shown:
        return False
    a, b = (float(text.lstrip("x+").replace(",", "")) for text in (expected, shown))
    return abs(a - b) <= tolerance * max(abs(a), abs(b))

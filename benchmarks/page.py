"""Write the sections of docs/benchmarks.md, or of another page, that a benchmark measures."""

from __future__ import annotations

import os
import platform
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"


def describe_machine() -> str:
    """Return the cores, the kernel and the Python with which a benchmark was measured, as a sentence."""
    return f"{len(os.sched_getaffinity(0))} cores, Linux {platform.release()}, Python {platform.python_version()}."


def replace_section(title: str, lines: list[str], page: Path = PAGE) -> None:
    """Replace the section of that title by `lines`. A page without this section gets it at its end."""
    before, _, rest = page.read_text().partition(f"\n## {title}\n")
    _, heading, after = rest.partition("\n## ")
    page.write_text(before.rstrip("\n") + "\n" + "\n".join(["", f"## {title}", "", *lines, ""]) + heading + after)

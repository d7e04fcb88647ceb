"""Make the description for package indexes, which cannot follow the README's links to files of the repository."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
LINK = re.compile(r"(!?)\[([^\]]+)\]\(([^)]+)\)")


def describe(readme: str, source: str | None) -> str:
    """Return the README with its relative links made absolute: below `source`, the address of the repository.

    If `source` is None, each relative link becomes plain text, and each image of the repository is left out.
    """

    def replace(link: re.Match[str]) -> str:
        image, text, target = link.groups()
        if "://" in target or target.startswith("#"):
            return link[0]
        if source is None:
            return "" if image else text
        return f"{image}[{text}]({source.rstrip('/')}/{'raw' if image else 'blob'}/HEAD/{target})"

    return LINK.sub(replace, readme)


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = describe((ROOT / "README.md").read_text(), project.get("urls", {}).get("Source"))
    setup(long_description=text, long_description_content_type="text/markdown")

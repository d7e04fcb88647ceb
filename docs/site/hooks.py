"""Hooks of mkdocs: add pages that are not in docs/, and lead links out of docs/ somewhere."""

from __future__ import annotations

import posixpath
import re
import tomllib
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import swsurgery

ROOT = Path(__file__).parents[2]
OUTSIDE = {
    "README.md": "index.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Maps files of the repository to their pages on the site."""

LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])+)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the repository's root, and the reference of the Python functions."""
    for source, page in OUTSIDE.items():
        if source != "README.md":
            files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    files.append(File.generated(config, "api.md", content=list_functions()))
    return files


def list_functions() -> str:
    """Return a page that mkdocstrings fills with the signatures and docstrings of all public names."""
    names = [name for name in swsurgery.__all__ if name != "__version__"]
    intro = "# Python functions\n\nMade from the docstrings. [python.md](python.md) has an example of each function.\n"
    return intro + "".join(f"\n::: swsurgery.{name}\n" for name in names)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace relative links that lead out of docs/."""
    folder = "" if page.file.src_uri in OUTSIDE.values() and page.file.src_uri != "index.md" else "docs"
    return LINK.sub(lambda link: replace_link(link, folder, files), markdown)


def replace_link(link: re.Match[str], folder: str, files: Files) -> str:
    """Return a link as the site needs it. A link to a file that is not on the site becomes text or a public address."""
    text, target, anchor = link[1], link[2], link[3] or ""
    if "://" in target or target.startswith("mailto:"):
        return link[0]
    path = posixpath.normpath(posixpath.join(folder, target))
    inside = path.removeprefix("docs/") if path.startswith("docs/") else OUTSIDE.get(path)
    if inside and files.get_file_from_path(inside):
        return f"[{text}]({inside}{anchor})"
    if not (ROOT / path).exists():
        return link[0]  # mkdocs reports it
    source = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {}).get("Source")
    return f"[{text}]({source.rstrip('/')}/blob/HEAD/{path})" if source else text

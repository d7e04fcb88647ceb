"""The documentation site: its navigation, its generated tables and figure, and the checker of its links."""

from __future__ import annotations

import re
import runpy
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import yaml

import swsurgery

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
GENERATE = runpy.run_path(str(DOCS / "generate.py"), run_name="generate")
FIGURE = runpy.run_path(str(DOCS / "figure.py"), run_name="figure")
LINKS = runpy.run_path(str(DOCS / "site" / "links.py"), run_name="links")


def list_pages(nav: object) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for each in (nav.values() if isinstance(nav, dict) else nav) for page in list_pages(each)]


def test_the_navigation_has_each_page_once():
    added = set(re.findall(r'"(\w+\.md)"', (DOCS / "site" / "hooks.py").read_text())) - {
        "README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md",
    }  # fmt: skip
    pages = list_pages(SITE["nav"])
    assert len(pages) == len(set(pages))
    assert set(pages) == {path.name for path in DOCS.glob("*.md")} | added


def test_a_broken_link_fails_the_build():
    assert SITE["strict"] is True
    assert set(SITE["validation"]["links"].values()) | set(SITE["validation"]["nav"].values()) == {"warn"}


def test_the_tables_of_tools_are_those_that_were_measured():
    assert (ROOT / "README.md").read_text() == GENERATE["readme"]()
    assert (DOCS / "comparison.md").read_text() == GENERATE["comparison"]()


def test_the_figure_shows_the_known_values():
    assert FIGURE["FIGURE"].read_text() == FIGURE["draw"](FIGURE["read_bars"]())
    texts = [each.text for each in ET.parse(FIGURE["FIGURE"]).iter("{http://www.w3.org/2000/svg}text")]
    assert {"25.1", "121", "261,170", "797,307"} <= set(texts)


def test_the_figure_needs_no_other_file_and_has_two_colour_schemes():
    text = FIGURE["FIGURE"].read_text()
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"href|url\(|<script|@import|http(?!://www.w3.org/2000/svg)", text)


def test_the_checker_of_links_finds_what_leads_nowhere(tmp_path):
    good = '<h1 id="top">a</h1><a href="b.html#x"></a><a href="#top"></a><a href="https://host/y">z</a>'
    (tmp_path / "a.html").write_text(good + '<img src="p.svg">')
    (tmp_path / "b.html").write_text('<p id="x"></p><a href="sub/">c</a>')
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "index.html").write_text('<a href="../a.html#top">up</a>')
    (tmp_path / "p.svg").write_text("<svg/>")
    assert LINKS["find_faults"](tmp_path) == []
    (tmp_path / "c.html").write_text(
        '<a href="gone.html"></a><a href="a.html#gone"></a><img src="gone.png"><script src="//host/x.js"></script>'
    )
    assert LINKS["find_faults"](tmp_path) == [
        "c.html: loaded from another server: //host/x.js",
        "c.html: no such file: gone.html",
        "c.html: no such anchor: a.html#gone",
        "c.html: no such file: gone.png",
    ]


def test_a_folder_without_pages_is_a_fault(tmp_path):
    assert LINKS["find_faults"](tmp_path) == [f"{tmp_path}: there is no page"]


@pytest.mark.parametrize("name", sorted(set(swsurgery.__all__) - {"__version__"}))
def test_the_docstring_of_a_public_name_has_no_accidental_link(name):
    text = re.sub(r"`[^`]*`", "", getattr(swsurgery, name).__doc__)
    assert not re.search(r"\]\s?[\[(]", text), "the site would take it for a Markdown link; quote it with backticks"

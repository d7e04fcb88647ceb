"""What the project says about itself: supported systems and how to cite it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

import swsurgery
from swsurgery.cli import make_app

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_linux_is_the_only_system_that_the_package_claims():
    systems = [line for line in PROJECT["classifiers"] if line.startswith("Operating System")]
    assert systems == ["Operating System :: POSIX :: Linux"]


def test_the_tests_run_on_the_claimed_system_and_pythons():
    workflows = "\n".join(path.read_text() for path in WORKFLOWS)
    assert {re.match(r"[a-z]+", name)[0] for name in re.findall(r"runs-on: (\S+)", workflows)} == {"ubuntu"}
    claimed = {line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)}
    assert claimed == set(re.findall(r'"(3\.\d+)"', re.search(r"python-version: \[(.*)\]", workflows)[1]))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_on_a_page_have_the_options_that_it_uses(page):
    commands = get_command(make_app()).commands
    for block in re.findall(r"^```[^\n]*\n(.*?)^```", page.read_text(), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = re.match(r"(?:\$ |- run: |    - )?swsurgery ([a-z]+)\b([^#|>]*)", line.strip())
            if words and page.name != "commands.md":
                known = {option for each in commands[words[1]].params for option in each.opts}
                assert set(re.findall(r"(?<=\s)--?[a-z][a-z-]*", words[2])) <= known, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_other_systems_only_to_say_that_they_are_untested(page):
    for paragraph in page.read_text().split("\n\n"):
        if re.search(r"\bmacOS\b|\bWindows (?:1|PC|computer)|\bWSL\b", paragraph):
            assert re.search(r"not covered|not tested|not supported", paragraph), paragraph


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")), ids=lambda page: page.name)
def test_a_page_that_installs_a_release_says_what_to_do_before_the_first(page):
    if "\n## 0.1.0 (unreleased)\n" in (ROOT / "CHANGELOG.md").read_text():
        text = page.read_text()
        if re.search(r"""pip install\s+["']?swsurgery|v0\.1\.0""", text):
            assert "faq.md#how-do-i-install-it" in text or page.name == "faq.md"


def test_the_citation_is_a_valid_cff_file_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys(), "required by version 1.2.0 of the format"
    assert (citation["cff-version"], citation["type"]) == ("1.2.0", "software")
    assert str(citation["version"]) == swsurgery.__version__
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"]
    texts = [citation["message"], citation["title"], citation["abstract"], *citation["keywords"]]
    assert all(isinstance(text, str) and text for text in texts)
    [article] = citation["references"]
    assert article["identifiers"] == [{"type": "other", "value": "arXiv:2411.07191"}]
    assert all({"family-names", "given-names"} == author.keys() for author in article["authors"])

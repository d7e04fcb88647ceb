"""The pages for contributors agree with the code: levels, packages, recipes, and the list of pages."""

from __future__ import annotations

import ast
import re
import runpy
import tomllib
from pathlib import Path
from typing import get_args

import pytest
import quick
import test_imports
from test_imports import IMPORTS, LEVELS, SOURCES, WALLS

import swsurgery
from swsurgery.editing import apply
from swsurgery.manifest import operations

ROOT = Path(__file__).parents[1]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
README = (ROOT / "README.md").read_text()
RECIPES = dict(re.findall(r"^### (.+?)\n(.*?)(?=^##|\Z)", CONTRIBUTING, re.M | re.S))
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its two first lines."""
    section = re.split(r"\n##+ ", page.partition(f"# {heading}\n")[2])[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    assert len(lines) > 2, f"no table below {heading}"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def names(cell: str) -> list[str]:
    return [name.rstrip("/") for name in re.findall(r"`([^`]+)`", cell)]


def test_the_table_of_levels_is_the_one_that_the_tests_enforce():
    table = rows(ARCHITECTURE, "Levels")
    assert [(names(cells[1]), int(cells[0])) for cells in table] == [([name], level) for name, level in LEVELS.items()]
    for cells in table:
        (module,) = names(cells[1])
        package = Path(swsurgery.__file__).parent / module
        assert package.is_dir() == cells[1].endswith("/`"), f"{module}: only packages end in a slash"
        assert cells[2]


def test_the_table_of_libraries_is_the_one_that_the_tests_enforce():
    written = {
        names(cells[0])[0]: tuple(f"swsurgery.{name.removesuffix('.py').replace('/', '.')}" for name in names(cells[1]))
        for cells in rows(ARCHITECTURE, "What may be imported where")
    }
    assert written == WALLS


def test_no_package_imports_what_the_page_rules_out():
    table = rows(ARCHITECTURE, "What each package must not depend on")
    packages = {path.parent.name for path in Path(swsurgery.__file__).parent.glob("*/__init__.py")}
    assert {names(cells[0])[0] for cells in table} == packages
    for package, excluded, reason in table:
        assert reason and set(names(excluded)) <= LEVELS.keys()
        for module in names(excluded):
            users = [m for m in SOURCES if m.startswith(f"swsurgery.{names(package)[0]}")]
            assert users
            for user in users:
                assert not [n for n in IMPORTS[user] if f"{n}.".startswith(f"swsurgery.{module}.")], (user, module)


def test_the_steps_of_apply_are_called_in_the_order_of_the_page():
    table = rows(ARCHITECTURE, "How `apply` works, as values")
    assert [int(cells[0]) for cells in table] == list(range(1, len(table) + 1))
    steps = [name for cells in table[:-1] for name in names(cells[1])]
    body = ast.parse(Path(apply.__file__).read_text()).body
    (function,) = (node for node in body if isinstance(node, ast.FunctionDef) and node.name == "apply")
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    calls.sort(key=lambda call: (call.end_lineno, call.end_col_offset))  # an argument is computed before its call
    called = [ast.unparse(call.func).rpartition(".")[2] for call in calls]
    assert [name for name in dict.fromkeys(called) if name in steps] == steps


def test_every_page_is_in_the_index_and_the_readme():
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    index = re.findall(r"^\| \[(.+?)\]\((.+?)\) \| .+ \|$", (ROOT / "docs" / "index.md").read_text(), re.M)
    assert all(text == target for text, target in index)
    assert sorted(target for _, target in index) == sorted(pages)
    assert {f"docs/{page}" for page in pages | {"index.md"}} <= set(LINK.findall(README))


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda page: page.name)
def test_links_to_files_of_the_repository_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        assert "://" in target or target.startswith("mailto:") or (page.parent / target).exists(), target


def test_there_is_a_recipe_for_each_extension_point():
    points = {
        "A dtype", "An operation", "A target", "A model family", "A layout of quantised weights", "A rule", "A recipe",
        "A known model", "A JSON document",
    }  # fmt: skip
    assert set(RECIPES) == points


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_a_recipe_names_exists(recipe):
    quoted = {word for code in re.findall(r"`([^`]+)`", RECIPES[recipe]) for word in code.split() if word != ">"}
    paths = {word for word in quoted if re.fullmatch(r"[\w./-]+\.(py|md|toml|json)(::\w+)?", word)}
    texts = []
    for path in paths:
        file, _, function = path.partition("::")
        texts.append((ROOT / file).read_text())
        assert not function or f"def {function}(" in texts[-1], path
    assert any(path.startswith("swsurgery/") for path in paths) and any("::" in path for path in paths)
    for word in quoted - paths - {"python", "-m", "swsurgery.known", "entry", "NAME"}:
        assert any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) for text in texts), word


def test_the_modules_that_the_page_about_regions_names_exist():
    modules = [name for cells in rows(ARCHITECTURE, "How regions are edited") for name in names(cells[1])]
    assert len(modules) > 8
    assert [name for name in modules if not (ROOT / "swsurgery" / name).is_file()] == []


def test_every_operation_has_a_row_on_the_page():
    classes = get_args(get_args(operations.Edit)[0])
    ops = [get_args(each.model_fields["op"].annotation)[0] for each in classes]
    table = rows((ROOT / "docs" / "manifest.md").read_text(), "Operations")
    assert [names(cells[0])[0] for cells in table] == ops


def test_make_targets_that_the_pages_name_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    named = {name for page in (CONTRIBUTING, README) for name in re.findall(r"(?:^|`)make (\w+)", page, re.M)}
    assert {"quick", "test"} <= named <= targets


def test_the_readme_of_a_package_index_has_no_relative_link():
    describe = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["describe"]
    source = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {}).get("Source")
    targets = LINK.findall(describe(README, source))
    assert "https://arxiv.org/abs/2411.07191" in targets
    assert [target for target in targets if "://" not in target] == []
    assert describe("[a](b.md), [c](https://d) [e](#f)", None) == "a, [c](https://d) [e](#f)"
    assert describe("[a](b.md)", "https://host/x/") == "[a](https://host/x/blob/HEAD/b.md)"
    assert describe("a ![b](c.svg) d", None) == "a  d"
    assert describe("![b](c.svg)", "https://host/x") == "![b](https://host/x/raw/HEAD/c.svg)"


@pytest.mark.parametrize("entry", quick.NEEDS_TORCH + quick.TAKES_LONG)
def test_what_the_quick_tests_leave_out_exists(entry):
    file, _, function = entry.partition("::")
    path = quick.TESTS / file
    assert path.is_dir() if file.endswith("/") else path.is_file()
    assert not function or f"def {function}(" in path.read_text()


def test_the_quick_tests_leave_out_what_imports_torch():
    assert quick.imports_extras(quick.TESTS / "model" / "test_variants.py")
    assert quick.imports_extras(quick.TESTS / "model" / "test_tokenizer_process.py"), "through tiny_checkpoint"
    assert not quick.imports_extras(Path(test_imports.__file__))

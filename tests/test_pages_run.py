"""The commands of README.md and of the tutorial print what these pages show; the notebook runs."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest
from console import matches, run_page, same_line

ROOT = Path(__file__).parents[1]
MODEL = os.environ.get("SWSURGERY_TEST_MODEL")
needs_model = pytest.mark.skipif(not MODEL, reason="SWSURGERY_TEST_MODEL names no model")


@pytest.fixture
def folder(tmp_path):
    """A folder in which `my-model` is the real model."""
    (tmp_path / "my-model").symlink_to(Path(MODEL).resolve())
    return tmp_path


@pytest.mark.model
@needs_model
@pytest.mark.parametrize("page, commands", [("README.md", 3), ("docs/tutorial.md", 8)])
def test_the_commands_of_a_page_print_what_it_shows(page, commands, folder):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "XDG_DATA_HOME": str(folder / "data"), "COLUMNS": "120"}
    assert run_page(ROOT / page, folder, environment) == commands


@pytest.mark.model
@needs_model
def test_the_notebook_runs(folder, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "docs" / "notebook.ipynb", 4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), "it is stored without outputs"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    done = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    [texts] = [cell for cell in done.cells if cell["source"].endswith("\ntexts")]
    shown = texts["outputs"][-1]["data"]["text/plain"]
    base, patched = ast.literal_eval(shown).values()
    assert "Paris" in base and "Paris" not in patched
    answers = [output["data"] for cell in done.cells for output in cell.get("outputs", ()) if "data" in output]
    tables = [data for data in answers if "text/html" in data]
    assert len(tables) >= 2, "tables are shown as tables"


def test_a_page_with_other_output_is_found():
    assert matches(["a 1.00", "...", "c"], ["a 1.01", "b", "b", "c"], 0.05)
    assert not matches(["a", "...", "c"], ["a", "b"], 0.05)
    assert not matches(["a"], ["a", "b"], 0.05)
    assert same_line("perplexity  25.0", "perplexity 25.5", 0.05)
    assert not same_line("perplexity 25.0", "perplexity 35.0", 0.05)
    assert not same_line("layer 11", "layer 12", 0.05), "a number without a decimal point is no measurement"

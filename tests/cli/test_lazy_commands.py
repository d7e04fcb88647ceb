"""A command line imports only the modules that its command needs."""

from __future__ import annotations

import gc
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from patched import write_patched

from swsurgery import cli
from swsurgery.cli import COMMANDS, main, make_app

NEVER = {"torch", "transformers", "numpy", "huggingface_hub", "tqdm", "rich"}
"""Libraries that are slow to load, and that none of the commands in `NEEDS` needs."""

NEEDS = {
    "apply edit.yaml -o new --check off": {"cli.editing", "editing.apply"},
    "apply edit.yaml --dry-run": {"cli.editing", "editing.apply"},
    "inspect base": {"cli.checkpoint", "checkpoint.inspect"},
    "verify patched": {"cli.verifying", "verifying.against_record"},
    "lookup llama-7b": {"cli.known", "known.shipped"},
}
"""Command lines, and modules that they must import."""

OTHERS = {"editing.in_place", "checkpoint.journal", "model.check", "manifest.patch"}
"""Modules that `apply` of a text in a folder does not need if it runs no model."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("folder")
    write_patched(folder)
    (folder / "edit.yaml").write_text(
        "version: 1\nbase: {path: base}\nedits:\n"
        "  - {op: zero, tensor: model.layers.0.mlp.down_proj.weight, index: [0, 0]}\n"
    )
    return folder


def list_modules(folder: Path, words: list[str]) -> set[str]:
    """Run a command in a process of its own, and return the names of the modules that it imported."""
    code = (
        "import sys\nfrom swsurgery.cli import main\n"
        "code = main()\nprint('', *sys.modules, file=sys.stderr)\nsys.exit(code)"
    )
    environment = {**os.environ, "XDG_DATA_HOME": str(folder / "own"), "XDG_CACHE_HOME": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize("line", NEEDS)
def test_a_command_imports_what_it_needs(folder, line):
    modules = list_modules(folder, line.split())
    assert not NEVER & modules
    assert {f"swsurgery.{name}" for name in NEEDS[line]} <= modules
    commands = {f"swsurgery.cli.{name}" for name in COMMANDS.values()}
    assert commands & modules == {f"swsurgery.cli.{COMMANDS[line.split()[0]]}"}
    if line.startswith("apply"):
        assert not {f"swsurgery.{name}" for name in OTHERS} & modules


def test_the_help_knows_every_command():
    names = [command.callback.__name__ for command in make_app().registered_commands if command.callback]
    assert names == list(COMMANDS)


@pytest.mark.parametrize(
    ("words", "said"),
    [(["aply"], "Did you mean 'apply'"), (["--verson"], "No such option"), (["apply", "--dry"], "--dry-run")],
)
def test_a_mistyped_word_is_explained_as_before(capsys, words, said):
    assert main(words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_command_is_imported_is_one_line(monkeypatch, capsys, number):
    true = importlib.import_module

    def interrupt(name: str) -> object:
        signal.raise_signal(number)
        return true(name)

    monkeypatch.setattr(importlib, "import_module", interrupt)
    assert main(["schema"]) == 130
    line = f"swsurgery: interrupted: {number.name} (nothing was left behind)\n"
    assert capsys.readouterr() == ("", line)


def test_a_process_looks_for_garbage_rarely_but_a_call_of_main_changes_nothing(monkeypatch):
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    assert main(["--version"]) == 0
    assert (gc.get_threshold(), gc.get_freeze_count()) == (before, frozen)
    monkeypatch.setattr(cli, "main", lambda: 0)
    try:
        with pytest.raises(SystemExit):
            cli.entry()
        assert gc.isenabled() and gc.get_threshold() == (20_000, *before[1:])
        assert gc.get_freeze_count() > frozen, "no object is looked at when the process ends"
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)

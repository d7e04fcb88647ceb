"""-h, and the completion of words in shells."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from swsurgery.cli import COMMANDS, main
from swsurgery.known import STATUSES, list_all_models
from swsurgery.known.names import list_model_names
from swsurgery.known.own import get_own_folder

NAMES = sorted(COMMANDS)
COMPLETED = [
    (["loo"], ["lookup"]),
    (["lookup", "llama-7"], ["llama-7b"]),
    (["lookup", "huggyllama/llama-7"], ["huggyllama/llama-7b"]),
    (["lookup", "x", "--status", "ca"], ["candidate"]),
    (["verify", "x", "--model", "llama-7"], ["llama-7b"]),
    (["recipe", "llama-7"], ["llama-7b"]),
    (["export", "x", "--format", "outliers", "--model", "llama-7"], ["llama-7b"]),
    (["schema", "--output", "err"], ["error"]),
    (["check", "x", "--device", "cu"], ["cuda"]),
    (["apply", "x", "--link", "cl"], ["clone"]),
    (["apply", "x", "--dev"], ["--device"]),
]
FILES = [
    ["apply", "man"],
    ["lookup", "./mod"],
    ["inspect", "mod"],
    ["check", "x", "--text", "te"],
    ["verify", "x", "--manifest", "man"],
    ["sweep", "man"],
]
"""Words that a shell completes by names of files."""


@pytest.fixture
def complete(monkeypatch, tmp_path, capsys):
    """Return a function that completes the last of some words as bash asks for it."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "torch", None)

    def complete(words: list[str]) -> list[str]:
        monkeypatch.setenv("_SWSURGERY_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", " ".join(["swsurgery", *words]))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        assert main([]) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        return printed.out.split()

    return complete


@pytest.mark.parametrize("command", NAMES)
def test_h_is_help(capsys, command):
    pages = [(main([command, option]), capsys.readouterr().out) for option in ("-h", "--help")]
    assert pages[0] == pages[1]
    assert pages[0][0] == 0 and pages[0][1].startswith(f"Usage: swsurgery {command} ")
    assert "completion" not in pages[0][1]


def test_the_options_of_completion_are_at_the_top(capsys):
    assert main(["-h"]) == 0
    page = capsys.readouterr().out
    assert "--install-completion" in page and "--show-completion" in page and "-h, --help" in page


@pytest.mark.parametrize(("words", "expected"), COMPLETED)
def test_a_word_is_completed(complete, words, expected):
    assert complete(words) == expected


@pytest.mark.parametrize("words", FILES)
def test_a_shell_completes_the_names_of_files(complete, words):
    assert complete(words) == []


def test_every_known_model_is_completed(complete):
    assert set(complete(["lookup", ""])) == {model.slug for model in list_all_models()}
    assert complete(["lookup", "x", "--status", ""]) == list(STATUSES)


def test_own_entries_are_completed_if_a_shell_does_not_interpret_their_names(complete):
    own = get_own_folder()
    own.mkdir(parents=True)
    entries = {
        "sound": {"hf_id": "me/my-model", "aliases": ["my-model"]},
        "hostile": {"hf_id": "my/$(touch x)", "aliases": ["my-`touch x`"]},
        "odd": {"hf_id": 3, "aliases": {"my": 3}},
        "list": [1],
    }
    for name, entry in entries.items():
        (own / f"{name}.json").write_text(json.dumps(entry))
    (own / "damaged.json").write_text("{")
    (own / "deep.json").write_text("[" * 100_000)
    assert complete(["lookup", "my"]) == ["my-model"]
    assert [name for name in list_model_names() if name.startswith("me/")] == ["me/my-model"]


def run(words: list[str], **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(words, env={**os.environ, **environment}, capture_output=True, text=True, check=True)


def test_no_slow_library_is_loaded():
    code = (
        "import atexit, sys\natexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
        "from swsurgery.cli import main\nmain([])"
    )
    words = {"COMP_WORDS": "swsurgery lookup llama-7", "COMP_CWORD": "2", "_SWSURGERY_COMPLETE": "complete_bash"}
    done = run([sys.executable, "-c", code], **words)
    assert done.stdout.split() == ["llama-7b"]
    assert not {"torch", "transformers", "numpy", "huggingface_hub", "tqdm"} & set(done.stderr.split())


def test_zsh_and_fish(tmp_path):
    swsurgery = [sys.executable, "-m", "swsurgery"]
    words = {"_TYPER_COMPLETE_ARGS": "swsurgery lookup llama-7", "XDG_DATA_HOME": str(tmp_path)}
    zsh = run(swsurgery, _SWSURGERY_COMPLETE="complete_zsh", **words)
    assert zsh.stdout == "_arguments '*: :((\"llama-7b\"))'\n"
    fish = run(swsurgery, _SWSURGERY_COMPLETE="complete_fish", _TYPER_COMPLETE_FISH_ACTION="get-args", **words)
    assert fish.stdout == "llama-7b\n"


def test_bash_completes_with_the_script_that_is_installed(tmp_path):
    program = tmp_path / "bin" / "swsurgery"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m swsurgery "$@"\n')
    program.chmod(0o755)
    session = (
        "swsurgery --install-completion; source ~/.bashrc; complete -p swsurgery\n"
        "COMP_WORDS=(swsurgery lookup llama-7); COMP_CWORD=2; _swsurgery_completion swsurgery; echo ${COMPREPLY[@]}"
    )
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    repository = str(Path(__file__).parents[2])
    done = run(["bash", "-c", session], HOME=str(tmp_path), PATH=path, PYTHONPATH=repository)
    assert done.stdout.splitlines()[-2:] == ["complete -o default -F _swsurgery_completion swsurgery", "llama-7b"]

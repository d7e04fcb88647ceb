"""A stdout that cannot be written changes the exit code to 2; the message names what the command has already done."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from checkpoints import down, sha256, write_llama, write_manifest
from hub import fixture
from publishing import EDIT, NEW, patch, put_base

from swsurgery.cli import main

any_hub, hub = fixture.any_hub, fixture.hub

FULL = "swsurgery: cannot write (No space left on device): stdout"


@pytest.fixture
def base(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    base = write_llama(tmp_path / "base")
    shard = base / "model-00002-of-00003.safetensors"
    pins = {shard.name: sha256(shard)}
    edit = {"op": "zero", "tensor": down(1), "index": [2, 3]}
    write_manifest(tmp_path / "m.json", {"path": str(base), "sha256": pins}, edit)
    return base


def run_full(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run a command whose stdout is a full disk."""
    with open("/dev/full", "w") as full, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", full)
        return main([*words])


APPLY = ["apply", "m.json", "-o", "out", "--check", "off"]
IN_PLACE = ["apply", "m.json", "--in-place", "--check", "off"]


@pytest.mark.parametrize(
    ("before", "words", "done"),
    [
        ([], APPLY, "the output was written: {here}/out"),
        ([], IN_PLACE, "the edit was made: {here}/base"),
        ([APPLY], ["revert", "out", "-o", "back"], "the output was written: {here}/back"),
        ([IN_PLACE], ["revert", "base"], "the base was put back: {here}/base"),
        ([], ["export", "m.json", "--format", "sparse", "-o", "s"], "the output was written: s"),
        ([], ["export", "m.json", "--format", "peft", "-o", "p"], "the output was written: p"),
        ([], ["export", "m.json", "--format", "vllm", "-o", "v"], "the output was written: v"),
    ],
    ids=["apply", "apply in place", "revert to a copy", "revert", "sparse", "peft", "vllm"],
)
@pytest.mark.parametrize("more", [[], ["--json"]], ids=["text", "json"])
def test_the_message_names_what_was_done(base, capsys, monkeypatch, before, words, done, more):
    for command in before:
        assert main(command) == 0
    capsys.readouterr()
    assert run_full(monkeypatch, *words, *more) == 2
    lines = capsys.readouterr().err.splitlines()
    done = done.format(here=base.parent)
    assert [line for line in lines if "stdout" in line] == [f"{FULL} ({done})"]
    assert Path(done.rpartition(": ")[2]).exists()


@pytest.mark.parametrize("words", [["inspect", "base"], ["apply", "m.json", "--dry-run"], ["schema"]])
def test_a_command_that_did_nothing_claims_nothing(base, capsys, monkeypatch, words):
    """The twin, after a command that did something."""
    assert main(APPLY) == 0
    capsys.readouterr()
    assert run_full(monkeypatch, *words) == 2
    assert capsys.readouterr().err == f"{FULL}\n"


def test_a_removed_own_entry_is_named(tmp_path, capsys, monkeypatch):
    gone = tmp_path / "entry.json"
    monkeypatch.setattr("swsurgery.known.own.forget", lambda name: gone)
    assert run_full(monkeypatch, "lookup", "mine", "--forget") == 2
    assert capsys.readouterr().err == f"{FULL} (your entry was removed: {gone})\n"


def test_a_publication_is_named(hub, tmp_path, capsys, monkeypatch):
    patched = patch(hub, tmp_path, put_base(hub, tmp_path / "base"), f"[{EDIT}]")
    capsys.readouterr()
    assert run_full(monkeypatch, "publish", str(patched), NEW, "--yes", "--quiet", "--accept", "check-missing") == 2
    assert capsys.readouterr().err.startswith(f"{FULL} (published: {NEW}, commit ")

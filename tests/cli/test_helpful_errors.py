"""Errors say in the user's words what is wrong and what to do."""

from __future__ import annotations

import shutil

import pytest
from patched import DOWN, write_patched

from swsurgery.cli import main

HEAD = "version: 1\nbase: {path: nothere}\nedits:\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["inspect", "hf://org"], "the name of a repository has two parts: hf://org (write hf://ORG/NAME)"),
        (
            ["apply", "tab.yaml"],
            "tab.yaml:4:1: not YAML: a line is indented with a tab (indent with spaces)",
        ),
        (
            ["apply", "base/config.json"],
            "base/config.json:1:1: this is not a manifest (a manifest has the fields version, base and edits)",
        ),
        (
            ["apply", "moved.yaml"],
            "no such checkpoint: nothere (base.path is relative to the folder of the manifest)",
        ),
        (
            ["inspect", "pickled"],
            "the weights are not in safetensors files: {root}/pickled "
            "(load it with transformers, and save it with save_pretrained)",
        ),
        (["inspect", "base", "--tensor", DOWN[:-1]], f"no such tensor: {DOWN[:-1]} (did you mean {DOWN}?)"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_an_error_names_the_remedy(tmp_path, monkeypatch, capsys, words, line):
    write_patched(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tab.yaml").write_text(f"{HEAD}\t- {{op: zero}}\n")
    (tmp_path / "moved.yaml").write_text(f"{HEAD}  - {{op: zero, tensor: {DOWN}, index: [0, 0]}}\n")
    (tmp_path / "pickled").mkdir()
    shutil.copy(tmp_path / "base/config.json", tmp_path / "pickled")
    (tmp_path / "pickled/pytorch_model.bin").touch()
    assert main(words) == 2
    assert capsys.readouterr().err == f"swsurgery: {line.format(root=tmp_path)}\n"

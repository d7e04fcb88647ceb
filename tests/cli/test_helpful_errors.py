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
            "moved.yaml:2:14: base.path: no such checkpoint: nothere "
            "(base.path is relative to the folder of the manifest)",
        ),
        (
            ["inspect", "pickled"],
            "the weights are not in safetensors files: {root}/pickled "
            "(load it with transformers, and save it with save_pretrained)",
        ),
        (["verify", "pathced"], "no such checkpoint: {root}/pathced (did you mean patched?)"),
        (
            ["verify", "pickled/model"],
            "no such checkpoint: {root}/pickled/model (a repository of the Hub is written hf://pickled/model)",
        ),
        (
            ["check", "base/config.json"],
            "a checkpoint is a directory, but this is a file: {root}/base/config.json "
            "(give the directory that contains the file: base)",
        ),
        (["lookup", "zzz"], "no such known model: zzz (no known name is similar; swsurgery lookup lists all names)"),
        (
            ["inspect", "base", "--tensor", "mlp.down_proj.weigt"],
            f"no such tensor: mlp.down_proj.weigt (did you mean {DOWN}?)",
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


def test_a_directory_without_a_record_is_not_only_an_unknown_name(tmp_path, monkeypatch, capsys):
    write_patched(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["lookup", "base"]) == 2
    assert (
        "; the directory of this name has no record, swsurgery scan finds its super weights)" in capsys.readouterr().err
    )


def test_a_missing_shard_is_a_finding_of_its_file(tmp_path, monkeypatch, capsys):
    write_patched(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "patched/model-00002-of-00002.safetensors").unlink()
    assert main(["verify", "patched", "--format", "github"]) == 1
    shard = "model-00002-of-00002.safetensors"
    said = f"{shard}: missing shard (complete the download)"
    assert capsys.readouterr().out == (f"::error file=patched/{shard},title=swsurgery verify%3A structure::{said}\n")


def test_a_public_and_a_private_key_are_told_apart(tmp_path, monkeypatch, capsys):
    from keys import write_keys

    write_patched(tmp_path)
    monkeypatch.chdir(tmp_path)
    private, public = write_keys(tmp_path), tmp_path / "key.pub"
    public.chmod(0o600)
    assert main(["sign", "patched", "--key", str(public)]) == 2
    assert capsys.readouterr().err == f"swsurgery: this is a public key: {public} (give the private key)\n"
    assert main(["sign", "patched", "--key", str(private)]) == 0
    capsys.readouterr()
    assert main(["verify", "patched", "--signature", "patched/model.sig", "--public-key", str(private)]) == 2
    assert f"this is a private key: {private} (give the public key)" in capsys.readouterr().err


def test_a_base_of_other_sizes_than_the_known_model_is_named(tmp_path, monkeypatch, capsys):
    write_patched(tmp_path)
    monkeypatch.chdir(tmp_path)
    edit = "  - {op: zero, layer: 2, row: 3968, col: 7003}\n"
    (tmp_path / "llama.yaml").write_text(f"version: 1\nbase: {{repo_id: huggyllama/llama-7b}}\nedits:\n{edit}")
    assert main(["apply", "llama.yaml", "--base", "base", "--dry-run"]) == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[0]
        .startswith(
            "swsurgery: llama.yaml: the base is not huggyllama/llama-7b: it has 1 layers, hidden 4, intermediate 6, "
        )
    )

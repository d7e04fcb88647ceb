"""A message says what is wrong and what to do, for the mistakes that are easily made; none of these needs torch."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import CONFIG, FIRST, HIDDEN, INDEX, INNER, down, tensor, write_llama, write_manifest, write_single
from pointers import POINTER
from reports import REPORT, SIDE

from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.checkpoint.projections import locate
from swsurgery.cli import main
from swsurgery.errors import ArchitectureError, CheckpointError, SwsurgeryError
from swsurgery.hub import parse_location
from swsurgery.hub.names import suggest_uri
from swsurgery.model.bounds import CheckedBounds

COMMIT, OTHER = "0123456789abcdef0123456789abcdef01234567", "f" * 40
EDIT = {"op": "zero", "layer": 1, "row": 2, "col": 3}


@pytest.fixture
def base(tmp_path) -> Path:
    return write_llama(tmp_path / "base")


def refused(call, *arguments) -> str:
    with pytest.raises(SwsurgeryError) as caught:
        call(*arguments)
    [line] = caught.value.faults
    return line


# --- git-lfs


@pytest.mark.parametrize("name", ["config.json", INDEX, FIRST])
def test_a_pointer_of_git_lfs_is_called_one(base, name):
    (base / name).write_bytes(POINTER)
    line = refused(open_checkpoint, base)
    assert line.startswith("is a git-lfs pointer, not the file itself: ")
    assert line.endswith(f"{name} (run git lfs pull)")


def test_so_are_a_record_and_a_manifest(base, tmp_path, capsys):
    manifest = write_manifest(tmp_path / "m.json", base, EDIT)
    assert main(["apply", str(manifest), "-o", str(tmp_path / "p"), "--check", "weights", "--quiet"]) == 0
    capsys.readouterr()
    (tmp_path / "p" / "swsurgery.json").write_bytes(POINTER)
    manifest.write_bytes(POINTER)
    for command in (["verify", str(tmp_path / "p")], ["apply", str(manifest), "-o", str(tmp_path / "q")]):
        assert main(command) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert "is a git-lfs pointer, not the file itself" in line and line.endswith("(run git lfs pull)")


@pytest.mark.parametrize(("start", "what"), [(b"<!doctype html>", "an HTML page"), (b"\x1f\x8b\x08", "a gzip file")])
def test_other_downloads_that_failed_are_named_too(base, start, what):
    (base / "config.json").write_bytes(start + b"\0" * 20)
    assert f"is {what}" in refused(open_checkpoint, base)


# --- a layer that is there


LAYER = "model.layers.1.mlp."


@pytest.mark.parametrize("names", [["down_proj.q_weight"], ["down_proj.trellis"]])
def test_a_layer_that_is_packed_is_not_beyond_the_model(tmp_path, names):
    tensors = {down(0): tensor("F16", HIDDEN, INNER), **{LAYER + name: tensor("I8", 4) for name in names}}
    shapes = open_checkpoint(write_single(tmp_path / "m", tensors)).shapes
    line = refused(lambda: locate(CONFIG, shapes, layer=1, row=1, col=2))
    assert line.startswith("the down projection is packed") and LAYER + names[0] in line


def test_nor_is_one_that_is_stored_in_parts(tmp_path):
    names = ["down_proj.weight_plane.1", "down_proj.weight_plane.0", "down_proj.bias"]
    tensors = {down(0): tensor("F16", HIDDEN, INNER), **{LAYER + name: tensor("I8", 4) for name in names}}
    shapes = open_checkpoint(write_single(tmp_path / "m", tensors)).shapes
    with pytest.raises(ArchitectureError) as caught:
        locate(CONFIG, shapes, layer=1, row=1, col=2)
    assert str(caught.value) == (
        f"the down projection is quantised or stored in parts, so its scalars are not stored one by one: {LAYER}"
        "down_proj.weight_plane.0 (use the checkpoint before quantisation)"
    )


def test_nor_is_one_of_an_unknown_kind(tmp_path):
    tensors = {down(0): tensor("F16", HIDDEN, INNER), "model.layers.1.mamba.out_proj.weight": tensor("F16", 4, 4)}
    shapes = open_checkpoint(write_single(tmp_path / "m", tensors)).shapes
    line = refused(lambda: locate(CONFIG, shapes, layer=1, row=1, col=2))
    assert line.startswith("no known down projection in layer 1: model_type llama (looked for ")
    line = refused(lambda: locate(CONFIG, shapes, layer=2, row=1, col=2))
    assert line.startswith("layer 2 is beyond the model: it has layers 0 to 1 ")


# --- a Hugging Face cache


@pytest.fixture
def repo(tmp_path) -> Path:
    """A cache with one snapshot."""
    folder = tmp_path / "hub" / "models--org--name"
    snapshot = folder / "snapshots" / COMMIT
    (folder / "blobs").mkdir(parents=True)
    write_llama(snapshot)
    for number, path in enumerate(sorted(p for p in snapshot.rglob("*") if p.is_file())):
        blob = folder / "blobs" / f"{number:040x}"
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, path.parent))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    return folder


def test_the_repository_s_folder_is_not_its_snapshot(repo):
    open_checkpoint(repo / "snapshots" / COMMIT)
    for place in (repo, repo / "blobs", repo / "snapshots", repo / "refs"):
        assert refused(open_checkpoint, place) == (
            f"is a folder of the Hugging Face cache, not a checkpoint: {place} (give the snapshot: {repo}/snapshots/"
            f"{COMMIT})"
        )


def test_of_several_snapshots_that_of_main_is_named(repo):
    (repo / "snapshots" / OTHER).mkdir()
    assert refused(open_checkpoint, repo).endswith(f"(give the snapshot: {repo}/snapshots/{COMMIT})")
    (repo / "refs" / "main").unlink()
    assert refused(open_checkpoint, repo).endswith(f"(give one of the 2 snapshots in {repo}/snapshots)")


def test_a_file_in_the_cache_is_in_a_snapshot(repo):
    for place in (repo / "snapshots" / COMMIT / "config.json", repo / "blobs" / f"{0:040x}"):
        assert refused(open_checkpoint, place).endswith(f"(give the snapshot: {repo}/snapshots/{COMMIT})")


@pytest.mark.parametrize("through", ["snapshot", "blob"])
def test_links_into_a_cache_mean_a_snapshot(repo, tmp_path, through):
    folder = tmp_path / "links"
    folder.mkdir()
    link = repo / "snapshots" / COMMIT / "config.json"
    (folder / "config.json").symlink_to(link if through == "snapshot" else link.resolve())
    assert refused(open_checkpoint, folder) == (
        f"is a symbolic link: config.json (give the snapshot: {repo}/snapshots/{COMMIT}) in {folder}"
    )


def test_other_links_mean_the_directory_of_the_real_files(base, tmp_path):
    (base / "link").symlink_to(tmp_path)
    assert "(give the directory that holds the real files)" in refused(open_checkpoint, base)


# --- the Hub


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("org/name", "hf://org/name"),
        ("org/name@main", "hf://org/name@main"),
        ("hf:org/name", "hf://org/name"),
        ("hf:/org/name", "hf://org/name"),
        ("meta-llama/Llama-3.1-8B", "hf://meta-llama/Llama-3.1-8B"),
        ("https://huggingface.co/org/name", "hf://org/name"),
        ("https://huggingface.co/org/name/", "hf://org/name"),
        ("http://www.huggingface.co/org/name?x=1", "hf://org/name"),
        ("https://huggingface.co/org/name/tree/main", "hf://org/name"),
        ("https://huggingface.co/org/name/tree/v1.0", "hf://org/name@v1.0"),
        (f"https://hf.co/org/name/tree/{COMMIT}/sub", f"hf://org/name@{COMMIT}/sub"),
        ("huggingface.co/org/name", "hf://org/name"),
    ],
)
def test_what_looks_like_a_repository_is_one(given, meant, tmp_path, monkeypatch, capsys):
    assert suggest_uri(given) == f"a repository of the Hub is written {meant}"
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", given]) == 2
    note, error = capsys.readouterr().err.splitlines()
    assert note == f"swsurgery: checkpoint: {meant}"
    assert error.startswith(f"swsurgery: the repository is not in the local Hugging Face cache: {meant} (")


@pytest.mark.parametrize("given", ["model", "./model", "/org/name", "a/b/c", "../org/name", "~/name", "a/.b"])
def test_other_paths_get_no_such_hint(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert suggest_uri(given) == ""
    assert parse_location(given) == Path(given)


@pytest.mark.parametrize("path", ["org/name", "https://huggingface.co/org/name"])
def test_a_repository_as_the_path_of_a_manifest(tmp_path, capsys, path):
    manifest = write_manifest(tmp_path / "m.json", {"path": path}, EDIT)
    assert main(["apply", str(manifest), "--dry-run"]) == 2
    assert capsys.readouterr().err.rstrip().endswith("; for a repository on the Hub, use base.repo_id)")


@pytest.mark.parametrize("command", ["verify", "publish", "check"])
def test_a_record_is_not_missed_before_the_checkpoint(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    assert main([command, "org/name", *(["a/b"] if command == "publish" else [])]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "no such checkpoint: " in line
    assert line.endswith("org/name (a repository of the Hub is written hf://org/name)")


# --- a file that was changed after the edit


@pytest.fixture
def patched(base, tmp_path) -> Path:
    manifest = write_manifest(tmp_path / "m.json", base, EDIT)
    assert main(["apply", str(manifest), "-o", str(tmp_path / "patched"), "--check", "weights", "--quiet"]) == 0
    return tmp_path / "patched"


def test_revert_names_the_file_that_was_edited(patched, tmp_path, capsys):
    card = patched / "README.md"
    card.write_bytes(card.read_bytes().swapcase())  # of the same size
    for options in ([], ["-o", str(tmp_path / "back")]):
        assert main(["revert", str(patched), *options]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert "its record says" in line
        assert line.endswith("(README.md was changed since the edit: restore it, or give the unchanged checkpoint)")
    card.write_text("longer than it was before")
    assert main(["revert", str(patched)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "these files were changed or removed since the edit: README.md" in line and line.endswith("(restore them)")


def test_revert_names_the_file_that_is_gone(patched, tmp_path, capsys):
    (patched / "README.md").unlink()
    assert main(["revert", str(patched), "-o", str(tmp_path / "back")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "these files are missing: README.md" in line and line.endswith("(restore them)")


# --- a base that is not finite


def test_weaker_edits_are_advised_only_if_the_base_is_sound():
    broken = replace(SIDE, finite=False)
    bounds = CheckedBounds(max_perplexity_ratio=1.0)
    both = replace(REPORT, base=broken, patched=broken, perplexity_ratio=float("nan"), bounds=bounds).failures
    assert [line.split("(")[1] for line in both] == [
        "those of the base are not finite either, so check the base: verify --finite)"
    ] * 2
    patched = replace(REPORT, patched=broken, bounds=bounds).failures
    assert [line.split("(")[1] for line in patched] == [
        "weaken the edits)", "weaken the edits or raise max_perplexity_ratio)",
    ]  # fmt: skip
    [alone] = replace(REPORT, base=broken, patched=broken, compared=False).failures
    assert alone == "logits of the model are not finite: text or prompts (search its weights: verify --finite)"


def test_the_index_of_a_config_that_cannot_be_read_names_the_config(base):
    (base / "config.json").write_text(json.dumps(CONFIG)[:-1])
    with pytest.raises(CheckpointError, match="is not valid JSON: .*: config.json"):
        open_checkpoint(base)

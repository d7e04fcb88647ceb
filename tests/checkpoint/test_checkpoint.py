"""What is a checkpoint on disk, which of its files are the weights, and every way in which they can disagree."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from swsurgery.checkpoint.listing import is_cache_snapshot
from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.checkpoint.weight_files import MAX_LISTED
from swsurgery.errors import CheckpointError

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_shard(path: Path, *tensors: str) -> None:
    save_file({tensor: np.ones((2, 3), np.float32) for tensor in tensors}, path)


def write_index(folder: Path, weight_map: dict, **metadata: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))


@pytest.fixture
def single(tmp_path):
    write_shard(tmp_path / "model.safetensors", "a", "b")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    write_shard(tmp_path / FIRST, "a", "b")
    write_shard(tmp_path / SECOND, "c")
    write_index(tmp_path, {"a": FIRST, "b": FIRST, "c": SECOND}, total_size=72)
    return tmp_path


def refused(folder: Path, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder, **options)
    return str(caught.value)


def test_a_single_file_is_a_checkpoint(single):
    checkpoint = open_checkpoint(single)
    assert checkpoint.weight_map == {"a": "model.safetensors", "b": "model.safetensors"}
    assert checkpoint.index_name is None
    assert checkpoint.config == {"model_type": "llama"}
    assert [f.name for f in checkpoint.files] == ["config.json", "model.safetensors"]
    assert checkpoint.get_info("a").shape == (2, 3)
    assert checkpoint.shapes == {"a": (2, 3), "b": (2, 3)}
    assert checkpoint.get_file("model.safetensors").size == (single / "model.safetensors").stat().st_size
    assert (checkpoint.copies, checkpoint.left_out, checkpoint.notes, checkpoint.disagreements) == ((), (), (), {})
    assert (checkpoint.repo_id, checkpoint.revision, checkpoint.in_cache) == (None, None, False)


def test_one_safetensors_file_of_any_name_is_a_checkpoint_and_two_without_an_index_are_not(tmp_path):
    write_shard(tmp_path / "weights.safetensors", "a")
    assert open_checkpoint(tmp_path).weight_map == {"a": "weights.safetensors"}
    write_shard(tmp_path / "more.safetensors", "b")
    assert "2 safetensors files and no index" in refused(tmp_path)


def test_shards_with_an_index_are_a_checkpoint(sharded):
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.weight_map == {"a": FIRST, "b": FIRST, "c": SECOND}
    assert checkpoint.index_name == INDEX
    assert list(checkpoint.shards) == [FIRST, SECOND]
    assert (checkpoint.disagreements, checkpoint.notes, checkpoint.config) == ({}, (), {})


def test_files_in_folders_are_listed_by_their_relative_names(single):
    (single / "extra" / "deep").mkdir(parents=True)
    (single / "extra" / "deep" / "notes.txt").write_text("n")
    assert "extra/deep/notes.txt" in [f.name for f in open_checkpoint(single).files]


def test_a_linked_root_is_resolved(single, tmp_path_factory):
    link = tmp_path_factory.mktemp("links") / "model"
    link.symlink_to(single)
    assert open_checkpoint(link).root == Path(os.path.realpath(single))


def test_what_is_no_checkpoint_says_so(tmp_path):
    assert refused(tmp_path / "missing").startswith("no such checkpoint: ")
    (tmp_path / "file").write_text("")
    assert "a checkpoint is a directory" in refused(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "no safetensors file" in refused(tmp_path / "empty")


# --- the index


def test_missing_shards_are_all_named(sharded):
    (sharded / FIRST).unlink()
    (sharded / SECOND).unlink()
    message = refused(sharded)
    for name in (FIRST, SECOND):
        assert f"missing shard: {sharded.resolve() / name} (complete the download)" in message.splitlines()


OUTSIDE = [
    "../model.safetensors",
    "/etc/model.safetensors",
    "sub/model.safetensors",
    "./model.safetensors",
    "..",
    ".",
    "",
    ".safetensors",
    ".hidden.safetensors",
    "-rf.safetensors",
    "model.safetensors/",
    "model.safetensors\n",
    "model.safetensors\0",
    "a\\b.safetensors",
    "C:\\model.safetensors",
    "model.bin",
    "model.SAFETENSORS",
    "m\u00f6del.safetensors",
    "\u202emodel.safetensors",
    "two words.safetensors",
    "~/model.safetensors",
    "$HOME.safetensors",
    "https://example.org/model.safetensors",
    "m" * 300 + ".safetensors",
]


@pytest.mark.parametrize("name", OUTSIDE, ids=[ascii(name)[:40] for name in OUTSIDE])
def test_an_index_can_only_point_to_plain_names(name, sharded):
    write_index(sharded, {"a": FIRST, "b": name, "c": SECOND})
    message = refused(sharded)
    assert "lists the shard" in message and "which is not a plain file name" in message
    assert message.isprintable()


@pytest.mark.parametrize("value", [None, 1, ["x"], {"x": 1}])
def test_an_index_can_only_point_to_text(value, sharded):
    write_index(sharded, {"a": FIRST, "b": value, "c": SECOND})
    assert "which is not a plain file name" in refused(sharded)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": null}'])
def test_an_index_without_a_map_is_refused(text, sharded):
    (sharded / INDEX).write_text(text)
    assert refused(sharded) == f"has no weight_map: {INDEX}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"weight_map": {"a": "x", "a": "y"}}',
        '{"weight_map": {}, "weight_map": {}}',
        "\ufeff{}",
        '{"metadata": ' + "[" * 100_000,
        '{"metadata": {"total_size": ' + "1" * 10_000 + "}}",
    ],
    ids=lambda text: text[:40],
)
def test_an_index_is_strict_json(text, sharded):
    (sharded / INDEX).write_text(text, encoding="utf-8")
    message = refused(sharded)
    assert INDEX in message and "\n" not in message


def test_duplicate_keys_are_refused_in_the_index_and_the_config(sharded):
    (sharded / INDEX).write_text(f'{{"weight_map": {{"a": "{FIRST}", "a": "{SECOND}"}}}}')
    assert "'a' appears twice" in refused(sharded)
    write_index(sharded, {"a": FIRST, "b": FIRST, "c": SECOND})
    (sharded / "config.json").write_text('{"model_type": "llama", "model_type": "opt"}')
    assert "'model_type' appears twice" in refused(sharded)


def test_total_size_is_a_note_only_where_it_is_wrong(sharded):
    assert open_checkpoint(sharded).notes == ()
    write_index(sharded, {"a": FIRST, "b": FIRST, "c": SECOND}, total_size=73)
    assert open_checkpoint(sharded).notes == (f"{INDEX} states total_size 73, but the shards contain 72 bytes",)
    write_index(sharded, {"a": FIRST, "b": FIRST, "c": SECOND})
    assert open_checkpoint(sharded).notes == ()


def test_a_tensor_that_no_shard_has(sharded):
    write_index(sharded, {"a": FIRST, "b": FIRST, "c": SECOND, "d": FIRST})
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.disagreements == {"d": f"{INDEX} puts it in {FIRST}, but it is in no shard"}
    assert set(checkpoint.shapes) == {"a", "b", "c"}


def test_a_tensor_that_another_shard_has(sharded):
    write_index(sharded, {"a": SECOND, "b": FIRST, "c": SECOND})
    assert open_checkpoint(sharded).disagreements == {"a": f"{INDEX} puts it in {SECOND}, but it is in {FIRST}"}


def test_a_tensor_in_two_shards(sharded):
    write_shard(sharded / SECOND, "a", "c")
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.disagreements == {"a": f"it is stored in 2 shards: {FIRST}, {SECOND}"}
    assert set(checkpoint.shapes) == {"b", "c"}


def test_a_tensor_that_the_index_leaves_out(sharded):
    write_index(sharded, {"a": FIRST, "c": SECOND})
    (tensor, what), *rest = open_checkpoint(sharded).disagreements.items()
    assert (tensor, rest) == ("b", [])
    assert what == f"it is in {FIRST}, but {INDEX} does not list it, so loaders skip it"


def test_every_malformed_shard_is_named(sharded):
    (sharded / FIRST).write_bytes(b"")
    (sharded / SECOND).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    first, second = refused(sharded).splitlines()
    assert FIRST in first and "too short" in first
    assert SECOND in second and "git-lfs pointer" in second


# --- two sets of weights, copies


@pytest.fixture
def both(sharded):
    write_shard(sharded / "model.safetensors", "a", "b", "c")
    return sharded


def test_an_index_beside_a_single_file_has_to_be_chosen_between(both):
    assert "two sets of weights, model.safetensors and " + INDEX in refused(both)
    by_index, by_single = open_checkpoint(both, "index"), open_checkpoint(both, "single")
    assert (by_index.index_name, set(by_index.shards)) == (INDEX, {FIRST, SECOND})
    assert by_index.copies == ("model.safetensors",)
    assert (by_single.index_name, set(by_single.shards)) == (None, {"model.safetensors"})
    assert set(by_single.copies) == {FIRST, SECOND, INDEX}


def test_a_choice_that_is_not_there_is_refused(single, tmp_path_factory):
    assert "the choice of weights is index, which the checkpoint does not have" in refused(single, weights="index")
    assert open_checkpoint(single, "single").index_name is None
    other = tmp_path_factory.mktemp("sharded")
    write_shard(other / FIRST, "a")
    write_index(other, {"a": FIRST})
    assert "the choice of weights is single, which the checkpoint does not have" in refused(other, weights="single")
    assert open_checkpoint(other, "index").index_name == INDEX


def test_several_indices_are_ambiguous_unless_one_has_the_name_that_loaders_read(tmp_path):
    write_shard(tmp_path / FIRST, "a")
    for name in ("one", "two"):
        (tmp_path / f"{name}.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": FIRST}}))
    assert "several indices: one.safetensors.index.json, two.safetensors.index.json" in refused(tmp_path)
    write_index(tmp_path, {"a": FIRST})
    assert open_checkpoint(tmp_path).index_name == INDEX


def test_further_copies_of_the_weights_are_listed_and_nothing_else_is(single):
    copies = ["consolidated.00.pth", "pytorch_model.bin",
              "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "model-q4.gguf", "tf_model.h5",
              "flax_model.msgpack", "rust_model.ot", "model.onnx", "original/params.json", "onnx/model.onnx",
              "openvino/model.xml"]  # fmt: skip
    others = ["tokenizer.json", "README.md", "adapter.txt", "training_args.bin", "model.fp16.safetensors"]
    for name in copies + others:
        (single / name).parent.mkdir(exist_ok=True)
        (single / name).write_text("x")
    assert sorted(open_checkpoint(single).copies) == sorted(copies)


def test_folders_of_version_control_and_download_tools_are_left_out(single):
    for name in (".git", ".cache"):
        (single / name).mkdir()
        (single / name / "config").write_text("x")
    (single / ".gitattributes").write_text("x")
    checkpoint = open_checkpoint(single)
    assert checkpoint.left_out == (".cache", ".git")
    assert [f.name for f in checkpoint.files] == [".gitattributes", "config.json", "model.safetensors"]


# --- what is no regular file


def test_a_directory_a_fifo_and_a_link_are_no_shards(single):
    (single / "dir.safetensors").mkdir()
    os.mkfifo(single / "pipe")
    (single / "link.safetensors").symlink_to("model.safetensors")
    lines = refused(single).splitlines()
    assert len(lines) == 3
    assert any(line.startswith("is a directory, not a shard: dir.safetensors") for line in lines)
    assert any(line.startswith("is not a regular file: pipe") for line in lines)
    assert any(line.startswith("is a symbolic link: link.safetensors") for line in lines)


def test_names_that_cannot_be_printed_are_refused_and_printed_escaped(single):
    (single / "evil\x1b[2J\n.txt").write_text("x")
    (single / "turn\u202e.txt").write_text("x")
    lines = refused(single).splitlines()
    assert len(lines) == 2
    assert all(line.startswith("a file has a name that cannot be printed: ") and line.isprintable() for line in lines)


def test_a_long_list_of_faults_is_cut_and_counted(single):
    for i in range(MAX_LISTED + 7):
        (single / f"link-{i:02d}").symlink_to("config.json")
    lines = refused(single).splitlines()
    assert len(lines) == MAX_LISTED + 1
    assert lines[-1].startswith("and 7 more of these")


# --- snapshots of a Hugging Face cache


@pytest.fixture
def snapshot(tmp_path):
    """hub/models--org--tiny with config.json by git digest and model.safetensors by sha256."""
    repo = tmp_path / "hub" / "models--org--tiny"
    folder = repo / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "blobs" / ("c" * 40)).write_text('{"model_type": "llama"}')
    write_shard(repo / "blobs" / ("5" * 64), "a")
    (folder / "config.json").symlink_to("../../blobs/" + "c" * 40)
    (folder / "model.safetensors").symlink_to("../../blobs/" + "5" * 64)
    return folder


def test_a_snapshot_opens_the_blobs_and_knows_repository_and_revision(snapshot):
    checkpoint = open_checkpoint(snapshot)
    assert is_cache_snapshot(snapshot)
    assert (checkpoint.repo_id, checkpoint.revision, checkpoint.in_cache) == ("org/tiny", COMMIT, True)
    weights, config = checkpoint.get_file("model.safetensors"), checkpoint.get_file("config.json")
    assert weights.entry.path == snapshot.resolve().parents[1] / "blobs" / ("5" * 64)
    assert (weights.digest, config.digest) == ("5" * 64, None)
    assert checkpoint.config == {"model_type": "llama"}
    assert not weights.entry.path.is_symlink()


def test_a_blob_in_the_store_that_repositories_share_is_followed(snapshot):
    """Since huggingface_hub 1.32 a blob of a repository may be a link into hub/blobs/ab/abcd..."""
    hub, name = snapshot.parents[2], "ab" + "1" * 62
    (hub / "blobs" / "ab").mkdir(parents=True)
    write_shard(hub / "blobs" / "ab" / name, "shared")
    blob = snapshot.parents[1] / "blobs" / ("5" * 64)
    blob.unlink()
    blob.symlink_to(f"../../blobs/ab/{name}")
    checkpoint = open_checkpoint(snapshot)
    assert set(checkpoint.weight_map) == {"shared"}
    assert checkpoint.get_file("model.safetensors").entry.path == hub.resolve() / "blobs" / "ab" / name


@pytest.mark.parametrize("how", ["directly", "through a blob", "other repository", "odd name", "above the store"])
def test_a_link_that_leaves_the_cache_is_refused(how, snapshot, tmp_path):
    secret = tmp_path / "secret"
    write_shard(secret, "x")
    link, blob = snapshot / "model.safetensors", snapshot.parents[1] / "blobs" / ("5" * 64)
    if how == "through a blob":
        blob.unlink()
        blob.symlink_to(secret)
    elif how == "above the store":
        (snapshot.parents[2] / "blobs").mkdir()
        write_shard(snapshot.parents[2] / "blobs" / "loose", "x")
        blob.unlink()
        blob.symlink_to("../../blobs/loose")
    else:
        link.unlink()
        if how == "directly":
            link.symlink_to(secret)
        elif how == "other repository":
            other = snapshot.parents[2] / "models--org--other" / "blobs"
            other.mkdir(parents=True)
            write_shard(other / ("6" * 64), "x")
            link.symlink_to(f"../../../models--org--other/blobs/{'6' * 64}")
        else:
            write_shard(blob.parent / "notes", "x")
            link.symlink_to("../../blobs/notes")
    assert "is a link that points outside the Hugging Face cache: model.safetensors" in refused(snapshot)


def test_an_unfinished_download_is_told(snapshot):
    (snapshot.parents[1] / "blobs" / ("5" * 64)).unlink()
    assert "is not fully downloaded: model.safetensors" in refused(snapshot)


def test_a_snapshot_of_a_branch_name_has_no_revision(snapshot):
    branch = snapshot.rename(snapshot.parent / "main")
    checkpoint = open_checkpoint(branch)
    assert (checkpoint.repo_id, checkpoint.revision) == ("org/tiny", None)

"""Variants of the weights (fp16), and an index that lists only the single file beside it: one set is chosen, or it
needs no choice, and every command reads the same one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_checkpoint
from checkpoints import (
    HIDDEN,
    INDEX,
    INNER,
    down,
    sha256,
    stored,
    tensor,
    tree,
    write_manifest,
    write_shard,
    write_single,
)
from safetensors.torch import load_file

from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.checkpoint.record import read_record
from swsurgery.cli import action, main
from swsurgery.editing.in_memory import load_patched
from swsurgery.errors import AmbiguousWeights, CheckpointError, ModelError
from swsurgery.model.check import run_checks
from swsurgery.model.load import open_model
from swsurgery.scanning import scan_files
from swsurgery.storage.folder import Folder

NAME = down(0)
PLAIN = {NAME: tensor("F32", HIDDEN, INNER, seed=1)}
HALF = {NAME: tensor("F16", HIDDEN, INNER, seed=2)}
EDIT = {"op": "zero", "tensor": NAME, "index": [1, 2]}
FP16, FP16_INDEX = "model.fp16.safetensors", "model.safetensors.index.fp16.json"
SHARD = "model.fp16-00001-of-00001.safetensors"


@pytest.fixture
def base(tmp_path) -> Path:
    """Plain weights and an fp16 variant with other values, each in one file."""
    folder = write_single(tmp_path / "base", PLAIN)
    write_shard(folder / FP16, HALF)
    return folder


@pytest.fixture
def run(capsys):
    def run(*arguments: object) -> tuple[int, dict, list[str]]:
        code = main([*map(str, arguments), "--json", "--quiet"])
        out, err = capsys.readouterr()
        return code, json.loads(out) if out else {}, err.splitlines()

    return run


def write_index(folder: Path, name: str, shard: str) -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": {NAME: shard}}))


def shards_of(folder: Path, *chosen: str | None) -> tuple[list[str], str | None]:
    checkpoint = open_checkpoint(folder, *chosen)
    return list(checkpoint.shards), checkpoint.variant


# --- variants


def test_without_a_choice_the_plain_weights_are_read_and_the_variant_is_a_copy(base):
    assert shards_of(base) == (["model.safetensors"], None)
    assert open_checkpoint(base).copies == (FP16,)


def test_the_variant_is_read_and_the_plain_weights_are_the_copy(base):
    assert shards_of(base, None, "fp16") == ([FP16], "fp16")
    assert open_checkpoint(base, None, "fp16").copies == ("model.safetensors",)


@pytest.mark.parametrize("index", [FP16_INDEX, "model.safetensors.fp16.index.json"])
def test_a_variant_may_have_shards(base, index):
    (base / FP16).unlink()
    write_shard(base / SHARD, HALF)
    write_index(base, index, SHARD)
    assert shards_of(base, None, "fp16") == ([SHARD], "fp16")
    assert open_checkpoint(base, None, "fp16").index_name == index
    assert open_checkpoint(base).copies == tuple(sorted((SHARD, index)))


def test_a_variant_with_an_index_and_a_file_needs_the_other_choice_too(base):
    write_shard(base / SHARD, HALF)
    write_index(base, FP16_INDEX, SHARD)
    with pytest.raises(AmbiguousWeights, match=f"two sets of weights, {FP16} and {FP16_INDEX}"):
        open_checkpoint(base, None, "fp16")
    assert shards_of(base, "index", "fp16") == ([SHARD], "fp16")
    assert shards_of(base, "single", "fp16") == ([FP16], "fp16")
    assert (open_checkpoint(base, "index", "fp16").choice, open_checkpoint(base, "single", "fp16").choice) == (
        "index", "single",
    )  # fmt: skip


def test_the_only_variant_needs_no_choice(base):
    (base / "model.safetensors").unlink()
    assert shards_of(base) == ([FP16], "fp16")
    (base / FP16).rename(base / SHARD)
    write_index(base, FP16_INDEX, SHARD)
    assert shards_of(base) == ([SHARD], "fp16")


def test_of_two_variants_without_plain_weights_one_is_chosen(base):
    (base / "model.safetensors").rename(base / "model.bf16.safetensors")
    with pytest.raises(AmbiguousWeights) as caught:
        open_checkpoint(base)
    assert str(caught.value) == (
        f"there is no model.safetensors, but there are the variants bf16, fp16: {base.resolve()} "
        "(choose one with base.variant in a manifest, or with the option --variant)"
    )
    assert shards_of(base, None, "bf16") == (["model.bf16.safetensors"], "bf16")


def test_a_variant_that_is_not_there_is_refused(base):
    with pytest.raises(CheckpointError, match=r"has no variant bf16: .* \(choose one of its variants: fp16\)"):
        open_checkpoint(base, None, "bf16")
    (base / FP16).unlink()
    with pytest.raises(CheckpointError, match=r"has no variant fp16: .* \(it has no variants\)"):
        open_checkpoint(base, None, "fp16")


def test_shards_of_a_variant_without_their_index_say_so(base):
    (base / "model.safetensors").unlink()
    (base / FP16).rename(base / SHARD)
    write_shard(base / "model.fp16-00002-of-00002.safetensors", {"x": tensor("F16", 2)})
    with pytest.raises(
        CheckpointError, match=r"2 shards of a variant and no index: .* \(download model.safetensors.ind"
    ):
        open_checkpoint(base)


@pytest.mark.parametrize("variant", ["", "../x", "fp 16", "a.b", "-x"])
def test_a_variant_in_a_manifest_is_a_plain_word(base, tmp_path, run, variant):
    manifest = write_manifest(tmp_path / "m.json", {"path": str(base), "variant": variant}, EDIT)
    code, _, (line, *_) = run("apply", manifest, "--dry-run")
    assert code == 2 and "base.variant" in line


@pytest.fixture
def patched(base, tmp_path, run) -> Path:
    """The variant edited, the plain weights carried along."""
    manifest = write_manifest(tmp_path / "m.json", {"path": str(base), "variant": "fp16", "copies": "keep"}, EDIT)
    assert run("apply", manifest, "-o", tmp_path / "patched", "--check", "weights")[0] == 0
    return tmp_path / "patched"


def test_the_variant_is_edited_and_nothing_else(base, patched):
    assert stored(patched / FP16, NAME, (1, 2)) == bytes(2) != stored(base / FP16, NAME, (1, 2))
    assert (patched / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_the_record_remembers_it_and_every_command_reads_it(base, patched, run, tmp_path):
    assert json.loads((patched / "swsurgery.json").read_text())["base"]["variant"] == "fp16"
    at = ["--tensor", NAME, "--at", "1,2"]
    assert run("inspect", patched, *at)[1]["value"] == 0
    assert run("inspect", patched, *at, "--weights", "single")[1]["file"] == "model.safetensors"
    assert run("inspect", base, *at)[1]["file"] == "model.safetensors"
    assert run("inspect", base, *at, "--variant", "fp16")[1]["file"] == FP16
    assert run("verify", patched)[0] == 0
    assert run("verify", patched, "--base", base)[0] == 0
    assert run("verify", patched, "--manifest", tmp_path / "m.json")[0] == 0
    changes = run("diff", base, patched, "--variant", "fp16")[1]["changes"]
    assert [change["index"] for change in changes] == [[1, 2]]
    assert run("revert", patched, "-o", tmp_path / "back")[0] == 0
    assert tree(tmp_path / "back") == tree(base)


def test_another_variant_than_the_record_s_is_refused(base, patched, run):
    shutil.copy(patched / FP16, patched / "model.bf16.safetensors")
    code, _, lines = run("verify", patched, "--variant", "bf16")
    assert (code, lines) == (
        2,
        ["swsurgery: --variant bf16 was given, but the choice fp16 is stated in: swsurgery.json (leave --variant out)"],
    )  # fmt: skip
    assert run("check", patched, "--variant", "bf16")[2] == lines


def test_a_variant_is_edited_in_place_and_undone(base, tmp_path, run):
    before = tree(base)
    said = {"path": str(base), "variant": "fp16", "copies": "keep", "sha256": {FP16: sha256(base / FP16)}}
    manifest = write_manifest(tmp_path / "m.json", said, EDIT)
    for _ in range(2):  # the second finds it done
        assert run("apply", manifest, "--in-place", "--check", "weights")[::2] == (0, [])
    assert stored(base / FP16, NAME, (1, 2)) == bytes(2)
    assert run("verify", base)[0] == 0
    assert run("revert", base)[0] == 0
    assert tree(base) == before


def test_omit_leaves_the_other_variant_out(base, tmp_path, run):
    manifest = write_manifest(tmp_path / "m.json", {"path": str(base), "variant": "fp16", "copies": "omit"}, EDIT)
    assert run("apply", manifest, "-o", tmp_path / "p", "--check", "weights")[0] == 0
    assert not (tmp_path / "p" / "model.safetensors").exists()
    assert run("verify", tmp_path / "p")[0] == 0


def test_a_record_without_a_variant_has_no_such_key(base, tmp_path, run):
    manifest = write_manifest(tmp_path / "m.json", {"path": str(base), "copies": "keep"}, EDIT)
    assert run("apply", manifest, "-o", tmp_path / "p", "--check", "weights")[0] == 0
    assert "variant" not in json.loads((tmp_path / "p" / "swsurgery.json").read_text())["base"]
    patched = read_record(Folder.at(tmp_path / "p"))
    assert patched.record.render() == patched.record_raw


def test_a_patch_carries_the_variant_and_only_then(base, tmp_path, run):
    for number, more in enumerate(({"variant": "fp16"}, {})):
        manifest = write_manifest(tmp_path / "m.json", {"path": str(base), "copies": "keep", **more}, EDIT)
        patch = tmp_path / f"{number}.safetensors"
        assert run("export", manifest, "--format", "sparse", "-o", patch)[0] == 0
        assert (b"variant" in patch.read_bytes()) == bool(more)
        assert run("apply", patch, "--base", base, "-o", tmp_path / f"p{number}", "--check", "weights")[0] == 0
        edited, other = (FP16, "model.safetensors") if more else ("model.safetensors", FP16)
        assert (tmp_path / f"p{number}" / edited).read_bytes() != (base / edited).read_bytes()
        assert (tmp_path / f"p{number}" / other).read_bytes() == (base / other).read_bytes()


def test_scan_writes_the_variant_into_its_manifest(base, tmp_path):
    read = open_checkpoint(base, variant="fp16")
    assert scan_files.make_base(read, base / "m.yaml") == {"path": ".", "variant": "fp16"}
    assert scan_files.make_base(open_checkpoint(base), base / "m.yaml") == {"path": "."}


def test_the_action_takes_the_variant(base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(base.parent)
    (base / "model.safetensors").rename(base / "model.bf16.safetensors")
    inputs = {"CHECKPOINT": "base", "FINITE": "true"}
    assert action.run(inputs, tmp_path) == 2
    assert action.run(inputs | {"VARIANT": "fp16"}, tmp_path) == 0


def test_the_model_of_the_variant_runs(tmp_path):
    pair = tiny_checkpoint.write_pair(tmp_path)
    shutil.copy(pair.patched / "model.safetensors", pair.base / FP16)
    perplexities = [
        run_checks(open_checkpoint(folder, None, variant), (), text=tiny_checkpoint.TEXT, prompts=["The river was"],
                   device="cpu", placement="whole").base.perplexity
        for folder, variant in ((pair.base, None), (pair.base, "fp16"), (pair.patched, None))
    ]  # fmt: skip
    assert perplexities[1] == perplexities[2] != perplexities[0]
    manifest = {"version": 1, "base": {"path": str(pair.base), "variant": "fp16", "copies": "keep"},
                "edits": [{"op": "zero", "tensor": tiny_checkpoint.DOWN, "index": [1, 2]}]}  # fmt: skip
    state = load_patched(manifest, pair.base).state_dict()[tiny_checkpoint.DOWN]
    stored = load_file(pair.base / FP16)[tiny_checkpoint.DOWN]
    assert (float(state[1, 2]), float(state[3, 7])) == (0.0, float(stored[3, 7]))


# --- an index that lists only the single file


@pytest.fixture
def mlx(tmp_path) -> Path:
    """One file and its index, as mlx-lm writes them."""
    folder = write_single(tmp_path / "mlx", PLAIN)
    write_index(folder, INDEX, "model.safetensors")
    return folder


@pytest.mark.parametrize("weights", [None, "index", "single"])
def test_it_is_one_set_of_weights_whatever_is_chosen(mlx, weights):
    checkpoint = open_checkpoint(mlx, weights)
    assert (list(checkpoint.shards), checkpoint.index_name, checkpoint.copies, checkpoint.choice) == (
        ["model.safetensors"], INDEX, (), None,
    )  # fmt: skip


@pytest.mark.parametrize("weights", [None, "index", "single"])
def test_every_command_agrees_on_it(mlx, tmp_path, run, weights):
    more = {"weights": weights} if weights else {}
    manifest = write_manifest(tmp_path / "m.json", {"path": str(mlx), **more}, EDIT)
    patched = tmp_path / "p"
    assert run("apply", manifest, "-o", patched, "--check", "weights")[0] == 0
    assert sorted(tree(patched)) == sorted([*tree(mlx), "SHA256SUMS", "manifest.yaml", "swsurgery.json"])
    assert run("verify", patched, "--base", mlx, "--manifest", tmp_path / "m.json", "--finite")[0] == 0
    assert len(run("diff", mlx, patched)[1]["changes"]) == 1
    assert run("inspect", mlx)[1]["copies"] == []
    assert run("export", patched, "--format", "sparse", "-o", tmp_path / "patch.safetensors")[0] == 0
    assert run("revert", patched, "-o", tmp_path / "back")[0] == 0
    assert tree(tmp_path / "back") == tree(mlx)


@pytest.mark.parametrize("weights", [None, "index", "single"])
def test_what_index_and_header_say_differently_is_still_found(mlx, run, weights):
    (mlx / INDEX).write_text(json.dumps({"weight_map": {"missing": "model.safetensors"}}))
    assert set(open_checkpoint(mlx, weights).disagreements) == {"missing", NAME}
    assert run("verify", mlx, "--finite", *(["--weights", weights] if weights else []))[0] == 1


@pytest.mark.parametrize("other", ["other.safetensors", "gone.safetensors"])
def test_an_index_that_lists_another_file_too_is_another_set(mlx, other):
    if other == "other.safetensors":
        write_shard(mlx / other, {"x": tensor("F16", 2)})
    (mlx / INDEX).write_text(json.dumps({"weight_map": {NAME: "model.safetensors", "x": other}}))
    with pytest.raises(AmbiguousWeights):
        open_checkpoint(mlx)
    assert open_checkpoint(mlx, "single").index_name is None


def test_a_broken_index_beside_the_single_file_can_be_passed_over(mlx):
    (mlx / INDEX).write_text("{")
    with pytest.raises(AmbiguousWeights):
        open_checkpoint(mlx)
    assert open_checkpoint(mlx, "single").copies == (INDEX,)


def test_a_model_with_such_an_index_runs_whole_and_streamed(tmp_path):
    pair = tiny_checkpoint.write_pair(tmp_path)
    names = load_file(pair.base / "model.safetensors")
    (pair.base / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    for weights in (None, "index", "single"):
        try:
            open_model(open_checkpoint(pair.base, weights), device="cpu", placement="whole")
        except ModelError as error:
            pytest.fail(str(error))


# --- second downloads


@pytest.mark.parametrize("name", ["model (1).safetensors", "model(2).safetensors", "model - Copy.safetensors",
                                  "model copy 2.safetensors"])  # fmt: skip
def test_a_browser_s_second_download_is_named(tmp_path, name):
    folder = write_single(tmp_path / "base", PLAIN)
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert str(caught.value) == (f"there is no model.safetensors, but there is {name!r}, as a browser names a second "
                                 f"download: {folder.resolve()} (rename it to model.safetensors)")  # fmt: skip


def test_so_is_one_of_a_shard_or_of_the_index(tmp_path):
    folder = write_single(tmp_path / "base", PLAIN)
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002 (1).safetensors"]
    (folder / "model.safetensors").rename(folder / shards[0])
    write_shard(folder / shards[1], {"x": tensor("F16", 2)})
    weight_map = {NAME: shards[0], "x": "model-00002-of-00002.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(
        CheckpointError, match=r"\(rename 'model-00002-of-00002 \(1\).safetensors' to it, as a browser "
    ):
        open_checkpoint(folder)
    (folder / shards[1]).rename(folder / "model-00002-of-00002.safetensors")
    (folder / INDEX).rename(folder / "model.safetensors.index (1).json")
    with pytest.raises(CheckpointError, match=r"rename it to model.safetensors.index.json"):
        open_checkpoint(folder)

"""Edits exported for others: PEFT computes with the adapter what the patched checkpoint computes, vLLM's fields give
the patched tensors back, and what a format cannot hold is refused."""

from __future__ import annotations

import itertools
import json
import os
import struct
from pathlib import Path

import pytest
import tiny_models
import torch
from checkpoints import FIRST, SECOND, THIRD, down, sha256, tensor, tree, write_llama, write_manifest, write_single
from hub import fixture
from peft import PeftModel
from safetensors.torch import load_file
from tiny_checkpoint import DOWN, load, write_pair

import swsurgery
from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.cli import main
from swsurgery.editing.check_options import CheckOptions
from swsurgery.editing.plan import make_plan
from swsurgery.errors import ArchitectureError, CheckpointError, PlanError, TargetError
from swsurgery.manifest import patch as patch_module
from swsurgery.manifest.load import parse_manifest
from swsurgery.sharing import export
from swsurgery.storage import filesystem

any_hub, hub = fixture.any_hub, fixture.hub
OFF = CheckOptions("off")
OTHER = "model.layers.0.mlp.down_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"
EDITS = (
    {"op": "set", "tensor": DOWN, "index": [3, 7], "value": 5},
    {"op": "zero", "tensor": DOWN, "index": [3, 9]},
    {"op": "scale", "tensor": DOWN, "index": [10, 0], "factor": -2.5},
    {"op": "set", "tensor": UP, "index": [20, 1], "value": 2},
)

# PEFT's own use of transformers: it asks for a property that is renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def adapted(model, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(model, folder).eval()


def logits(model, tokens: torch.Tensor = tiny_models.TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


def made(folder: Path, dtype: torch.dtype, *edits: dict) -> tuple[Path, Path, Path]:
    """(base, patched, adapter) of a tiny Llama."""
    base = write_pair(folder, dtype=dtype).base
    manifest = write_manifest(folder / "m.json", base, *edits)
    swsurgery.apply(manifest, output=folder / "edited", check=OFF)
    export.export(str(folder / "edited"), folder / "adapter", format="peft")
    return base, folder / "edited", folder / "adapter"


# PEFT ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "edits", [EDITS[:1], EDITS[:2], EDITS[:3], EDITS], ids=["one", "a row", "two rows", "two layers"]
)
def test_peft_computes_what_the_patched_checkpoint_computes(tmp_path, edits):
    base, edited, adapter = made(tmp_path, torch.float32, *edits)
    plain, wanted = logits(load(base)), logits(load(edited))
    assert (plain - wanted).abs().max() > 0.1, "the edits matter"
    model = adapted(load(base), adapter)
    assert (logits(model) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged), wanted), "merged, the weights are the patched ones"
    stored = load_file(edited / "model.safetensors")
    for name in (DOWN, UP):
        assert torch.equal(merged.get_parameter(name), stored[name])


def test_merged_into_bfloat16_the_weights_are_exact_and_unmerged_they_are_close(tmp_path):
    base, edited, adapter = made(tmp_path, torch.bfloat16, *EDITS)
    wanted = logits(load(edited))
    model = adapted(load(base), adapter)
    # The base's own product is rounded to bfloat16 before the adapter's is added, so the old value is not taken away
    # whole: the difference is of the order of one rounding, 2^-8.
    assert (logits(model) - wanted).abs().max() < 2**-5 * wanted.abs().max()
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged), wanted)
    assert torch.equal(merged.get_parameter(DOWN), load_file(edited / "model.safetensors")[DOWN])


def test_the_adapter_has_the_names_and_ranks_that_peft_saves(tmp_path):
    _, _, adapter = made(tmp_path, torch.float32, *EDITS)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(name.removesuffix(".weight") for name in (DOWN, UP))
    assert (config["r"], config["lora_alpha"]) == (2, 2), "scalars of one row share a rank"
    assert config["rank_pattern"] == config["alpha_pattern"] == {r"model\.layers\.0\.mlp\.up_proj": 1}
    tensors = load_file(adapter / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers"
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {
        f"{prefix}.1.mlp.down_proj.lora_A.weight": (2, 24),
        f"{prefix}.1.mlp.down_proj.lora_B.weight": (16, 2),
        f"{prefix}.0.mlp.up_proj.lora_A.weight": (1, 16),
        f"{prefix}.0.mlp.up_proj.lora_B.weight": (24, 1),
    }
    saved = tmp_path / "saved"
    adapted(load(tmp_path / "base"), adapter).save_pretrained(saved)
    assert {n: t.dtype for n, t in load_file(saved / "adapter_model.safetensors").items()} == {
        n: torch.float32 for n in tensors
    }


def short(name: str, folder: Path, base: Path) -> Path:
    """A manifest that sets one scalar of the first down projection, whatever the family calls it."""
    for layer, expert in itertools.product((0, 1), ({}, {"expert": 1})):
        edit = {"op": "set", "layer": layer, "row": 3, "col": 5, "value": 4.0, **expert}
        manifest = write_manifest(folder / f"{name}.json", base, edit)
        try:
            make_plan(parse_manifest(manifest.read_bytes(), manifest), open_checkpoint(base))
        except (ArchitectureError, PlanError):
            continue
        return manifest
    raise AssertionError(name)


EXPERTS = {name for name, config in tiny_models.TEXT_MODELS.items() if any("experts" in key for key in config)}

REFUSED = {"lfm2", "lfm3", "modernbert", "modernbert-decoder", "zamba", "zamba2"}
"""Families whose down projections have names that need not be those of linear layers (`w2` and `Wo`), or belong to
several layers."""


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_a_family_is_exported_rightly_or_refused(tmp_path, name):
    base = tmp_path / "base"
    tiny_models.write(name, base)
    manifest = short(name, tmp_path, base)
    swsurgery.apply(manifest, output=tmp_path / "edited", check=OFF)
    try:
        export.export(str(manifest), tmp_path / "adapter", format="peft")
    except PlanError as error:
        assert name in EXPERTS | set(tiny_models.VISION_LANGUAGE_MODELS) | REFUSED
        assert len(error.faults) == 1 and "a LoRA adapter cannot represent this edit: " in error.faults[0]
        assert not (tmp_path / "adapter").exists()
        return
    plain, wanted = (logits(tiny_models.load(name, folder)) for folder in (base, tmp_path / "edited"))
    found = logits(adapted(tiny_models.load(name, base), tmp_path / "adapter"))
    assert not torch.equal(plain, wanted)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_attention_of_a_mixture_of_experts_is_exported(tmp_path):
    base = tmp_path / "base"
    tiny_models.write("mixtral", base)
    edit = {"op": "set", "tensor": "model.layers.1.self_attn.v_proj.weight", "index": [3, 5], "value": 4}
    manifest = write_manifest(tmp_path / "m.json", base, edit)
    swsurgery.apply(manifest, output=tmp_path / "edited", check=OFF)
    export.export(manifest, tmp_path / "adapter", format="peft")
    wanted = logits(tiny_models.load("mixtral", tmp_path / "edited"))
    found = logits(adapted(tiny_models.load("mixtral", base), tmp_path / "adapter"))
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_a_checkpoint_saved_without_its_head_gets_the_names_of_the_model_with_one(tmp_path):
    base = tmp_path / "base"
    tiny_models.write("llama", base, base=True)
    manifest = write_manifest(
        tmp_path / "m.json", base,
        {"op": "zero", "tensor": "layers.1.mlp.down_proj.weight", "index": [3, 5]},
    )  # fmt: skip
    export.export(str(manifest), tmp_path / "adapter", format="peft")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("an embedding", {"tensor": "model.embed_tokens.weight", "index": [1, 2]}),
        ("a norm", {"tensor": "model.norm.weight", "index": [2]}),
        ("an expert", {"tensor": "model.layers.0.mlp.experts.3.down_proj.weight", "index": [1, 2]}),
        ("stacked experts", {"tensor": "model.layers.0.mlp.experts.down_proj", "index": [1, 2, 3]}),
        ("a router", {"tensor": "model.layers.0.mlp.gate.weight", "index": [1, 2]}),
        ("a bias", {"tensor": "model.layers.0.mlp.down_proj.bias", "index": [1]}),
        ("integers", {"tensor": "model.layers.1.mlp.up_proj.weight", "index": [1, 1]}),
    ],
)
def test_what_is_no_linear_layer_is_refused_with_its_coordinate(tmp_path, capsys, name, edit):
    extra = {
        "model.layers.0.mlp.experts.3.down_proj.weight": tensor("F32", 4, 4),
        "model.layers.0.mlp.experts.down_proj": tensor("F32", 4, 4, 4),
        "model.layers.0.mlp.gate.weight": tensor("F32", 4, 4),
        "model.layers.0.mlp.down_proj.bias": tensor("F32", 4),
        "model.layers.1.mlp.up_proj.weight": tensor("I32", 4, 4),
    }
    base = write_llama(tmp_path / "base", extra)
    fine = {"op": "zero", "tensor": down(1), "index": [0, 0]}
    manifest = write_manifest(tmp_path / "m.json", base, {"op": "zero", **edit}, fine)
    assert main(["export", str(manifest), "--format", "peft", "-o", str(tmp_path / "adapter")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"cannot represent this edit: {edit['tensor']}[{', '.join(map(str, edit['index']))}] is" in line
    assert not (tmp_path / "adapter").exists()


def test_a_difference_that_float32_cannot_hold_is_named_with_what_it_gives(tmp_path):
    def single(value: float) -> bytes:
        return struct.pack("<f", value)

    base = write_single(tmp_path / "base", {down(0): ("F32", (1, 2), single(5.875) + single(5.875))})
    edits = [{"op": "set", "tensor": down(0), "index": [0, n], "value": v} for n, v in enumerate((1e-7, 2.0))]
    exported = export.export(write_manifest(tmp_path / "m.json", base, *edits), tmp_path / "adapter", format="peft")
    [note] = exported.notes
    assert note.startswith(f"merged by PEFT, {down(0)}[0, 0] becomes 0, not ")
    # The oracle: the same sum in torch.
    old, new = torch.tensor(5.875), torch.tensor(1e-7)
    delta = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    [product] = (
        delta["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"]
        @ (delta["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"])
    )
    assert old + product[0] == 0 != new and old + product[1] == 2


# vLLM ----------------------------------------------------------------------------------------------------------------


def test_the_fields_of_vllm_give_the_patched_tensors(tmp_path):
    base, edited, _ = made(tmp_path, torch.bfloat16, *EDITS)
    export.export(str(edited), tmp_path / "vllm", format="vllm")
    document = json.loads((tmp_path / "vllm" / "patches.json").read_text())
    arrays = load_file(tmp_path / "vllm" / "patches.safetensors")
    plain, wanted = load_file(base / "model.safetensors"), load_file(edited / "model.safetensors")
    for patch in document["patches"]:
        assert set(patch) == {"name", "shape", "dtype", "values", "indices"}
        values, indices = arrays[patch["values"]], arrays[patch["indices"]]
        assert values.dtype is getattr(torch, patch["dtype"]) is wanted[patch["name"]].dtype
        assert indices.dtype is torch.int64 and indices.shape == values.shape and values.dim() == 1
        assert list(wanted[patch["name"]].shape) == patch["shape"]
        flat = plain[patch["name"]].flatten()
        flat[indices] = values
        plain[patch["name"]] = flat.reshape(patch["shape"])
    assert all(torch.equal(plain[name], wanted[name]) for name in wanted)
    assert [p["name"] for p in document["patches"]] == sorted((DOWN, UP))
    assert document["base"]["sha256"] == {"model.safetensors": sha256(base / "model.safetensors")}


def test_integers_are_refused_for_vllm(tmp_path):
    base = write_llama(tmp_path / "base", {"counts": tensor("I64", 4)})
    manifest = write_manifest(tmp_path / "m.json", base, {"op": "zero", "tensor": "counts", "index": [2]})
    with pytest.raises(PlanError, match=r"only floating-point values, not I64: counts\[2\]"):
        export.export(str(manifest), tmp_path / "vllm", format="vllm")


# Every format --------------------------------------------------------------------------------------------------------

FORMATS = ("sparse", "peft", "vllm")
ZERO = {"op": "zero", "layer": 0, "row": 2, "col": 3}
EDIT_OF_LAST = {"op": "set", "layer": 2, "row": 1, "col": 4, "value": 3.5}


@pytest.mark.parametrize("form", FORMATS)
def test_an_export_is_a_few_kilobytes_and_the_same_each_time(tmp_path, form, capsys):
    base = write_llama(tmp_path / "base")
    manifest = write_manifest(tmp_path / "m.json", base, ZERO)
    for name in ("one", "two"):
        assert main(["export", str(manifest), "--format", form, "-o", str(tmp_path / name), "--json", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    one, two = tmp_path / "one", tmp_path / "two"
    assert (tree(one) == tree(two)) if one.is_dir() else (one.read_bytes() == two.read_bytes())
    assert 0 < sum(p.stat().st_size for p in (one.rglob("*") if one.is_dir() else [one])) < 8192
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("form", FORMATS)
def test_the_json_names_files_and_sizes(tmp_path, form, capsys):
    manifest = write_manifest(tmp_path / "m.json", write_llama(tmp_path / "base"), ZERO)
    assert main(["export", str(manifest), "--format", form, "-o", str(tmp_path / "new"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["format"], document["scalars"], document["output"]) == (form, 1, str(tmp_path / "new"))
    folder = tmp_path if form == "sparse" else tmp_path / "new"
    assert document["files"] == {name: (folder / name).stat().st_size for name in document["files"]}
    assert len(document["files"]) == (1 if form == "sparse" else 2)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_a_target_that_exists_is_refused_and_stays(tmp_path, form, kind):
    manifest = write_manifest(tmp_path / "m.json", write_llama(tmp_path / "base"), ZERO)
    target = tmp_path / "new"
    {"file": target.touch, "folder": target.mkdir, "dangling link": lambda: target.symlink_to("nowhere")}[kind]()
    with pytest.raises(TargetError, match="the output already exists"):
        export.export(str(manifest), target, format=form)
    assert not target.is_dir() or list(target.iterdir()) == []
    assert not target.is_file() or target.read_bytes() == b""


@pytest.mark.parametrize("form", ["peft", "vllm"])
def test_what_a_killed_run_left_behind_is_replaced(tmp_path, form):
    manifest = write_manifest(tmp_path / "m.json", write_llama(tmp_path / "base"), ZERO)
    export.export(manifest, tmp_path / "whole", format=form)
    (tmp_path / ".new.partial").mkdir()
    for name in [*tree(tmp_path / "whole"), "stray"]:
        (tmp_path / ".new.partial" / name).write_text("half")
    export.export(manifest, tmp_path / "new", format=form)
    assert tree(tmp_path / "new") == tree(tmp_path / "whole")
    assert not (tmp_path / ".new.partial").exists()


def test_a_file_that_appears_while_it_is_written_is_not_replaced(tmp_path, monkeypatch):
    manifest = write_manifest(tmp_path / "m.json", write_llama(tmp_path / "base"), ZERO)
    write = filesystem.write_file

    def late(path: Path, data: bytes, mode: int) -> None:
        write(path, data, mode)
        (tmp_path / "new").write_text("mine")

    monkeypatch.setattr(filesystem, "write_file", late)
    with pytest.raises(TargetError, match="File exists"):
        export.export(str(manifest), tmp_path / "new", format="sparse")
    assert (tmp_path / "new").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "m.json", "new"]


@pytest.mark.parametrize("form", FORMATS)
def test_a_target_without_a_folder_is_one_line(tmp_path, form, capsys):
    manifest = write_manifest(tmp_path / "m.json", write_llama(tmp_path / "base"), ZERO)
    assert main(["export", str(manifest), "--format", form, "-o", str(tmp_path / "no" / "new")]) == 2
    assert "create the directory first" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_base_that_the_manifest_does_not_mean_is_refused(tmp_path):
    base = write_llama(tmp_path / "base")
    pinned = {"path": str(base), "sha256": {FIRST: "0" * 64}}
    with pytest.raises(PlanError, match="but the manifest says 0000"):
        export.export(str(write_manifest(tmp_path / "m.json", pinned, ZERO)), tmp_path / "p", format="sparse")
    sound = {"path": str(base), "sha256": {FIRST: sha256(base / FIRST)}}
    export.export(str(write_manifest(tmp_path / "m.json", sound, ZERO)), tmp_path / "p", format="sparse")


def test_a_checkpoint_that_is_not_what_its_record_says_is_refused(tmp_path):
    base = write_llama(tmp_path / "base")
    swsurgery.apply(write_manifest(tmp_path / "m.json", base, ZERO), output=tmp_path / "edited", check=OFF)
    (tmp_path / "edited" / FIRST).write_bytes((base / FIRST).read_bytes())
    with pytest.raises(CheckpointError, match="differs from its record"):
        export.export(str(tmp_path / "edited"), tmp_path / "p", format="sparse")
    with pytest.raises(CheckpointError, match="no record"):
        export.export(str(base), tmp_path / "p", format="sparse")
    assert not (tmp_path / "p").exists()


def test_only_protecting_is_nothing_to_export(tmp_path):
    base = write_llama(tmp_path / "base")
    manifest = write_manifest(tmp_path / "m.json", base, {**ZERO, "op": "protect"})
    with pytest.raises(PlanError, match="nothing is changed"):
        export.export(str(manifest), tmp_path / "p", format="sparse")


def test_of_the_base_only_headers_scalars_and_touched_shards_are_read(tmp_path, monkeypatch):
    base = write_llama(tmp_path / "base")
    counted: dict[str, int] = {}
    read = os.preadv

    def counting(fd: int, buffers: list, offset: int) -> int:
        name = Path(os.readlink(f"/proc/self/fd/{fd}")).name
        counted[name] = counted.get(name, 0) + sum(map(len, buffers))
        return read(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", counting)
    export.export(write_manifest(tmp_path / "m.json", base, ZERO), tmp_path / "p", format="sparse")
    assert [name for name in (FIRST, SECOND, THIRD) if counted[name] >= (base / name).stat().st_size] == [FIRST]
    assert counted[THIRD] > 0, "its header"


def test_a_patch_becomes_an_adapter(tmp_path):
    base, edited, adapter = made(tmp_path, torch.float32, *EDITS)
    export.export(str(edited), tmp_path / "p", format="sparse")
    export.export(str(tmp_path / "p"), tmp_path / "again", format="peft", base=str(base))
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "again"))
    assert all(torch.equal(one[name], two[name]) for name in one.keys() | two.keys())


# On the Hub ----------------------------------------------------------------------------------------------------------


def test_of_a_repository_headers_and_scalars_are_read_and_the_digest_is_the_hubs(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("swsurgery.hub.remote.HEAD", 2048)  # of these small shards the usual one is the whole file
    base = write_llama(tmp_path / "base", {"model.extra.weight": tensor("F32", 4000, 6)})
    commit = hub.add_repo("org/base", base)
    manifest = write_manifest(tmp_path / "m.json", {"repo_id": "org/base", "revision": commit}, EDIT_OF_LAST)
    hub.traffic.clear()
    export.export(manifest, tmp_path / "p", format="sparse")
    assert hub.traffic.sent() < 20_000 < (base / THIRD).stat().st_size
    said = patch_module.parse((tmp_path / "p").read_bytes(), tmp_path).base
    assert (said.repo_id, said.revision, said.sha256) == ("org/base", commit, {THIRD: sha256(base / THIRD)})
    export.export(manifest, tmp_path / "local", format="sparse", base=str(base))
    assert (tmp_path / "local").read_bytes() == (tmp_path / "p").read_bytes()


def test_a_patched_repository_is_exported_and_its_patch_is_applied_to_the_base(any_hub, tmp_path):
    base = write_llama(tmp_path / "base")
    commit, name = any_hub.add_repo("org/base", base), any_hub.name("org/base")
    manifest = write_manifest(tmp_path / "m.json", {"repo_id": name, "revision": commit}, EDIT_OF_LAST)
    swsurgery.apply(manifest, output=tmp_path / "edited", check=OFF)
    any_hub.add_repo("org/edited", tmp_path / "edited")
    export.export(f"hf://{any_hub.name('org/edited')}", tmp_path / "p", format="sparse")
    swsurgery.apply(tmp_path / "p", output=tmp_path / "again", check=OFF)
    assert sha256(tmp_path / "again" / THIRD) == sha256(tmp_path / "edited" / THIRD) != sha256(base / THIRD)


def test_a_checkpoint_of_which_only_the_edited_shard_is_here_is_exported(any_hub, tmp_path):
    base = write_llama(tmp_path / "base")
    commit, name = any_hub.add_repo("org/base", base), any_hub.name("org/base")
    manifest = write_manifest(tmp_path / "m.json", {"repo_id": name, "revision": commit}, EDIT_OF_LAST)
    swsurgery.apply(manifest, output=tmp_path / "edited", check=OFF)
    export.export(tmp_path / "edited", tmp_path / "p", format="sparse")
    record = json.loads((tmp_path / "edited" / "swsurgery.json").read_text())
    record["elsewhere"] = [FIRST]
    (tmp_path / "edited" / "swsurgery.json").write_text(json.dumps(record))
    (tmp_path / "edited" / FIRST).unlink()
    export.export(tmp_path / "edited", tmp_path / "again", format="sparse")
    assert (tmp_path / "p").read_bytes() == (tmp_path / "again").read_bytes()

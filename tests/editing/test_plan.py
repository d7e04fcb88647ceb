"""Where manifest and checkpoint do not fit: every misfit by its message, all at once, and nothing written."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import (
    EMBED,
    FIRST,
    HEAD,
    HIDDEN,
    NORM,
    SECOND,
    down,
    place,
    sha256,
    stored,
    tensor,
    tree,
    write_llama,
    write_manifest,
    write_single,
    write_sparse_shard,
)
from listening import Listener

import swsurgery
from swsurgery.cli import main
from swsurgery.editing.check_options import CheckOptions
from swsurgery.editing.targets import KnownPlace, find_known
from swsurgery.errors import PlanError

COMMIT, OTHER_COMMIT = "0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef"
OFF = CheckOptions("off")
ZERO = {"op": "zero", "layer": 1, "row": 2, "col": 3}


@pytest.fixture
def base(tmp_path) -> Path:
    return write_llama(tmp_path / "base")


def faults(base: Path | dict, *edits: dict, **more: object) -> list[str]:
    """The misfits, each without the place in the manifest; and the refusal leaves no trace."""
    folder = Path(base["path"]) if isinstance(base, dict) and "path" in base else base
    return _faults(folder, write_manifest(folder.parent / "manifest.json", base, *edits, **more))


def _faults(base: Path, manifest: Path, override: str | None = None) -> list[str]:
    before = tree(base.parent)
    with pytest.raises(PlanError) as caught:
        swsurgery.apply(manifest, output=base.parent / "patched", base=override, check=OFF)
    assert tree(base.parent) == before
    assert str(caught.value) == "\n".join(caught.value.faults)
    return [fault.removeprefix(f"{manifest}:").removeprefix(f"{manifest}: ").strip() for fault in caught.value.faults]


def test_a_plan_names_the_bytes(base, tmp_path):
    plan = swsurgery.plan(
        write_manifest(tmp_path / "m.json", base, ZERO, {"op": "protect", "tensor": NORM, "index": [5]})
    )
    (splice,), (protected,) = plan.splices, plan.protected
    assert (splice.offset, len(splice.new)) == place(base / SECOND, down(1), (2, 3))
    assert (splice.old, splice.new) == (stored(base / SECOND, down(1), (2, 3)), b"\0\0")
    assert (splice.file, splice.op, str(splice.coordinate)) == (SECOND, "zero", f"{down(1)}[2, 3]")
    assert (protected.offset, protected.old) == (place(base / SECOND, NORM, (5,))[0], stored(base / SECOND, NORM, (5,)))
    assert plan.notes == plan.omitted == ()


def test_planning_writes_nothing(base, tmp_path):
    manifest = write_manifest(tmp_path / "m.json", base, ZERO)
    before = tree(tmp_path)
    swsurgery.plan(manifest)
    assert tree(tmp_path) == before


def test_an_edit_without_effect_is_noted(base, tmp_path, capsys):
    swsurgery.apply(write_manifest(tmp_path / "m.json", base, ZERO), output=tmp_path / "once", check=OFF)
    again = write_manifest(
        tmp_path / "again.json", tmp_path / "once", ZERO, {"op": "zero", "tensor": NORM, "index": [5]}
    )
    (note,) = swsurgery.plan(again).notes
    assert note.endswith(f": edits[0]: zero has no effect: {down(1)}[2, 3] already has this value")
    assert main(["apply", str(again), "-o", str(tmp_path / "twice"), "--check", "off"]) == 0
    assert f"swsurgery: {note}\n" in capsys.readouterr().err


MISFITS = {
    "wrong bits": (
        {**ZERO, "expect": "0x0001"},
        "expected bits 0x0001, stored are",
    ),
    "no such layer": ({"op": "zero", "layer": 3, "row": 0, "col": 0}, "layer 3"),
    "swapped in layer, row, col": ({"op": "zero", "layer": 1, "row": 9, "col": 3}, "row and col look swapped: [3, 9]"),
    "row out of range": ({"op": "zero", "layer": 1, "row": 60, "col": 3}, "row 60 is out of range 0..5"),
    "both out of range": (
        {"op": "zero", "layer": 1, "row": 60, "col": 70},
        "row 60 is out of range 0..5 and col 70 is out of range 0..9",
    ),
    "swapped in tensor, index": (
        {"op": "zero", "tensor": down(1), "index": [9, 3]},
        "index [9, 3] is out of range: {d1} of shape [6, 10] (row and col look swapped: [3, 9] would fit)",
    ),
    "index out of range": (
        {"op": "zero", "tensor": down(1), "index": [60, 70]},
        "index [60, 70] is out of range: {d1} of shape [6, 10]",
    ),
    "index of the wrong rank": (
        {"op": "zero", "tensor": NORM, "index": [0, 0]},
        f"index [0, 0] is out of range: {NORM} of shape [6]",
    ),
    "no such tensor": (
        {"op": "zero", "tensor": "model.layers.1.mlp.down_porj.weight", "index": [0, 0]},
        "no such tensor: model.layers.1.mlp.down_porj.weight (did you mean {d1}?)",
    ),
    "no tensor of a like name": ({"op": "zero", "tensor": "xyz", "index": [0, 0]}, "no such tensor: xyz"),
    "overflow": (
        {"op": "set", "layer": 1, "row": 2, "col": 3, "value": 1e6},
        "cannot set {d1}[2, 3]: 1000000 overflows F16",
    ),
    "bits of another width": (
        {"op": "set", "layer": 1, "row": 2, "col": 3, "bits": "0x00000000"},
        "cannot set {d1}[2, 3]: 0x00000000 has 8 hex digits, but F16 takes 4",
    ),
    "known without a model": ({"op": "zero", "known": "L2.3968.7003"}, "no known super weights of this base"),
    "all without a model": ({"op": "protect", "known": "all"}, "(set base.model to the name of the known model)"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_misfit_is_named(name, base):
    edit, message = MISFITS[name]
    (fault,) = faults(base, edit)
    assert message.format(d1=down(1)) in fault
    assert fault.startswith("4:1: edits[0]: ")


def test_a_wrong_value_is_refused_and_a_right_one_is_not(base, tmp_path):
    edit = {"op": "zero", "tensor": NORM, "index": [0]}
    (fault,) = faults(base, {**edit, "expect": 123.5})
    assert f"{NORM}[0]" in fault and "expected 123.5, stored is" in fault and "is this the right base?" in fault
    bits = "0x" + stored(base / SECOND, NORM, (0,))[::-1].hex()
    assert swsurgery.plan(write_manifest(tmp_path / "m.json", base, {**edit, "expect": bits})).splices


def test_an_expected_value_at_the_swapped_place_is_recognised(base):
    bits = "0x" + stored(base / SECOND, down(1), (3, 2))[::-1].hex()
    (fault,) = faults(base, {**ZERO, "expect": bits})
    assert fault.endswith("(row and col look swapped: [3, 2] has this value)")


def test_every_misfit_is_listed_with_its_line(base):
    edits = [edit for edit, _ in MISFITS.values()]
    found = faults(base, *edits)
    for number, (_, message) in enumerate(MISFITS.values()):
        assert any(
            f.startswith(f"{number + 4}:1: edits[{number}]: ") and message.format(d1=down(1)) in f for f in found
        )
    assert len(found) == len(edits)


def test_two_operations_on_one_scalar_are_refused_however_spelled(base):
    by_name = {"op": "protect", "tensor": down(1), "index": [2, 3]}
    message = f"5:1: edits[1]: {down(1)}[2, 3] has two operations (the other is edits[0])"
    assert faults(base, ZERO, by_name) == [message]
    assert faults(base, by_name, ZERO) == [message]
    assert faults(base, ZERO, ZERO) == [message]


def test_an_empty_tensor_has_no_scalar(tmp_path):
    base = write_llama(tmp_path / "base", {"empty": ("F32", (0, 4), b"")})
    (fault,) = faults(base, {"op": "zero", "tensor": "empty", "index": [0, 0]})
    assert fault.endswith("index [0, 0] is out of range: empty of shape [0, 4] (the tensor has no elements)")


@pytest.mark.parametrize(
    ("dtype", "op", "message"),
    [
        ("F8_E8M0", {"op": "zero"}, "cannot zero x[0, 1]: F8_E8M0 contains block scales (powers of two)"),
        ("F8_E8M0", {"op": "protect", "expect": 1.0}, "F8_E8M0 contains block scales"),
        ("I8", {"op": "scale", "factor": 2.0}, "cannot scale x[0, 1]: I8 is an integer dtype"),
    ],
)
def test_a_dtype_that_has_no_such_scalar_is_refused(tmp_path, dtype, op, message):
    base = write_llama(tmp_path / "base", {"x": tensor(dtype, 2, 2)})
    (fault,) = faults(base, {**op, "tensor": "x", "index": [0, 1]})
    assert message in fault


def test_a_stored_nan_cannot_be_scaled_but_zeroed(tmp_path):
    base = write_llama(tmp_path / "base", {"x": ("BF16", (1,), b"\xc0\x7f")})
    (fault,) = faults(base, {"op": "scale", "tensor": "x", "index": [0], "factor": 2.0})
    assert "cannot scale x[0]: the stored value is nan, which cannot be scaled (use set or zero)" in fault
    plan = swsurgery.plan(write_manifest(tmp_path / "m.json", base, {"op": "zero", "tensor": "x", "index": [0]}))
    assert plan.splices[0].new == b"\0\0"


@pytest.mark.parametrize("companion", ["weight_scale", "weight_scale_inv", "scales", "SCB", "weight.absmax"])
def test_a_quantised_weight_of_unknown_layout_is_refused_and_any_may_be_protected(tmp_path, companion):
    stem = "model.layers.0.mlp.up_proj"
    base = write_llama(
        tmp_path / "base", {f"{stem}.weight": tensor("I8", 2, 2), f"{stem}.{companion}": tensor("F32", 2)}
    )
    place_of = {"tensor": f"{stem}.weight", "index": [0, 0]}
    if companion not in ("weight_scale", "SCB"):
        (fault,) = faults(base, {"op": "zero", **place_of})
        assert f"quantised: what its codes mean depends on {stem}.{companion}: {stem}.weight[0, 0] (edit" in fault
    assert swsurgery.plan(write_manifest(tmp_path / "m.json", base, {"op": "protect", **place_of})).protected


@pytest.mark.parametrize(
    "name",
    ["a.qweight", "a.qzeros", "a.g_idx", "a.scales", "a.weight_packed", "a.gate_up_blocks", "a.down_proj_scales",
     "a.SCB", "a.weight.absmax", "a.weight.quant_state.bitsandbytes__nf4", "a.W_q", "a.codes", "a.weight._data",
     "a.weight_global_scale", "a.input_scale"],
)  # fmt: skip
def test_packed_values_are_refused(tmp_path, name):
    base = write_llama(tmp_path / "base", {name: tensor("I32", 2, 2)})
    (fault,) = faults(base, {"op": "zero", "tensor": name, "index": [0, 0]})
    assert f"packed or scaling values of a quantised layer, not weights: {name}" in fault


def test_a_head_that_is_tied_and_not_stored_points_to_the_embedding(tmp_path):
    tensors = {EMBED: tensor("F32", 3, HIDDEN), down(0): tensor("F32", HIDDEN, 10)}
    base = write_single(tmp_path / "base", tensors, {"tie_word_embeddings": True})
    (fault,) = faults(base, {"op": "zero", "tensor": HEAD, "index": [0, 0]})
    assert fault.endswith(f"{HEAD} is tied to {EMBED} and not stored (edit {EMBED})")


def test_tied_tensors_that_are_both_stored_are_edited_alike(tmp_path):
    same = tensor("F32", 3, HIDDEN)
    base = write_single(tmp_path / "base", {EMBED: same, HEAD: same}, {"tie_word_embeddings": True})
    embed, head = ({"op": "zero", "tensor": name, "index": [1, 2]} for name in (EMBED, HEAD))
    (fault,) = faults(base, embed)
    assert f"{EMBED}[1, 2] is tied to {HEAD}, which is stored too" in fault
    (fault,) = faults(base, head)
    assert f"{HEAD}[1, 2] is tied to {EMBED}, which is stored too" in fault
    assert len(faults(base, embed, {**head, "op": "set", "value": 2.0})) == 2
    assert len(swsurgery.plan(write_manifest(tmp_path / "m.json", base, embed, head)).splices) == 2


def test_a_text_config_that_is_no_map_is_passed_over(tmp_path):
    same = tensor("F32", 3, HIDDEN)
    config = {"tie_word_embeddings": True, "text_config": [1]}
    base = write_single(tmp_path / "base", {EMBED: same, HEAD: same}, config)
    (fault,) = faults(base, {"op": "zero", "tensor": HEAD, "index": [1, 2]})
    assert "is tied to" in fault


def test_a_tied_head_is_known_behind_a_prefix(tmp_path):
    embed, head = f"language_model.{EMBED}", f"language_model.{HEAD}"
    same = tensor("F32", 3, HIDDEN)
    base = write_single(tmp_path / "base", {embed: same, head: same}, {"text_config": {"tie_word_embeddings": True}})
    (fault,) = faults(base, {"op": "zero", "tensor": head, "index": [1, 2]})
    assert f"{head}[1, 2] is tied to {embed}, which is stored too" in fault


def test_untied_tensors_are_edited_alone(base, tmp_path):
    assert swsurgery.plan(
        write_manifest(tmp_path / "m.json", base, {"op": "zero", "tensor": HEAD, "index": [0, 0]})
    ).splices


def test_a_tensor_that_index_and_shards_place_differently_is_refused(base):
    index = base / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"][NORM] = FIRST
    index.write_text(json.dumps(document))
    (fault,) = faults(base, {"op": "zero", "tensor": NORM, "index": [0]})
    assert f"index and shards disagree about {NORM}" in fault and f"it is in {SECOND}" in fault


def test_so_it_is_where_layer_row_and_col_mean_it(base):
    index = base / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"][down(1)] = FIRST
    index.write_text(json.dumps(document))
    (fault,) = faults(base, ZERO)
    assert f"index and shards disagree about {down(1)}" in fault and f"it is in {SECOND}" in fault


def test_what_they_say_differently_of_other_tensors_is_told(base, tmp_path):
    index = base / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"] |= {NORM: FIRST, "ghost": FIRST}
    index.write_text(json.dumps(document))
    notes = swsurgery.plan(write_manifest(tmp_path / "m.json", base, ZERO)).notes
    assert [note.split(":")[0] for note in notes] == [
        f"index and shards disagree about {name}" for name in (NORM, "ghost")
    ]


QWEN = {"hf_id": "Qwen/Qwen3-1.7B", "first": "L2.1793.1821", "second": "L2.1999.1821"}
"""A known model whose two coordinates have values: -0.8203125 and -0.515625 in BF16."""


@pytest.fixture
def known_base(tmp_path) -> Path:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "qwen3", "hidden_size": 2000, "num_hidden_layers": 3}')
    write_sparse_shard(base / "model.safetensors", down(2), "BF16", 2000, 1822)
    with open(base / "model.safetensors", "r+b") as file:
        for row, bits in ((1793, 0xBF52), (1999, 0xBF04)):
            file.seek(place(base / "model.safetensors", down(2), (row, 1821))[0])
            file.write(bits.to_bytes(2, "little"))
    return base


def test_known_all_yields_to_edits_that_name_a_scalar(known_base, tmp_path):
    explicit = {"op": "scale", "layer": 2, "row": 1793, "col": 1821, "factor": 0.5}
    everything = {"op": "protect", "known": "all"}
    where = {"path": str(known_base), "model": QWEN["hf_id"]}
    for edits in ([explicit, everything], [everything, explicit]):
        plan = swsurgery.plan(write_manifest(tmp_path / "m.json", where, *edits))
        assert [s.coordinate.index for s in plan.splices] == [(1793, 1821)]
        assert [s.coordinate.index for s in plan.protected] == [(1999, 1821)]
        ids = [plan.facts[scalar.coordinate].id for scalar in (*plan.splices, *plan.protected)]
        assert ids == [QWEN["first"], QWEN["second"]]


def test_restore_of_all_yields_to_a_scalar_that_is_protected(known_base, tmp_path, monkeypatch):
    where = {"path": str(known_base), "model": QWEN["hf_id"]}
    protect, restore = {"op": "protect", "known": QWEN["first"]}, {"op": "restore", "known": "all"}
    for edits in ([protect, restore], [restore, protect]):
        plan = swsurgery.plan(write_manifest(tmp_path / "m.json", where, *edits))
        assert [s.coordinate.index for s in plan.splices] == [(1999, 1821)]
        assert [s.coordinate.index for s in plan.protected] == [(1793, 1821)]
    inexact = {(1793, 1821)}

    def forget(model: object, name: str) -> list[KnownPlace]:
        return [replace(p, expect=None) if (p.row, p.col) in inexact else p for p in find_known(model, name)]

    monkeypatch.setattr("swsurgery.editing.plan.find_known", forget)
    (fault,) = faults(where, restore)
    assert fault.endswith(
        f"no exact value of this scalar is known: {down(2)}[1793, 1821] "
        "(give from: CHECKPOINT, or protect this scalar, which known: all then leaves out)"
    )
    assert swsurgery.plan(write_manifest(tmp_path / "m.json", where, protect, restore)).splices


def test_what_an_earlier_step_protects_may_be_restored_if_nothing_changes(known_base, tmp_path):
    where = {"path": str(known_base), "model": QWEN["hf_id"]}
    first = write_manifest(tmp_path / "first.json", where, {"op": "protect", "known": QWEN["first"]})
    swsurgery.apply(first, output=tmp_path / "once", check="off")
    where["path"] = str(tmp_path / "once")
    restore = write_manifest(tmp_path / "second.json", where, {"op": "restore", "known": "all"})
    applied = swsurgery.apply(restore, output=tmp_path / "twice", check="off")
    assert sum("restore has no effect" in note for note in applied.notes) == 2
    assert swsurgery.verify(tmp_path / "twice").ok and swsurgery.verify(tmp_path / "twice", manifest=restore).ok
    (fault,) = faults(where, {"op": "zero", "known": "all"})
    assert fault.endswith(
        f"{down(2)}[1793, 1821] is protected by step 1 of the base's record "
        "(name the others with known: ID, revert that step, or start from the first base)"
    )


@pytest.mark.parametrize("ops", [("zero", "protect"), ("protect", "zero"), ("zero", "zero")])
def test_of_two_edits_of_all_known_coordinates_neither_wins(known_base, ops):
    where = {"path": str(known_base), "model": QWEN["hf_id"]}
    found = faults(where, *({"op": op, "known": "all"} for op in ops))
    assert len(found) == 2  # the model has two coordinates
    assert all(fault.endswith("has two operations (the other is edits[0])") for fault in found)


def test_a_known_coordinate_brings_its_value(known_base):
    shard = known_base / "model.safetensors"
    offset, _ = place(shard, down(2), (1999, 1821))
    with open(shard, "r+b") as file:
        file.seek(offset)
        file.write(b"\x05\xbf")
    (fault,) = faults({"path": str(known_base), "model": QWEN["hf_id"]}, {"op": "zero", "known": "all"})
    assert "expected -0.515625 (BF16), stored is -0.51953125" in fault


@pytest.mark.parametrize(
    ("model", "known", "message"),
    [
        ("qwen3-1.7b", "L2.1.1", "no such known coordinate of"),
        ("qwen3-1.7b", "L2.9.", "no such known coordinate of"),
        ("smollm2-135m", "all", "complete coordinate (layer, row and col) of HuggingFaceTB/SmolLM2-135M"),
    ],
)
def test_a_coordinate_that_is_not_known_is_refused(base, model, known, message):
    (fault,) = faults({"path": str(base), "model": model}, {"op": "zero", "known": known})
    assert message in fault


def test_an_unknown_model_is_refused(base):
    found = faults({"path": str(base), "model": "no-such-model"}, ZERO)
    assert len(found) == 1 and "base.model: no such known model: no-such-model" in found[0]


def cached(tmp_path: Path, *, repo: str = "org/name", commit: str = COMMIT) -> Path:
    """A snapshot as huggingface_hub lays it out: links into blobs that are named by digest."""
    root = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    (root / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name, data in tree(write_llama(tmp_path / "files")).items():
        blob = root / "blobs" / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        (snapshot / name).parent.mkdir(exist_ok=True)
        (snapshot / name).symlink_to(Path(*[".."] * (2 + name.count("/")), "blobs", blob.name))
    return snapshot


def test_another_repository_or_revision_than_the_manifest_says_is_refused(tmp_path):
    snapshot = cached(tmp_path)
    manifest = write_manifest(tmp_path / "m.json", {"repo_id": "org/other", "revision": OTHER_COMMIT}, ZERO)
    found = _faults(snapshot, manifest, str(snapshot))
    assert len(found) == 2
    assert "base.repo_id is org/other, but the checkpoint has org/name" in found[0]
    assert f"base.revision is {OTHER_COMMIT}, but the checkpoint has {COMMIT}" in found[1]
    manifest = write_manifest(tmp_path / "m.json", {"repo_id": "org/name", "revision": COMMIT}, ZERO)
    plan = swsurgery.plan(manifest, str(snapshot))
    assert (plan.checkpoint.repo_id, plan.checkpoint.revision, len(plan.splices)) == ("org/name", COMMIT, 1)


def test_a_pinned_digest_is_held_against_the_blobs_name(tmp_path):
    snapshot = cached(tmp_path)
    pins = {FIRST: "0" * 64, SECOND: sha256(snapshot / SECOND)}
    manifest = write_manifest(tmp_path / "m.json", {"repo_id": "org/name", "sha256": pins}, ZERO)
    (fault,) = _faults(snapshot, manifest, str(snapshot))
    assert f"wrong base: {FIRST} has digest {sha256(snapshot / FIRST)}, not {'0' * 64}" in fault


def test_a_pinned_digest_is_held_against_the_bytes(base):
    right = {name: sha256(base / name) for name in (FIRST, SECOND)}
    (fault,) = faults({"path": str(base), "sha256": right | {FIRST: "1" * 64}}, ZERO)
    assert f"its sha256 is {right[FIRST]}, but the manifest says {'1' * 64}: {base / FIRST}" in fault
    manifest = write_manifest(base.parent / "m.json", {"path": str(base), "sha256": right}, ZERO)
    swsurgery.apply(manifest, output=base.parent / "patched", check=OFF)


def test_a_pin_of_a_file_that_is_not_there_is_refused(base):
    (fault,) = faults({"path": str(base), "sha256": {"other.safetensors": "0" * 64}}, ZERO)
    assert fault.endswith("base.sha256 names other.safetensors, which the base does not have")


def test_a_further_copy_of_the_weights_asks_for_a_decision(base, tmp_path):
    (base / "model-q4.gguf").write_bytes(b"GGUF")
    (fault,) = faults(base, ZERO)
    assert "the base contains more copies of the weights, which would not be edited: model-q4.gguf" in fault
    for decision, there in (("omit", False), ("keep", True)):
        where = {"path": str(base), "copies": decision}
        notes: list[str] = []
        manifest = write_manifest(tmp_path / "m.json", where, ZERO)
        swsurgery.apply(manifest, output=tmp_path / decision, check=OFF, reporter=Listener(notes.append))
        assert (tmp_path / decision / "model-q4.gguf").exists() is there
        assert any("model-q4.gguf" in note for note in notes)
        record = json.loads((tmp_path / decision / "swsurgery.json").read_text())
        assert (record["omitted"] == ["model-q4.gguf"]) is not there


def test_protecting_alone_reaches_every_copy(base, tmp_path):
    (base / "model-q4.gguf").write_bytes(b"GGUF")
    plan = swsurgery.plan(write_manifest(tmp_path / "m.json", base, {**ZERO, "op": "protect"}))
    assert (len(plan.protected), plan.omitted) == (1, ())


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("name", ["manifest.yaml", "SHA256SUMS"])
def test_a_base_with_a_file_of_swsurgerys_own_name_is_refused(base, name, folder):
    if folder:
        (base / name).mkdir()
    (base / name / "x" if folder else base / name).write_text("something else")
    (fault,) = faults(base, ZERO)
    assert fault.endswith(
        f"{base / name}: the base already has a file with this name, which swsurgery writes (rename it)"
    )

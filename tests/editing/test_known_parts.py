"""`known:` with the id of a published expert or column changes what the same place does when it is given by numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import tree, write_manifest

import swsurgery
from swsurgery.cli import main
from swsurgery.errors import LookupFailed
from swsurgery.known import own, shipped
from swsurgery.known.lookup import lookup

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402

QWEN, LLAMA = "qwen3-30b-a3b", "llama-7b"
EXPERTS = 70
PARTS = {"gate": (3, 4), "up": (3, 4), "down": (4, 3)}
COLUMN = "model.layers.2.mlp.down_proj.weight"


def name(layer: int, expert: int, part: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"


def save(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 4, "hidden_size": 4} | config))
    return folder


@pytest.fixture
def moe(tmp_path) -> Path:
    """A tiny Qwen3-MoE with two layers that are stored as published: one tensor for each matrix of an expert."""
    random = torch.Generator().manual_seed(3)
    tensors = {
        name(layer, expert, part): torch.randn(*shape, generator=random).to(torch.bfloat16)
        for layer in (0, 1)
        for expert in range(EXPERTS)
        for part, shape in PARTS.items()
    }
    tensors |= {f"model.layers.{n}.mlp.gate.weight": torch.ones(EXPERTS, 4, dtype=torch.bfloat16) for n in (0, 1)}
    config = {"model_type": "qwen3_moe", "num_experts": EXPERTS, "moe_intermediate_size": 3, "intermediate_size": 3}
    return save(tmp_path / "moe", tensors, **config)


@pytest.fixture
def dense(tmp_path) -> Path:
    random = torch.Generator().manual_seed(4)
    tensors = {COLUMN: torch.randn(4, 7010, generator=random).to(torch.float16)}
    return save(tmp_path / "dense", tensors, model_type="llama", intermediate_size=7010)


def apply(tmp_path: Path, base: Path, model: str | None, label: str, *edits: dict) -> Path:
    manifest = write_manifest(tmp_path / f"{label}.json", {"path": str(base), "model": model}, *edits)
    swsurgery.apply(manifest, output=tmp_path / label, check="off")
    return tmp_path / label


@pytest.mark.parametrize("known", ["L1.E68", "qwen3-30b-a3b:L1.E68"])
@pytest.mark.parametrize("op", [{"op": "zero"}, {"op": "scale", "factor": -0.5}, {"op": "round", "bits": 4}])
def test_an_expert_by_id_is_the_expert_by_layer_and_number(tmp_path, moe, known, op):
    by_id = apply(tmp_path, moe, QWEN, "id", {**op, "known": known})
    by_number = apply(tmp_path, moe, QWEN, "number", {**op, "layer": 1, "expert": 68})
    for file in ("model.safetensors", "swsurgery-undo.safetensors"):
        assert (by_id / file).read_bytes() == (by_number / file).read_bytes()
    changed = {n for n, t in load_file(moe / "model.safetensors").items()
               if not torch.equal(t, load_file(by_id / "model.safetensors")[n])}  # fmt: skip
    assert changed == {name(1, 68, part) for part in PARTS}


def test_zeroing_an_expert_by_id_is_proved_and_undone(tmp_path, moe):
    out = apply(tmp_path, moe, QWEN, "out", {"op": "zero", "known": "L1.E68"})
    wanted = load_file(moe / "model.safetensors")
    for part, shape in PARTS.items():
        wanted[name(1, 68, part)] = torch.zeros(*shape, dtype=torch.bfloat16)
    found = load_file(out / "model.safetensors")
    assert all(torch.equal(found[n].view(torch.int16), t.view(torch.int16)) for n, t in wanted.items())
    assert swsurgery.verify(out).ok
    assert swsurgery.verify(out, base=moe, manifest=tmp_path / "out.json").ok
    swsurgery.revert(out, output=tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (moe / "model.safetensors").read_bytes()


def test_protecting_an_expert_by_id_keeps_its_bytes(tmp_path, moe):
    out = apply(
        tmp_path, moe, QWEN, "out", {"op": "protect", "known": "L1.E68"}, {"op": "zero", "layer": 1, "expert": 67}
    )
    record = json.loads((out / "swsurgery.json").read_text())
    assert [r["tensor"] for r in record["protected_regions"]] == [name(1, 68, part) for part in PARTS]
    assert swsurgery.verify(out, manifest=tmp_path / "out.json").ok
    assert swsurgery.verify(out, protected=tmp_path / "out.json", base=moe).ok


def test_a_column_by_id_is_the_column_by_layer_and_number(tmp_path, dense):
    by_id = apply(tmp_path, dense, LLAMA, "id", {"op": "zero", "known": "L2.*.7003"})
    by_number = apply(tmp_path, dense, LLAMA, "number", {"op": "zero", "layer": 2, "col": 7003})
    assert (by_id / "model.safetensors").read_bytes() == (by_number / "model.safetensors").read_bytes()
    wanted = load_file(dense / "model.safetensors")[COLUMN].numpy()
    wanted[:, 7003] = 0
    assert np.array_equal(load_file(by_id / "model.safetensors")[COLUMN].numpy(), wanted)
    assert swsurgery.verify(by_id, base=dense, manifest=tmp_path / "id.json").ok


def test_a_row_by_id_is_proved_by_its_record(tmp_path):
    row = "model.layers.11.mlp.down_proj.weight"
    base = save(tmp_path / "base", {row: torch.ones(576, 4)}, model_type="llama", num_hidden_layers=30, hidden_size=576)
    out = apply(tmp_path, base, "smollm2-135m", "out", {"op": "zero", "known": "L11.507.*"})
    assert swsurgery.verify(out, manifest=tmp_path / "out.json").ok


def test_known_all_names_single_scalars_only(tmp_path, moe):
    manifest = write_manifest(tmp_path / "m.json", {"path": str(moe), "model": QWEN}, {"op": "protect", "known": "all"})
    with pytest.raises(swsurgery.SwsurgeryError) as error:  # the tiny model has neither row 940 nor layers 2 and 3
        swsurgery.plan(manifest)
    assert len(error.value.faults) == 4 and "the base is not Qwen/Qwen3-30B-A3B" in error.value.faults[0]
    assert [p.col for p in swsurgery.editing.targets.find_known(own.find_model(QWEN), "all")] == [711, 59, 423]


BAD = {
    "another expert": (QWEN, {"op": "zero", "known": "L1.E69"}, "no such known expert of qwen3-30b-a3b"),
    "no expert": (LLAMA, {"op": "zero", "known": "L1.E68"}, "no expert of llama-7b is known"),
    "another column": (LLAMA, {"op": "zero", "known": "L2.*.7004"}, "did you mean L2.*.7003?"),
    "no column": (QWEN, {"op": "zero", "known": "L2.*.7003"}, "no column of qwen3-30b-a3b is known"),
    "a layer that the checkpoint lacks": (QWEN, {"op": "zero", "known": "L3.E82"}, "layer 3"),
    "an operation on scalars": (QWEN, {"op": "flip", "known": "L1.E68", "bit": 0}, "flip changes one scalar"),
    "no model": (None, {"op": "zero", "known": "L1.E68"}, "set base.model"),
    "another model": (QWEN, {"op": "zero", "known": "llama-7b:L1.E68"}, "another model"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_id_is_one_line_and_writes_nothing(tmp_path, moe, capsys, case):
    model, edit, message = BAD[case]
    base = {"path": str(moe)} | ({"model": model} if model else {})
    manifest = write_manifest(tmp_path / "m.json", base, edit)
    before = tree(tmp_path)
    assert main(["apply", str(manifest), "-o", str(tmp_path / "out"), "--check", "off"]) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if "the base is not Qwen" not in line]
    assert message in error and len(lines) == 1, error
    assert tree(tmp_path) == before


def test_restoring_an_expert_needs_a_checkpoint(tmp_path, moe, capsys):
    manifest = write_manifest(
        tmp_path / "m.json", {"path": str(moe), "model": QWEN}, {"op": "restore", "known": "L1.E68"}
    )
    assert main(["apply", str(manifest), "-o", str(tmp_path / "out"), "--check", "off"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    out = apply(tmp_path, moe, QWEN, "zeroed", {"op": "zero", "known": "L1.E68"})
    back = apply(tmp_path, out, QWEN, "restored", {"op": "restore", "known": "L1.E68", "from": str(moe)})
    assert (back / "model.safetensors").read_bytes() == (moe / "model.safetensors").read_bytes()


def test_lookup_shows_experts_and_columns(capsys):
    [model] = lookup(QWEN).to_json()["models"]
    assert [e["id"] for e in model["experts"]] == ["L1.E68", "L2.E92", "L3.E82"] and model["columns"] == []
    first = model["experts"][0]
    assert (first["layer"], first["expert"], first["status"], first["causal_alone"]) == (1, 68, "paper", "untested")
    assert "2507.23279" in first["sources"][0]
    assert [c["id"] for c in model["coordinates"]] == ["L1.E68.940.711", "L2.E92.940.59", "L3.E82.940.423"]
    [filtered] = lookup(QWEN, status="measured").to_json()["models"]
    assert filtered["experts"] == []
    [columns] = [m["columns"] for m in lookup(LLAMA).to_json()["models"]]
    assert [(c["id"], c["layer"], c["col"], c["expert"]) for c in columns] == [("L2.*.7003", 2, 7003, None)]
    assert main(["lookup", QWEN]) == 0
    assert "\nL1.E68        paper   untested" in capsys.readouterr().out


def test_published_parts_are_those_of_the_related_results():
    related = shipped.list_related()
    experts = {m.hf_id: tuple(e.id for e in m.experts) for m in shipped.list_shipped_models() if m.experts}
    published = {hf_id: s.experts for s in related.super_experts for hf_id in (s.hf_id, *s.also)}
    assert experts == published
    columns = {(c.layer, c.col) for m in shipped.list_shipped_models() for c in m.columns}
    assert columns == {(n.layer, col) for n in related.sink_neurons for col in n.columns}


@pytest.mark.parametrize(
    ("table", "wrong"),
    [("experts", "L1.E68.940"), ("experts", "L1"), ("columns", "L1.5.*"), ("columns", "L1.*"), ("columns", "L1.5")],
)
def test_a_file_with_a_wrong_id_is_refused(tmp_path, table, wrong):
    path = tmp_path / "family.toml"
    text = (
        '[sources]\na = { kind = "paper", cite = "A" }\n[[models]]\nhf_id = "org/m"\naliases = ["m"]\nfamily = "F"\n'
        'hidden_size = 4\nintermediate_size = 8\nnum_layers = 2\nsizes_from = "here"\ntensor = "l.{layer}.weight"\n'
        f'[[models.{table}]]\nstatus = "paper"\nsources = ["a"]\nid = '
    )
    good = {"experts": "L1.Eshared", "columns": "L1.E3.*.5"}[table]
    path.write_text(f'{text}"{good}"\n')
    [model] = shipped.load_file(path)
    assert shipped.find(model, good) == model.parts[0]
    path.write_text(f'{text}"{wrong}"\n')
    with pytest.raises(ValueError, match="is not the id of a"):
        shipped.load_file(path)
    with pytest.raises(LookupFailed):
        shipped.find(model, wrong)

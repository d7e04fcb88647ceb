"""The format outliers for protected rows, columns, neurons and slices: every scalar of them, and no other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoints import HEAD, HIDDEN, INNER, NORM, SECOND, down, place, stored, tensor, write_llama, write_manifest
from safetensors.torch import load_file
from test_outliers import READER, read, shard

import swsurgery
from swsurgery.cli import main
from swsurgery.errors import CheckpointError, PlanError

ROW = {"op": "protect", "layer": 1, "row": 2}
COLUMN = {"op": "protect", "layer": 2, "col": 3}
SLICE = {"op": "protect", "tensor": HEAD, "slice": "1:3, 2:"}
WHOLE = {"op": "protect", "tensors": NORM}
SCALAR = {"op": "protect", "layer": 0, "row": 5, "col": 9}
ROUND = {"op": "round", "tensors": "*down_proj.weight", "bits": 2}
PLACES = [
    *((down(1), (2, c)) for c in range(INNER)),
    *((down(2), (r, 3)) for r in range(HIDDEN)),
    *((HEAD, (r, c)) for r in (1, 2) for c in range(2, HIDDEN)),
    *((NORM, (n,)) for n in range(HIDDEN)),
    (down(0), (5, 9)),
]
SHAPES = {down(n): (HIDDEN, INNER) for n in range(3)} | {HEAD: (12, HIDDEN), NORM: (HIDDEN,)}


def oracle(base: Path) -> dict[tuple[str, int], bytes]:
    flat = {(n, i): int(np.ravel_multi_index(i, SHAPES[n])) for n, i in PLACES}
    return {(n, flat[n, i]): stored(shard(base, n), n, i) for n, i in PLACES}


@pytest.fixture
def patched(tmp_path) -> Path:
    base = write_llama(tmp_path / "base")
    manifest = write_manifest(tmp_path / "m.json", base, ROW, COLUMN, SLICE, WHOLE, SCALAR, ROUND)
    swsurgery.apply(manifest, output=tmp_path / "patched", check="off")
    return tmp_path / "patched"


def test_every_scalar_of_protected_regions_and_no_other(patched, tmp_path):
    made = [
        swsurgery.export(s, tmp_path / f"{n}", format="outliers") for n, s in enumerate((patched, tmp_path / "m.json"))
    ]
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()
    assert read(tmp_path / "0") == oracle(tmp_path / "base")
    assert {m.scalars for m in made} == {len(PLACES)}


def test_the_reader_of_the_page_restores_them_after_other_values_were_rounded(patched, tmp_path):
    swsurgery.export(patched, tmp_path / "o", format="outliers")
    names: dict = {}
    exec(compile(READER, "docs/patches.md", "exec"), names)
    zeros = {}
    for path in (tmp_path / "base").glob("*.safetensors"):
        zeros |= {name: weight * 0 for name, weight in load_file(path).items()}
    names["put_back"](zeros, tmp_path / "o")
    assert {(n, tuple(i)) for n, w in zeros.items() for i in w.nonzero().tolist()} == set(PLACES)


def test_regions_of_an_earlier_step_are_exported_too(patched, tmp_path):
    again = write_manifest(tmp_path / "n.json", patched, {"op": "zero", "layer": 0, "row": 1})
    swsurgery.apply(again, output=tmp_path / "twice", check="off")
    swsurgery.export(tmp_path / "twice", tmp_path / "o", format="outliers")
    assert read(tmp_path / "o") == oracle(tmp_path / "base")


def test_a_protected_region_that_changed_is_refused(patched, tmp_path):
    offset, _ = place(patched / SECOND, down(1), (2, 4))
    raw = bytearray((patched / SECOND).read_bytes())
    raw[offset] ^= 1
    (patched / SECOND).write_bytes(raw)
    with pytest.raises(CheckpointError, match="the stored region differs from its record"):
        swsurgery.export(patched, tmp_path / "o", format="outliers")
    assert not (tmp_path / "o").exists()
    raw[offset] ^= 1
    raw[place(patched / SECOND, down(1), (3, 4))[0]] ^= 1  # the twin: outside of the region
    (patched / SECOND).write_bytes(raw)
    assert swsurgery.export(patched, tmp_path / "o", format="outliers").scalars == len(PLACES)


def test_too_many_scalars_are_one_line(tmp_path, capsys):
    extra = {"model.extra.weight": tensor("BF16", 513, 512)}
    base = write_llama(tmp_path / "base", extra)
    manifest = write_manifest(tmp_path / "m.json", base, {"op": "protect", "tensors": "model.extra.weight"})
    assert main(["export", str(manifest), "--format", "outliers", "-o", str(tmp_path / "o")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "262656 scalars are protected, but an export has at most 262144" in line
    part = write_manifest(tmp_path / "p.json", base, {"op": "protect", "tensor": "model.extra.weight", "slice": ":512"})
    assert swsurgery.export(part, tmp_path / "o", format="outliers").scalars == 1 << 18


def test_codes_of_a_quantiser_are_refused(tmp_path):
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 4, "desc_act": False}}
    extra = {
        "model.layers.0.mlp.up_proj.qweight": tensor("I32", 1, 6),
        "model.layers.0.mlp.up_proj.qzeros": tensor("I32", 2, 1),
        "model.layers.0.mlp.up_proj.scales": tensor("F16", 2, 6),
        "model.layers.0.mlp.up_proj.g_idx": tensor("I32", 8),
    }
    base = write_llama(tmp_path / "base", extra, config)
    edit = {"op": "protect", "tensor": "model.layers.0.mlp.up_proj.qweight", "slice": "0"}
    with pytest.raises(PlanError, match="not a weight"):
        swsurgery.export(write_manifest(tmp_path / "m.json", base, edit), tmp_path / "o", format="outliers")

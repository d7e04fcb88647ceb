"""Edits of structures and whole tensors write exactly the bytes that an independent computation gives.

The oracle reads and writes with torch and the real safetensors library; it shares no code with the package.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import tree, write_manifest, write_sparse_shard

import swsurgery
from swsurgery.errors import PlanError, SwsurgeryError

torch = pytest.importorskip("torch")
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

HIDDEN, INNER, LAYERS, VOCABULARY = 6, 10, 2, 12
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
UNDO = "swsurgery-undo.safetensors"
LAYER = "model.layers.{}."
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def name(layer: int, part: str) -> str:
    return f"model.layers.{layer}.mlp.{part}_proj.weight"


def build(dtype) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(7)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    tensors = {"model.embed_tokens.weight": make(VOCABULARY, HIDDEN), "lm_head.weight": make(VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        tensors |= {
            name(layer, "gate"): make(INNER, HIDDEN),
            name(layer, "up"): make(INNER, HIDDEN),
            name(layer, "down"): make(HIDDEN, INNER),
            LAYER.format(layer) + "input_layernorm.weight": make(HIDDEN),
        }
    return tensors


def write_base(folder: Path, dtype=torch.bfloat16, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """Two shards written by the safetensors library, an index and config.json."""
    tensors = build(dtype) if tensors is None else tensors
    names = sorted(tensors)
    shards = {ONE: names[: len(names) // 2], TWO: names[len(names) // 2 :]}
    folder.mkdir()
    for shard, inside in shards.items():
        save_file({n: tensors[n] for n in inside}, folder / shard, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: shard for shard, inside in shards.items() for n in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
        "vocab_size": VOCABULARY, "num_attention_heads": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / ONE) | load_file(folder / TWO)


def check_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        ours, theirs = (t.contiguous().view(torch.uint8) for t in (found[key], tensor))
        assert torch.equal(ours, theirs), key


def apply(tmp_path: Path, *edits: dict, base: Path | None = None, output: str = "out", **options) -> swsurgery.Applied:
    base = base or tmp_path / "base"
    manifest = write_manifest(tmp_path / f"{output}.json", base, *edits)
    return swsurgery.apply(manifest, output=tmp_path / output, check="off", **options)


def row(t: dict) -> list[torch.Tensor]:
    return [t[name(1, "down")][2]]


def column(t: dict) -> list[torch.Tensor]:
    return [t[name(1, "down")][:, 3]]


def neuron(t: dict) -> list[torch.Tensor]:
    return [t[name(0, "gate")][4], t[name(0, "up")][4], t[name(0, "down")][:, 4]]


def part(t: dict) -> list[torch.Tensor]:
    return [t["lm_head.weight"][-3:, 1:4]]


def whole(t: dict) -> list[torch.Tensor]:
    return [t["lm_head.weight"]]


def glob(t: dict) -> list[torch.Tensor]:
    return [t[name(layer, kind)] for layer in range(LAYERS) for kind in ("down", "gate", "up")]


TARGETS = {
    "row": ({"layer": 1, "row": 2}, row),
    "column": ({"layer": 1, "col": 3}, column),
    "neuron": ({"layer": 0, "neuron": 4}, neuron),
    "slice": ({"tensor": "lm_head.weight", "slice": "-3:, 1:4"}, part),
    "tensor": ({"tensors": "lm_head.weight"}, whole),
    "glob": ({"tensors": "model.*mlp*"}, glob),
}


def zero(parts: list[torch.Tensor]) -> None:
    for tensor in parts:
        tensor.zero_()


def scale(parts: list[torch.Tensor]) -> None:
    for tensor in parts:
        tensor.copy_((tensor.double() * 1.75).to(tensor.dtype))


def store(parts: list[torch.Tensor]) -> None:
    for tensor in parts:
        tensor.fill_(0.375)


def clip(parts: list[torch.Tensor]) -> None:
    """The largest half of |w| becomes the largest |w| of the rest."""
    for tensor in parts:
        ordered = tensor.abs().flatten().sort().values
        limit = ordered[len(ordered) - len(ordered) // 2 - 1]
        tensor.copy_(tensor.clamp(-limit, limit))


def prune(parts: list[torch.Tensor]) -> None:
    everything = torch.cat([tensor.abs().flatten() for tensor in parts])
    limit = everything.sort(descending=True).values[3]
    assert (everything >= limit).sum() == 4, "the oracle needs distinct values"
    for tensor in parts:
        tensor[tensor.abs() >= limit] = 0


def quantise(parts: list[torch.Tensor]) -> None:
    for tensor in parts:
        wide = tensor.float() if tensor.dtype != torch.float32 else tensor.double()
        step = (tensor.double().abs().max() / 127).to(wide.dtype)
        tensor.copy_(((wide / step).round() * step + 0.0).to(tensor.dtype))


OPERATIONS = {
    "zero": ({"op": "zero"}, zero),
    "scale": ({"op": "scale", "factor": 1.75}, scale),
    "set": ({"op": "set", "value": 0.375}, store),
    "clip": ({"op": "clip", "fraction": 0.5}, clip),
    "prune_outliers": ({"op": "prune_outliers", "count": 4}, prune),
    "round": ({"op": "round", "bits": 8}, quantise),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("target", TARGETS)
def test_every_operation_on_every_target_writes_the_oracles_bytes(tmp_path, target, operation, dtype):
    base = write_base(tmp_path / "base", DTYPES[dtype])
    before = tree(base)
    wanted = read(base)
    (fields, select), (edit, compute) = TARGETS[target], OPERATIONS[operation]
    compute(select(wanted))
    applied = apply(tmp_path, {**edit, **fields})
    check_equal(read(tmp_path / "out"), wanted)
    assert tree(base) == before
    assert applied.record.registry_version == 2
    scalars = sum(tensor.numel() for tensor in select(wanted))
    assert sum(change.scalars for change in applied.record.changes) == scalars
    for file in (ONE, TWO):  # the header and everything outside the regions
        assert applied.record.files[file].base_sha256 == hashlib.sha256(before[file]).hexdigest()
        assert applied.record.files[file].sha256 == hashlib.sha256((tmp_path / "out" / file).read_bytes()).hexdigest()


def test_the_undo_file_contains_the_old_bytes_and_the_real_library_reads_it(tmp_path):
    base = write_base(tmp_path / "base")
    old = read(base)
    edits = ({"op": "zero", "layer": 0, "neuron": 4}, {"op": "prune_outliers", "tensors": "lm_head.weight", "count": 4})
    applied = apply(tmp_path, *edits)
    undo = load_file(tmp_path / "out" / UNDO)
    assert undo.keys() == {"edit.0.0.old", "edit.0.1.old", "edit.0.2.old", "edit.1.0.index", "edit.1.0.old"}
    assert torch.equal(undo["edit.0.0.old"], old[name(0, "gate")][4:5])
    assert torch.equal(undo["edit.0.2.old"], old[name(0, "down")][:, 4:5])
    indices = undo["edit.1.0.index"]
    assert indices.tolist() == sorted(old["lm_head.weight"].abs().flatten().sort(descending=True).indices[:4].tolist())
    assert torch.equal(undo["edit.1.0.old"], old["lm_head.weight"].flatten()[indices])
    data = (tmp_path / "out" / UNDO).read_bytes()
    assert applied.record.undo.sha256 == hashlib.sha256(data).hexdigest() and applied.record.undo.size == len(data)
    assert f"{applied.record.undo.sha256}  {UNDO}\n" in (tmp_path / "out" / "SHA256SUMS").read_text()
    with safe_open(tmp_path / "out" / UNDO, "pt") as opened:
        assert opened.metadata() == {"format": "swsurgery-undo"}


def test_digests_of_regions_are_those_of_their_bytes(tmp_path):
    base = write_base(tmp_path / "base")
    old = read(base)
    record = apply(
        tmp_path, {"op": "zero", "layer": 1, "col": 3}, {"op": "protect", "tensors": "lm_head.weight"}
    ).record
    [change], [protected] = record.changes, record.protected_regions
    column = old[name(1, "down")][:, 3].contiguous().view(torch.uint8).numpy().tobytes()
    assert change.base_sha256 == hashlib.sha256(column).hexdigest()
    assert change.sha256 == hashlib.sha256(bytes(len(column))).hexdigest()
    assert (change.bounds, change.scalars, change.changed) == ([[0, HIDDEN], [3, 4]], HIDDEN, HIDDEN)
    whole = old["lm_head.weight"].view(torch.uint8).numpy().tobytes()
    assert protected.sha256 == hashlib.sha256(whole).hexdigest()


def test_protected_scalars_and_regions_inside_a_rewrite_keep_their_bits(tmp_path):
    base = write_base(tmp_path / "base")
    wanted = read(base)
    matrix = wanted[name(1, "down")]
    old = matrix.clone()
    matrix.zero_()
    matrix[2, 3], matrix[4] = old[2, 3], old[4]
    apply(
        tmp_path,
        {"op": "zero", "tensors": name(1, "down")},
        {"op": "protect", "layer": 1, "row": 2, "col": 3},
        {"op": "protect", "layer": 1, "row": 4},
    )
    check_equal(read(tmp_path / "out"), wanted)


def test_restore_reads_the_bytes_of_another_checkpoint(tmp_path):
    base = write_base(tmp_path / "base")
    apply(tmp_path, {"op": "round", "tensors": "*", "bits": 2}, output="rough")
    wanted = read(tmp_path / "rough")
    old = read(base)
    wanted[name(1, "down")][2] = old[name(1, "down")][2]
    wanted["lm_head.weight"].copy_(old["lm_head.weight"])
    wanted[name(0, "down")][1, 1] = old[name(0, "down")][1, 1]
    for own in ("swsurgery.json", "manifest.yaml", "SHA256SUMS", UNDO):
        (tmp_path / "rough" / own).unlink()
    edits = (
        {"op": "restore", "layer": 1, "row": 2, "from": "base"},
        {"op": "restore", "tensors": "lm_head.weight", "from": str(base)},
        {"op": "restore", "layer": 0, "row": 1, "col": 1, "from": "base"},
    )
    apply(tmp_path, *edits, base=tmp_path / "rough")
    check_equal(read(tmp_path / "out"), wanted)


def test_clip_and_round_skip_vectors_and_say_so(tmp_path):
    base = write_base(tmp_path / "base")
    manifest = write_manifest(tmp_path / "m.json", base, {"op": "round", "tensors": "*", "bits": 4})
    plan = swsurgery.plan(manifest)
    assert plan.notes == (
        "edits[0]: round skips 2 one-dimensional tensors: model.layers.0.input_layernorm.weight, "
        "model.layers.1.input_layernorm.weight",
        "not computed in a dry run: round (apply refuses results that overflow, and a clip that removes everything)",
    )
    assert len(plan.rewrites) == len(read(base)) - 2
    names = f"lm_head.weight, model.embed_tokens.weight, {name(0, 'down')} and 5 more"
    assert plan.to_lines() == [f"round bits=4 *: 504 scalars (1.0 kB) in 8 tensors: {names}"]


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_eight_bit_floats_are_rewritten(tmp_path, dtype):
    kind = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}[dtype]
    base = write_base(tmp_path / "base", kind)
    wanted = read(base)
    for tensor in whole(wanted):
        tensor.copy_((tensor.double() * 0.5).to(kind))
    row(wanted)[0].view(torch.uint8).zero_()
    apply(tmp_path, {"op": "scale", "tensors": "lm_head.weight", "factor": 0.5}, {"op": "zero", "layer": 1, "row": 2})
    check_equal(read(tmp_path / "out"), wanted)


def test_bits_are_flipped(tmp_path):
    base = write_base(tmp_path / "base")
    wanted = read(base)
    wanted[name(0, "up")].view(torch.int16)[4, 5] ^= (1 << 14) | 1
    apply(tmp_path, {"op": "flip", "tensor": name(0, "up"), "index": [4, 5], "bit": [14, 0]})
    check_equal(read(tmp_path / "out"), wanted)


EVERYTHING = (
    {"op": "round", "tensors": "model.layers.*", "bits": 4, "block": [4, 3]},
    {"op": "prune_outliers", "tensors": "*embed*", "fraction": 0.1},
    {"op": "scale", "tensor": "lm_head.weight", "slice": "2:9, 1:", "factor": 3},
    {"op": "zero", "tensor": "lm_head.weight", "index": [0, 0]},
    {"op": "protect", "layer": 1, "row": 2, "col": 3},
)


def test_the_bytes_do_not_depend_on_threads_and_block_sizes(tmp_path, monkeypatch):
    write_base(tmp_path / "base")
    results = []
    for number, (threads, band, chunk) in enumerate([("4", 4 << 20, 4 << 20), ("1", 1, 64), ("2", 50, 4096)]):
        monkeypatch.setenv("SWSURGERY_THREADS", threads)
        for module in ("rewriting.rows.BAND_SIZE", "rewriting.segments.BAND_SIZE"):
            monkeypatch.setattr(f"swsurgery.{module}", band)
        monkeypatch.setattr("swsurgery.rewriting.segments.list_segments.__defaults__", (band,))
        monkeypatch.setattr("swsurgery.rewriting.stream.CHUNK", chunk)
        apply(tmp_path, *EVERYTHING, output=f"out{number}", link="copy")
        files = tree(tmp_path / f"out{number}")
        results.append(files)
    assert results[0] == results[1] == results[2]


def test_the_old_bytes_are_left_out_above_the_limit(tmp_path):
    write_base(tmp_path / "base")
    edit = {"op": "zero", "tensors": "lm_head.weight"}
    size = VOCABULARY * HIDDEN * 2
    assert apply(tmp_path, edit, undo_limit=size).record.undo is not None
    record = apply(tmp_path, edit, output="without", undo_limit=size - 1).record
    assert record.undo is None and record.changes[0].undo is None
    assert not (tmp_path / "without" / UNDO).exists()
    sparse = {"op": "prune_outliers", "tensors": "lm_head.weight", "count": 4}
    assert apply(tmp_path, sparse, output="sparse", undo_limit=4 * 10).record.undo is not None
    assert apply(tmp_path, sparse, output="sparser", undo_limit=4 * 10 - 1).record.undo is None


NORM = "model.layers.0.input_layernorm.weight"
BAD = {
    "a glob without a match": ([{"op": "zero", "tensors": "model.decoder.*"}], "no tensor matches: model.decoder.*"),
    "a name that is misspelt": ([{"op": "zero", "tensors": "lm_head.weigth"}], "did you mean lm_head.weight?"),
    "a slice out of range": (
        [{"op": "zero", "tensor": "lm_head.weight", "slice": "3:13"}],
        "13 is out of range for an axis of 12: lm_head.weight[3:13]",
    ),
    "an index out of range": (
        [{"op": "zero", "tensor": "lm_head.weight", "slice": "-13"}],
        "-13 is out of range for an axis of 12",
    ),
    "an empty slice": ([{"op": "zero", "tensor": "lm_head.weight", "slice": "5:5"}], "the slice selects nothing"),
    "too many axes": ([{"op": "zero", "tensor": "lm_head.weight", "slice": "1, 2, 3"}], "the slice has 3 axes"),
    "an expert of a dense layer": ([{"op": "zero", "layer": 0, "expert": 1}], "layer 0 is dense"),
    "a row beyond the tensor": ([{"op": "zero", "layer": 0, "row": 6}], "row 6 is out of range 0..5"),
    "two operations on one scalar": (
        [{"op": "zero", "layer": 0, "row": 2}, {"op": "scale", "layer": 0, "col": 3, "factor": 2}],
        "edits[1]: model.layers.0.mlp.down_proj.weight[2, 3] has two operations (the other is edits[0])",
    ),
    "a scalar inside a region": (
        [{"op": "zero", "layer": 0, "row": 2, "col": 3}, {"op": "zero", "tensors": "*down*"}],
        "model.layers.0.mlp.down_proj.weight[2, 3] has two operations",
    ),
    "a scalar inside a protected region": (
        [{"op": "zero", "layer": 0, "row": 2, "col": 3}, {"op": "protect", "layer": 0, "row": 2}],
        "has two operations",
    ),
    "a region without an unprotected scalar": (
        [{"op": "zero", "layer": 0, "row": 2}, {"op": "protect", "tensors": "*down*"}],
        "every scalar is protected",
    ),
    "a clip of a vector": ([{"op": "clip", "z": 3, "tensors": NORM}], "; the edit names no other tensor"),
    "a bit outside the dtype": (
        [{"op": "flip", "layer": 0, "row": 1, "col": 1, "bit": 16}],
        "BF16 has no bit 16",
    ),
    "an overflow": ([{"op": "scale", "tensors": "lm_head.weight", "factor": 1e39}], "cannot scale"),
    "a value that the dtype cannot represent": (
        [{"op": "set", "tensors": "lm_head.weight", "value": 1e39}],
        "overflows BF16",
    ),
    "a restore from nothing": ([{"op": "restore", "layer": 0, "row": 1, "from": "nowhere"}], "nowhere"),
    "a restore of a value that nobody published": (
        [{"op": "restore", "layer": 0, "row": 1, "col": 1}],
        "no known super weights",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_reported_and_nothing_is_written(tmp_path, case):
    base = write_base(tmp_path / "base")
    before = tree(tmp_path)
    edits, message = BAD[case]
    with pytest.raises(SwsurgeryError) as error:
        apply(tmp_path, *edits)
    assert message in str(error.value) and len(error.value.faults) == 1
    assert error.value.exit_code == 2
    (tmp_path / "out.json").unlink()
    assert tree(tmp_path) == before
    assert base.exists()


def test_quantised_matches_are_refused_with_the_first_and_their_number(tmp_path):
    tensors = {
        "model.layers.0.mlp.down_proj.weight": torch.zeros(4, 4, dtype=torch.int8),
        "model.layers.0.mlp.down_proj.weight_scale": torch.ones(4, 1),
        "lm_head.weight": torch.ones(4, 4),
    }
    write_base(tmp_path / "base", tensors=tensors)
    with pytest.raises(PlanError, match=r"edits\[0\]: 2 of 3 tensors cannot be edited; the first is model\.layers\.0"):
        apply(tmp_path, {"op": "zero", "tensors": "*"})


def test_codes_and_scales_are_flipped_only_if_raw(tmp_path):
    scale = "model.layers.0.mlp.down_proj.weight_scale"
    tensors = {
        "model.layers.0.mlp.down_proj.weight": torch.zeros(4, 4, dtype=torch.int8),
        scale: torch.ones(4, 1),
        "lm_head.weight": torch.ones(4, 4),
    }
    write_base(tmp_path / "base", tensors=tensors)
    edit = {"op": "flip", "tensor": scale, "index": [1, 0], "bit": 31}
    with pytest.raises(PlanError, match="set raw: true"):
        apply(tmp_path, edit)
    apply(tmp_path, {**edit, "raw": True})
    assert read(tmp_path / "out")[scale][1, 0] == -1


def test_thousands_of_rows_are_planned_in_seconds(tmp_path):
    """Conflicts and segments must not take quadratic time."""
    tensors = {"lm_head.weight": torch.ones(4000, 8)}
    tensors["model.norm.weight"] = torch.ones(8)
    write_base(tmp_path / "base", tensors=tensors)
    edits = [{"op": "zero", "tensor": "lm_head.weight", "slice": str(row)} for row in range(0, 4000, 2)]
    apply(tmp_path, *edits)
    assert read(tmp_path / "out")["lm_head.weight"].sum(1).tolist() == [0, 8] * 2000


def test_a_run_that_was_interrupted_is_continued_with_the_same_bytes(tmp_path, monkeypatch):
    write_base(tmp_path / "base")
    apply(tmp_path, *EVERYTHING)
    wanted = tree(tmp_path / "out")
    from swsurgery.editing import copy
    from swsurgery.errors import Interrupted

    real = copy._Copier.copy

    def stop_at_second(self, file):
        if file.name == "config.json":
            raise Interrupted("stopped")
        return real(self, file)

    monkeypatch.setenv("SWSURGERY_THREADS", "1")
    monkeypatch.setattr(copy._Copier, "copy", stop_at_second)
    with pytest.raises(Interrupted):
        apply(tmp_path, *EVERYTHING, output="again")
    assert (tmp_path / ".again.partial" / ONE).exists()
    monkeypatch.undo()
    applied = apply(tmp_path, *EVERYTHING, output="again")
    assert {f.name: f.how for f in applied.copied.files}[ONE] == "kept"
    assert tree(tmp_path / "again") == wanted
    assert os.listdir(tmp_path / "again").count(UNDO) == 1


def test_a_plan_names_every_region_and_its_size(tmp_path):
    base = write_base(tmp_path / "base")
    manifest = write_manifest(tmp_path / "m.json", base, {"op": "zero", "layer": 0, "neuron": 4})
    plan = swsurgery.plan(manifest)
    names = ", ".join(name(0, part) for part in ("gate", "up", "down"))
    assert plan.to_lines() == [f"zero L0 neuron 4: 18 scalars (36 B) in 3 tensors: {names}"]
    document = plan.to_json()
    assert [(r["tensor"], r["bounds"], r["bytes"]) for r in document["rewrites"]] == [
        (name(0, "gate"), [[4, 5], [0, HIDDEN]], 2 * HIDDEN),
        (name(0, "up"), [[4, 5], [0, HIDDEN]], 2 * HIDDEN),
        (name(0, "down"), [[0, HIDDEN], [4, 5]], 2 * HIDDEN),
    ]


def test_the_id_of_a_published_row_names_the_whole_row(tmp_path):
    tensors = {"model.layers.11.mlp.down_proj.weight": torch.ones(576, 4), "model.norm.weight": torch.ones(4)}
    base = write_base(tmp_path / "base", tensors=tensors)
    config = json.loads((base / "config.json").read_text()) | {"num_hidden_layers": 30, "hidden_size": 576}
    (base / "config.json").write_text(json.dumps(config))
    manifest = write_manifest(
        tmp_path / "m.json", {"path": str(base), "model": "smollm2-135m"}, {"op": "zero", "known": "L11.507.*"}
    )
    swsurgery.apply(manifest, output=tmp_path / "out", check="off")
    wanted = read(base)
    wanted["model.layers.11.mlp.down_proj.weight"][507] = 0
    check_equal(read(tmp_path / "out"), wanted)


MEASURE = """
import re, sys
import swsurgery
swsurgery.apply(sys.argv[1], output=sys.argv[2], check="off")
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""
"""Prints the maximum memory in kilobytes. `ru_maxrss` would begin at what the parent had when it forked."""


@pytest.mark.parametrize(
    "edit", [{"op": "round", "bits": 4, "block": [64, 64]}, {"op": "clip", "z": 3}], ids=lambda e: e["op"]
)
def test_a_tensor_of_a_gigabyte_needs_at_most_300_megabytes(tmp_path, edit):
    (tmp_path / "base").mkdir()
    write_sparse_shard(tmp_path / "base" / "model.safetensors", "lm_head.weight", "BF16", 32768, 16384)
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama"}')
    manifest = write_manifest(tmp_path / "m.json", tmp_path / "base", {**edit, "tensors": "lm*"})
    command = [sys.executable, "-c", MEASURE, str(manifest), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 300_000, "kilobytes"

"""apply --in-place and revert without -o for rows, columns, neurons, experts, slices and whole tensors.

The oracle is the copy that `apply -o` writes of the same base by the same manifest, which test_regions.py compares with
torch, and the bytes of the base.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoints import sha256, tree, write_manifest, write_shard
from killed import killed, run

import swsurgery
from swsurgery.checkpoint import journal_format
from swsurgery.cli import main
from swsurgery.editing import changed_bytes, in_place, in_place_regions
from swsurgery.editing.check_options import CheckOptions
from swsurgery.errors import CheckpointError, PlanError
from swsurgery.storage.names import JOURNAL, OWN_FILES, UNDO_NAME, WORKING_FILES

HIDDEN, INNER, EXPERTS, VOCABULARY = 6, 10, 4, 12
SHARD, OTHER = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
HEAD, NORM = "lm_head.weight", "model.layers.0.input_layernorm.weight"


def expert(number: int, part: str) -> str:
    return f"model.layers.1.block_sparse_moe.experts.{number}.w{part}.weight"


def bf16(*shape: int, seed: int) -> tuple[str, tuple[int, ...], bytes]:
    """Random BF16 values as stored bytes."""
    values = np.random.default_rng(seed).normal(0, 1, int(np.prod(shape)))
    return "BF16", shape, (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()


def write_mixtral(folder: Path) -> Path:
    """A sparse layer of four experts and what the edits name besides, in two shards."""
    first = {expert(e, p): bf16(*shape, seed=10 * e + int(p)) for e in range(EXPERTS) for p, shape in PARTS.items()}
    shards = {SHARD: first, OTHER: {HEAD: bf16(VOCABULARY, HIDDEN, seed=7), NORM: bf16(HIDDEN, seed=8)}}
    folder.mkdir()
    for name, tensors in shards.items():
        write_shard(folder / name, tensors, padding=1)
    index = {"metadata": {}, "weight_map": {n: shard for shard, tensors in shards.items() for n in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "model_type": "mixtral", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2,
        "vocab_size": VOCABULARY, "num_attention_heads": 2, "num_local_experts": EXPERTS, "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


PARTS = {"1": (INNER, HIDDEN), "2": (HIDDEN, INNER), "3": (INNER, HIDDEN)}
ROW = {"op": "zero", "layer": 1, "expert": 1, "row": 2}
SCALAR = {"op": "set", "tensor": HEAD, "index": [0, 0], "value": 2.0}
EDITS = {
    "row": [ROW],
    "column": [{"op": "scale", "factor": -1.5, "layer": 1, "expert": 0, "col": 3}],
    "neuron": [{"op": "zero", "layer": 1, "expert": 2, "neuron": 4}],
    "expert": [{"op": "zero", "layer": 1, "expert": 3}],
    "slice": [{"op": "set", "value": 0.375, "tensor": HEAD, "slice": "-3:, 1:4"}],
    "round": [{"op": "round", "bits": 4, "tensors": HEAD}],
    "clip": [{"op": "clip", "fraction": 0.25, "tensors": HEAD}],
    "prune": [{"op": "prune_outliers", "count": 3, "tensors": "model.*w2*"}],
    "nothing to change": [{"op": "scale", "factor": 1.0, "layer": 1, "expert": 1, "row": 2}],
    "kept scalars and a protected tensor": [
        {"op": "zero", "tensors": expert(1, "2")},
        {"op": "protect", "layer": 1, "expert": 1, "row": 0, "col": 0},
        {"op": "protect", "layer": 1, "expert": 1, "row": 4},
        {"op": "protect", "tensors": NORM},
        SCALAR,
    ],
    "a scalar beside a column": [{"op": "zero", "tensor": HEAD, "slice": ":, 1"}, SCALAR],
    "only a protected region": [{"op": "protect", "tensors": HEAD}],
}


@pytest.fixture
def base(tmp_path) -> Path:
    return write_mixtral(tmp_path / "base")


def read_tensors(shard: Path) -> dict[str, bytes]:
    """The stored bytes of each tensor."""
    raw = shard.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    places = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: data[begin:end] for name, (begin, end) in places.items()}


def pinned(path: Path, base: Path, *edits: dict) -> Path:
    return write_manifest(path, {"path": str(base), "sha256": {n: sha256(base / n) for n in (SHARD, OTHER)}}, *edits)


def edit(manifest: Path, **more: object) -> swsurgery.Applied:
    return swsurgery.apply(manifest, in_place=True, check="off", **more)


def state(folder: Path) -> tuple[dict[str, bytes], dict[str, int]]:
    """All bytes, and all modification times: that of the folder moves when an entry is made or removed in it."""
    return tree(folder), {str(p): os.stat(p).st_mtime_ns for p in (folder, *folder.rglob("*"))}


@pytest.mark.parametrize("name", EDITS)
def test_the_bytes_are_those_of_a_copy_and_revert_gives_the_base_back(base, tmp_path, name):
    original = tree(base)
    manifest = pinned(tmp_path / "m.json", base, *EDITS[name])
    swsurgery.apply(manifest, output=tmp_path / "copy", check="off", link="copy")
    applied = edit(manifest)
    assert tree(base) == tree(tmp_path / "copy"), "the undo file and the record too"
    assert applied.record.registry_version == 2 and swsurgery.verify(base).ok
    assert not {*WORKING_FILES} & {*os.listdir(base)}
    swsurgery.revert(base)
    assert tree(base) == original
    swsurgery.revert(tmp_path / "copy")
    assert tree(tmp_path / "copy") == original


@pytest.mark.parametrize("name", EDITS)
def test_the_same_command_again_writes_nothing(base, tmp_path, name):
    manifest = pinned(tmp_path / "m.json", base, *EDITS[name])
    edit(manifest)
    before = state(base)
    again = edit(manifest)
    assert not again.written and again.notes == ("the manifest was already applied; nothing was written",)
    assert state(base) == before


def test_a_dry_run_in_place_refuses_what_the_edit_would_refuse(base, tmp_path, monkeypatch, capsys):
    manifest = pinned(tmp_path / "m.json", base, ROW, SCALAR)
    before = state(base)
    assert swsurgery.plan(manifest, in_place=True).splices == swsurgery.plan(manifest).splices

    def refuse(*words: str) -> str:
        refused = []
        for options in (["--dry-run"], []):
            command = ["apply", str(manifest), "--in-place", "--check", "off", "--quiet", *options, *words]
            assert main(command) == 2
            refused.append(capsys.readouterr().err)
        assert refused[0] == refused[1] and state(base) == before
        return refused[0]

    assert main(["apply", str(manifest), "--in-place", "--dry-run"]) == 0 and state(base) == before
    capsys.readouterr()
    assert "undo" in refuse("--undo-limit", "5")
    with monkeypatch.context() as patch:
        patch.setattr(changed_bytes, "MAX_CHANGED", 11)
        assert "the edit changes more than 11 B, too many to do in place" in refuse()
    os.link(base / SHARD, tmp_path / "link")
    before = state(base)
    assert "hard links" in refuse()
    (tmp_path / "link").unlink()
    manifest = write_manifest(tmp_path / "m.json", {"path": str(base)}, ROW)
    before = state(base)
    assert "no sha256 of these files is known" in refuse()


def test_a_tensor_that_is_protected_is_left_out_of_a_glob(base, tmp_path):
    kept = expert(1, "2")
    edits = [{"op": "zero", "tensors": "model.*w2*"}, {"op": "protect", "tensors": kept}]
    for name, order in (("one", edits), ("other", edits[::-1])):
        manifest = pinned(tmp_path / f"{name}.json", base, *order)
        applied = swsurgery.apply(manifest, output=tmp_path / name, check="off")
        assert applied.notes == (f"edits[{order.index(edits[0])}]: skips 1 region, which is protected, in {kept}",)
        new, old = read_tensors(tmp_path / name / SHARD), read_tensors(base / SHARD)
        zeroed = {tensor for tensor in old if tensor.endswith("w2.weight")} - {kept}
        assert zeroed and new == old | {tensor: bytes(len(old[tensor])) for tensor in zeroed}
        assert swsurgery.verify(tmp_path / name).ok and swsurgery.verify(tmp_path / name, manifest=manifest).ok
        swsurgery.revert(tmp_path / name)
        assert tree(tmp_path / name) == tree(base)


def test_a_glob_of_protected_tensors_only_is_refused(base, tmp_path, monkeypatch):
    monkeypatch.setattr("swsurgery.editing.plan_regions.MAX_KEPT", 5)
    edits = [{"op": "zero", "tensors": "model.*w2*"}, {"op": "protect", "tensors": "model.*"}]
    with pytest.raises(PlanError, match=r"every scalar is protected: .*name only the other tensors") as caught:
        swsurgery.plan(pinned(tmp_path / "m.json", base, *edits))
    assert len(caught.value.faults) == 1


def test_steps_are_taken_back_one_by_one(base, tmp_path):
    original = tree(base)
    edit(pinned(tmp_path / "one.json", base, *EDITS["row"], *EDITS["clip"]))
    once = tree(base)
    edit(write_manifest(tmp_path / "two.json", base, *EDITS["neuron"]))
    twice = tree(base)
    assert {UNDO_NAME, "swsurgery-undo-2.safetensors"} < twice.keys() and twice[UNDO_NAME] == once[UNDO_NAME]
    edit(write_manifest(tmp_path / "three.json", base, {"op": "zero", "layer": 1, "expert": 0, "row": 1, "col": 1}))
    assert swsurgery.verify(base).ok
    for wanted in (twice, once, original):
        swsurgery.revert(base)
        assert tree(base) == wanted


def test_only_changed_bytes_are_written(base, tmp_path, monkeypatch):
    """Twice, the old and the new ones; a short gap of unchanged bytes is written too."""
    written: list[int] = []
    real = in_place.filesystem.write_at

    def write_at(fd: int, data: bytes, offset: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").endswith(".safetensors"):
            written.append(len(data))
        real(fd, data, offset)

    monkeypatch.setattr(in_place.filesystem, "write_at", write_at)
    edit(pinned(tmp_path / "m.json", base, *EDITS["column"]))
    assert len(written) == 2 * HIDDEN and max(written) == 2, "one scalar a row, as the rows are longer than a gap"


def test_the_forward_check_compares_with_the_old_bytes(tmp_path):
    """There is no base beside it: the check reads the old bytes from memory."""
    pytest.importorskip("torch")
    from tiny_checkpoint import DOWN, TEXT, write_pair

    base = write_pair(tmp_path).base
    pins = {"path": str(base), "sha256": {"model.safetensors": sha256(base / "model.safetensors")}}
    edits = [
        {"op": "scale", "factor": 8, "tensor": DOWN, "slice": "3"},
        {"op": "zero", "tensor": DOWN, "index": [4, 4]},
    ]
    manifest = write_manifest(tmp_path / "m.json", pins, *edits)
    options = CheckOptions("forward", device="cpu", text=TEXT * 3)
    copied = swsurgery.apply(manifest, output=tmp_path / "copy", check=options).record.check
    placed = swsurgery.apply(manifest, in_place=True, check=options).record.check
    assert placed == copied and placed["perplexity_ratio"] != 1


# --- refusals


def refuse(base: Path, call, *words: str) -> None:
    """The call is refused in one line with these words, and nothing is written."""
    before = state(base)
    with pytest.raises((PlanError, CheckpointError)) as error:
        call()
    assert len(error.value.faults) == 1
    assert all(word in str(error.value) for word in words), error.value
    assert state(base) == before


@pytest.mark.parametrize(("limit", "value"), [("MAX_CHANGED", 19), ("MAX_PLACES", 5)])
def test_too_many_changed_bytes_are_refused(base, tmp_path, monkeypatch, limit, value):
    """The row has 20 bytes in one run, and the column six runs of 2 bytes."""
    manifest = pinned(tmp_path / "m.json", base, *EDITS["row" if limit == "MAX_CHANGED" else "column"])
    copy = tmp_path / "copy"
    swsurgery.apply(manifest, output=copy, check="off", link="copy")
    monkeypatch.setattr(changed_bytes, limit, value)
    refuse(base, lambda: edit(manifest), f"changes more than {value} ", "apply with -o")
    refuse(copy, lambda: swsurgery.revert(copy), f"changes more than {value} ", "revert with -o")
    monkeypatch.setattr(changed_bytes, limit, value + 1)
    edit(manifest)
    assert tree(base) == tree(copy)


def test_the_command_refuses_in_one_line(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(changed_bytes, "MAX_CHANGED", 19)
    before = state(base)
    assert main(["apply", str(pinned(tmp_path / "m.json", base, ROW)), "--in-place", "--check", "off"]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1) and "apply with -o" in err
    assert state(base) == before


@pytest.mark.parametrize("name", ["row", "clip"])
def test_old_bytes_beyond_the_undo_limit_are_refused(base, tmp_path, monkeypatch, name):
    manifest = pinned(tmp_path / "m.json", base, *EDITS[name])
    refuse(base, lambda: edit(manifest, undo_limit=8), "exceed 8 B,", "could not be undone", "apply with -o")
    monkeypatch.setattr(in_place_regions, "MAX_UNDO", 9)
    refuse(base, lambda: edit(manifest), "exceed 9 B,")


def test_a_copy_without_old_bytes_is_not_reverted_in_place(base, tmp_path):
    manifest = pinned(tmp_path / "m.json", base, ROW)
    copy = tmp_path / "copy"
    swsurgery.apply(manifest, output=copy, check="off", undo_limit=0)
    refuse(copy, lambda: swsurgery.revert(copy), "the old bytes were not stored")
    refuse(copy, lambda: edit(manifest, base=copy), "the manifest was already applied, but without the old bytes")


def test_an_undo_file_that_is_too_large_or_changed_or_missing_is_refused(base, tmp_path, monkeypatch):
    manifest = pinned(tmp_path / "m.json", base, ROW)
    edit(manifest)
    with monkeypatch.context() as patch:
        patch.setattr(in_place, "MAX_HEADER", 0)
        patch.setattr(in_place, "MAX_UNDO", 10)
        refuse(base, lambda: swsurgery.revert(base), "too much to revert in place", "revert with -o")
    raw = (base / UNDO_NAME).read_bytes()
    (base / UNDO_NAME).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    refuse(base, lambda: swsurgery.revert(base), "the undo file was changed")
    refuse(base, lambda: edit(manifest), "the undo file was changed")
    (base / UNDO_NAME).unlink()
    refuse(base, lambda: swsurgery.revert(base), "the undo file is missing")


def test_a_file_with_the_name_of_the_undo_file_is_not_overwritten(base, tmp_path):
    edit(pinned(tmp_path / "one.json", base, SCALAR))
    (base / "swsurgery-undo-2.safetensors").write_bytes(b"mine")
    manifest = write_manifest(tmp_path / "two.json", base, {"op": "zero", "tensors": HEAD})
    refuse(base, lambda: edit(manifest), "swsurgery-undo-2.safetensors: the base already has a file with this name")
    with pytest.raises(PlanError, match="swsurgery-undo-2.safetensors: the base already has a file with this name"):
        swsurgery.apply(manifest, output=tmp_path / "out", check="off")


def test_an_unknown_digest_is_refused_with_what_to_add(base, tmp_path):
    manifest = write_manifest(tmp_path / "m.json", base, ROW)
    refuse(base, lambda: edit(manifest), f'add base.sha256: {{"{SHARD}": "{sha256(base / SHARD)}"}}')


def test_a_protected_tensor_in_another_file_must_match_its_pin(base, tmp_path):
    manifest = pinned(tmp_path / "m.json", base, ROW, {"op": "protect", "tensors": HEAD})
    with (base / OTHER).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    refuse(base, lambda: edit(manifest), "but the manifest says")


FORGED = {
    "another region": (lambda d: d["changes"][0].update(bounds=[[3, 4], [0, INNER]]), "has no change of"),
    "another operation": (lambda d: d["changes"][0].update(op="prune_outliers"), "the record has prune_outliers"),
    "another result": (lambda d: d["changes"][0].update(sha256="0" * 64), "does not have the recorded digests"),
    "nothing protected": (lambda d: d.update(protected_regions=[]), "does not protect"),
    "other protected bytes": (lambda d: d["protected_regions"][0].update(sha256="0" * 64), "protected region was"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_record_is_not_believed(base, tmp_path, name):
    manifest = pinned(tmp_path / "m.json", base, ROW, {"op": "protect", "tensors": HEAD})
    edit(manifest)
    change, says = FORGED[name]
    document = json.loads((base / "swsurgery.json").read_text())
    change(document)
    (base / "swsurgery.json").write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
    refuse(base, lambda: edit(manifest), "the record says that this manifest was applied; however, ", says)


# --- interruptions


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("edit_call", "revert_call", "number"),
    [("rename_new", "rename_new", 1), ("write_at", "write_at", 5), ("replace_file", "remove_file", 2)],
)
def test_a_killed_edit_is_undone_and_so_is_a_killed_reversion(base, tmp_path, edit_call, revert_call, number, after):
    """tests/faults plays all steps; here, real processes are killed."""
    manifest = pinned(tmp_path / "m.json", base, *EDITS["row"], *EDITS["clip"])
    original = tree(base)
    arguments = ("apply", manifest, "--in-place", "--check", "off")
    killed(f"storage.filesystem.{edit_call}", *arguments, number=number, after=after)
    assert run("inspect", base).returncode == 0
    assert tree(base) == original
    assert run(*arguments).returncode == 0
    patched = tree(base)
    assert UNDO_NAME in patched
    killed(f"storage.filesystem.{revert_call}", "revert", base, number=number, after=after)
    assert run("inspect", base).returncode == 0
    assert tree(base) == patched
    assert run("revert", base).returncode == 0
    assert tree(base) == original


# --- the journal


def cut_off(base: Path, tmp_path: Path, monkeypatch) -> bytes:
    """Leave an edit that a process began, and return its journal."""
    manifest = pinned(tmp_path / "m.json", base, ROW)

    def stop(*arguments: object) -> None:
        shutil.copytree(base, tmp_path / "left")
        raise CheckpointError("stop")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError):
        patch.setattr(in_place, "run_check", stop)
        edit(manifest)
    return (tmp_path / "left" / JOURNAL).read_bytes()


def seal(body: bytes) -> bytes:
    return body + hashlib.sha256(body).hexdigest().encode() + b"\n"


def test_the_journal_of_a_region_is_version_3_and_has_its_bytes(base, tmp_path, monkeypatch):
    raw = cut_off(base, tmp_path, monkeypatch)
    line, _, rest = raw[:-65].partition(b"\n")
    head = json.loads(line)
    assert head["version"] == 3 and head["own"] == dict.fromkeys((*OWN_FILES, UNDO_NAME))
    [(name, file)] = head["files"].items()
    assert name == SHARD and rest[sum(file["sizes"]) :] == bytes(sum(file["sizes"])), "the new bytes are zeros"
    at = file["offsets"][0]
    assert rest[: file["sizes"][0]] == (base / SHARD).read_bytes()[at : at + file["sizes"][0]]


BROKEN = {
    "no undo file": lambda h: h["own"].pop(OWN_FILES[0]),
    "two undo files": lambda h: h["own"].update({"swsurgery-undo-2.safetensors": None}),
    "a shard as own file": lambda h: h["own"].update({SHARD: None}),
    "a path": lambda h: h["own"].update({"../x": None}),
    "made of another file": lambda h: h.update(made={"../x": None}),
    "a size too many": lambda h: h["files"][SHARD]["sizes"].append(1),
    "a longer place": lambda h: h["files"][SHARD]["sizes"].__setitem__(0, 1 << 30),
    "an own size": lambda h: h["own"].update({UNDO_NAME: 5}),
    "version 3.0": lambda h: h.update(version=3.0),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_invalid_journal_is_refused(base, tmp_path, monkeypatch, name):
    raw = cut_off(base, tmp_path, monkeypatch)
    line, _, rest = raw[:-65].partition(b"\n")
    head = json.loads(line)
    BROKEN[name](head)
    (base / JOURNAL).write_bytes(seal(json.dumps(head).encode() + b"\n" + rest))
    with pytest.raises(CheckpointError):
        journal_format.parse_journal((base / JOURNAL).read_bytes(), base / JOURNAL)
    refuse(base, lambda: swsurgery.revert(base), "journal")


def test_what_another_program_wrote_into_a_region_is_not_overwritten(base, tmp_path, monkeypatch):
    raw = cut_off(base, tmp_path, monkeypatch)
    (base / JOURNAL).write_bytes(raw)
    at = json.loads(raw[:-65].partition(b"\n")[0])["files"][SHARD]["offsets"][0]
    data = bytearray((base / SHARD).read_bytes())
    data[at + 1] ^= 0x5A
    (base / SHARD).write_bytes(data)
    refuse(base, lambda: swsurgery.inspect(base), "another program has written", f"at byte {at}")

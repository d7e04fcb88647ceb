"""verify compares the manifest beside the record with what the record says was done."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import FIRST as FIRST_OF_THREE
from checkpoints import down, place, write_llama, write_manifest, write_sparse_shard
from patched import DOWN, EDITED, FIRST, MANIFEST, SCALED, SECOND, apply_text, write_base

import swsurgery
from swsurgery import known
from swsurgery.checkpoint.opening import read_checkpoint
from swsurgery.checkpoint.record import read_record
from swsurgery.cli import main
from swsurgery.errors import LookupFailed
from swsurgery.sharing import export
from swsurgery.storage.folder import Folder
from swsurgery.verifying.against_manifest import find_own_differences
from swsurgery.verifying.findings import Finding

RECORD, OWN_MANIFEST, SUMS = "swsurgery.json", "manifest.yaml", "SHA256SUMS"
QWEN = "Qwen/Qwen3-1.7B"


@pytest.fixture
def patched(tmp_path) -> Path:
    write_base(tmp_path / "base")
    return apply_text(tmp_path, MANIFEST, "patched")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def forge(root: Path, manifest: str | None = None, change: Any = None) -> None:
    """Write another manifest and another record, and make every digest of swsurgery's own files agree."""
    raw = (root / OWN_MANIFEST).read_bytes() if manifest is None else manifest.encode()
    document = json.loads((root / RECORD).read_text())
    document["manifest_sha256"] = sha256(raw)
    if change is not None:
        change(document)
    record = (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()
    sums = {name: entry["sha256"] for name, entry in document["files"].items() if entry["sha256"]}
    sums |= {RECORD: sha256(record), OWN_MANIFEST: sha256(raw)}
    (root / OWN_MANIFEST).write_bytes(raw)
    (root / RECORD).write_bytes(record)
    (root / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))


def findings(root: Path) -> tuple[Finding, ...]:
    return swsurgery.verify(root).findings


def test_the_twin_a_forgery_that_changes_nothing_is_fine(patched):
    forge(patched, MANIFEST.replace("edits:", "# a remark\nedits:"))
    assert findings(patched) == ()


@pytest.mark.parametrize(
    ("old", "new", "index", "said"),
    [
        ("factor: 2.0", "factor: 4.0", SCALED, "scale was requested: the record has the factor 2.0, not 4.0"),
        ("op: zero, ", "op: set, value: 1.0, ", EDITED, "set was requested: the record has zero"),
        ("op: zero, ", "op: protect, ", EDITED, "protect was requested: the record has zero"),
        ("op: protect, ", "op: zero, ", (0, 4), "zero was requested: the record has protect"),
        ("index: [0, 4]}", "index: [0, 4], expect: '0x0000'}", (0, 4), "the base does not match: expected bits 0x0000"),
        ("index: [1, 2]}", "index: [1, 2], expect: 77.0}", EDITED, "the base does not match: expected 77"),
        (
            f"  - {{op: zero, tensor: {DOWN}, index: [1, 2]}}\n",
            "",
            EDITED,
            "the record has zero, but the manifest does not",
        ),
        (
            f"  - {{op: protect, tensor: {DOWN}, index: [0, 4]}}\n",
            "",
            (0, 4),
            "the record protects the scalar, but the manifest does",
        ),
    ],
)
def test_a_manifest_that_asks_for_something_else(patched, old, new, index, said):
    assert old in MANIFEST
    forge(patched, MANIFEST.replace(old, new, 1))
    (finding,) = findings(patched)
    assert (finding.rule, finding.file, finding.tensor, finding.index) == ("manifest", OWN_MANIFEST, DOWN, index)
    assert said in finding.message


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("index: [1, 2]", "index: [1, 3]", {"does not list the scalar", "zero, but the manifest does not ask"}),
        ("{path: base}", "{repo_id: org/other}", set()),
        ("edits:\n", f"edits:\n  - {{op: zero, tensor: {DOWN}, index: [0, 0]}}\n", {"does not list the scalar"}),
        ("edits:\n", f"edits:\n  - {{op: zero, tensor: {DOWN}, index: [3, 5]}}\n",
         {"has two operations", "zero was requested: the record has scale"}),
        ("edits:\n", "edits:\n  - {op: zero, layer: 7, row: 0, col: 0}\n", {"edits[0]: "}),
        ("edits:\n", "edits:\n  - {op: protect, known: all}\n", {"does not list the known super weights"}),
        ("{path: base}", f"{{path: base, sha256: {{{SECOND}: '{'1' * 64}'}}}}", {f"base.sha256 of {SECOND} is 111"}),
        ("{path: base}", "{path: base, weights: single}", set()),
        ("version: 1", "version: 2", {"the manifest is invalid: 1:10: version"}),
        (MANIFEST, "[", {"the manifest is invalid"}),
    ],
)  # fmt: skip
def test_whatever_else_it_asks(patched, old, new, said):
    """A name of the base that the record does not know is no contradiction."""
    forge(patched, MANIFEST.replace(old, new, 1))
    found = findings(patched)
    assert {f.rule for f in found} == ({"manifest"} if said else set())
    assert all(any(text in f.message for f in found) for text in said), found
    assert len(found) == len(said)


def test_another_name_of_the_base_than_the_recorded_one(patched):
    def record(document):
        document["base"].update(repo_id="org/name", named_by="cache")

    forge(patched, MANIFEST.replace("{path: base}", "{repo_id: org/other}"), record)
    (finding,) = findings(patched)
    assert (finding.rule, finding.message) == ("manifest", "base.repo_id is org/other, but the base was org/name")


def test_other_bits_than_the_arithmetic_gives(patched):
    """A record that sells a set as what it is, beside a manifest that asked for another value."""

    def sell(document):
        document["edits"][1].update(op="set")
        del document["edits"][1]["factor"]

    scaled = json.loads((patched / RECORD).read_text())["edits"][1]
    asked = f"{{op: set, tensor: {DOWN}, index: [3, 5], bits: '{scaled['new_bits']}'}}"
    edit = f"{{op: scale, tensor: {DOWN}, index: [3, 5], factor: 2.0}}"
    forge(patched, MANIFEST.replace(edit, asked), sell)
    assert findings(patched) == ()
    forge(patched, MANIFEST.replace(edit, asked.replace(scaled["new_bits"], "0x3f80")))
    (finding,) = findings(patched)
    assert (finding.rule, finding.index) == ("manifest", SCALED)
    assert finding.message == f"set was requested: the record has {scaled['new_bits']}, not 0x3f80"


def test_the_command_says_so_at_the_line_and_exits_1(patched, capsys):
    forge(patched, MANIFEST.replace("factor: 2.0", "factor: 4.0"))
    assert main(["verify", str(patched), "--json"]) == 1
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert (finding["rule"], finding["manifest"], finding["line"]) == ("manifest", f"{patched}/manifest.yaml", 5)
    assert main(["verify", str(patched)]) == 1
    assert "proved" not in capsys.readouterr().out


def test_a_manifest_changed_by_hand_is_one_finding(patched):
    (patched / OWN_MANIFEST).write_text(MANIFEST.replace("factor: 2.0", "factor: 4.0"))
    assert [f.message for f in findings(patched) if f.rule == "manifest"] == [
        "this is not the manifest that the record was made from"
    ]


# --- earlier steps


@pytest.fixture
def twice(patched, tmp_path) -> Path:
    text = MANIFEST.replace("path: base", "path: patched").replace("[1, 2]", "[2, 2]").replace("[3, 5]", "[2, 3]")
    return apply_text(tmp_path, text.replace("  - {op: protect", "  # {op: protect"), "twice")


def test_both_steps_of_a_history_are_compared(twice):
    assert findings(twice) == ()
    text = json.loads((twice / RECORD).read_text())["history"][0]["manifest"]

    def ask(document):
        step = document["history"][0]
        step["manifest"] = text.replace("factor: 2.0", "factor: 4.0")
        step["registry"]["manifest_sha256"] = sha256(step["manifest"].encode())

    forge(twice, None, ask)
    (finding,) = findings(twice)
    assert (finding.rule, finding.file, finding.index) == ("manifest", RECORD, SCALED)
    assert finding.message == "step 1: scale was requested: the record has the factor 2.0, not 4.0"


def test_an_earlier_manifest_that_is_not_the_one_of_its_step(twice):
    def ask(document):
        document["history"][0]["manifest"] += "# a remark\n"

    forge(twice, None, ask)
    (finding,) = findings(twice)
    assert (finding.rule, finding.file) == ("manifest", RECORD)
    assert "the manifest of step 1 is not the one" in finding.message


# --- known super weights


@pytest.fixture
def known_base(tmp_path) -> Path:
    """Qwen3-1.7B as far as its two known super weights go: -0.8203125 and -0.515625 in BF16."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "qwen3", "hidden_size": 2000, "num_hidden_layers": 3}')
    write_sparse_shard(base / "model.safetensors", down(2), "BF16", 2000, 1822)
    with (base / "model.safetensors").open("r+b") as file:
        for row, bits in ((1793, 0xBF52), (1999, 0xBF04)):
            file.seek(place(base / "model.safetensors", down(2), (row, 1821))[0])
            file.write(bits.to_bytes(2, "little"))
    return base


@pytest.mark.parametrize("edits", [
    [{"op": "zero", "known": "all"}],
    [{"op": "zero", "known": "L2.1793.1821"}],
    [{"op": "scale", "layer": 2, "row": 1793, "col": 1821, "factor": 0.5}, {"op": "protect", "known": "all"}],
    [{"op": "protect", "known": "all"}, {"op": "zero", "known": "qwen3-1.7b:L2.1999.1821"}],
], ids=lambda edits: edits[0]["op"])  # fmt: skip
def test_known_means_what_was_known_then(known_base, tmp_path, monkeypatch, edits):
    """Also if a later version knows other super weights, or cannot identify the model."""
    manifest = write_manifest(tmp_path / "m.json", {"path": str(known_base), "model": QWEN}, *edits)
    swsurgery.apply(manifest, output=tmp_path / "out", check="off")
    assert findings(tmp_path / "out") == ()

    def unknown(name: str) -> None:
        raise LookupFailed("no such known model", name)

    monkeypatch.setattr(known.own, "find_model", unknown)
    monkeypatch.setattr(known.own, "find_by_repo", lambda name: None)
    assert findings(tmp_path / "out") == ()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d["known"]["coordinates"].pop(), "the record has zero, but the manifest does not ask for it"),
        (lambda d: d.update(known=None), "the record does not list the known super weights"),
        (lambda d: d["known"].update(coordinates=[]), "the record has no such known super weight"),
        (lambda d: d["known"].update(coordinates=[1]), "the record does not list the known super weights"),
        (lambda d: d["known"]["coordinates"][0].update(value=5.0), "the base does not match: expected 5"),
        (lambda d: d["known"]["coordinates"][0].update(value="x"), "the record has no valid value of"),
        (lambda d: d["known"]["coordinates"][0].update(layer=9), "edits[0]: "),
    ],
)
def test_what_the_record_says_was_known_is_compared(known_base, tmp_path, change, said):
    where = {"path": str(known_base), "model": QWEN}
    manifest = write_manifest(tmp_path / "m.json", where, {"op": "zero", "known": "all"})
    swsurgery.apply(manifest, output=tmp_path / "out", check="off")
    forge(tmp_path / "out", None, change)
    found = findings(tmp_path / "out")
    assert {f.rule for f in found} == {"manifest"} and any(said in f.message for f in found)


# --- other ways to a record


def test_a_patch_asks_for_what_it_did(tmp_path):
    base = write_base(tmp_path / "base")
    apply_text(tmp_path, MANIFEST, "patched")
    export.export(tmp_path / "patched", tmp_path / "p.safetensors", format="sparse")
    swsurgery.apply(tmp_path / "p.safetensors", output=tmp_path / "out", base=str(base), check="off")
    assert findings(tmp_path / "out") == ()
    text = (tmp_path / "out" / OWN_MANIFEST).read_text()
    forge(tmp_path / "out", text.replace('"factor": 2.0', '"factor": 4.0'))
    assert [f.rule for f in findings(tmp_path / "out")] == ["manifest"]


def test_an_edit_in_place_and_left_out_files_with_pins_are_no_finding(tmp_path):
    base = write_llama(tmp_path / "base")
    (base / "model-q4.gguf").write_bytes(b"GGUF")
    pins = {name: sha256((base / name).read_bytes()) for name in ("model-q4.gguf", FIRST_OF_THREE)}
    edit = {"op": "zero", "layer": 0, "row": 2, "col": 3}
    manifest = write_manifest(tmp_path / "m.json", {"path": str(base), "copies": "omit", "sha256": pins}, edit)
    swsurgery.apply(manifest, output=tmp_path / "out", check="off")
    assert findings(tmp_path / "out") == ()
    record = {"path": str(tmp_path / "out"), "sha256": {RECORD: sha256((tmp_path / "out" / RECORD).read_bytes())}}
    swsurgery.apply(write_manifest(tmp_path / "2.json", record, {**edit, "row": 1}), in_place=True, check="off")
    assert findings(tmp_path / "out") == ()


def test_a_protected_scalar_of_a_shard_that_is_elsewhere_is_no_finding(patched):
    """Without its header the layer, row and col of its edit cannot be resolved here."""

    def leave(document):
        document["elsewhere"] = [FIRST, SECOND]
        document["edits"] = []

    text = "version: 1\nbase: {path: base}\nedits:\n  - {op: protect, layer: 0, row: 0, col: 4}\n"
    forge(patched, text, leave)
    for name in (FIRST, SECOND):
        (patched / name).unlink()
    own = read_record(Folder.at(patched))
    checkpoint = read_checkpoint(Folder.at(patched), own.record.base, elsewhere=own.record.elsewhere)
    assert find_own_differences(own, checkpoint) == []
    found = swsurgery.verify(patched)
    assert found.ok and found.record.protected == 0
    forge(patched, text.replace("protect", "zero"))
    assert {f.rule for f in findings(patched)} == {"manifest"}


def test_verifying_does_not_load_the_planner(patched):
    code = (
        "import sys\nfrom swsurgery.cli import main\n"
        f"code = main(['verify', {str(patched)!r}, '--quiet'])\n"
        "planner = {'swsurgery.editing.plan', 'swsurgery.editing.apply', 'swsurgery.verifying.against_base'}\n"
        "print(code, sorted(planner & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr

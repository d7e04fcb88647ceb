"""publish for edits of regions: the undo file travels, the card has one row for each edit, and the download reverts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import FIRST, HEAD, INNER, SECOND, THIRD, down
from hub import fixture
from huggingface_hub import snapshot_download
from publishing import BASE, NEW, OWN, digests, how, patch, put_base, run, tree
from test_card import split, table

import swsurgery
from swsurgery.cli import main
from swsurgery.editing.check_options import CheckOptions
from swsurgery.manifest import patch as patch_module
from swsurgery.sharing.plan_checkpoint import list_loader_notes

any_hub, hub = fixture.any_hub, fixture.hub
ACCEPT = ("--accept", "check-missing")
UNDO = "swsurgery-undo.safetensors"
ROW, SCALAR = "{op: zero, layer: 1, row: 2}", f"{{op: scale, tensor: {down(1)}, index: [0, 1], factor: 2}}"
COLUMN = "{op: protect, layer: 0, col: 1}"


@pytest.fixture
def commit(hub, tmp_path) -> str:
    return put_base(hub, tmp_path / "base")


@pytest.fixture
def patched(hub, tmp_path, commit) -> Path:
    return patch(hub, tmp_path, commit, f"[{ROW}, {SCALAR}, {COLUMN}]")


def test_a_version_2_record_is_published_with_its_undo_file(hub, tmp_path, commit, patched, capsys):
    assert (patched / UNDO).exists() and json.loads((patched / "swsurgery.json").read_text())["registry_version"] == 2
    code, document, _ = run(capsys, patched, NEW, "--dry-run")
    assert code == 0 and [f["rule"] for f in document["findings"]] == ["check-missing"]
    assert how(document)[SECOND] == how(document)[UNDO] == "upload"
    assert how(document)[FIRST] == how(document)[THIRD] == "copy"
    reasons = {f["name"]: f["why"] for f in document["plan"]["files"]}
    assert reasons[SECOND] == "edited" and reasons[UNDO] == "the old bytes of the edits"
    code, document, err = run(capsys, patched, NEW, "--yes", *ACCEPT)
    assert code == 0 and document["published"]["findings"] == [], err
    shown, here = tree(hub), digests(patched)
    assert set(shown) == set(here)
    assert {n: shown[n] for n in set(here) - OWN} == {n: here[n] for n in set(here) - OWN}
    assert hub.repo(NEW).history("main")[0].title == f"{INNER + 1} scalars of {BASE}@{commit[:12]} changed"
    assert "zero L1 row 2: 10 of 10 scalars changed in 1 tensor" in hub.head(NEW).message
    _, body = split(hub.read(NEW, "README.md").decode())
    rows = table(body, "What was changed")
    assert rows[1][:2] == [down(1), "[0, 1]"] and rows[3] == ["zero", "L1 row 2", "-", "10", "10", down(1)]
    assert main(["verify", f"hf://{NEW}"]) == 0
    local = Path(snapshot_download(hub.name(NEW)))
    assert main(["verify", str(local)]) == 0
    swsurgery.revert(local, tmp_path / "reverted")
    before, after = digests(tmp_path / "base"), digests(tmp_path / "reverted")
    assert {n: d for n, d in after.items() if n != "README.md"} == {
        n: d for n, d in before.items() if n in after and n != "README.md"
    }


def test_the_same_again_makes_no_commit_and_a_next_edit_without_regions_removes_the_undo_file(
    hub, tmp_path, commit, patched, capsys
):
    assert run(capsys, patched, NEW, "--yes", *ACCEPT)[0] == 0
    head = hub.head(NEW).oid
    code, document, _ = run(capsys, patched, NEW, "--yes", *ACCEPT)
    assert code == 0 and document["published"]["already_published"] and hub.head(NEW).oid == head
    other = patch(hub, tmp_path, commit, f"[{SCALAR}]", name="scalars")
    code, document, _ = run(capsys, other, NEW, "--yes", *ACCEPT)
    assert code == 0 and how(document)[UNDO] == "delete" and UNDO not in tree(hub)


def test_a_checkpoint_whose_row_was_never_run_needs_the_findings_acceptance(hub, tmp_path, commit, capsys):
    patched = patch(hub, tmp_path, commit, f"[{ROW}]")
    code, _, err = run(capsys, patched, NEW, "--yes")
    assert code == 1 and "not published: check-missing" in err


def test_a_modified_undo_file_is_not_published(hub, patched, capsys):
    raw = bytearray((patched / UNDO).read_bytes())
    raw[-1] ^= 1
    (patched / UNDO).write_bytes(raw)
    code, _, err = run(capsys, patched, NEW, "--yes", *ACCEPT)
    assert code == 1 and f"not published: digest: {UNDO}" in err and NEW not in hub.state.repos


def test_a_note_names_a_loader_that_reads_the_undo_file_as_weights(hub, patched, capsys):
    _, document, _ = run(capsys, patched, NEW, "--dry-run")
    assert not any("vLLM" in note for note in document["plan"]["notes"])  # the index tells vLLM what to read
    assert list_loader_notes(["model.safetensors", "swsurgery.json"]) == []
    [note] = list_loader_notes(["model.safetensors", "swsurgery-undo-2.safetensors"])
    assert "vLLM reads swsurgery-undo-2.safetensors as weights" in note


def test_without_an_undo_file_the_card_names_the_base(hub, tmp_path, commit, capsys):
    base = Path(snapshot_download(hub.name(BASE), revision=commit))
    manifest = tmp_path / "m.yaml"
    manifest.write_text(f'version: 1\nbase: {{repo_id: {BASE}, revision: "{commit}"}}\nedits: [{ROW}]\n')
    out = tmp_path / "out"
    swsurgery.apply(manifest, output=out, base=str(base), check=CheckOptions("weights"), undo_limit=0)
    code, document, _ = run(capsys, out, NEW, "--dry-run")
    rules = {f["rule"] for f in document["findings"]}
    accept = [word for rule in {*rules, *_find_rules(out)} for word in ("--accept", rule)]
    code, _, err = run(capsys, out, NEW, "--yes", *accept)
    assert code == 0, err
    assert UNDO not in tree(hub) and "The old values are not stored." in hub.read(NEW, "README.md").decode()


def _find_rules(folder: Path) -> set[str]:
    return {finding.rule for finding in swsurgery.verify(folder).findings}


def test_a_large_shard_that_stayed_on_the_hub_is_copied_there(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("swsurgery.editing.apply.SMALL_CHECKPOINT", 10_000)
    commit = put_base(hub, tmp_path / "base", rows=20_000)
    manifest = tmp_path / "sparse.yaml"
    manifest.write_text(f'version: 1\nbase: {{repo_id: {BASE}, revision: "{commit}"}}\nedits: [{ROW}, {COLUMN}]\n')
    out = tmp_path / "sparse"
    swsurgery.apply(manifest, output=out, check=CheckOptions("weights"), for_publish=True)
    assert not (out / THIRD).exists() and (out / UNDO).exists()
    code, _, err = run(capsys, out, NEW, "--yes", *ACCEPT)
    assert code == 0, err
    assert tree(hub)[THIRD] == digests(tmp_path / "base")[THIRD] and tree(hub)[UNDO] == digests(out)[UNDO]
    assert main(["verify", f"hf://{NEW}"]) == 0


def test_a_patch_of_two_steps_with_regions_makes_the_same_checkpoint_again(any_hub, tmp_path, capsys):
    commit = put_base(any_hub, tmp_path / "base")
    patch(any_hub, tmp_path, commit, f"[{ROW}, {SCALAR}]")
    manifest = tmp_path / "next.yaml"
    edits = f"[{{op: set, layer: 1, col: 1, value: 2}}, {{op: flip, tensor: {HEAD}, index: [1, 1], bit: 3}}]"
    manifest.write_text(f"version: 1\nbase: {{path: patched}}\nedits: {edits}\n")
    swsurgery.apply(manifest, output=tmp_path / "twice", check=CheckOptions("weights"))
    code, document, err = run(capsys, tmp_path / "twice", any_hub.name(NEW), "--patch", "--yes", *ACCEPT)
    assert code == 0 and document["published"]["findings"] == [], err
    made = patch_module.parse(any_hub.read(NEW, "patch.safetensors"), Path("p"))
    assert len(made.scalars) == INNER + 6 - 1 + 1
    _, body = split(any_hub.read(NEW, "README.md").decode())
    assert f"changes {INNER + 6} scalars" in body and "in 2 steps" in body
    rows = table(body, "What it changes")
    assert [row[:2] for row in rows if row[0] in ("zero", "set")] == [["zero", "L1 row 2"], ["set", "L1 column 1"]]
    (tmp_path / "p.safetensors").write_bytes(any_hub.read(NEW, "patch.safetensors"))
    swsurgery.apply(tmp_path / "p.safetensors", output=tmp_path / "once", check=CheckOptions("weights"))
    for name in (FIRST, SECOND, THIRD):
        assert digests(tmp_path / "once")[name] == digests(tmp_path / "twice")[name]


def test_a_hub_that_serves_another_undo_file_is_found_out(hub, patched, capsys, monkeypatch):
    assert run(capsys, patched, NEW, "--yes", *ACCEPT)[0] == 0
    raw = bytearray(hub.read(NEW, UNDO))
    raw[-1] ^= 1
    hub.commit(NEW, {UNDO: bytes(raw)})
    assert main(["verify", f"hf://{NEW}"]) == 1
    assert UNDO in capsys.readouterr().out

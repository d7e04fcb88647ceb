"""publish --patch: a repository of four small files that hold the edit, and no weights."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from checkpoints import down
from hub import fixture
from hub.faults import Drop
from huggingface_hub import hf_hub_download
from publishing import BASE, EDIT, digests, patch, put_base, served, tree

import swsurgery
from swsurgery.cli import main
from swsurgery.editing.check_options import CheckOptions
from swsurgery.manifest import patch as patch_module

any_hub, hub = fixture.any_hub, fixture.hub
ACCEPT = ("--accept", "check-missing")
NEW, PATCH = "org/edited-patch", "patch.safetensors"
FILES = {PATCH, "manifest.yaml", "SHA256SUMS", "README.md"}


@pytest.fixture
def commit(any_hub, tmp_path) -> str:
    return put_base(any_hub, tmp_path / "base")


@pytest.fixture
def patched(any_hub, tmp_path, commit) -> Path:
    return patch(any_hub, tmp_path, commit)


def run(capsys, directory: Path, *more: str, to: str = NEW) -> tuple[int, dict, str]:
    """Exit code, the document on stdout, and what was said on stderr."""
    capsys.readouterr()
    code = main(["publish", str(directory), to, "--patch", "--json", *more])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else {}, err


def weights(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in digests(folder).items() if name.endswith(".safetensors")}


def published(hub) -> patch_module.Patch:
    return patch_module.parse(hub.read(NEW, PATCH), Path(PATCH))


def test_only_the_edit_travels_and_it_makes_the_same_checkpoint_again(hub, tmp_path, commit, patched, capsys):
    hub.traffic.clear()
    code, document, err = run(capsys, patched, "--yes", *ACCEPT)
    assert code == 0, err
    shown = tree(hub, NEW)
    assert set(shown) - {".gitattributes"} == FILES
    assert hub.traffic.received() < 20_000 and hub.traffic.sent() < 20_000
    assert hub.traffic.requests(r"model-0000") == []
    done = document["published"]
    assert done["commit"] == hub.head(NEW).oid and done["findings"] == [] and done["verified"]["files"] == 4
    assert hub.repo(NEW).refs[f"refs/tags/base-{commit[:12]}"] == hub.head(NEW).oid
    assert hub.head(NEW).title == f"a patch: 1 scalar of {BASE}@{commit[:12]} changed"
    assert hub.read(NEW, "manifest.yaml") == (patched / "manifest.yaml").read_bytes()
    sums = dict(line.split("  ")[::-1] for line in hub.read(NEW, "SHA256SUMS").decode().splitlines())
    assert sums == {name: hashlib.sha256(hub.read(NEW, name)).hexdigest() for name in (PATCH, "manifest.yaml")}

    taken = hf_hub_download(NEW, PATCH)
    again = tmp_path / "again"
    assert main(["apply", taken, "--base", f"hf://{BASE}@{commit}", "-o", str(again), "--check", "weights"]) == 0
    assert weights(again) == weights(patched) != weights(tmp_path / "base")


def test_a_patch_at_any_hub_makes_the_same_checkpoint_again(any_hub, tmp_path, commit, patched, capsys):
    name, api = any_hub.name(NEW), any_hub.api()
    code, document, err = run(capsys, patched, "--private", *ACCEPT, to=name)
    assert code == 0 and document["published"]["findings"] == [], err
    assert api.repo_info(name).sha == document["published"]["commit"]
    shown = served(any_hub, NEW)
    assert set(shown) - {".gitattributes"} == FILES
    assert shown["manifest.yaml"] == digests(patched)["manifest.yaml"]
    base = f"hf://{any_hub.name(BASE)}@{commit}"
    taken, again = hf_hub_download(name, PATCH), tmp_path / "again"
    assert main(["apply", taken, "--base", base, "-o", str(again), "--check", "weights"]) == 0
    assert weights(again) == weights(patched) != weights(tmp_path / "base")
    code, document, _ = run(capsys, patched, *ACCEPT, to=name)
    assert code == 0 and document["published"]["already_published"]


def test_the_card_says_what_it_is_and_how_to_apply_it(any_hub, commit, patched, capsys):
    name, base = any_hub.name(NEW), any_hub.name(BASE)
    assert run(capsys, patched, "--private", *ACCEPT, to=name)[0] == 0
    card = any_hub.read(NEW, "README.md").decode()
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    lines = {f"base_model: {base}", "base_model_relation: adapter", "license: apache-2.0", "library_name: swsurgery"}
    assert lines <= set(front.splitlines())
    assert "- small" not in front  # the base's own tags are of a model
    assert f"hf download {name} {PATCH} --local-dir .\nswsurgery apply {PATCH} --base hf://{base}@{commit} -o" in body
    assert f"| `{down(1)}` | `[2, 3]` |" in body and f"{len(any_hub.read(NEW, PATCH))} bytes" in body
    assert "check-missing" in body and "# Base" not in body and "Protected" not in body


def test_a_dry_run_sends_nothing(hub, patched, capsys):
    hub.traffic.clear()
    code, document, _ = run(capsys, patched, "--dry-run")
    assert code == 0 and {r.method for r in hub.traffic.requests()} == {"GET"} and NEW not in hub.state.repos
    assert {file["name"] for file in document["plan"]["files"]} == FILES
    assert document["plan"]["copy_bytes"] == 0 < document["plan"]["upload_bytes"] < 10_000
    assert [f["rule"] for f in document["findings"]] == ["check-missing"]


def test_the_gate_and_the_question_are_the_same(hub, patched, capsys):
    hub.traffic.clear()
    code, _, err = run(capsys, patched, "--yes")
    assert code == 1 and "not published: check-missing" in err and hub.traffic.requests() == []
    code, _, err = run(capsys, patched, *ACCEPT)
    assert code == 2 and "publishing publicly needs a confirmation" in err and NEW not in hub.state.repos
    code, _, _ = run(capsys, patched, *ACCEPT, "--private")
    assert code == 0 and hub.repo(NEW).private


def test_the_same_again_makes_no_commit_and_another_edit_makes_one(hub, tmp_path, commit, patched, capsys):
    assert run(capsys, patched, "--yes", *ACCEPT)[0] == 0
    first = hub.head(NEW).oid
    assert main(["publish", str(patched), NEW, "--patch", *ACCEPT]) == 0
    out, _ = capsys.readouterr()
    assert "had already been published" in out and "4 files with the planned digests\n" in out
    assert hub.head(NEW).oid == first
    hub.commit(NEW, {"notes.txt": b"a stranger's"})
    other = patch(hub, tmp_path, commit, f"[{{op: scale, tensor: {down(0)}, index: [1, 1], factor: 2.0}}]", "second")
    code, document, _ = run(capsys, other, "--yes", *ACCEPT)
    assert code == 0 and hub.read(NEW, "notes.txt") and "notes.txt" in " ".join(document["plan"]["notes"])
    assert [s.tensor for s in published(hub).scalars] == [down(0)]
    assert hub.repo(NEW).refs[f"refs/tags/base-{commit[:12]}"] == first


def test_a_pull_request_is_opened_once(any_hub, patched, capsys):
    before, name, api = any_hub.add_repo(NEW, private=True), any_hub.name(NEW), any_hub.api()
    for already in (False, True):
        code, document, _ = run(capsys, patched, "--create-pr", *ACCEPT, to=name)
        assert code == 0 and document["published"]["already_published"] is already
    assert api.repo_info(name).sha == before and [each.num for each in api.get_repo_discussions(name)] == [1]
    assert set(served(any_hub, NEW, "refs/pr/1")) >= FILES


def test_a_repository_of_weights_is_left_alone(hub, patched, capsys):
    assert main(["publish", str(patched), NEW, "--yes", *ACCEPT]) == 0
    before = hub.head(NEW).oid
    code, _, err = run(capsys, patched, "--yes", *ACCEPT)
    assert code == 2 and "the repository contains weights (model-00001-of-00003.safetensors)" in err
    assert hub.head(NEW).oid == before


def test_two_manifests_are_one_patch_of_the_first_base(any_hub, tmp_path, commit, capsys):
    first = patch(any_hub, tmp_path, commit)
    manifest = tmp_path / "next.yaml"
    edits = f"[{{op: set, tensor: {down(1)}, index: [2, 3], value: 2}}, {{op: zero, tensor: {down(0)}, index: [1, 1]}}]"
    manifest.write_text(f"version: 1\nbase: {{path: patched}}\nedits: {edits}\n")
    swsurgery.apply(manifest, output=tmp_path / "twice", check=CheckOptions("weights"))
    assert first.is_dir()
    code, _, err = run(capsys, tmp_path / "twice", "--private", *ACCEPT, to=any_hub.name(NEW))
    assert code == 0, err
    made = published(any_hub)
    assert (made.base.repo_id, made.base.revision) == (any_hub.name(BASE), commit)
    assert [(s.tensor, s.op) for s in made.scalars] == [(down(0), "zero"), (down(1), "set")]
    assert "in 2 steps" in any_hub.read(NEW, "README.md").decode()
    (tmp_path / "taken").mkdir()
    for name in (PATCH, "manifest.yaml"):  # either makes both steps at once
        (tmp_path / "taken" / name).write_bytes(any_hub.read(NEW, name))
        out = tmp_path / f"once-{name}"
        swsurgery.apply(tmp_path / "taken" / name, output=out, check=CheckOptions("weights"))
        assert weights(out) == weights(tmp_path / "twice")


def test_a_base_that_is_not_on_the_hub_has_to_be_at_hand(hub, tmp_path, commit, capsys):
    shutil.copytree(tmp_path / "base", tmp_path / "here")
    manifest = tmp_path / "here.yaml"
    manifest.write_text(f"version: 1\nbase: {{path: here}}\nedits: [{EDIT}]\n")
    swsurgery.apply(manifest, output=tmp_path / "out", check=CheckOptions("weights"))
    code, document, err = run(capsys, tmp_path / "out", "--yes", *ACCEPT)
    assert code == 0, err
    assert "whoever applies the patch needs a local copy of it" in " ".join(document["plan"]["notes"])
    card = hub.read(NEW, "README.md").decode()
    assert "--base BASE -o patched" in card and "base_model" not in card and "not on the Hub" in card


def test_what_changes_nothing_is_no_patch(hub, tmp_path, commit, capsys):
    only = patch(hub, tmp_path, commit, f"[{{op: protect, tensor: {down(0)}, index: [0, 1]}}]", "only")
    code, _, err = run(capsys, only, "--yes")
    assert code == 2 and "nothing is changed" in err and NEW not in hub.state.repos


def test_a_hub_that_serves_other_bytes_is_found_out(hub, patched, capsys):
    assert run(capsys, patched, "--yes", *ACCEPT)[0] == 0
    held = hub.state.paths[tree(hub, NEW)[PATCH]]
    data = bytearray(held.read_bytes())
    data[-1] ^= 1
    held.write_bytes(data)
    code, document, _ = run(capsys, patched, *ACCEPT)
    assert code == 1 and [(f["rule"], f["file"]) for f in document["published"]["findings"]] == [("digest", PATCH)]


@pytest.mark.parametrize("target", ["/preupload/", "/commit/main", "/tag/"])
def test_what_was_cut_off_is_finished_by_the_same_command(hub, patched, capsys, target):
    fault = hub.fail("POST", target, Drop(), times=None)
    assert run(capsys, patched, "--yes", *ACCEPT)[0] == 2 and fault.hits
    there = set(tree(hub, NEW)) - {".gitattributes"}
    assert there in (set(), FILES)
    hub.faults.clear()
    code, document, err = run(capsys, patched, "--yes", *ACCEPT)
    assert code == 0, err
    assert document["published"]["already_published"] is (there == FILES)
    assert set(tree(hub, NEW)) - {".gitattributes"} == FILES and document["published"]["tag"]
    assert [ref for ref in hub.repo(NEW).refs if "tags" in ref]

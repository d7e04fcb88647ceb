"""publish at whatever Hub there is, the tests' own or another: what it made is read back through the client alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import FIRST, SECOND, THIRD, down
from hub import fixture
from huggingface_hub import snapshot_download
from publishing import BASE, NEW, OWN, digests, how, patch, put_base, run, served

from swsurgery.cli import main

any_hub = fixture.any_hub
ACCEPT = ("--accept", "check-missing")


@pytest.fixture
def commit(any_hub, tmp_path) -> str:
    return put_base(any_hub, tmp_path / "base")


@pytest.fixture
def patched(any_hub, tmp_path, commit) -> Path:
    return patch(any_hub, tmp_path, commit)


def tags(hub, repo_id: str = NEW) -> dict[str, str]:
    """Name -> commit, at any Hub."""
    return {tag.name: tag.target_commit for tag in hub.api().list_repo_refs(hub.name(repo_id)).tags}


def test_a_publication_at_any_hub_is_copied_there_and_reads_back_whole(any_hub, commit, patched, capsys):
    name, api = any_hub.name(NEW), any_hub.api()
    code, document, err = run(capsys, patched, name, "--private", *ACCEPT)
    assert code == 0 and document["published"]["findings"] == [], err
    assert how(document)[FIRST] == how(document)[THIRD] == "copy" and how(document)[SECOND] == "upload"
    copied = (patched / FIRST).stat().st_size + (patched / THIRD).stat().st_size
    assert document["published"]["bytes"]["copied"] == copied > 0 and "uploading instead" not in err
    shown, here = served(any_hub), digests(patched)
    assert set(shown) == set(here) and {n: shown[n] for n in set(here) - OWN} == {n: here[n] for n in set(here) - OWN}
    at = document["published"]["commit"]
    assert api.repo_info(name).sha == at
    assert tags(any_hub) == {f"base-{commit[:12]}": at}
    code, document, _ = run(capsys, patched, name, *ACCEPT)
    assert code == 0 and document["published"]["already_published"] and api.repo_info(name).sha == at


def test_what_was_published_is_verified_inspected_and_compared_where_it_is(any_hub, patched, capsys):
    assert run(capsys, patched, any_hub.name(NEW), "--private", *ACCEPT)[0] == 0
    base, new = f"hf://{any_hub.name(BASE)}", f"hf://{any_hub.name(NEW)}"
    assert main(["verify", new, "--base", base]) == 0
    capsys.readouterr()
    assert main(["inspect", new, "--tensor", down(1), "--at", "2,3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["value"] == 0.0
    assert main(["diff", base, new, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [(c["tensor"], c["index"], c["new"]) for c in found["changes"]] == [(down(1), [2, 3], 0.0)]
    assert [found["files"][name] for name in (FIRST, SECOND, THIRD)] == ["same", "changed", "same"]
    assert main(["diff", new, str(patched), "--json"]) == 1  # by the files that were made for the repository
    found = json.loads(capsys.readouterr().out)
    assert found["changes"] == [] and {name for name, how in found["files"].items() if how != "same"} <= OWN


def test_what_was_published_verifies_and_gives_the_base_back(any_hub, tmp_path, patched, capsys):
    assert run(capsys, patched, any_hub.name(NEW), "--private", *ACCEPT)[0] == 0
    copy = tmp_path / "copy"
    snapshot_download(any_hub.name(NEW), local_dir=copy)
    assert main(["verify", str(copy)]) == 0
    assert main(["revert", str(copy), "-o", str(tmp_path / "back")]) == 0
    base, back = digests(tmp_path / "base"), digests(tmp_path / "back")
    assert back == {name: base[name] for name in base if name != "README.md"}


def test_another_manifest_makes_another_commit_and_removes_only_its_own_files(any_hub, tmp_path, commit, capsys):
    first, name, api = patch(any_hub, tmp_path, commit), any_hub.name(NEW), any_hub.api()
    assert run(capsys, first, name, "--private", *ACCEPT)[0] == 0
    tagged = tags(any_hub)
    api.upload_file(path_or_fileobj=b"a stranger's", path_in_repo="notes.txt", repo_id=name)
    parent = api.repo_info(name).sha
    second = patch(
        any_hub, tmp_path, commit, f"[{{op: scale, tensor: {down(0)}, index: [1, 1], factor: 2.0}}]", "second"
    )
    (second / "tokenizer.json").unlink()
    record = json.loads((second / "swsurgery.json").read_text())
    del record["files"]["tokenizer.json"]
    (second / "swsurgery.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    (second / "SHA256SUMS").write_text(
        "".join(line for line in (second / "SHA256SUMS").read_text().splitlines(True) if "tokenizer" not in line)
    )
    code, document, err = run(capsys, second, name, "--accept", "digest", *ACCEPT)
    assert code == 0, err
    assert [each.commit_id for each in api.list_repo_commits(name)][:2] == [document["published"]["commit"], parent]
    shown = served(any_hub)
    assert "tokenizer.json" not in shown and shown["notes.txt"]
    assert how(document)["tokenizer.json"] == "delete" and how(document)[SECOND] == "copy"
    assert "notes.txt" in " ".join(document["plan"]["notes"])
    assert shown[FIRST] == digests(second)[FIRST] and shown[SECOND] == digests(tmp_path / "base")[SECOND]
    assert tags(any_hub) == tagged and len(tagged) == 1


def test_a_pull_request_leaves_main_alone_and_is_opened_once(any_hub, patched, capsys):
    before, name, api = any_hub.add_repo(NEW, private=True), any_hub.name(NEW), any_hub.api()
    code, document, err = run(capsys, patched, name, "--create-pr", *ACCEPT)
    assert code == 0 and document["published"]["pull_request"] == 1, err
    assert document["published"]["bytes"]["copied"] > 0
    assert api.repo_info(name).sha == before and tags(any_hub) == {}
    shown, here = served(any_hub, NEW, "refs/pr/1"), digests(patched)
    assert {n: shown[n] for n in set(here) - OWN} == {n: here[n] for n in set(here) - OWN}
    code, document, _ = run(capsys, patched, name, "--create-pr", *ACCEPT)
    assert code == 0 and document["published"]["already_published"]
    assert [each.num for each in api.get_repo_discussions(name)] == [1]


def test_a_branch_is_made_and_main_stays(any_hub, patched, capsys):
    before, name, api = any_hub.add_repo(NEW, private=True), any_hub.name(NEW), any_hub.api()
    assert run(capsys, patched, name, "--revision", "edits", "--tag", "v1", *ACCEPT)[0] == 0
    assert api.repo_info(name).sha == before
    assert served(any_hub, NEW, "edits")[SECOND] == digests(patched)[SECOND]
    assert tags(any_hub) == {"v1": api.repo_info(name, revision="edits").sha}
    code, _, err = run(capsys, patched, name, "--tag", "v1", *ACCEPT)
    assert code == 2 and "the tag already exists at another commit" in err


def test_a_private_repository_needs_no_question_and_stays_private(any_hub, patched, capsys):
    name, api = any_hub.name(NEW), any_hub.api()
    code, document, _ = run(capsys, patched, name, "--private", *ACCEPT)
    assert code == 0 and document["plan"]["private"] and api.repo_info(name).private
    assert run(capsys, patched, name, *ACCEPT)[0] == 0 and api.repo_info(name).private


@pytest.mark.parametrize("option", ["--message", "--tag"])
def test_an_argument_that_is_not_utf_8_is_refused_before_anything_is_made(any_hub, patched, capsys, option):
    code, document, err = run(capsys, patched, any_hub.name(NEW), "--private", *ACCEPT, option, "a\udcff")
    assert (code, set(document), err.count("\n")) == (2, {"error", "schema"}, 1), err
    assert not any_hub.api().repo_exists(any_hub.name(NEW))

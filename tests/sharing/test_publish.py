"""publish: one commit, in which what the base has is copied on the Hub and only the edited shard is uploaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import FIRST, INDEX, SECOND, THIRD, down, place, write_shard, write_sparse_shard
from hub import fixture
from huggingface_hub import snapshot_download
from publishing import BASE, EDIT, NEW, OWN, digests, how, patch, put_base, run, tree, write_base

import swsurgery
from swsurgery.cli import main
from swsurgery.editing.check_options import CheckOptions
from swsurgery.hub.remote import HEAD

any_hub, hub = fixture.any_hub, fixture.hub
ACCEPT = ("--accept", "check-missing")


@pytest.fixture
def commit(hub, tmp_path) -> str:
    return put_base(hub, tmp_path / "base")


@pytest.fixture
def patched(hub, tmp_path, commit) -> Path:
    return patch(hub, tmp_path, commit)


def test_a_plan_names_what_of_the_bases_card_is_not_taken_over(hub, tmp_path, capsys):
    folder = write_base(tmp_path / "base")
    (folder / "README.md").write_text(
        "---\nlicense: other\nlicense_name: a (b)\nlicense_link: ftp://x\ntags: [a|b]\n---\n"
    )
    patched = patch(hub, tmp_path, hub.add_repo(BASE, folder))
    said = "fields of the base's card that are not copied, or only in part: license_link"
    _, document, _ = run(capsys, patched, NEW, "--dry-run")
    assert f"{said}, tags" in document["plan"]["notes"]
    _, document, _ = run(capsys, patched, NEW, "--patch", "--dry-run")
    assert said in document["plan"]["notes"]  # a patch has tags of its own


def test_a_dry_run_says_what_would_move_and_sends_nothing(hub, patched, capsys):
    hub.traffic.clear()
    code, document, _ = run(capsys, patched, NEW, "--dry-run")
    assert code == 0
    plan = document["plan"]
    size = {name: (patched / name).stat().st_size for name in (FIRST, SECOND, THIRD)}
    assert (plan["created"], plan["private"], plan["parent"]) == (True, False, None)
    assert plan["copy_bytes"] == size[FIRST] + size[THIRD]
    assert size[SECOND] < plan["upload_bytes"] < size[SECOND] + 20_000
    assert how(document)[SECOND] == "upload" and how(document)[FIRST] == how(document)[THIRD] == "copy"
    assert [f["rule"] for f in document["findings"]] == ["check-missing"]
    assert {r.method for r in hub.traffic.requests()} == {"GET"} and len(hub.traffic.requests()) <= 4
    assert NEW not in hub.state.repos


def test_a_dry_run_without_a_network_plans_from_the_record(hub, patched, capsys, monkeypatch):
    _, online, _ = run(capsys, patched, NEW, "--dry-run")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.traffic.clear()
    code, document, _ = run(capsys, patched, NEW, "--dry-run")
    plan = document["plan"]
    assert code == 0 and hub.traffic.requests() == []
    assert (plan["offline"], plan["created"], online["plan"]["offline"]) == (True, None, False)
    assert plan["notes"][0].startswith("the offline mode is on, so the plan does not consider what the repositories")
    assert how(document) == how(online)
    assert main(["publish", str(patched), NEW, "--dry-run"]) == 0
    assert f"{NEW}: public if it is new; one commit to main\n" in capsys.readouterr().out
    code, document, _ = run(capsys, patched, NEW, "--patch", "--dry-run")
    assert code == 0 and document["plan"]["offline"] and "patch.safetensors" in how(document)
    assert run(capsys, patched, NEW, "--yes", *ACCEPT)[0] == 2  # only a dry run does without the Hub


def test_a_first_publication_moves_the_edited_shard_and_small_files(hub, commit, patched, capsys):
    hub.traffic.clear()
    code, document, _ = run(capsys, patched, NEW, "--yes", *ACCEPT)
    assert code == 0
    shown, here = tree(hub), digests(patched)
    assert set(shown) == set(here)
    assert {n: shown[n] for n in set(here) - OWN} == {n: here[n] for n in set(here) - OWN}
    size = (patched / SECOND).stat().st_size
    assert hub.traffic.received(origin="store") == size
    assert hub.traffic.received() < size + 30_000
    assert hub.traffic.requests(FIRST) == hub.traffic.requests(THIRD) == []  # never read nor written by name
    assert hub.traffic.sent(origin="store") <= size
    done = document["published"]
    assert done["commit"] == hub.head(NEW).oid and done["findings"] == [] and not done["already_published"]
    assert done["verified"] == {"files": len(here), "scalars": 1}
    assert [c.title for c in hub.repo(NEW).history("main")] == [
        f"1 scalar of {BASE}@{commit[:12]} changed", "initial commit",
    ]  # fmt: skip
    assert hub.repo(NEW).refs[f"refs/tags/base-{commit[:12]}"] == hub.head(NEW).oid
    assert "accepted: check-missing" in hub.head(NEW).message and "0x0000" in hub.head(NEW).message


def test_people_are_told_in_words(hub, commit, patched, capsys):
    assert main(["publish", str(patched), NEW, "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert f"{NEW}: new, public; one commit to main" in out and f"base: hf://{BASE}@{commit}" in out
    assert "to copy on the Hub: 49.3 kB; to upload:" in out and "needs --accept check-missing" in err
    assert main(["publish", str(patched), NEW, "--yes", *ACCEPT]) == 0
    out, err = capsys.readouterr()
    assert f"{NEW}: published, commit {hub.head(NEW).oid}" in out and "and 1 edited scalar with the planned bits" in out
    assert f"/{NEW}/tree/{hub.head(NEW).oid}" in out and "accepted findings: check-missing" in err
    assert main(["publish", str(patched), NEW, "--quiet", *ACCEPT]) == 0
    out, err = capsys.readouterr()
    assert "had already been published" in out and err == ""


def test_what_the_hub_adds_to_a_base_without_git_is_no_finding(hub, tmp_path, capsys):
    write_base(tmp_path / "base")
    (tmp_path / "base" / ".gitattributes").unlink()
    patched = patch(hub, tmp_path, hub.add_repo(BASE, tmp_path / "base"))
    assert run(capsys, patched, NEW, "--yes", *ACCEPT)[0] == 0
    assert ".gitattributes" in tree(hub) and not (patched / ".gitattributes").exists()
    assert main(["verify", f"hf://{NEW}"]) == 0
    hub.commit(NEW, {"other.txt": b"a stranger's"})
    assert main(["verify", f"hf://{NEW}"]) == 1
    assert "other.txt" in capsys.readouterr().out


def test_two_repositories_are_compared_by_reading_the_edited_shard(hub, tmp_path, capsys):
    patched = patch(hub, tmp_path, put_base(hub, tmp_path / "base", rows=20_000))
    assert run(capsys, patched, NEW, "--yes", *ACCEPT)[0] == 0
    hub.traffic.clear()
    assert main(["diff", f"hf://{BASE}", f"hf://{NEW}", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [(c["tensor"], c["index"], c["new"]) for c in found["changes"]] == [(down(1), [2, 3], 0.0)]
    assert {n: s for n, s in found["files"].items() if n in (FIRST, SECOND, THIRD)} == {
        FIRST: "same", SECOND: "changed", THIRD: "same",
    }  # fmt: skip
    beginnings = 2 * 65_600  # of both: the header, and what is fetched with it
    assert hub.traffic.sent(digests(patched)[THIRD], origin="store") < beginnings < (patched / THIRD).stat().st_size
    assert hub.traffic.sent(digests(patched)[SECOND], origin="store") >= (patched / SECOND).stat().st_size


def test_the_same_again_makes_no_commit(hub, patched, capsys):
    assert run(capsys, patched, NEW, "--yes", *ACCEPT)[0] == 0
    before = hub.head(NEW).oid
    hub.traffic.clear()
    code, document, _ = run(capsys, patched, NEW, *ACCEPT)  # and there is nothing to ask
    assert code == 0 and document["published"]["already_published"]
    assert hub.head(NEW).oid == before
    assert {r.method for r in hub.traffic.requests()} == {"GET"}
    assert set(how(document).values()) == {"keep"}


def test_blanks_around_a_message_are_no_part_of_it(hub, patched, capsys):
    hub.add_repo(NEW)
    for message, already in ((" by hand\n", False), ("by hand", True), ("\tby hand ", True)):
        code, document, err = run(capsys, patched, NEW, "--create-pr", "--yes", "--message", message, *ACCEPT)
        assert code == 0 and document["published"]["already_published"] is already, err
    assert [each.title for each in hub.repo(NEW).discussions] == ["by hand"]
    code, document, err = run(capsys, patched, NEW, "--yes", "--message", " ", *ACCEPT)
    assert code == 0 and hub.head(NEW).title.startswith("1 scalar of"), err


def test_nobody_is_made_private_or_public_behind_their_back(hub, patched, capsys):
    before = hub.add_repo(NEW)
    code, _, err = run(capsys, patched, NEW, "--private", *ACCEPT)
    assert code == 2 and "--private was given, but the repository is public" in err
    code, _, err = run(capsys, patched, NEW, *ACCEPT)
    assert code == 2 and "--yes" in err and err.count("\n") == 1
    assert hub.head(NEW).oid == before


def test_somebody_who_is_asked_may_say_no(hub, patched, capsys, monkeypatch):
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal("n\n"))
    code, _, err = run(capsys, patched, NEW, *ACCEPT)
    assert code == 1 and "visible to everyone?" in err and "to upload" in err
    assert NEW not in hub.state.repos
    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    assert run(capsys, patched, NEW, *ACCEPT)[0] == 0
    assert hub.head(NEW).title.startswith("1 scalar")


def test_a_pull_request_to_a_repository_of_others(hub, patched, capsys):
    before = hub.add_repo("meta/theirs")
    code, _, err = run(capsys, patched, "meta/theirs", "--yes", *ACCEPT)
    assert code == 2 and "refuses access" in err
    assert run(capsys, patched, "meta/theirs", "--create-pr", "--yes", *ACCEPT)[0] == 0
    assert hub.head("meta/theirs").oid == before
    assert tree(hub, "meta/theirs", "refs/pr/1")[SECOND] == digests(patched)[SECOND]


def test_a_gated_base_is_copied_for_those_whom_it_lets_in(hub, commit, patched, capsys):
    hub.repo(BASE).gated = "auto"
    code, document, _ = run(capsys, patched, NEW, "--yes", *ACCEPT)
    assert code == 0 and document["published"]["bytes"]["copied"] > 40_000


@pytest.mark.parametrize("reason", ["no xet", "region", "gated", "gone"])
def test_what_is_not_copied_is_uploaded_and_said(hub, commit, patched, capsys, reason):
    if reason == "no xet":
        hub.repo(BASE).xet = False
    elif reason == "region":
        hub.repo(BASE).region = "eu"
    elif reason == "gated":
        hub.state.repos["meta/base"] = hub.repo(BASE)
        hub.fail("POST", "lfs-files/duplicate", _answer(403))
    else:
        hub.repo(BASE).private, hub.repo(BASE).repo_id = True, "meta/base"
    code, document, err = run(capsys, patched, NEW, "--yes", *ACCEPT)
    assert code == 0
    assert tree(hub)[THIRD] == digests(patched)[THIRD]
    early = {"no xet": "only files with a Xet hash", "gone": "not visible"}.get(reason)
    if early:
        assert how(document)[THIRD] == "upload" and early in json.dumps(document["plan"])
    else:
        assert "uploading instead" in err and THIRD in err
    assert document["published"]["bytes"]["copied"] == 0
    assert hub.traffic.received(origin="store") >= (patched / THIRD).stat().st_size


def _answer(status: int):
    from hub.faults import Answer

    return Answer(status, "no")


@pytest.fixture
def sparse(hub, tmp_path, monkeypatch) -> Path:
    """What --for-publish makes: the large untouched shard is not there."""
    monkeypatch.setattr("swsurgery.editing.apply.SMALL_CHECKPOINT", 10_000)
    commit = put_base(hub, tmp_path / "base", rows=20_000)
    manifest = tmp_path / "sparse.yaml"
    manifest.write_text(f'version: 1\nbase: {{repo_id: {BASE}, revision: "{commit}"}}\nedits: [{EDIT}]\n')
    swsurgery.apply(manifest, output=tmp_path / "sparse", check=CheckOptions("weights"), for_publish=True)
    assert not (tmp_path / "sparse" / THIRD).exists()
    return tmp_path / "sparse"


def test_a_file_that_stayed_on_the_hub_is_copied_there_and_never_downloaded(hub, tmp_path, sparse, capsys):
    code, _, err = run(capsys, sparse, NEW, "--yes", *ACCEPT)
    assert code == 0, err
    assert tree(hub)[THIRD] == digests(tmp_path / "base")[THIRD]
    size = (tmp_path / "base" / THIRD).stat().st_size
    assert hub.traffic.sent() < size / 2  # the plan of the edit read its header
    published = json.loads(hub.read(NEW, "swsurgery.json"))
    assert published["elsewhere"] == [] and THIRD in published["files"]


def test_a_file_that_stayed_on_the_hub_and_is_not_copied_is_fetched_and_uploaded(hub, tmp_path, sparse, capsys):
    hub.repo(BASE).region = "eu"
    code, _, err = run(capsys, sparse, NEW, "--yes", *ACCEPT)
    assert code == 0 and f"downloading {THIRD}" in err
    assert tree(hub)[THIRD] == digests(tmp_path / "base")[THIRD]


def test_a_file_that_is_nowhere_is_refused(hub, sparse, capsys):
    hub.commit(BASE, {THIRD: None})
    record = json.loads((sparse / "swsurgery.json").read_text())
    record["base"]["revision"] = hub.head(BASE).oid
    (sparse / "swsurgery.json").write_text(json.dumps(record))
    code, _, err = run(capsys, sparse, NEW, "--dry-run")
    assert code == 2 and "neither in the directory nor in the base's repository" in err


def test_further_copies_of_the_weights_are_left_out_and_named(hub, tmp_path, commit, capsys):
    base = Path(snapshot_download(BASE, revision=commit))
    extra = tmp_path / "with-copies"
    extra.mkdir()
    for file in base.iterdir():
        (extra / file.name).write_bytes(file.read_bytes())
    manifest = tmp_path / "copies.yaml"
    manifest.write_text(f"version: 1\nbase: {{path: with-copies}}\nedits: [{EDIT}]\n")
    swsurgery.apply(manifest, output=tmp_path / "copies", check=CheckOptions("weights"))
    (tmp_path / "copies" / "pytorch_model.bin").write_bytes(b"weights")
    (tmp_path / "copies" / ".cache").mkdir()
    (tmp_path / "copies" / ".cache" / "x").write_text("x")
    code, document, err = run(capsys, tmp_path / "copies", NEW, "--yes", *ACCEPT, "--accept", "file-undeclared")
    assert code == 0, err
    assert {"pytorch_model.bin", ".cache"} <= {each["name"] for each in document["plan"]["left_out"]}
    assert not {"pytorch_model.bin", ".cache/x"} & set(tree(hub))
    assert document["plan"]["base"] is None and "nothing is copied" in " ".join(document["plan"]["notes"])


def test_an_edit_in_place_is_hashed_and_its_untouched_shards_are_copied(hub, tmp_path, commit, capsys):

    here = tmp_path / "here"
    snapshot_download(BASE, revision=commit, local_dir=here)
    manifest = tmp_path / "here.yaml"
    pins = f'{{{SECOND}: "{digests(tmp_path / "base")[SECOND]}"}}'
    base = f'{{repo_id: {BASE}, revision: "{commit}", sha256: {pins}}}'
    manifest.write_text(f"version: 1\nbase: {base}\nedits: [{EDIT}]\n")
    swsurgery.apply(manifest, in_place=True, base=str(here), check=CheckOptions("weights"))
    code, document, err = run(capsys, here, NEW, "--yes", *ACCEPT)
    assert code == 0, err
    assert how(document)[THIRD] == "copy"
    assert None not in [record["sha256"] for record in json.loads(hub.read(NEW, "swsurgery.json"))["files"].values()]


def test_a_directory_that_nobody_patched_is_refused(hub, tmp_path, capsys):
    code, _, err = run(capsys, write_base(tmp_path / "plain"), NEW, "--yes")
    assert code == 2 and "no record" in err and hub.traffic.requests() == []


def test_a_hub_that_serves_other_bytes_than_it_took_is_found_out(hub, patched, capsys):
    code, _, _ = run(capsys, patched, NEW, "--yes", *ACCEPT)
    assert code == 0
    sha256 = digests(patched)[SECOND]
    held = hub.state.paths[sha256]
    offset, _ = place(held, down(1), (2, 3))
    data = bytearray(held.read_bytes())
    data[offset] ^= 1
    held.write_bytes(data)
    code, document, _ = run(capsys, patched, NEW, *ACCEPT)
    assert code == 1
    assert [(f["rule"], f["index"]) for f in document["published"]["findings"]] == [("edit-changed", [2, 3])]


def test_a_hub_that_lists_another_file_is_found_out(hub, patched, capsys, monkeypatch):
    real = hub.state.add_commit

    def swapped(repo, ref, new, title, *rest):
        if title != "initial commit" and repo.repo_id == NEW:
            new = {**new, FIRST: new[THIRD]}
        return real(repo, ref, new, title, *rest)

    monkeypatch.setattr(hub.state, "add_commit", swapped)
    code, document, _ = run(capsys, patched, NEW, "--yes", *ACCEPT)
    assert code == 1
    assert [(f["rule"], f["file"]) for f in document["published"]["findings"]] == [("digest", FIRST)]


def test_a_base_in_a_folder_of_its_repository_is_copied_by_content(hub, tmp_path, capsys):
    whole = tmp_path / "whole"
    write_base(whole / "model")
    write_shard(whole / "other.safetensors", {})
    commit = hub.add_repo(BASE, whole)
    manifest = tmp_path / "folder.yaml"
    manifest.write_text(f'version: 1\nbase: {{repo_id: {BASE}, revision: "{commit}"}}\nedits: [{EDIT}]\n')
    swsurgery.apply(
        manifest, output=tmp_path / "out", base=f"hf://{BASE}@{commit}/model", check=CheckOptions("weights")
    )
    code, document, err = run(capsys, tmp_path / "out", NEW, "--yes", *ACCEPT)
    assert code == 0, err
    assert how(document)[THIRD] == "copy" and tree(hub)[THIRD] == digests(whole / "model")[THIRD]


def test_of_13_gigabytes_only_the_edited_shard_travels(hub, tmp_path, capsys):
    """Untouched shards are holes in a file with made-up digests: whoever read them would find that out."""
    base = tmp_path / "large"
    write_base(base)
    weight_map = json.loads((base / INDEX).read_text())["weight_map"]
    made_up = {}
    for n in range(2):
        name = f"model-0000{n + 4}-of-00005.safetensors"
        write_sparse_shard(base / name, f"large.{n}", "F16", 3_375_000, 1000)
        weight_map[f"large.{n}"], made_up[name] = name, str(n) * 64
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    commit = hub.add_repo(BASE, base, digests=made_up)
    assert sum(file.stat().st_size for file in base.iterdir()) > 13.5e9
    manifest = tmp_path / "large.yaml"
    manifest.write_text(f'version: 1\nbase: {{repo_id: {BASE}, revision: "{commit}"}}\nedits: [{EDIT}]\n')
    swsurgery.apply(manifest, output=tmp_path / "out", check=CheckOptions("weights"), for_publish=True)
    beginnings = sum(min(file.stat().st_size, HEAD) for file in base.glob("*.safetensors"))
    whole = sum((base / name).stat().st_size for name in (FIRST, SECOND, THIRD))  # the edited one, and small files
    assert hub.traffic.sent(origin="store") == beginnings + whole and hub.traffic.sent(origin="hub") < 20_000
    assert [hub.traffic.sent(digest, origin="store") for digest in made_up.values()] == [HEAD] * 2
    hub.traffic.clear()
    code, document, err = run(capsys, tmp_path / "out", NEW, "--dry-run")
    assert code == 0 and document["plan"]["copy_bytes"] > 13.5e9, err
    assert len(hub.traffic.requests("org/")) == 3  # the base at its commit, its files, what is there already
    code, document, err = run(capsys, tmp_path / "out", NEW, "--yes", *ACCEPT)
    assert code == 0, err
    edited = (base / SECOND).stat().st_size
    assert hub.traffic.received() < edited + 1_000_000 and hub.traffic.sent() < edited + 1_000_000
    assert {name: tree(hub)[name] for name in made_up} == made_up


@pytest.mark.parametrize(
    "words",
    [["edited"], ["a/b/c"], [""], *([NEW, option, name] for option in ("--tag", "--revision") for name in
     ("", "a b", "a..b", "a~1", "a^", "a:b", "-a", ".a", "a/", "a//b", "a.lock", "@", "HEAD", "refs/heads/a",
      "refs/pr/1"))],
)  # fmt: skip
def test_a_name_that_nothing_can_have_is_refused_before_anything_is_made(hub, patched, capsys, words):
    before = set(hub.state.repos)
    hub.traffic.clear()
    arguments = words if words[1:2] != ["--tag"] else [words[0], f"--tag={words[2]}"]
    arguments = arguments if words[1:2] != ["--revision"] else [words[0], f"--revision={words[2]}"]
    code, _, err = run(capsys, patched, *arguments, "--yes", *ACCEPT)
    assert code == 2 and err.count("\n") == 1, err
    assert set(hub.state.repos) == before and hub.traffic.requests() == []


def test_a_repository_is_not_given_a_second_set_of_weights(hub, tmp_path, patched, capsys):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "model.safetensors").write_bytes((patched / FIRST).read_bytes())
    before = hub.add_repo(NEW, tmp_path / "old")
    code, _, err = run(capsys, patched, NEW, "--yes", *ACCEPT)
    assert code == 2 and "contains other weights" in err and hub.head(NEW).oid == before
    hub.commit(NEW, {"model.safetensors": None})
    assert run(capsys, patched, NEW, "--yes", *ACCEPT)[0] == 0
    assert main(["verify", f"hf://{NEW}"]) == 0


def test_a_gitignore_of_the_repository_leaves_nothing_out(hub, patched, capsys):
    hub.add_repo(NEW)
    hub.commit(NEW, {".gitignore": b"*.safetensors\n*.json\n"})
    code, document, err = run(capsys, patched, NEW, "--yes", *ACCEPT)
    assert code == 0 and document["published"]["findings"] == [], err
    assert tree(hub)[SECOND] == digests(patched)[SECOND] and tree(hub)["config.json"] == digests(patched)["config.json"]

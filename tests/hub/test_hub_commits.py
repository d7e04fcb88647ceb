"""The real client changes repositories: a commit is whole or it is not, and copies move no bytes or are refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from contextlib import nullcontext

import httpx2
import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    constants,
)
from huggingface_hub.errors import (
    BadRequestError,
    FileDuplicationError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

SHARD = "model.safetensors"


def copy_of(hub, path: str, to: str | None = None, revision: str | None = None) -> CommitOperationCopy:
    """A copy out of org/base."""
    return CommitOperationCopy(path, to or path, revision, src_repo_id=hub.name("org/base"), src_repo_type="model")


def refusal(call, *arguments, **named) -> int:
    """The status with which the server refuses a call of the client."""
    with pytest.raises(HfHubHTTPError) as caught:
        call(*arguments, **named)
    return caught.value.response.status_code


def test_a_repository_is_made_once(any_hub):
    any_hub.add_repo("org/new")
    api, name = any_hub.api(), any_hub.name("org/new")
    assert api.repo_exists(name)
    assert [each.title for each in api.list_repo_commits(name)] == ["initial commit"]
    assert refusal(api.create_repo, name) == 409
    assert api.create_repo(name, exist_ok=True).repo_id == name
    api.update_repo_settings(name, private=True)
    assert api.repo_info(name).private
    api.delete_repo(name)
    assert not api.repo_exists(name)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(name)


def test_only_the_owner_of_a_namespace_writes_there(hub, model):
    hub.add_repo("meta/base", model)
    assert refusal(hub.api().create_repo, "meta/new") == 403
    reader = HfApi(endpoint=hub.endpoint, token=hub.add_user("bob", write=False))
    assert refusal(reader.create_repo, "bob/new") == 403
    assert refusal(hub.api().create_tag, "meta/base", tag="v1") == 403
    upload = hub.api().upload_file
    assert refusal(upload, path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="meta/base") == 403
    assert refusal(hub.api().auth_check, "meta/base", write=True) == 403
    hub.api().auth_check("meta/base")


def test_a_folder_arrives_as_it_is(any_hub, model):
    any_hub.add_repo("org/new")
    name = any_hub.name("org/new")
    done = any_hub.api().upload_folder(repo_id=name, folder_path=model, commit_message="All of it")
    assert any_hub.api().repo_info(name).sha == done.oid
    for path in (SHARD, "config.json", "original/params.json", "README.md"):
        assert any_hub.read("org/new", path) == (model / path).read_bytes()
    rows = {each.path: each for each in any_hub.api().list_repo_tree(name, recursive=True)}
    assert rows[SHARD].lfs.sha256 == hashlib.sha256((model / SHARD).read_bytes()).hexdigest()
    assert rows["config.json"].lfs is None
    assert [each.title for each in any_hub.api().list_repo_commits(name)] == ["All of it", "initial commit"]


def test_a_large_object_goes_to_the_second_origin_and_only_once(hub, model):
    hub.add_repo("org/new")
    size = (model / SHARD).stat().st_size
    for path, sent in ((SHARD, size), ("again.safetensors", 0)):
        hub.traffic.clear()
        hub.api().upload_file(path_or_fileobj=model / SHARD, path_in_repo=path, repo_id="org/new")
        assert hub.traffic.received(origin="store") == sent
        assert hub.traffic.received(origin="hub") < 3000
        assert hub.read("org/new", path) == (model / SHARD).read_bytes()


def test_an_object_in_parts(hub, model):
    hub.add_repo("org/new")
    hub.part_size = 100_000
    hub.api().upload_file(path_or_fileobj=model / SHARD, path_in_repo=SHARD, repo_id="org/new")
    sizes = [each.received for each in hub.traffic.requests("part=", method="PUT", origin="store")]
    assert sizes == [100_000] * 3 + [(model / SHARD).stat().st_size - 300_000]
    assert hub.read("org/new", SHARD) == (model / SHARD).read_bytes()


def test_the_store_refuses_other_bytes_than_were_announced(hub):
    hub.add_repo("org/new")
    batch = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": "ab" * 32, "size": 3}]}
    url = f"{hub.endpoint}/org/new.git/info/lfs/objects/batch"
    answer = httpx2.post(url, json=batch, headers={"Authorization": f"Bearer {hub.token}"}).json()
    link = answer["objects"][0]["actions"]["upload"]["href"]
    assert httpx2.put(link, content=b"abc").status_code == 400
    assert hub.repo("org/new").objects == set()
    assert httpx2.put(link + "0", content=b"abc").status_code == 403


def test_a_parent_that_moved_is_told(any_hub, model):
    first = any_hub.add_repo("org/base", model)
    api, name = any_hub.api(), any_hub.name("org/base")

    def add(text: bytes):
        operations = [CommitOperationAdd("note.txt", text)]
        return api.create_commit(name, operations, commit_message="note", parent_commit=first)

    second = add(b"one").oid
    assert refusal(add, b"two") == 412
    assert api.repo_info(name).sha == second
    assert any_hub.read("org/base", "note.txt") == b"one"


def test_a_copy_within_the_repository(any_hub, model):
    any_hub.add_repo("org/base", model)
    name = any_hub.name("org/base")
    operations = [CommitOperationCopy(SHARD, "copy.safetensors"), CommitOperationCopy("config.json", "copy.json")]
    any_hub.api().create_commit(name, operations, commit_message="copies")
    assert any_hub.read("org/base", "copy.safetensors") == (model / SHARD).read_bytes()
    assert any_hub.read("org/base", "copy.json") == (model / "config.json").read_bytes()


def test_a_copy_from_another_repository_moves_no_large_bytes(hub, model):
    head = hub.add_repo("org/base", model)
    hub.commit("org/base", {"config.json": b"changed since"})
    hub.add_repo("org/new")
    hub.traffic.clear()
    operations = [copy_of(hub, SHARD, revision=head), copy_of(hub, "config.json", revision=head)]
    hub.api().create_commit("org/new", operations, commit_message="copies")
    assert hub.traffic.requests(origin="store") == []
    assert [each.received for each in hub.traffic.requests("/lfs-files/duplicate")][0] < 300
    assert len(hub.traffic.requests("resolve/.*config.json", method="GET")) == 1  # small files go by the client
    assert hub.read("org/new", SHARD) == (model / SHARD).read_bytes()
    assert hub.read("org/new", "config.json") == (model / "config.json").read_bytes()


def test_a_copy_is_refused_without_a_xet_hash_before_it_is_asked_for(hub, model):
    hub.add_repo("org/base", model, xet=False)
    before = hub.add_repo("org/new")
    with pytest.raises(ValueError, match="no xet hash"):
        hub.api().create_commit("org/new", [copy_of(hub, SHARD)], commit_message="copies")
    assert hub.traffic.requests("/lfs-files/duplicate") == []
    assert hub.head("org/new").oid == before


def test_a_copy_is_refused_between_regions(hub, model):
    hub.add_repo("org/base", model, region="eu")
    before = hub.add_repo("org/new")
    with pytest.raises(FileDuplicationError, match="different storage regions"):
        hub.api().create_commit("org/new", [copy_of(hub, SHARD)], commit_message="copies")
    assert hub.head("org/new").oid == before
    assert hub.repo("org/new").objects == set()


def test_a_copy_is_refused_out_of_what_may_not_be_read(hub, model):
    hub.add_repo("org/base", model)
    token = hub.add_user("bob")
    bob = HfApi(endpoint=hub.endpoint, token=token)
    bob.create_repo("bob/new")
    hub.repo("org/base").gated = "auto"
    assert refusal(bob.create_commit, "bob/new", [copy_of(hub, SHARD)], commit_message="copies") == 403
    hub.repo("org/base").private = True
    with pytest.raises(RepositoryNotFoundError):
        bob.create_commit("bob/new", [copy_of(hub, SHARD)], commit_message="copies")
    assert len(hub.repo("bob/new").commits) == 1


def test_a_copy_is_refused_into_what_may_not_be_written(hub, model):
    head = hub.add_repo("org/base", model)
    before = hub.add_repo("meta/theirs")
    assert refusal(hub.api().create_commit, "meta/theirs", [copy_of(hub, SHARD)], commit_message="copies") == 403
    url = f"{hub.endpoint}/api/models/org/base/lfs-files/duplicate"
    files = [{"sha256": hub.head("org/base").tree[SHARD].sha256, "xetHash": "0"}]
    body = {"target": {"type": "model", "name": "meta/theirs"}, "files": files, "revision": head}
    for token, status in ((hub.token, 403), (hub.add_user("bob", ["meta"], write=False), 403), (None, 401)):
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        assert httpx2.post(url, json=body, headers=headers).status_code == status
    assert hub.repo("meta/theirs").objects == set() and hub.head("meta/theirs").oid == before


def test_what_is_deleted_is_gone_and_the_old_commit_still_has_it(any_hub, model):
    first = any_hub.add_repo("org/base", model)
    api, name = any_hub.api(), any_hub.name("org/base")
    operations = [CommitOperationDelete("original/"), CommitOperationDelete("config.json")]
    api.create_commit(name, operations, commit_message="less")
    left = set(api.list_repo_files(name)) - {".gitattributes"}
    assert left == {"README.md", SHARD}
    assert any_hub.read("org/base", "config.json", first) == (model / "config.json").read_bytes()
    with pytest.raises(RemoteEntryNotFoundError, match="doesn't exist"):
        api.create_commit(name, [CommitOperationDelete("config.json")], commit_message="again")


def test_what_is_the_same_makes_no_commit(any_hub, model):
    first = any_hub.add_repo("org/base", model)
    done = any_hub.api().upload_folder(repo_id=any_hub.name("org/base"), folder_path=model)
    assert done.oid == first


HEADERS = (None, 7, "x", ["x"], {}, {"summary": ""}, {"summary": ["x"]}, {"summary": "x", "parentCommit": 7})
"""What is no header of a commit; a later one takes the place of an earlier one."""

ADD = {"key": "file", "value": {"path": "new.txt", "content": "eA==", "encoding": "base64"}}


@pytest.mark.parametrize(
    "last",
    [
        b"{not json",
        json.dumps({"key": "file", "value": {"path": "bad.txt", "content": "%%%"}}).encode(),
        json.dumps({"key": "lfsFile", "value": {"path": "x.bin", "oid": "cd" * 32, "algo": "sha256"}}).encode(),
        json.dumps({"key": "deletedFile", "value": {"path": "nowhere"}}).encode(),
        json.dumps({"key": "file", "value": {"path": "../x", "content": "eA=="}}).encode(),
        json.dumps({"key": "file", "value": {"path": "new.txt/below", "content": "eA=="}}).encode(),
        json.dumps({"key": "unheard-of", "value": {"path": "x"}}).encode(),
        json.dumps({"key": "deletedFile", "value": "config.json"}).encode(),
        *(json.dumps({"key": "header", "value": value}).encode() for value in HEADERS),
    ],
)
def test_a_commit_with_one_bad_line_changes_nothing(hub, model, last):
    first = hub.add_repo("org/base", model)
    url, headers = f"{hub.endpoint}/api/models/org/base/commit/main", {"Authorization": f"Bearer {hub.token}"}
    lines = [json.dumps({"key": "header", "value": {"summary": "x"}}).encode(), json.dumps(ADD).encode()]
    assert httpx2.post(url, content=b"\n".join([*lines, last]), headers=headers).status_code in (400, 404)
    assert hub.head("org/base").oid == first and len(hub.repo("org/base").commits) == 1
    assert httpx2.post(url, content=b"\n".join(lines), headers=headers).status_code == 200
    assert hub.read("org/base", "new.txt") == b"x"


def test_a_pull_request_leaves_the_main_branch_alone_until_it_is_merged(any_hub, model):
    first = any_hub.add_repo("org/base", model)
    api, name = any_hub.api(), any_hub.name("org/base")
    done = api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id=name, create_pr=True)
    assert done.pr_revision == "refs/pr/1"
    assert api.repo_info(name).sha == first
    assert api.repo_info(name, revision="refs/pr/1").sha == done.oid
    assert any_hub.read("org/base", "x.txt", "refs/pr/1") == b"x"
    references = api.list_repo_refs(name, include_pull_requests=True)
    assert [(each.ref, each.target_commit) for each in references.pull_requests] == [("refs/pr/1", done.oid)]
    details = api.get_discussion_details(name, done.pr_num)
    assert details.is_pull_request and details.status == "open" and details.target_branch == "refs/heads/main"
    assert done.oid in [getattr(event, "oid", None) for event in details.events]
    api.merge_pull_request(name, done.pr_num)
    assert any_hub.read("org/base", "x.txt") == b"x"
    assert api.get_discussion_details(name, done.pr_num).status == "merged"
    assert [each.num for each in api.get_repo_discussions(name)] == [1]


def test_a_stranger_may_open_a_pull_request_and_not_merge_it(hub, model):
    hub.add_repo("meta/base", model)
    api = hub.api()
    shard = model / SHARD
    done = api.upload_file(path_or_fileobj=shard, path_in_repo="x.bin", repo_id="meta/base", create_pr=True)
    again = api.upload_file(path_or_fileobj=b"y", path_in_repo="y.txt", repo_id="meta/base", revision="refs/pr/1")
    assert hub.head("meta/base", "refs/pr/1").oid == again.oid != done.oid
    assert refusal(api.merge_pull_request, "meta/base", done.pr_num) == 403
    hub.commit("meta/base", {"y.txt": b"other"})
    owner = HfApi(endpoint=hub.endpoint, token=hub.add_user("zoe", ["meta"]))
    assert refusal(owner.merge_pull_request, "meta/base", 1) == 409
    said = owner.comment_discussion("meta/base", 1, "conflict")
    assert said.content == "conflict" and said.author == "zoe"
    assert owner.change_discussion_status("meta/base", 1, "closed").new_status == "closed"


def test_tags_and_branches(any_hub, model):
    first = any_hub.add_repo("org/base", model)
    api, name = any_hub.api(), any_hub.name("org/base")
    api.create_tag(name, tag="base/v1", revision=first)
    assert refusal(api.create_tag, name, tag="base/v1") == 409
    api.create_tag(name, tag="base/v1", exist_ok=True)
    with pytest.raises(RevisionNotFoundError):
        api.create_tag(name, tag="v2", revision="nowhere")
    api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id=name)
    references = api.list_repo_refs(name)
    assert [(each.name, each.target_commit) for each in references.tags] == [("base/v1", first)]
    api.create_branch(name, branch="side", revision="base/v1")
    assert refusal(api.create_branch, name, branch="side") == 409
    assert api.repo_info(name, revision="side").sha == first
    api.delete_branch(name, branch="side")
    api.delete_tag(name, tag="base/v1")
    assert [each.name for each in api.list_repo_refs(name).branches] == ["main"]
    assert refusal(api.delete_branch, name, branch="main") == 403


def test_a_cards_metadata_is_judged_before_anything_is_uploaded(any_hub):
    any_hub.add_repo("org/new")
    api, name = any_hub.api(), any_hub.name("org/new")
    bad = b"---\nlicense: [\n---\n"
    with pytest.raises(ValueError, match="Invalid metadata"):
        api.upload_file(path_or_fileobj=bad, path_in_repo="README.md", repo_id=name)
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.upload_file(path_or_fileobj=b"# no metadata\n", path_in_repo="README.md", repo_id=name)


def test_an_upload_by_xet_is_refused_in_one_piece(hub, model, monkeypatch):
    before = hub.add_repo("org/new")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(ConnectionError, match="404"):  # the client falls back to nothing
        hub.api().upload_file(path_or_fileobj=model / SHARD, path_in_repo=SHARD, repo_id="org/new")
    assert hub.head("org/new").oid == before
    assert hub.traffic.requests("/xet-write-token/")


NAMES = (
    "a", "a/b", "a-b", "a.b", "@", "a@b", "é", "A#1", "a b", "a..b", "a~1", "a^", "a:b", "a?", "a*", "a[", "a\\b",
    "a\x7f", "a@{b", "a//b", "/a", "a/", ".a", "a/.b", "a.", "a/b.", "a.lock", "a.lock/b", "-a", "HEAD",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_ref_has_a_name_that_git_takes(hub, name):
    if shutil.which("git") is None:
        pytest.skip("needs git")
    taken = subprocess.run(["git", "check-ref-format", "--branch", name], capture_output=True).returncode == 0
    hub.add_repo("org/new")
    for kind in ("branch", "tag"):
        with nullcontext() if taken else pytest.raises(BadRequestError):
            getattr(hub.api(), f"create_{kind}")("org/new", **{kind: name})
    made = {"refs/heads/main"} | ({f"refs/heads/{name}", f"refs/tags/{name}"} if taken else set())
    assert set(hub.repo("org/new").refs) == made


def test_bad_requests_are_bad_requests(hub):
    hub.add_repo("org/new")
    for name in ("refs/pr/5", "refs/heads/a"):
        with pytest.raises(BadRequestError):
            hub.api().create_branch("org/new", branch=name)


def test_copies_of_what_is_there_already_still_make_a_commit(hub, model):
    hub.add_repo("org/base", model)
    hub.add_repo("org/new")
    heads = []
    for _ in range(2):
        done = hub.api().create_commit("org/new", [copy_of(hub, SHARD)], commit_message="copies")
        heads.append((done.oid, hub.head("org/new").tree[SHARD]))
    assert heads[0][0] != heads[1][0] and heads[0][1] == heads[1][1]  # the client does not compare other repositories

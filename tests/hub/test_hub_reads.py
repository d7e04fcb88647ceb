"""The real client reads from the server what was put there, and no more bytes than it asked for."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from hub.fixture import OutsideHub, point_client_at
from huggingface_hub import HfApi, HfFileSystem, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

SHARD = "model.safetensors"


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def bearer(hub) -> dict[str, str]:
    return {"Authorization": f"Bearer {hub.token}"}


def git_blob(content: bytes) -> str:
    """The name that git itself gives to a blob."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    done = subprocess.run(["git", "hash-object", "--stdin"], input=content, capture_output=True, check=True)
    return done.stdout.decode().strip()


def test_a_snapshot_is_the_folder_that_was_put_there(any_hub, model):
    head = any_hub.add_repo("org/base", model)
    snapshot = Path(snapshot_download(any_hub.name("org/base")))
    got = files_of(snapshot)
    got.pop(".gitattributes", None)  # other endpoints add one
    assert got == files_of(model)
    assert snapshot.name == head


def test_a_small_file_comes_by_a_redirect_within_the_host_as_well(hub, model):
    head = hub.add_repo("org/base", model, private=True)
    plain = httpx2.head(f"{hub.endpoint}/org/base/resolve/main/config.json", headers=bearer(hub))
    hub.resolve_cache = True
    answer = httpx2.head(f"{hub.endpoint}/org/base/resolve/main/config.json", headers=bearer(hub))
    place = f"/api/resolve-cache/models/org/base/{head}/config.json"
    assert (answer.status_code, answer.headers["Location"]) == (307, place)
    there = httpx2.head(hub.endpoint + place, headers=bearer(hub))
    assert (there.status_code, there.headers["ETag"]) == (plain.status_code, plain.headers["ETag"]) and plain.is_success
    assert httpx2.head(hub.endpoint + place).status_code == 401
    hub.traffic.clear()
    snapshot = Path(snapshot_download("org/base"))
    assert files_of(snapshot) == files_of(model) and snapshot.name == head
    assert hub.traffic.requests("^/api/resolve-cache/.*/original/params.json")
    assert not hub.traffic.requests(f"^/api/resolve-cache/.*{SHARD}")
    assert set(hub.traffic.authorizations("hub")) == {f"Bearer {hub.token}"}


def test_a_cached_file_is_not_sent_again(hub, model):
    hub.add_repo("org/base", model)
    first = hf_hub_download("org/base", SHARD)
    size = (model / SHARD).stat().st_size
    assert hub.traffic.sent(origin="store") == size
    assert hub.traffic.sent_by_path()[f"/objects/{hashlib.sha256(Path(first).read_bytes()).hexdigest()}"] == size
    hub.traffic.clear()
    assert hf_hub_download("org/base", SHARD) == first
    assert [each.method for each in hub.traffic.requests()] == ["HEAD"]
    assert Path(first).resolve().name == hashlib.sha256((model / SHARD).read_bytes()).hexdigest()


def test_sizes_and_digests_are_those_of_git(any_hub, model):
    head = any_hub.add_repo("org/base", model)
    info = any_hub.api().repo_info(any_hub.name("org/base"), files_metadata=True)
    assert info.sha == head
    assert info.card_data.license == "apache-2.0"
    siblings = {each.rfilename: each for each in info.siblings}
    for name, content in files_of(model).items():
        sibling = siblings[name]
        assert sibling.size == len(content)
        if name == SHARD:
            sha256 = hashlib.sha256(content).hexdigest()
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()
            assert sibling.lfs == {"size": len(content), "sha256": sha256, "pointer_size": len(pointer)}
            assert sibling.blob_id == git_blob(pointer)
        else:
            assert sibling.lfs is None
            assert sibling.blob_id == git_blob(content)


def test_a_tree_in_pages_is_the_tree_in_one(hub, model):
    hub.add_repo("org/base", model)
    whole = list(hub.api().list_repo_tree("org/base", recursive=True))
    assert {each.path for each in whole} == {*files_of(model), "original"}
    hub.page_size = 2
    hub.traffic.clear()
    assert list(hub.api().list_repo_tree("org/base", recursive=True)) == whole
    assert len(hub.traffic.requests("/tree/")) == 3
    assert [each.path for each in hub.api().list_repo_tree("org/base", "original")] == ["original/params.json"]
    with pytest.raises(RemoteEntryNotFoundError):
        list(hub.api().list_repo_tree("org/base", "nowhere"))


def test_expanded_rows_name_the_last_commit_of_each_file(hub, model):
    first = hub.add_repo("org/base", model)
    second = hub.commit("org/base", {"config.json": b'{"model_type": "mistral"}\n'})
    rows = {each.path: each for each in hub.api().list_repo_tree("org/base", recursive=True, expand=True)}
    assert rows["config.json"].last_commit.oid == second
    assert rows[SHARD].last_commit.oid == first
    assert rows["original"].last_commit.oid == first
    assert [each.commit_id for each in hub.api().list_repo_commits("org/base")] == [second, first]


def test_paths_info_leaves_out_what_is_not_there(any_hub, model):
    any_hub.add_repo("org/base", model)
    rows = any_hub.api().get_paths_info(any_hub.name("org/base"), [SHARD, "nothing", "original"])
    assert [(type(each).__name__, each.path) for each in rows] == [("RepoFile", SHARD), ("RepoFolder", "original")]


@pytest.mark.parametrize("xet", [True, False])
def test_a_xet_hash_is_there_only_where_the_repository_has_them(hub, model, xet):
    hub.add_repo("org/base", model, xet=xet)
    shard, config = hub.api().get_paths_info("org/base", [SHARD, "config.json"])
    assert (shard.xet_hash is not None) == xet
    assert config.xet_hash is None
    assert Path(hf_hub_download("org/base", SHARD)).read_bytes() == (model / SHARD).read_bytes()


def test_a_file_system_reads_ranges_and_moves_only_those(hub, model):
    hub.add_repo("org/base", model)
    files = HfFileSystem(endpoint=hub.endpoint, token=hub.token, skip_instance_cache=True)
    with files.open(f"org/base/{SHARD}", block_size=64, cache_type="none") as file:
        hub.traffic.clear()
        file.seek(1000)
        assert file.read(64) == (model / SHARD).read_bytes()[1000:1064]
        assert [each.range for each in hub.traffic.requests(origin="store")] == ["bytes=1000-1063"]
        assert hub.traffic.sent() == 64
    metadata = hub.api().parse_safetensors_file_metadata("org/base", SHARD)
    assert metadata.tensors["w"].shape == [300_000]


@pytest.mark.parametrize(
    ("asked", "status", "part"),
    [
        ("bytes=0-0", 206, slice(0, 1)),
        ("bytes=5-8", 206, slice(5, 9)),
        ("bytes=10-", 206, slice(10, None)),
        ("bytes=-3", 206, slice(-3, None)),
        ("bytes=0-99999999", 206, slice(None)),
        ("bytes=99999999-", 416, None),
        ("bytes=8-5", 416, None),
        ("bytes=0-1,3-4", 200, slice(None)),
        (None, 200, slice(None)),
    ],
)
@pytest.mark.parametrize("name", [SHARD, "config.json"])
def test_ranges(hub, model, name, asked, status, part):
    hub.add_repo("org/base", model)
    content = (model / name).read_bytes()
    url = f"{hub.endpoint}/org/base/resolve/main/{name}"
    answer = httpx2.get(url, headers={"Range": asked} if asked else {}, follow_redirects=True)
    assert answer.status_code == status
    if part is None:
        assert answer.headers["Content-Range"] == f"bytes */{len(content)}"
        return
    assert answer.content == content[part]
    if status == 206:
        start, stop, _ = part.indices(len(content))
        assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{len(content)}"


def test_one_connection_serves_request_after_request(hub, model):
    hub.add_repo("org/base", model)
    url = f"{hub.endpoint}/org/base/resolve/main/config.json"
    with httpx2.Client() as client:
        client.get(url)
        before = set(hub.front.connections)
        for _ in range(5):
            assert client.get(url).status_code == 200
        assert client.post(f"{hub.endpoint}/nowhere", content=b"x" * 100_000).status_code == 404
        assert client.get(url, headers={"Range": "bytes=0-1"}).content == b'{"'
        assert set(hub.front.connections) == before != set()


def test_a_revision_by_each_of_its_names(any_hub, model):
    first = any_hub.add_repo("org/base", model)
    api, name = any_hub.api(), any_hub.name("org/base")
    api.create_tag(name, tag="v1")
    api.create_branch(name, branch="side/line", revision=first)
    for revision in ("main", "v1", "side/line", first):
        assert api.repo_info(name, revision=revision).sha == first
    for wrong in ("nowhere", "0" * 40):
        with pytest.raises(RevisionNotFoundError):
            api.repo_info(name, revision=wrong)
        with pytest.raises(RevisionNotFoundError):
            hf_hub_download(name, "config.json", revision=wrong)


def test_what_is_not_there_is_told_apart(any_hub, model):
    any_hub.add_repo("org/base", model)
    with pytest.raises(RepositoryNotFoundError):
        any_hub.api().repo_info(any_hub.name("org/base") + "-not")
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(any_hub.name("org/base"), "missing.json")
    assert any_hub.api().file_exists(any_hub.name("org/base"), "config.json")
    assert not any_hub.api().file_exists(any_hub.name("org/base"), "missing.json")


def test_a_private_repository_is_missing_to_others(any_hub, model):
    any_hub.add_repo("org/secret", model, private=True)
    assert any_hub.api().repo_info(any_hub.name("org/secret")).private
    with pytest.raises(RepositoryNotFoundError):
        HfApi(endpoint=any_hub.endpoint, token=False).repo_info(any_hub.name("org/secret"))
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download(any_hub.name("org/secret"), "config.json", token=False)


def test_a_private_repository_is_missing_to_a_stranger_and_not_to_a_member(hub, model):
    hub.add_repo("org/secret", model, private=True)
    with pytest.raises(RepositoryNotFoundError) as caught:
        HfApi(endpoint=hub.endpoint, token=hub.add_user("eve")).repo_info("org/secret")
    assert caught.value.response.status_code == 404
    member = HfApi(endpoint=hub.endpoint, token=hub.add_user("bob", ["org"], write=False))
    assert member.repo_info("org/secret").private


def test_a_gated_repository_shows_its_name_and_not_its_files(hub, model):
    hub.add_repo("meta/gated", model, gated="manual")
    stranger = hub.add_user("eve")
    for token, status in ((stranger, 403), (False, 401)):
        assert HfApi(endpoint=hub.endpoint, token=token).repo_info("meta/gated").gated == "manual"
        with pytest.raises(GatedRepoError) as caught:
            hf_hub_download("meta/gated", "config.json", token=token)
        assert caught.value.response.status_code == status
    hub.repo("meta/gated").granted.add("eve")
    assert Path(hf_hub_download("meta/gated", "config.json", token=stranger)).read_text()


def test_whoami_and_a_token_that_nobody_has(any_hub):
    assert any_hub.api().whoami()["name"]
    with pytest.raises(HfHubHTTPError) as caught:
        HfApi(endpoint=any_hub.endpoint, token="hf_nobody").whoami()
    assert caught.value.response.status_code == 401


@pytest.mark.parametrize("xet", [True, False])
def test_no_token_reaches_the_second_origin(hub, model, xet):
    hub.add_repo("org/base", model, private=True, xet=xet)
    snapshot_download("org/base")
    assert hub.traffic.requests(origin="store")
    assert hub.traffic.authorizations("store") == []
    assert set(hub.traffic.authorizations("hub")) == {f"Bearer {hub.token}"}


def test_the_second_origin_takes_neither_a_token_nor_an_old_link(hub, model):
    hub.add_repo("org/base", model)
    link = httpx2.head(f"{hub.endpoint}/org/base/resolve/main/{SHARD}").headers["Location"]
    assert link.startswith(hub.store.url) and not link.startswith(hub.endpoint)
    assert httpx2.get(link).content == (model / SHARD).read_bytes()
    assert httpx2.get(link, headers={"Authorization": "Bearer x"}).status_code == 400
    assert hub.traffic.authorizations("store") == ["Bearer x"] and len(hub.leaks) == 1
    hub.expire_links()
    assert httpx2.get(link).status_code == 403
    hub.leaks.clear()


def test_a_huge_sparse_file_is_served_without_being_read(hub, tmp_path):
    folder = tmp_path / "huge"
    folder.mkdir()
    size = 20 << 30
    with (folder / SHARD).open("wb") as file:
        file.truncate(size)
        file.seek(size - 4)
        file.write(b"tail")
    hub.add_repo("org/huge", folder, digests={SHARD: "ab" * 32})
    assert (folder / SHARD).stat().st_blocks * 512 < 1 << 20
    files = HfFileSystem(endpoint=hub.endpoint, token=hub.token, skip_instance_cache=True)
    assert files.cat_file(f"org/huge/{SHARD}", start=size - 6, end=size) == b"\0\0tail"
    assert hub.traffic.sent(origin="store") == 6


def test_with_xet_a_file_of_a_repository_without_it_still_comes(hub, model, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.add_repo("org/plain", model, xet=False)
    assert files_of(Path(snapshot_download("org/plain"))) == files_of(model)


def test_children_reach_the_server_through_the_environment(any_hub, model):
    any_hub.add_repo("org/base", model)
    code = "import sys; from huggingface_hub import hf_hub_download; print(hf_hub_download(*sys.argv[1:]))"
    command = [sys.executable, "-c", code, any_hub.name("org/base"), "config.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).read_bytes() == (model / "config.json").read_bytes()
    assert done.stdout.startswith(os.environ["HF_HOME"])


def test_with_xet_a_snapshot_of_a_repository_on_xet_does_not_come(hub, model, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.add_repo("org/base", model)
    with pytest.raises(HfHubHTTPError, match="no Xet storage"):  # the client falls back to nothing
        snapshot_download("org/base")
    assert hub.traffic.requests("/xet-read-token/")


@pytest.mark.parametrize("disabled", [None, "1"])
def test_at_another_endpoint_xet_and_proxies_are_as_the_environment_has_them(tmp_path, monkeypatch, disabled):
    for name in ("HF_HUB_DISABLE_XET", "NO_PROXY"):
        monkeypatch.setenv(name, disabled) if disabled else monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", bool(disabled))
    waits = point_client_at(OutsideHub("https://hub.example/", "hf_x"), tmp_path, monkeypatch)
    assert (os.environ["HF_ENDPOINT"], os.environ["HF_TOKEN"]) == ("https://hub.example", "hf_x") and waits == []
    assert os.environ.get("HF_HUB_DISABLE_XET") == os.environ.get("NO_PROXY") == disabled
    assert bool(disabled) is constants.HF_HUB_DISABLE_XET


def test_at_the_tests_own_server_there_is_no_xet_and_no_proxy(hub):
    """The twin."""
    assert os.environ["HF_HUB_DISABLE_XET"] == "1" and constants.HF_HUB_DISABLE_XET
    assert os.environ["NO_PROXY"] == "127.0.0.1"

"""Each scripted fault strikes once, where it was told to, and the real client sees what it would see out there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from hub.faults import Answer, CutAnswer, CutRequest, Delay, Drop, ObjectError, Redirect
from hub.traffic import Traffic
from huggingface_hub import CommitOperationAdd, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

SHARD = "model.safetensors"


def add(hub, name: str = "note.txt", content: bytes | Path = b"x", **named):
    operations = [CommitOperationAdd(name, content)]
    return hub.api().create_commit("org/base", operations, commit_message="add", **named)


@pytest.mark.parametrize(
    ("action", "error"),
    [
        (Answer(401, code="RepoNotFound"), RepositoryNotFoundError),
        (Answer(403, code="GatedRepo"), GatedRepoError),
        (Answer(404, code="RepoNotFound"), RepositoryNotFoundError),
        (Answer(404, code="RevisionNotFound"), RevisionNotFoundError),
        (Answer(404, code="EntryNotFound"), RemoteEntryNotFoundError),
        (Answer(409), HfHubHTTPError),
        (Answer(412), HfHubHTTPError),
        (Answer(429, retry_after=3), HfHubHTTPError),
        (Answer(500), HfHubHTTPError),
        (Answer(502), HfHubHTTPError),
        (Answer(503), HfHubHTTPError),
    ],
)
def test_an_answer_is_the_error_that_the_client_knows_and_the_next_call_is_well(hub, model, action, error):
    head = hub.add_repo("org/base", model)
    fault = hub.fail("GET", "/api/models/org/base", action)
    with pytest.raises(error, match="scripted") as caught:
        hub.api().repo_info("org/base")
    assert caught.value.response.status_code == action.status
    assert hub.api().repo_info("org/base").sha == head
    assert (fault.hits, fault.seen) == (1, 2)


def test_the_nth_request_and_those_after_it(hub, model):
    hub.add_repo("org/base", model)
    hub.fail("*", "org/base", Answer(418), nth=2, times=2)
    url = f"{hub.endpoint}/api/models/org/base"
    assert [httpx2.get(url).status_code for _ in range(5)] == [200, 418, 418, 200, 200]
    hub.fail("GET", "org/base", Answer(418), times=None)
    assert [httpx2.get(url).status_code for _ in range(3)] == [418] * 3
    hub.faults.clear()
    assert httpx2.get(url).status_code == 200


def test_a_listing_waits_as_long_as_it_is_told_and_goes_on(hub, model):
    hub.add_repo("org/base", model)
    hub.fail("GET", "/tree/", Answer(429, retry_after=7))
    assert len(list(hub.api().list_repo_tree("org/base"))) == 4
    assert hub.waits == [8.0]  # one second is the client's own


def test_an_upload_is_tried_again_and_a_commit_is_not(hub, model):
    first = hub.add_repo("org/base", model)
    (model / "new.bin").write_bytes(b"n" * 5000)
    hub.fail("PUT", "/objects/", Answer(503), times=2)
    done = add(hub, "new.bin", model / "new.bin")
    assert hub.waits == [1, 2] and len(hub.traffic.requests(method="PUT")) == 3
    hub.waits.clear()
    hub.fail("POST", "/commit/", Answer(503))
    with pytest.raises(HfHubHTTPError):
        add(hub)
    assert hub.waits == []
    assert hub.head("org/base").oid == done.oid != first


def test_a_dropped_commit_did_not_happen_and_one_whose_answer_was_lost_did(hub, model):
    first = hub.add_repo("org/base", model)
    hub.fail("POST", "/commit/", Drop())
    with pytest.raises(httpx2.RemoteProtocolError):
        add(hub, parent_commit=first)
    assert hub.head("org/base").oid == first
    hub.fail("POST", "/commit/", Drop(done=True))
    with pytest.raises(httpx2.RemoteProtocolError):
        add(hub, parent_commit=first)
    assert hub.head("org/base").parent == first
    assert hub.read("org/base", "note.txt") == b"x"
    hub.fail("POST", "/commit/", Drop(done=True, reset=True))
    with pytest.raises(httpx2.NetworkError):
        add(hub, "other.txt")
    assert hub.read("org/base", "other.txt") == b"x"


def test_an_answer_cut_after_its_headers(hub, model):
    first = hub.add_repo("org/base", model)
    hub.fail("POST", "/commit/", CutAnswer(0))
    with pytest.raises(httpx2.RemoteProtocolError, match="without sending complete message body"):
        add(hub)
    assert hub.head("org/base").parent == first


@pytest.mark.parametrize(("at", "kept"), [(0, 0), (999, 0), (100_500, 100_000)])
def test_a_download_cut_at_a_byte_goes_on_from_the_last_whole_piece(hub, model, monkeypatch, at, kept):
    hub.add_repo("org/base", model)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # of 10 MiB otherwise: the client keeps whole ones
    fault = hub.fail("GET", "/objects/", CutAnswer(at))
    got = hf_hub_download("org/base", SHARD)
    assert Path(got).read_bytes() == (model / SHARD).read_bytes()
    first, second = hub.traffic.requests(method="GET", origin="store")
    size = (model / SHARD).stat().st_size
    assert (first.sent, second.sent) == (at, size - kept)
    assert second.range == (f"bytes={kept}-" if kept else None)
    assert fault.hits == 1 and hub.waits == [1]


def test_a_download_that_is_reset_is_an_error_and_leaves_no_file(hub, model):
    hub.add_repo("org/base", model)
    hub.fail("GET", "/objects/", CutAnswer(5000, reset=True))
    with pytest.raises(httpx2.ReadError):
        hf_hub_download("org/base", SHARD)
    assert not list(hub.home.rglob(SHARD))
    assert Path(hf_hub_download("org/base", SHARD)).read_bytes() == (model / SHARD).read_bytes()


@pytest.mark.parametrize("at", [0, 150_000])
def test_an_upload_cut_at_a_byte_leaves_nothing_and_is_sent_again(hub, model, at):
    hub.add_repo("org/base", model)
    (model / "new.bin").write_bytes(b"n" * 3_000_000)
    fault = hub.fail("PUT", "/objects/", CutRequest(at))
    add(hub, "new.bin", model / "new.bin")
    assert fault.hits == 1
    assert [each.received for each in hub.traffic.requests(method="PUT")] == [at, 3_000_000]
    assert hub.read("org/base", "new.bin") == b"n" * 3_000_000
    assert len(list(hub.folder.iterdir())) == 1


def test_a_commit_cut_in_its_request_did_not_happen(hub, model):
    first = hub.add_repo("org/base", model)
    hub.fail("POST", "/commit/", CutRequest(50))
    with pytest.raises((httpx2.NetworkError, httpx2.RemoteProtocolError)):
        add(hub, content=b"y" * 100_000)
    assert hub.head("org/base").oid == first


def test_a_delay(hub, model):
    hub.add_repo("org/base", model)
    hub.fail("GET", "/api/models", Delay(0.4))
    with pytest.raises(httpx2.ReadTimeout):
        hub.api().repo_info("org/base", timeout=0.1)
    assert hub.api().repo_info("org/base").id == "org/base"


def test_an_object_that_the_batch_refuses_is_not_uploaded_and_the_others_have_their_links(hub, model):
    first = hub.add_repo("org/base", model)
    fault = hub.fail("POST", "objects/batch", ObjectError(507, "storage quota exceeded", above=10), times=2)
    url, headers = f"{hub.endpoint}/org/base.git/info/lfs/objects/batch", {"Authorization": f"Bearer {hub.token}"}
    wanted = {"operation": "upload", "objects": [{"oid": "ab" * 32, "size": 10}, {"oid": "cd" * 32, "size": 11}]}
    small, large = httpx2.post(url, json=wanted, headers=headers).json()["objects"]
    assert "upload" in small["actions"] and "error" not in small
    assert large["error"] == {"code": 507, "message": "storage quota exceeded"} and "actions" not in large
    (model / "new.bin").write_bytes(b"n" * 5000)
    with pytest.raises(ValueError, match="storage quota exceeded"):
        add(hub, "new.bin", model / "new.bin")
    assert hub.traffic.requests(method="PUT") == [] and hub.head("org/base").oid == first
    add(hub, "new.bin", model / "new.bin")
    assert fault.hits == 2 and hub.read("org/base", "new.bin") == b"n" * 5000


def test_a_hostile_server_says_the_token_back(hub, model):
    hub.add_repo("org/base", model)
    hub.fail("GET", "/api/models", Answer(400, echo=True))
    with pytest.raises(HfHubHTTPError) as caught:
        hub.api().repo_info("org/base")
    assert f"Bearer {hub.token}" in str(caught.value)  # the client repeats it: whoever prints must not


def test_a_redirect_to_another_host_takes_no_token_along(hub, model):
    hub.add_repo("org/base", model)
    fault = hub.fail("*", "/resolve/", Redirect(), times=None)
    with pytest.raises(LocalEntryNotFoundError):  # the answer lacks the commit
        hf_hub_download("org/base", "config.json")
    fault_of_api = hub.fail("GET", "/api/models", Redirect())
    with pytest.raises(HfHubHTTPError):
        hub.api().repo_info("org/base")
    assert fault.hits and fault_of_api.hits
    assert [each.path for each in hub.traffic.requests(origin="store")] == ["/api/models/org/base"]
    assert hub.traffic.authorizations("store") == []


def test_a_listing_that_never_comes_leaves_the_cached_snapshot(hub, model):
    hub.add_repo("org/base", model)
    snapshot = snapshot_download("org/base")
    hub.fail("GET", "/api/models", Answer(503), times=None)
    assert snapshot_download("org/base") == snapshot


def test_a_server_of_its_own_for_documentation_and_benchmarks(model, tmp_path):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parents[1] / "support"), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
    }
    command = [sys.executable, "-m", "hub.server", "--seed", f"meta/base={model}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            told = dict(server.stdout.readline().strip().split("=", 1) for _ in range(3))
            assert set(told) == {"HF_ENDPOINT", "HF_TOKEN", "HF_HUB_DISABLE_XET"}
            answer = httpx2.get(f"{told['HF_ENDPOINT']}/meta/base/resolve/main/{SHARD}", follow_redirects=True)
            assert answer.content == (model / SHARD).read_bytes()
        finally:
            server.terminate()
        assert server.wait(20) == 0
    wrong = subprocess.run([*command[:-1], "nothing"], capture_output=True, text=True, env=environment)
    assert wrong.returncode == 2 and "not ORG/NAME=DIR" in wrong.stderr


def test_traffic_starts_empty():
    assert Traffic().requests() == [] and Traffic().sent_by_path() == {}

"""A hostile Hub or mirror: nothing is written outside the cache, no token leaves, and time and memory are bounded.

Each test has one bad behaviour of the server. The command exits with 2 and one line, and the same command succeeds if
the server behaves.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import time
from pathlib import Path

import pytest
from hub import fixture
from hub.faults import Altered, Answer, Delay, Drip, Redirect, Reply
from publishing import BASE, EDIT, write_base

from swsurgery import hub as product
from swsurgery.cli import main
from swsurgery.errors import HubError
from swsurgery.hub import Uri, commit, guard
from swsurgery.hub.names import is_file_name, is_revision

any_hub, hub = fixture.any_hub, fixture.hub


@pytest.fixture
def base(tmp_path) -> Path:
    return write_base(tmp_path / "base")


def written(hub) -> set[str]:
    """Everything below the cache's parent, with what a path that leaves the cache would hit."""
    return {p.relative_to(hub.home.parent).as_posix() for p in hub.home.parent.rglob("*")}


def refused(capsys, *words: object) -> str:
    """The one line of a command that exits with 2."""
    capsys.readouterr()
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("swsurgery: ")]
    assert (code, out) == (2, ""), err
    assert "Traceback" not in err
    return lines[-1]


def applied(base: Path, out: Path) -> list[object]:
    manifest = out.parent / "edit.yaml"
    manifest.write_text(f"version: 1\nbase: {{repo_id: {BASE}}}\nedits: [{EDIT}]\n")
    return ["apply", manifest, "-o", out, "--check", "off"]


def info(**changes: object) -> bytes:
    found = {"_id": "0" * 24, "id": BASE, "sha": "a" * 40, "private": False, "siblings": [], "tags": []}
    return json.dumps(found | changes).encode()


def tree(**changes: object) -> bytes:
    return json.dumps([{"type": "file", "oid": "b" * 40, "size": 3, "path": "config.json"} | changes]).encode()


@pytest.mark.parametrize("named", ["../..", "/tmp/outside", "A" * 40, "0" * 39, "main", "", None, 7])
def test_a_commit_in_an_answer_is_a_commit(hub, base, tmp_path, capsys, named):
    hub.add_repo(BASE, base)
    words = applied(base, tmp_path / "out")
    before = written(hub)
    fault = hub.fail("GET", f"/api/models/{BASE}(/revision/.*)?$", Reply(info(sha=named)), times=None)
    assert "names an invalid commit" in refused(capsys, *words)
    assert fault.hits == 1 and written(hub) - before <= {hub.home.name} and not (tmp_path / "out").exists()
    hub.faults.clear()
    assert main([str(w) for w in applied(base, tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("header", "value", "said"),
    [
        ("X-Repo-Commit", "../../../outside", "names an invalid commit"),
        ("X-Repo-Commit", "c" * 40, "another commit than requested"),
        ("ETag", '"../../../outside"', "an invalid ETag, which would be used as a file name"),
        ("ETag", '"/etc/outside"', "an invalid ETag, which would be used as a file name"),
        ("ETag", '".."', "an invalid ETag, which would be used as a file name"),
        ("ETag", '"' + "e" * 300 + '"', "an invalid ETag, which would be used as a file name"),
        ("X-Linked-ETag", '"../../../outside"', "an invalid ETag, which would be used as a file name"),
        ("X-Xet-Hash", "../outside", "an invalid Xet hash"),
        ("Content-Length", "-5", ""),
        ("Content-Length", "9" * 40, ""),
    ],
)
def test_headers_that_become_names_of_files_are_checked(hub, base, tmp_path, capsys, header, value, said):
    hub.add_repo(BASE, base)
    hub.fail("HEAD", "/resolve/", Altered({header: value}), times=None)
    before = written(hub)
    assert said in refused(capsys, *applied(base, tmp_path / "out"))
    new = {name for name in written(hub) - before if "outside" in name}
    assert new == set() and not Path("/etc/outside").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    ["../outside", "a/../../outside", "/etc/outside", "a//b", "./a", "a/.", "", "x" * 300, "a\nb", "a\x00b", None, 5],
)
def test_names_in_a_listing_stay_in_the_repository(hub, base, tmp_path, capsys, name):
    hub.add_repo(BASE, base)
    fault = hub.fail("GET", "/tree/", Reply(tree(path=name)), times=None)
    before = written(hub)
    for words in (applied(base, tmp_path / "out"), ["inspect", f"hf://{BASE}"]):
        assert "lists a file with an invalid name" in refused(capsys, *words)
    assert fault.hits == 2 and not {n for n in written(hub) - before if "outside" in n}


@pytest.mark.parametrize(
    "changes",
    [
        {"oid": "../x"}, {"oid": None}, {"size": -1}, {"size": "3"}, {"size": 1e300}, {"size": 2**70}, {"type": "link"},
        {"lfs": {"oid": "../../x", "size": 3, "pointerSize": 1}}, {"lfs": []}, {"lfs": {"oid": "a" * 64, "size": None}},
        {"xetHash": "../x"}, {"xetHash": 5},
    ],
)  # fmt: skip
def test_an_entry_of_a_listing_that_makes_no_sense(hub, base, capsys, changes):
    hub.add_repo(BASE, base)
    hub.fail("GET", "/tree/", Reply(tree(**changes)))
    assert "the Hub's answer is not valid" in refused(capsys, "inspect", f"hf://{BASE}")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"5",
        b'"text"',
        b"\xff\xfe",
        b"<html></html>",
        b"[" * 100_000,
        b"{}",
        b"[null]",
        b"[5]",
        b"[[]]",
    ],
)
@pytest.mark.parametrize("route", ["info", "tree", "refs"])
def test_documents_that_are_none(hub, base, tmp_path, capsys, body, route):
    hub.add_repo(BASE, base)
    pattern = {"info": f"/api/models/{BASE}(/revision/.*)?$", "tree": "/tree/", "refs": "/refs"}[route]
    if (route, body) == ("tree", b"[]"):
        pytest.skip("an empty repository")
    if route == "refs":
        if body == b"{}":
            pytest.skip("no branches")
        hub.fail("GET", pattern, Reply(body))
        with pytest.raises(HubError, match="the Hub's answer is not valid: hf://org/base"):
            commit.find_branch(BASE, "main")
        return
    hub.fail("GET", pattern, Reply(body))
    assert f"the Hub's answer is not valid: hf://{BASE}" in refused(capsys, "inspect", f"hf://{BASE}")


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b'{"commitOid": "../.."}', b'{"commitOid": 5}'])
def test_the_answer_to_a_commit_that_makes_no_sense(hub, base, body):
    hub.add_repo(BASE, base)
    draft = commit.Draft(BASE, "main", hub.head(BASE).oid, False)
    draft.add({"note.txt": b"x"})
    hub.fail("POST", "/commit/", Reply(body))
    with pytest.raises(HubError, match=r"is not valid|names no commit"):
        draft.send([], None, [], "add", "")


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"null", b'{"discussions": 5}', b'{"discussions": [5], "count": 1, "start": 0}']
)
def test_a_list_of_pull_requests_that_makes_no_sense(hub, base, body):
    hub.add_repo(BASE, base)
    hub.fail("GET", "/discussions", Reply(body), times=None)
    with pytest.raises(HubError, match="the Hub's answer is not valid"):
        commit.open_pull_requests(BASE, "title")


def test_the_token_is_not_sent_to_the_host_of_the_next_page(hub, base, capsys):
    hub.add_repo(BASE, base)
    hub.fail("GET", "/tree/", Altered({"Link": f'<{hub.store.url}/api/models/{BASE}/tree/main>; rel="next"'}))
    assert "another host for a request with your token" in refused(capsys, "inspect", f"hf://{BASE}")
    assert hub.traffic.requests(origin="store") == [] and hub.leaks == []


def test_the_token_is_not_sent_to_the_host_of_a_redirect(hub, base, tmp_path, capsys):
    hub.add_repo(BASE, base)
    hub.fail("*", f"/api/models/{BASE}", Redirect(), times=None)
    refused(capsys, *applied(base, tmp_path / "out"))
    assert hub.traffic.authorizations("store") == [] and hub.leaks == []


def test_the_token_is_not_sent_to_the_host_that_an_upload_is_verified_at(hub, base, tmp_path):
    hub.add_repo(BASE, base)
    (tmp_path / "new.bin").write_bytes(b"n" * 5000)
    digest = hashlib.sha256(b"n" * 5000).hexdigest()
    answer = {"transfer": "basic", "objects": [{"oid": digest, "size": 5000, "actions": {
        "upload": {"href": hub.store.url + "/nowhere"}, "verify": {"href": hub.store.url + "/verify"}}}]}  # fmt: skip
    hub.fail("POST", "objects/batch", Reply(json.dumps(answer).encode(), {"Content-Type": "application/json"}))
    hub.fail("PUT", "/nowhere", Reply())
    with pytest.raises(HubError, match="another host for a request with your token"):
        commit.Draft(BASE, "main", hub.head(BASE).oid, False).add({"new.bin": tmp_path / "new.bin"})
    assert hub.leaks == [] and hub.traffic.authorizations("store") == []


def test_a_list_without_an_end(hub, base, capsys, monkeypatch):
    monkeypatch.setattr(guard, "MAX_PAGES", 12)
    hub.add_repo(BASE, base)
    link = f'<{hub.endpoint}/api/models/{BASE}/tree/main?cursor=0>; rel="next"'
    fault = hub.fail("GET", "/tree/", Reply(tree(), {"Link": link}), times=None)
    assert "the Hub's list has more than 12 pages" in refused(capsys, "inspect", f"hf://{BASE}")
    assert fault.hits == 11  # and one question for the commit


def test_a_list_of_pull_requests_without_an_end(hub, base, monkeypatch):
    monkeypatch.setattr(guard, "MAX_PAGES", 12)
    hub.add_repo(BASE, base)
    row = {"title": "t", "num": 1, "author": {"name": "a"}, "status": "open", "isPullRequest": True}
    row |= {"createdAt": "2026-01-01T00:00:00.000Z", "repo": {"name": BASE, "type": "model"}}
    body = json.dumps({"discussions": [row], "count": 10**9, "start": 0}).encode()
    hub.fail("GET", "/discussions", Reply(body), times=None)
    with pytest.raises(HubError, match="more than 12 pages"):
        commit.open_pull_requests(BASE, "title")


def test_a_list_that_takes_too_long(hub, base, capsys, monkeypatch):
    monkeypatch.setattr(guard, "MAX_SECONDS", 0.0)
    hub.add_repo(BASE, base)
    assert "is not complete after 0 seconds" in refused(capsys, "inspect", f"hf://{BASE}")


@pytest.mark.parametrize(
    "reply",
    [
        Reply(gzip.compress(b" " * (64 << 20)), {"Content-Encoding": "gzip"}),
        Reply(b" " * (1 << 20), {"Transfer-Encoding": "chunked"}),
        Reply(b"", {"Content-Length": str(1 << 40)}),
    ],
)
def test_an_answer_that_would_fill_the_memory(hub, base, capsys, reply):
    hub.add_repo(BASE, base)
    hub.fail("GET", "/tree/", reply)
    assert "the Hub's answer is larger than" in refused(capsys, "inspect", f"hf://{BASE}")


def test_a_file_without_an_announced_length_that_would_fill_the_disk(hub, base, tmp_path, capsys):
    hub.add_repo(BASE, base)
    hub.fail("GET", "/config.json", Reply(b" " * (1 << 20), {"Transfer-Encoding": "chunked"}))
    assert "the Hub's answer is larger than" in refused(capsys, *applied(base, tmp_path / "out"))
    assert sum(p.stat().st_size for p in hub.home.rglob("*") if p.is_file()) < 40 << 20


def test_a_compressed_answer_that_is_honest_is_read(hub, base, capsys):
    oid = hub.add_repo(BASE, base)
    body = gzip.compress(info(sha=oid))
    hub.fail("GET", f"/api/models/{BASE}$", Reply(body, {"Content-Encoding": "gzip"}))
    assert main(["inspect", f"hf://{BASE}"]) == 0


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, gzip"])
def test_another_compression_is_refused(hub, base, capsys, coding):
    hub.add_repo(BASE, base)
    hub.fail("GET", "/tree/", Reply(b"x" * 100, {"Content-Encoding": coding}))
    assert "is compressed, which was not asked for" in refused(capsys, "inspect", f"hf://{BASE}")


def test_a_range_is_not_taken_compressed(hub, base, capsys):
    hub.add_repo(BASE, base)
    hub.fail("GET", "/resolve/.*safetensors", Altered({"Content-Encoding": "gzip"}))
    hub.fail("GET", "/objects/", Altered({"Content-Encoding": "gzip"}))
    assert "is compressed, which was not asked for" in refused(capsys, "inspect", f"hf://{BASE}")


@pytest.mark.parametrize("pattern", ["/tree/", "/objects/"])
def test_a_body_that_comes_too_slowly(hub, base, capsys, monkeypatch, pattern):
    monkeypatch.setattr(guard, "GRACE", 0.2)
    hub.add_repo(BASE, base)
    hub.fail("GET", pattern, Drip(0.05, 8))
    begin = time.monotonic()
    assert "the Hub's answer comes too slowly" in refused(capsys, "inspect", f"hf://{BASE}")
    assert time.monotonic() - begin < 5


def test_a_server_that_never_answers(hub, base, capsys, monkeypatch):
    monkeypatch.setattr(guard, "READ_TIMEOUT", 0.2)
    hub.add_repo(BASE, base)
    hub.fail("GET", "/api/models", Delay(3), times=None)
    begin = time.monotonic()
    assert "the connection to the Hub failed" in refused(capsys, "inspect", f"hf://{BASE}")
    assert time.monotonic() - begin < 2.9


@pytest.mark.parametrize("status", [429, 503])
def test_a_wait_without_an_end(hub, base, capsys, status):
    hub.add_repo(BASE, base)
    hub.fail("GET", "/tree/", Answer(status, retry_after=10**9))
    assert f"asks to wait {10**8} seconds (HTTP {status})" in refused(capsys, "inspect", f"hf://{BASE}")
    assert hub.waits == []


def test_other_calls_of_the_process_are_left_alone(hub, base, monkeypatch):
    monkeypatch.setattr(guard, "MAX_RESPONSE", 10)
    hub.add_repo(BASE, base)
    with pytest.raises(HubError, match="is larger than"):
        product.open_tree(BASE)
    assert hub.api().repo_info(BASE).id == BASE


@pytest.mark.parametrize("revision", ["../../x", "/x", "a/../b", "", "a b", "a..b", "x.lock", "-x", "a\nb", "a//b"])
def test_a_revision_that_would_lead_out_of_the_cache(revision):
    with pytest.raises(HubError, match="not a valid name of a branch"):
        Uri(BASE, revision, "")


@pytest.mark.parametrize("sub", ["..", "../x", "a/../..", "/etc", "a//b"])
def test_a_folder_that_would_lead_out_of_the_cache(sub):
    with pytest.raises(HubError, match="not a valid name of a folder"):
        Uri(BASE, None, sub)


def test_usual_names_are_accepted():
    assert all(map(is_revision, ["main", "refs/pr/1", "v1.0", "a" * 40, "fix/some-thing", "1.0.0+x"]))
    assert all(map(is_file_name, ["a", "a/b.json", "模型/x y.txt", "a..b", "-x", "...", "a\\b"]))

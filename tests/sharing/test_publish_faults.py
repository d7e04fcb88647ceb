"""publish, cut off at any request: the repository shows the old state or the new one, and the same command finishes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoints import SECOND, THIRD, down
from hub import fixture
from hub.faults import Answer, CutAnswer, CutRequest, Delay, Drop, ObjectError
from huggingface_hub import snapshot_download
from publishing import NEW, digests, patch, put_base, tree

from swsurgery.cli import main
from swsurgery.hub import commit
from swsurgery.sharing import publish as publish_module

any_hub, hub = fixture.any_hub, fixture.hub
ARGUMENTS = ("--yes", "--accept", "check-missing")
CUTS = (Drop(), Drop(done=True, reset=True), CutAnswer(at=0))


@pytest.fixture
def patched(hub, tmp_path) -> Path:
    return patch(hub, tmp_path, put_base(hub, tmp_path / "base"))


def publish(directory: Path, repo_id: str = NEW, *more: str) -> int:
    return main(["publish", str(directory), repo_id, "--quiet", *ARGUMENTS, *more])


def state(hub, repo_id: str) -> dict[str, str] | None:
    return tree(hub, repo_id) if repo_id in hub.state.repos else None


def lines(text: str) -> list[str]:
    """What was said, less the client's own warnings about retries."""
    return [line for line in text.splitlines() if line.startswith("swsurgery: ")]


def cut_everywhere(hub, directory: Path, seed: Path | None, action: object, capsys) -> int:
    """Publish into one fresh repository after the other, of which the nth answers nothing from its nth request on;
    returns how often the commit had landed all the same. `seed` is what is there already."""
    if seed is not None:
        hub.add_repo("org/counted", seed)
    hub.traffic.clear()
    assert publish(directory, "org/counted") == 0
    number, landed = len(hub.traffic.requests()), 0
    assert number > 15
    for nth in range(1, number + 1):
        repo_id = f"org/new-{nth}"
        if seed is not None:
            hub.add_repo(repo_id, seed)
        before = state(hub, repo_id)
        capsys.readouterr()
        hub.fail("*", "", action, nth=nth, times=None)
        code = publish(directory, repo_id)
        said = capsys.readouterr().err
        hub.faults.clear()
        between = state(hub, repo_id)
        assert code == 2 and len(lines(said)) == 1 and "Traceback" not in said, (nth, code, said)
        assert publish(directory, repo_id) == 0, nth
        after = state(hub, repo_id)
        assert after is not None and after.keys() >= digests(directory).keys()
        made = seed is None and between is not None and set(between) == {".gitattributes"}
        assert between in (before, after) or made, nth
        landed += between == after
        assert len(hub.repo(repo_id).commits) == 2, "one commit beside the first, however often it was tried"
    return landed


@pytest.mark.parametrize("action", CUTS, ids=["before", "after", "answer cut"])
def test_a_first_publication_that_is_cut_off_anywhere_is_finished_by_the_same_command(hub, patched, capsys, action):
    assert cut_everywhere(hub, patched, None, action, capsys) >= 5, "those that read back"


def test_an_update_that_is_cut_off_anywhere_is_the_old_publication_or_the_new(hub, tmp_path, patched, capsys):
    assert publish(patched) == 0
    old = tmp_path / "old"
    snapshot_download(NEW, local_dir=old)
    shutil.rmtree(old / ".cache")
    edits = f"[{{op: scale, tensor: {down(0)}, index: [1, 1], factor: 2.0}}]"
    update = patch(hub, tmp_path, hub.head("org/base").oid, edits, "update")
    assert cut_everywhere(hub, update, old, Drop(done=True), capsys) >= 5


@pytest.mark.parametrize("at", [0, 100])
def test_an_upload_that_breaks_in_the_middle_is_taken_up_again(hub, patched, at):
    fault = hub.fail("PUT", "", CutRequest(at=at), times=1)
    assert publish(patched) == 0 and fault.hits == 1
    assert tree(hub)[SECOND] == digests(patched)[SECOND]


def test_what_was_uploaded_is_not_uploaded_twice(hub, patched):
    hub.fail("POST", "/commit/", Drop(), times=None)
    assert publish(patched) == 2
    hub.faults.clear()
    hub.traffic.clear()
    assert publish(patched) == 0
    assert hub.traffic.requests(method="PUT", origin="store") == []


@pytest.mark.parametrize("method, target", [("PUT", "objects"), ("POST", "/commit/")])
def test_a_process_that_is_killed_leaves_one_state_or_the_other(hub, patched, method, target):
    fault = hub.fail(method, target, Delay(2))
    command = [sys.executable, "-m", "swsurgery", "publish", str(patched), NEW, *ARGUMENTS]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
    deadline = time.monotonic() + 60
    while not fault.hits and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and fault.hits == 1
    between = state(hub, NEW)
    time.sleep(2.2)  # the server goes on without its client
    assert publish(patched) == 0
    assert set(between) == {".gitattributes"} and tree(hub)[SECOND] == digests(patched)[SECOND]
    assert len(hub.repo(NEW).commits) == 2


def test_a_signal_ends_it_in_one_line(hub, patched):
    fault = hub.fail("POST", "/commit/", Delay(1.5))
    command = [sys.executable, "-m", "swsurgery", "publish", str(patched), NEW, *ARGUMENTS, "--quiet"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    deadline = time.monotonic() + 60
    while not fault.hits and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130 and "run the same command again" in err and "Traceback" not in err


def test_somebody_who_commits_between_plan_and_commit_is_not_overwritten(hub, patched, capsys, monkeypatch):
    hub.add_repo(NEW)
    real = commit.Draft.send

    def late(draft, *arguments):
        hub.commit(NEW, {"x.txt": b"somebody's"})
        return real(draft, *arguments)

    monkeypatch.setattr(commit.Draft, "send", late)
    assert publish(patched) == 2
    said = lines(capsys.readouterr().err)
    assert len(said) == 1 and "somebody else committed meanwhile (HTTP 412)" in said[0]
    assert set(tree(hub)) == {".gitattributes", "x.txt"}
    monkeypatch.undo()
    fixture.point_client_at(hub, hub.home, monkeypatch)
    assert publish(patched) == 0
    assert tree(hub)["x.txt"] and tree(hub)[SECOND] == digests(patched)[SECOND]


def test_a_conflict_with_the_very_same_commit_is_success(hub, patched, monkeypatch):
    real = commit.Draft.send

    def twice(draft, *arguments):
        real(draft, *arguments)
        for addition in draft._additions.values():
            addition._is_committed = False
        return real(draft, *arguments)

    monkeypatch.setattr(commit.Draft, "send", twice)
    assert publish(patched) == 0
    assert len(hub.repo(NEW).commits) == 2


@pytest.mark.parametrize(
    "status, line",
    [
        (400, "the Hub refused (HTTP 400)"),
        (409, "HTTP 409"),
        (412, "HTTP 412"),
        (429, "rate of requests"),
        (500, "HTTP 500"),
        (403, "refuses access"),
    ],
)
def test_a_commit_that_the_hub_refuses_is_one_line(hub, patched, capsys, status, line):
    hub.fail("POST", "/commit/", Answer(status, "<script>"), times=None)
    assert publish(patched) == 2
    said = lines(capsys.readouterr().err)
    assert len(said) == 1 and line in said[0] and "script" not in said[0]
    assert set(tree(hub)) == {".gitattributes"}


def test_a_file_for_which_there_is_no_room_is_said_so(hub, patched, capsys):
    fault = hub.fail("POST", "objects/batch", ObjectError(507, "storage quota exceeded <script>"), times=None)
    assert publish(patched) == 2
    remedy = "check how much storage is left in this namespace"
    said = f"swsurgery: the Hub rejects a large file: hf://{NEW} ({remedy})"
    assert lines(capsys.readouterr().err) == [said] and fault.hits == 1
    assert set(tree(hub)) == {".gitattributes"} and hub.traffic.requests(method="PUT") == []
    hub.faults.clear()
    assert publish(patched) == 0 and tree(hub)[SECOND] == digests(patched)[SECOND]


def test_small_files_that_come_by_a_redirect_within_the_host_are_read_all_the_same(hub, patched, capsys):
    hub.resolve_cache = True
    assert publish(patched) == 0
    assert hub.traffic.requests(r"^/api/resolve-cache/.*README.md")  # read back after the commit
    assert main(["verify", f"hf://{NEW}"]) == 0, capsys.readouterr().err


def test_too_many_requests_while_copying_is_no_refusal_to_copy(hub, patched, capsys):
    hub.fail("POST", "/lfs-files/duplicate", Answer(429, "slow"), times=None)
    assert publish(patched) == 2
    assert "uploading" not in capsys.readouterr().err
    assert hub.traffic.received(origin="store") < (patched / THIRD).stat().st_size


def test_a_file_that_changes_while_it_is_published_is_found_before_the_commit(hub, patched, capsys, monkeypatch):
    real = commit.Draft.add

    def late(draft, contents):
        (patched / SECOND).write_bytes((patched / SECOND).read_bytes()[:-1] + b"!")
        return real(draft, contents)

    monkeypatch.setattr(commit.Draft, "add", late)
    assert publish(patched) == 2
    assert "the file changed while it was being published" in capsys.readouterr().err
    assert set(tree(hub)) == {".gitattributes"}


def test_a_repository_that_somebody_else_made_and_filled_meanwhile_is_left_alone(hub, patched, capsys, monkeypatch):
    real = publish_module.hub.create_repository

    def late(repo_id, private):
        real(repo_id, private)
        hub.commit(repo_id, {"x.txt": b"somebody's"})

    monkeypatch.setattr(publish_module.hub, "create_repository", late)
    assert publish(patched) == 2
    assert "somebody else created the repository at the same time" in capsys.readouterr().err
    assert set(tree(hub)) == {".gitattributes", "x.txt"}


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("option", [True, False])
@pytest.mark.parametrize("moment", ["add", "_upload"])
def test_a_repository_that_becomes_public_before_the_commit_gets_none(
    hub, patched, capsys, monkeypatch, there, option, moment
):
    if not there and not option:
        pytest.skip("then it is public")
    if there:
        hub.add_repo(NEW, private=True)
    where = commit.Draft if moment == "add" else publish_module
    real = getattr(where, moment)

    def late(*arguments):
        hub.repo(NEW).private = False
        return real(*arguments)

    monkeypatch.setattr(where, moment, late)
    assert publish(patched, NEW, *(["--private"] if option else [])) == 2
    err = capsys.readouterr().err
    assert "the repository has become public, and nothing was committed: org/edited (make it private" in err
    assert set(tree(hub)) <= {".gitattributes"} and not hub.traffic.requests("/commit/", method="POST")
    hub.repo(NEW).private = True
    monkeypatch.setattr(where, moment, real)
    assert publish(patched, NEW, "--private") == 0 and "swsurgery.json" in tree(hub)


def test_a_repository_that_became_public_while_the_plan_was_made_gets_no_upload(hub, patched, capsys, monkeypatch):
    hub.add_repo(NEW, private=True)
    real = publish_module._carry_out

    def late(*arguments, **named):
        hub.repo(NEW).private = False
        return real(*arguments, **named)

    monkeypatch.setattr(publish_module, "_carry_out", late)
    assert publish(patched, NEW, "--private") == 2
    assert "has become public" in capsys.readouterr().err and hub.traffic.requests(method="PUT") == []


def test_a_repository_that_becomes_public_with_the_commit_is_reported(hub, patched, capsys, monkeypatch):
    real = commit.Draft.send

    def late(*arguments):
        sent = real(*arguments)
        hub.repo(NEW).private = False
        return sent

    monkeypatch.setattr(commit.Draft, "send", late)
    assert main(["publish", str(patched), NEW, "--private", *ARGUMENTS]) == 1
    out = capsys.readouterr().out
    assert "public: org/edited: the repository has become public, so anybody may have read what was published" in out
    assert "verified:" not in out

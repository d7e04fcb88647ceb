"""The gate before publishing, and what becomes of tokens: they stand in nothing that is printed, logged or sent on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import FIRST, SECOND
from hub import fixture
from hub.faults import Answer, Redirect
from hub.wire import Call, table
from publishing import NEW, patch, put_base, tree

from swsurgery.cli import main
from swsurgery.sharing import gate
from swsurgery.verifying.findings import RULES, Finding

any_hub, hub = fixture.any_hub, fixture.hub
TOKEN = "hf_" + "CanaryInAFileAaBbCcDdEeFfGgHhIiJj"


@pytest.fixture
def patched(hub, tmp_path) -> Path:
    return patch(hub, tmp_path, put_base(hub, tmp_path / "base"))


def publish(directory: Path, *more: str, accept: tuple[str, ...] = ("check-missing",)) -> int:
    accepted = [word for name in accept for word in ("--accept", name)]
    return main(["publish", str(directory), NEW, "--yes", *accepted, *more])


def rewrite(directory: Path, **check: object) -> None:
    """Another check in the record, and the digests of swsurgery's own files set right."""
    import hashlib

    path = directory / "swsurgery.json"
    record = json.loads(path.read_text())
    record["check"] = check
    path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    sums = directory / "SHA256SUMS"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    lines = [f"{digest}  swsurgery.json\n" if "swsurgery.json" in x else x for x in sums.read_text().splitlines(True)]
    sums.write_text("".join(lines))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_the_rules_of_the_gate_are_in_the_table():
    assert {rule.name for rule in RULES.values() if rule.command == "publish"} == {
        "check-missing", "check-failed", "public", "secret",
    }  # fmt: skip


def test_a_checkpoint_that_was_never_run_is_not_published_unless_somebody_says_so(hub, patched, capsys):
    hub.traffic.clear()
    assert publish(patched, accept=()) == 1
    err = capsys.readouterr().err
    assert "not published: check-missing: swsurgery.json: the edited model was never run" in err and "--accept" in err
    assert hub.traffic.requests() == []
    rewrite(patched, kind="off", reason="the check was turned off")
    assert publish(patched, accept=()) == 1
    rewrite(patched, kind="forward", ok=True, failures=[])
    assert publish(patched, accept=()) == 0
    assert "Accepted" not in hub.read(NEW, "README.md").decode()


def test_a_failed_check_is_named_and_accepting_another_finding_is_not_enough(hub, patched, capsys):
    rewrite(patched, kind="forward", ok=False, failures=["the perplexity ratio is 1e9"])
    assert publish(patched) == 1
    assert "check-failed: swsurgery.json: the perplexity ratio is 1e9" in capsys.readouterr().err
    assert publish(patched, accept=("check-failed",)) == 0
    assert "the perplexity ratio is 1e9" in hub.read(NEW, "README.md").decode().replace("\\", "")
    assert "accepted: check-failed" in hub.head(NEW).message


def test_an_undeclared_change_is_refused_and_if_accepted_published_as_it_is(hub, patched, capsys):
    flip(patched / FIRST)
    assert publish(patched) == 1
    err = capsys.readouterr().err
    assert f"digest: {FIRST}" in err
    assert publish(patched, accept=("check-missing", "digest")) == 0
    import hashlib

    assert tree(hub)[FIRST] == hashlib.sha256((patched / FIRST).read_bytes()).hexdigest()
    card = hub.read(NEW, "README.md").decode()
    assert "digest" in card and FIRST in card


def test_a_file_that_nobody_declared_is_refused(hub, patched, capsys):
    (patched / "notes.txt").write_text("mine")
    assert publish(patched) == 1 and "file-undeclared: notes.txt" in capsys.readouterr().err
    assert publish(patched, accept=("check-missing", "file-undeclared")) == 0
    assert hub.read(NEW, "notes.txt") == b"mine"


def test_a_finding_that_does_not_exist_cannot_be_accepted(hub, patched, capsys):
    assert publish(patched, accept=("all",)) == 2
    assert "no rule has this name: all" in capsys.readouterr().err and NEW not in hub.state.repos


def test_a_token_in_a_file_is_refused_and_not_repeated(hub, patched, capsys):
    (patched / "train.log").write_text(f"logged in with {TOKEN}\n")
    assert publish(patched, accept=("check-missing", "file-undeclared")) == 1
    out, err = capsys.readouterr()
    assert "secret: train.log" in err and TOKEN not in out + err and NEW not in hub.state.repos


def test_the_very_token_of_the_requests_is_found_whatever_it_looks_like(hub, patched, capsys):
    assert not gate.TOKEN_BYTES.search(hub.token.encode()), "the other way of finding it"
    (patched / "notes.txt").write_text(hub.token)
    assert publish(patched, accept=("check-missing", "file-undeclared")) == 1
    assert "secret: notes.txt" in capsys.readouterr().err


def test_a_token_in_the_message_is_refused(hub, patched, capsys):
    assert publish(patched, "--message", f"with {TOKEN}") == 1
    assert "secret: the commit's message" in capsys.readouterr().err and NEW not in hub.state.repos


def test_a_token_in_the_bases_own_card_is_not_quoted(hub, patched, capsys):
    hub.commit("org/base", {"README.md": f"# {TOKEN}\n".encode()})
    path = patched / "swsurgery.json"
    record = json.loads(path.read_text())
    record["base"]["revision"] = hub.head("org/base").oid
    del record["files"]["README.md"]
    path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    (patched / "README.md").unlink()
    assert publish(patched, accept=("check-missing", "digest", "manifest")) == 1
    out, err = capsys.readouterr()
    assert "secret: README.md" in err and TOKEN not in out + err and NEW not in hub.state.repos


@pytest.mark.parametrize("text", ["hf_hub_download_of_a_file_with_a_long_name", "hf_short", "self_attn"])
def test_words_of_program_code_are_no_secret(hub, text):
    assert gate.find_secrets([("code.py", text.encode())]) == []


def test_a_secret_is_a_finding_that_names_only_the_file(hub):
    found = gate.find_secrets([("a", b"x"), ("b", TOKEN.encode()), ("c", b"hf_jwt_" + b"A" * 40)])
    assert found == [Finding("secret", "the text contains what looks like a token of the Hub", name) for name in "bc"]


WHERE = ("/refs", "/revision/", "/tree/", "repos/create", "preupload", "objects/batch", "validate-yaml", "paths-info",
         "lfs-files/duplicate", "/commit/", "/tag/", "/resolve/")  # fmt: skip


@pytest.mark.parametrize("target", WHERE)
@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 500])
def test_a_server_that_echoes_the_token_is_not_repeated(hub, patched, capfd, caplog, target, status):
    fault = hub.fail("*", target, Answer(status, "no such luck", echo=True), times=None)
    code = publish(patched, "--debug")
    out, err = capfd.readouterr()
    assert fault.hits and code in (0, 2), err
    assert hub.token not in out + err + caplog.text and "no such luck" not in out + err
    assert code == 0 or [line for line in err.splitlines() if line.startswith("swsurgery: ")]


def test_what_a_server_puts_into_a_header_or_a_link_is_not_logged(hub, patched, tmp_path, monkeypatch):
    """The client logs a header that warns, and the whole link of a request that it repeats."""
    real, link = Call.send_response, hub.link

    def warning(call: Call, status: int, message: str | None = None) -> None:
        real(call, status, message)
        call.send_header("X-HF-Warning", f"topic{status}; you sent {call.headers['Authorization']}")

    monkeypatch.setattr(Call, "send_response", warning)
    monkeypatch.setattr(hub, "link", lambda path, **query: link(path, **query, said=hub.token))
    faults = [hub.fail(method, "objects", Answer(503)) for method in ("PUT", "GET")]
    for words in (["publish", str(patched), NEW, "--yes", "--accept", "check-missing"], ["inspect", f"hf://{NEW}"]):
        command = [sys.executable, "-m", "swsurgery", *words]
        done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
        assert done.returncode == 0, done.stderr
        assert hub.token not in done.stdout + done.stderr and "you sent" not in done.stderr
        assert hub.store.url not in done.stderr
    assert all(fault.hits for fault in faults)


def test_the_token_goes_into_no_argument_and_nothing_that_is_published(hub, patched, tmp_path):
    command = [sys.executable, "-m", "swsurgery", "publish", str(patched), NEW, "--yes", "--accept", "check-missing"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert hub.token not in done.stdout + done.stderr
    commit = hub.head(NEW)
    published = b"".join(hub.read(NEW, path) for path in commit.tree) + f"{commit.title}{commit.message}".encode()
    assert hub.token.encode() not in published and b"hf_" not in published
    assert hub.traffic.authorizations("hub") and hub.traffic.authorizations("store") == []


@pytest.mark.parametrize("target", ["/resolve/", "objects/batch", "/tree/", "/commit/"])
def test_a_redirect_to_another_host_takes_no_token_along(hub, patched, target):
    hub.fail("*", target, Redirect(), times=None)
    publish(patched)
    assert hub.traffic.authorizations("store") == []


def test_without_a_token_the_remedy_is_named(hub, patched, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert publish(patched) == 2
    err = capsys.readouterr().err
    assert "hf auth login" in err and "Traceback" not in err


def test_trusted_publishing_exchanges_the_tokens_of_the_job(hub, patched, monkeypatch, capsys):
    asked = []

    def exchange(call: Call) -> None:
        asked.append(call.body_json())
        call.json({"access_token": hub.token, "token_type": "bearer", "expires_in": 3600})

    hub.front.routes.append(table(("POST", "/oauth/token", exchange))[0])
    from huggingface_hub.utils import _auth

    monkeypatch.setattr(_auth, "_OIDC_TOKEN_CACHE", None)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_OIDC_RESOURCE", NEW)
    monkeypatch.setenv("HF_OIDC_ID_TOKEN", "eyJ.job.identity")
    assert publish(patched) == 0
    assert [(each["resource"], each["subject_token"]) for each in asked] == [(NEW, "eyJ.job.identity")]
    out, err = capsys.readouterr()
    assert "eyJ" not in out + err and hub.token not in out + err
    assert SECOND in tree(hub)


def test_trusted_publishing_without_an_identity_is_one_line(hub, patched, monkeypatch, capsys):
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    monkeypatch.setenv("HF_OIDC_RESOURCE", NEW)
    assert publish(patched) == 2
    assert "id-token: write" in capsys.readouterr().err

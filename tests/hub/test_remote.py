"""A checkpoint on the Hub, read by ranges: kilobytes move, they are counted, and what is read is what a copy holds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from checkpoints import FIRST, SECOND, THIRD, down
from hub import fixture, wire
from hub.faults import CutAnswer
from publishing import BASE, EDIT, digests, write_base

from swsurgery.cli import main
from swsurgery.hub import remote

any_hub, hub = fixture.any_hub, fixture.hub
FAR = ["--tensor", "model.extra.weight", "--at", "19999,1"]  # past what is fetched with the header


@pytest.fixture
def base(tmp_path) -> Path:
    return write_base(tmp_path / "base", rows=20_000)


def run(capsys, *words: object) -> tuple[int, dict, str]:
    """Exit code, the document on stdout, and what was said on stderr."""
    capsys.readouterr()
    code = main([*map(str, words), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else {}, err


def test_one_scalar_is_read_as_in_a_copy_and_costs_the_headers(hub, base, capsys):
    commit = hub.add_repo(BASE, base)
    _, here, _ = run(capsys, "inspect", base, *FAR)
    hub.traffic.clear()
    code, there, err = run(capsys, "inspect", f"hf://{BASE}", *FAR)
    assert code == 0 and (there["value"], there["bits"], there["offset"]) == (
        here["value"], here["bits"], here["offset"],
    )  # fmt: skip
    size = {name: (base / name).stat().st_size for name in (FIRST, SECOND, THIRD)}
    assert hub.traffic.sent(origin="store") == size[FIRST] + size[SECOND] + remote.HEAD + 4
    assert size[THIRD] > 4 * remote.HEAD
    assert hub.traffic.sent(origin="hub") < 64_000
    assert {r.path.split("/resolve/")[1].split("/")[0] for r in hub.traffic.requests("/resolve/")} == {commit}
    asked = hub.traffic.requests("/resolve/")
    moved = hub.traffic.sent("^/(objects|org/base/resolve)/")
    number, unit, requests = re.search(r"([0-9.]+) (kB|B) in (\d+) range requests", err).groups()
    assert int(requests) == len(asked) and round(moved / 1000, 1) == float(number) and unit == "kB"


def test_every_reading_command_moves_headers_and_says_so(hub, base, tmp_path, capsys):
    commit = hub.add_repo(BASE, base)
    manifest = tmp_path / "edit.yaml"
    manifest.write_text(f'version: 1\nbase: {{repo_id: {BASE}, revision: "{commit}"}}\nedits: [{EDIT}]\n')
    place, third = f"hf://{BASE}@{commit}", (base / THIRD).stat().st_size
    for words in (
        ["inspect", place],
        ["apply", manifest, "--dry-run"],
        ["verify", place, "--complete"],
        ["diff", place, base],
    ):
        hub.traffic.clear()
        code, _, err = run(capsys, *words)
        assert code in (0, 1, 2) and f"{place}: " in err and "range requests" in err, (words, err)
        if words[0] != "diff":
            assert 0 < hub.traffic.sent(origin="store") < third


def test_a_dry_run_takes_the_digests_that_the_hub_lists(hub, base, tmp_path, capsys):
    """They are listed of large files only. No shard is downloaded."""
    commit, right = hub.add_repo(BASE, base), digests(base)
    manifest = tmp_path / "edit.yaml"
    for name, digest, code in ((THIRD, right[THIRD], 0), (THIRD, "1" * 64, 2), (FIRST, "1" * 64, 2)):
        pins = right | {name: digest}
        listed = ", ".join(f'"{n}": "{pins[n]}"' for n in (FIRST, SECOND, THIRD, "README.md"))
        manifest.write_text(f"version: 1\nbase: {{repo_id: {BASE}, sha256: {{{listed}}}}}\nedits: [{EDIT}]\n")
        found, document, err = run(capsys, "apply", manifest, "--base", f"hf://{BASE}@{commit}", "--dry-run")
        assert found == code
        if code:
            assert f"wrong base: {name} has digest {right[name]}, not {digest}" in err
        else:
            assert document["pins"] == {"checked": [FIRST, SECOND, THIRD], "not_checked": ["README.md"]}
    assert hub.traffic.sent(origin="store") < 3 * (base / THIRD).stat().st_size


@pytest.mark.parametrize("sub", ["model", "model/deep"])
def test_a_folder_of_a_repository(any_hub, base, tmp_path, capsys, sub):
    whole = tmp_path / "whole"
    (whole / sub).parent.mkdir(parents=True)
    base.rename(whole / sub)
    (whole / "notes.txt").write_text("x")
    any_hub.add_repo(BASE, whole)
    code, found, err = run(capsys, "inspect", f"hf://{any_hub.name(BASE)}@main/{sub}", *FAR)
    _, here, _ = run(capsys, "inspect", whole / sub, *FAR)
    assert code == 0 and found["bits"] == here["bits"], err


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("at", [1, 999, 30_000])
def test_a_connection_that_breaks_in_the_middle_is_taken_up_again(hub, base, capsys, at, reset):
    hub.add_repo(BASE, base)
    _, here, _ = run(capsys, "diff", base, base)
    fault = hub.fail("GET", digests(base)[THIRD], CutAnswer(at, reset), times=2)
    code, there, err = run(capsys, "diff", f"hf://{BASE}", base)
    assert code == 0 and fault.hits == 2 and there["changes"] == here["changes"] == [], err
    begins = [r.range.split("-")[0] for r in hub.traffic.requests(digests(base)[THIRD])]
    goes_on = ["bytes=0", f"bytes={at}", f"bytes={2 * at}"]
    assert begins[:3] == goes_on or reset, "it goes on from where it broke off"


def test_a_connection_that_always_breaks_is_one_line(hub, base, capsys):
    hub.add_repo(BASE, base)
    hub.fail("GET", "objects", CutAnswer(1), times=None)
    code, _, err = run(capsys, "inspect", f"hf://{BASE}", *FAR)
    said = [line for line in err.splitlines() if line.startswith("swsurgery: ")]
    assert code == 2 and said and all("the connection broke 5 times" in line for line in said)


def test_a_server_that_answers_small_files_whole_will_do_and_large_ones_not(hub, base, capsys, monkeypatch):
    hub.add_repo(BASE, base)
    real = wire.byte_range
    monkeypatch.setattr(wire, "byte_range", lambda header, size: None if size <= remote.HEAD else real(header, size))
    assert run(capsys, "inspect", f"hf://{BASE}", *FAR)[0] == 0
    monkeypatch.setattr(wire, "byte_range", lambda header, size: None)
    code, _, err = run(capsys, "inspect", f"hf://{BASE}", *FAR)
    assert code == 2 and "does not support range requests" in err


def test_another_range_than_was_asked_for_is_no_answer(hub, base, capsys, monkeypatch):
    hub.add_repo(BASE, base)
    real = wire.byte_range

    def shifted(header: str | None, size: int) -> tuple[int, int] | None:
        part = real(header, size)
        return (part[0] - 8, part[1] - 8) if part and part[0] > remote.HEAD else part

    monkeypatch.setattr(wire, "byte_range", shifted)
    code, _, err = run(capsys, "inspect", f"hf://{BASE}", *FAR)
    assert code == 2 and "another range" in err


def test_one_tensor_of_a_folder_that_is_not_there_is_refused(hub, base, capsys):
    hub.add_repo(BASE, base)
    for place in (f"hf://{BASE}/nowhere", f"hf://{BASE}@nowhere", "hf://org/nothing", f"hf://datasets/{BASE}"):
        code, _, err = run(capsys, "inspect", place)
        assert code == 2 and err.count("\n") == 1, err
        assert "/nowhere" not in place or f"no such file or folder on the Hub: {place}" in err


def test_an_edited_scalar_that_the_hub_holds_is_told_from_the_base(any_hub, base, tmp_path, capsys):
    any_hub.add_repo(BASE, base)
    code, found, err = run(capsys, "diff", f"hf://{any_hub.name(BASE)}", base)
    assert code == 0 and found["changes"] == [] and down(1), err


def test_all_values_are_read_once(hub, base, capsys):
    hub.add_repo(BASE, base)
    _, here, _ = run(capsys, "verify", base, "--values")
    hub.traffic.clear()
    code, there, _ = run(capsys, "verify", f"hf://{BASE}", "--values")
    assert code == 0 and there["values"] == here["values"] and len(there["values"]["tensors"]) > 3
    size = sum((base / name).stat().st_size for name in (FIRST, SECOND, THIRD))
    assert hub.traffic.sent(origin="store") <= size + 3 * remote.HEAD

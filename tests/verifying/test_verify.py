"""verify: each rule by a planted fault and its name, and no single byte that escapes it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from patched import (
    DOWN,
    EDITED,
    FIRST,
    MANIFEST,
    PROTECTED,
    SCALED,
    SECOND,
    apply_text,
    flip,
    place,
    write_base,
    write_patched,
)

import swsurgery
from swsurgery.cli import main
from swsurgery.errors import CheckpointError
from swsurgery.verifying.findings import RULES
from swsurgery.verifying.verification import Verification

RECORD = "swsurgery.json"


@pytest.fixture
def patched(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_patched(tmp_path)


def run(root: Path, base: Path | None = None) -> Verification:
    return swsurgery.verify(root, base=base)


def found(root: Path, base: Path | None = None) -> set[tuple[str, str | None]]:
    return {(f.rule, f.file) for f in run(root, base).findings}


def rewrite(root: Path, change) -> None:
    """Let `change` edit the record's document, and write it in the record's own form."""
    document = json.loads((root / RECORD).read_text())
    change(document)
    (root / RECORD).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")


def test_a_clean_checkpoint_is_proved(patched):
    verification = run(patched)
    assert verification.findings == ()
    assert verification.ok
    assert (verification.record.edits, verification.record.protected) == (2, 1)
    assert set(verification.record.proved) == {
        FIRST,
        SECOND,
        "config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
    }
    assert not verification.record.compared_with_base


def test_a_clean_checkpoint_holds_against_its_base(patched):
    verification = run(patched, patched.parent / "base")
    assert verification.ok and verification.record.compared_with_base


def test_the_planner_is_not_needed(patched, tmp_path):
    """The base may be gone."""
    shutil.rmtree(tmp_path / "base")
    assert run(patched).ok


@pytest.mark.parametrize("file", [FIRST, SECOND, "tokenizer.json"])
def test_a_flipped_byte_is_one_finding(patched, file):
    flip(patched / file, -1)
    (finding,) = run(patched).findings
    assert (finding.rule, finding.file) == ("digest", file)
    (finding,) = run(patched, patched.parent / "base").findings
    assert (finding.rule, finding.file) == ("undeclared-change", file)


def test_a_configuration_that_is_no_json_any_more(patched):
    flip(patched / "config.json", 3)
    assert {f.rule for f in run(patched).findings} == {"structure"}


def test_a_configuration_that_says_something_else(patched):
    path = patched / "config.json"
    path.write_text(path.read_text().replace("1e-05", "2e-05"))
    assert found(patched) == {("digest", "config.json")}


def test_a_proved_file_is_not_listed_once_it_is_changed(patched):
    flip(patched / SECOND, -1)
    assert SECOND not in run(patched).record.proved
    assert FIRST in run(patched).record.proved


def test_an_edited_scalar_that_was_changed_again(patched):
    flip(patched / FIRST, place(patched / FIRST, DOWN, EDITED))
    verification = run(patched)
    # What is put back in its place is the base's scalar, so the rest of the file is still proved the base's.
    assert [(f.rule, f.tensor, f.index) for f in verification.findings] == [("edit-changed", DOWN, EDITED)]
    assert FIRST not in verification.record.proved
    flip(patched / FIRST, -1)
    assert found(patched) == {("edit-changed", FIRST), ("digest", FIRST)}


def test_a_protected_scalar_that_was_changed(patched):
    flip(patched / FIRST, place(patched / FIRST, DOWN, PROTECTED))
    for base in (None, patched.parent / "base"):
        verification = run(patched, base)
        assert [(f.rule, f.tensor, f.index) for f in verification.findings] == [("protected-changed", DOWN, PROTECTED)]
        assert FIRST not in verification.record.proved
    flip(patched / FIRST, -1)
    assert found(patched) == {("protected-changed", FIRST), ("digest", FIRST)}


def test_a_flipped_byte_in_the_length_of_a_header(patched):
    flip(patched / FIRST, 0)
    assert {f.rule for f in run(patched).findings} == {"structure"}


def test_a_renamed_tensor_in_a_header(patched):
    path = patched / SECOND
    path.write_bytes(path.read_bytes().replace(b"model.norm.weight", b"model.nope.weight"))
    rules = {f.rule for f in run(patched).findings}
    assert "structure" in rules


def test_a_changed_word_of_a_headers_metadata(patched):
    """Nothing that a loader would notice."""
    path = patched / FIRST
    path.write_bytes(path.read_bytes().replace(b'"pt"', b'"tp"'))
    assert found(patched) == {("digest", FIRST)}


def test_a_missing_side_file(patched):
    (patched / "tokenizer.json").unlink()
    assert found(patched) == {("file-missing", "tokenizer.json")}


def test_a_missing_shard(patched):
    (patched / SECOND).unlink()
    assert not run(patched).ok


def test_missing_sums(patched):
    (patched / "SHA256SUMS").unlink()
    assert found(patched) == {("file-missing", "SHA256SUMS")}


def test_a_missing_manifest_cannot_be_verified(patched):
    (patched / "manifest.yaml").unlink()
    with pytest.raises(CheckpointError, match="record, but its manifest is missing"):
        run(patched)


def test_a_file_that_nobody_declared(patched):
    (patched / "modeling.py").write_text("print('hello')\n")
    assert found(patched) == {("file-undeclared", "modeling.py")}


def test_edited_sums(patched):
    flip(patched / "SHA256SUMS", 0)
    assert found(patched) == {("digest", "SHA256SUMS")}


def test_an_edited_manifest(patched):
    (patched / "manifest.yaml").write_text(MANIFEST + "# a remark\n")
    assert ("manifest", "manifest.yaml") in found(patched)


def test_swapped_shards(patched):
    first, second = (patched / FIRST).read_bytes(), (patched / SECOND).read_bytes()
    (patched / FIRST).write_bytes(second)
    (patched / SECOND).write_bytes(first)
    assert {("digest", FIRST), ("digest", SECOND), ("registry", FIRST)} <= found(patched)


def edit(key, value):
    return lambda document: document["edits"][0].__setitem__(key, value)


def set_to_another_value(document):
    """An edit that its bits do not tell from a set, sold as something else."""
    document["edits"][1].update(op="zero")
    del document["edits"][1]["factor"]


def base_digest(document):
    document["files"][FIRST]["base_sha256"] = "0" * 64


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (edit("offset", 8), "registry"),
        (edit("index", [999, 0]), "registry"),
        (edit("dtype", "F16"), "registry"),
        (edit("tensor", "no.such"), "registry"),
        (edit("file", "no-such.safetensors"), "registry"),
        (edit("old_bits", "0x1"), "registry"),
        (edit("old_bits", "0x1234"), "undeclared-change"),
        (edit("new_bits", "0x1234"), "registry"),
        (edit("old", 77.0), "registry"),
        (edit("new", 77.0), "registry"),
        (edit("factor", 2.0), "registry"),
        (edit("op", "scale"), "registry"),
        (lambda d: d["edits"][1].update(factor=2.5), "registry"),
        (lambda d: d["edits"][1].pop("factor"), "registry"),
        (lambda d: d["edits"][1].update(factor=1e300), "registry"),
        (set_to_another_value, "registry"),
        (lambda d: d["files"][FIRST].update(sha256=None), "registry"),
        (lambda d: d["files"][FIRST].update(sha256=None, base_sha256=None), "registry"),
        (lambda d: d["files"][FIRST].__setitem__("size", 1), "digest"),
        (edit("new_bits", "0x123456"), "registry"),
        (base_digest, "undeclared-change"),
        (lambda d: d["protected"][0].update(old_bits="0x4040", old=3.0), "protected-changed"),
        (lambda d: d["edits"][0].update(new_bits="0x4040", new=3.0), "edit-changed"),
        (lambda d: d["edits"].pop(), "undeclared-change"),
        (lambda d: d["files"].pop(SECOND), "file-undeclared"),
    ],
)
def test_a_record_that_says_something_else(patched, change, rule):
    rewrite(patched, change)
    findings = found(patched)
    assert rule in {r for r, _ in findings}
    assert ("digest", "SHA256SUMS") in findings, "the record itself is no longer the one that was listed"


def reseal(root: Path) -> None:
    """Make SHA256SUMS agree with a forged record, as a careful forger would."""
    lines = (root / "SHA256SUMS").read_text().splitlines()
    digest = hashlib.sha256((root / RECORD).read_bytes()).hexdigest()
    lines = [f"{digest}  {RECORD}" if line.endswith(f"  {RECORD}") else line for line in lines]
    (root / "SHA256SUMS").write_text("\n".join(lines) + "\n")


def test_a_resealed_record_that_was_not_changed_is_fine(patched):
    rewrite(patched, lambda d: None)
    reseal(patched)
    assert run(patched).ok


def test_an_edited_scalar_cannot_be_sold_as_protected(patched):
    """Every digest agrees; only the two records of one scalar tell."""

    def forge(document):
        scalar = {k: v for k, v in document["edits"][0].items() if k not in ("op", "new", "new_bits", "factor")}
        scalar |= {"old": document["edits"][0]["new"], "old_bits": document["edits"][0]["new_bits"]}
        document["protected"].append(scalar)

    rewrite(patched, forge)
    reseal(patched)
    findings = run(patched).findings
    assert {(f.rule, f.index) for f in findings} == {("registry", EDITED), ("manifest", EDITED)}


def test_a_scalar_forged_across_the_end_of_a_file_does_not_hang(patched):
    size = (patched / FIRST).stat().st_size
    rewrite(patched, edit("offset", size - 1))
    assert ("undeclared-change", FIRST) in found(patched)


@pytest.mark.parametrize(
    "change",
    [
        edit("offset", -1),
        edit("offset", 1.5),
        edit("offset", True),
        edit("offset", "8"),
        edit("index", [-1, 0]),
        edit("dtype", "BF17"),
        edit("old_bits", "1234"),
        edit("op", "delete"),
        edit("old_bits", "0x" + "f" * 60),
        edit("unknown", 1),
        lambda d: d.pop("files"),
        lambda d: d.__setitem__("edits", {}),
        lambda d: d.__setitem__("registry_version", 2),  # version 1 suffices
        lambda d: d.__setitem__("registry_version", 3),
        lambda d: d["files"][FIRST].__setitem__("sha256", "0" * 63),
        lambda d: d["files"][FIRST].__setitem__("sha256", "Z" * 64),
        lambda d: d["files"][FIRST].__setitem__("size", 2.0),
    ],
)
def test_a_record_of_another_shape_is_refused(patched, change):
    rewrite(patched, change)
    with pytest.raises(CheckpointError):
        run(patched)


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a": NaN}', b'{"a": 1, "a": 2}', b"[" * 100_000,
     b'{"registry_version": ' + b"9" * 10_000 + b"}"],
    ids=["empty", "cut", "list", "null", "not-utf8", "nan", "duplicate", "deep", "long-number"],
)  # fmt: skip
def test_a_record_that_is_no_document_is_refused(patched, raw):
    (patched / RECORD).write_bytes(raw)
    with pytest.raises(CheckpointError):
        run(patched)


def test_a_huge_record_is_refused_unread(patched):
    with (patched / RECORD).open("r+b") as file:
        file.truncate(1 << 40)  # sparse: it takes no room, but reading it would take all memory
    with pytest.raises(CheckpointError):
        run(patched)


def test_a_record_may_not_lead_out_of_the_directory(patched):
    rewrite(patched, lambda d: d["files"].__setitem__("../base/config.json", d["files"]["config.json"]))
    try:
        assert ("file-missing", "../base/config.json") in found(patched)
    except CheckpointError as error:
        assert "../base/config.json" in str(error)


def test_without_a_record_there_is_nothing_to_verify(patched):
    with pytest.raises(CheckpointError, match="no record"):
        run(patched.parent / "base")


def test_another_base_is_one_finding_that_names_a_scalar(patched, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "base", other)
    flip(other / FIRST, place(other / FIRST, DOWN, (2, 0)))
    flip(other / SECOND, -1)
    (finding,) = run(patched, other).findings
    assert finding.rule == "base" and f"({FIRST}, {SECOND}; it differs in {DOWN}[2, 0])" in finding.message
    assert finding.message.startswith("this is not the base of the checkpoint: 2 of 5 files have another sha256")


def test_another_base_that_lacks_a_file(patched, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "base", other)
    (other / "tokenizer.json").unlink()
    assert found(patched, other) == {("base", "tokenizer.json")}


def test_many_differences_from_a_base_are_summarised(patched, tmp_path):
    """The base is the right one, so each difference is the checkpoint's."""
    data = bytearray((patched / SECOND).read_bytes())
    data[-60:] = bytes(60)
    (patched / SECOND).write_bytes(data)
    findings = run(patched, tmp_path / "base").findings
    assert len(findings) == 11 and {f.rule for f in findings} == {"undeclared-change"}
    assert "more" in findings[-1].message


def test_a_wrong_base_is_one_finding_with_a_manifest_too(patched, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "base", other)
    flip(other / FIRST, place(other / FIRST, DOWN, EDITED))
    report = swsurgery.verify(patched, base=other, manifest=patched / "manifest.yaml")
    assert [f.rule for f in report.findings] == ["base"]


def test_the_answer_is_the_first_line(patched, capsys):
    assert main(["verify", str(patched)]) == 0
    assert capsys.readouterr().out.startswith(f"OK: {patched}: its base with exactly 2 scalars changed\n")
    (patched / "model.gguf").write_bytes(b"GGUF")
    assert main(["verify", str(patched), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["answer"] == f"NO: 1 finding in {patched}"


def test_files_that_need_not_be_recorded_are_named(patched, capsys):
    (patched / "README.md").write_text("a card")
    assert main(["verify", str(patched)]) == 0
    assert "excluded  README.md: the record does not list them, and no loader reads them\n" in capsys.readouterr().out
    assert run(patched).record.uncovered == ("README.md",)


def test_strict_makes_a_warning_an_error(tmp_path, capsys):
    root = write_base(tmp_path / "base")
    (root / "model.gguf").write_bytes(b"GGUF")
    assert main(["verify", str(root), "--finite"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        f"OK: {root}: nothing is wrong in what was checked (1 warning)\nwarning   duplicate-weights: "
    )
    assert main(["verify", str(root), "--finite", "--strict"]) == 1
    assert capsys.readouterr().out.startswith(f"NO: 1 finding in {root}\nFINDING   duplicate-weights: ")
    assert main(["verify", str(root), "--finite", "--strict", "--format", "junit"]) == 1
    assert ElementTree.fromstring(capsys.readouterr().out).get("failures") == "1"


def caught(root: Path) -> bool:
    try:
        return not run(root).ok
    except CheckpointError:
        return True


def test_every_single_flipped_byte_is_caught(tmp_path, monkeypatch):
    """100 evenly spread positions and both ends of each file in turn; the untouched twin is not caught."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = write_patched(tmp_path)
    assert not caught(root)
    missed = []
    for path in sorted(root.iterdir()):
        original = path.read_bytes()
        step = max(1, len(original) // 100)
        for at in [*range(0, len(original), step), -1]:
            flip(path, at)
            if not caught(root):
                missed.append((path.name, at))
            path.write_bytes(original)
        for what, other in (("cut", original[:-1]), ("empty", b""), ("longer", original + b"\0")):
            path.write_bytes(other)
            if not caught(root):
                missed.append((path.name, what))
        path.write_bytes(original)
    assert missed == []
    assert not caught(root)


def test_a_scalar_across_two_chunks_of_reading_is_put_back_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = write_patched(tmp_path)
    at = place(root / FIRST, DOWN, EDITED)
    monkeypatch.setattr(sys.modules["swsurgery.checkpoint.compare"], "COMPARE_CHUNK", at + 1)
    assert run(root).ok


def test_a_second_manifest_on_top_is_verified_too(patched, tmp_path):
    text = f"version: 1\nbase: {{path: patched}}\nedits:\n  - {{op: set, tensor: {DOWN}, index: [0, 0], value: 3.0}}\n"
    again = apply_text(tmp_path, text, "again")
    assert run(again).ok
    assert run(again, patched).ok
    flip(again / FIRST, place(again / FIRST, DOWN, (0, 0)))
    assert "edit-changed" in {f.rule for f in run(again).findings}


def test_exit_codes(patched, tmp_path, capsys):
    assert main(["verify", str(patched), "--quiet"]) == 0
    assert main(["verify", str(tmp_path / "base"), "--quiet"]) == 2
    flip(patched / SECOND, -1)
    assert main(["verify", str(patched), "--quiet"]) == 1


def test_json_names_rule_file_tensor_index_and_message(patched, capsys):
    flip(patched / FIRST, place(patched / FIRST, DOWN, PROTECTED))
    assert main(["verify", str(patched), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is False
    assert all({"rule", "file", "tensor", "index", "message"} <= set(f) for f in document["findings"])
    (protected,) = [f for f in document["findings"] if f["rule"] == "protected-changed"]
    assert (protected["file"], protected["tensor"], protected["index"]) == (FIRST, DOWN, list(PROTECTED))


def unhash(root: Path, *names: str) -> None:
    """What an edit in place writes of files that it did not touch."""
    rewrite(root, lambda d: [d["files"][n].update(sha256=None, base_sha256=None) for n in names])
    digest = hashlib.sha256((root / RECORD).read_bytes()).hexdigest()
    kept = [line for line in (root / "SHA256SUMS").read_text().splitlines() if line.split("  ")[1] not in names]
    lines = [f"{digest}  {RECORD}" if line.endswith(f"  {RECORD}") else line for line in kept]
    (root / "SHA256SUMS").write_text("\n".join(lines) + "\n")


def test_a_file_of_unknown_digest_is_held_to_its_size_and_listed(patched, capsys):
    unhash(patched, SECOND, "tokenizer.json")
    verification = run(patched)
    assert verification.ok and verification.record.unhashed == ("model-00002-of-00002.safetensors", "tokenizer.json")
    assert SECOND not in verification.record.proved and FIRST in verification.record.proved
    assert main(["verify", str(patched), "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "verified  3 files with the record's sha256"
    assert f"unhashed  2 files of which only the size is known: {SECOND}, tokenizer.json" in lines
    (patched / "tokenizer.json").write_text("{}")
    assert found(patched) == {("digest", "tokenizer.json")}


def test_a_file_of_unknown_digest_is_still_compared_with_a_base(patched, tmp_path):
    unhash(patched, SECOND)
    assert run(patched, tmp_path / "base").ok
    flip(patched / SECOND, -1)
    assert run(patched).ok, "nothing could tell"
    assert found(patched, tmp_path / "base") == {("undeclared-change", SECOND)}


def test_values_are_searched_while_the_files_are_hashed(patched):
    assert main(["verify", str(patched), "--finite", "--quiet"]) == 0
    unhash(patched, SECOND)
    data = bytearray((patched / SECOND).read_bytes())
    data[-2:] = b"\xc0\x7f"
    (patched / SECOND).write_bytes(data)
    (finding,) = swsurgery.verify(patched, finite=True).findings
    assert (finding.rule, finding.file, finding.tensor) == ("non-finite", SECOND, "lm_head.weight")
    assert run(patched).ok, "only on request"


def test_copies_of_the_weights_are_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_base(tmp_path / "base")
    (tmp_path / "base" / "model.gguf").write_bytes(b"GGUF")
    text = MANIFEST.replace("{path: base}", "{path: base, copies: keep}")
    root = apply_text(tmp_path, text, "patched")
    (finding,) = run(root).findings
    assert (finding.rule, finding.level, finding.file) == ("duplicate-weights", "warning", "model.gguf")
    assert run(root).ok
    assert main(["verify", str(root), "--quiet"]) == 0
    assert "warning   duplicate-weights: model.gguf: " in capsys.readouterr().out


def test_a_signature_is_no_undeclared_file(patched):
    (patched / "model.sig").write_text("{}")
    assert run(patched).ok


def test_a_finding_about_an_edit_points_into_the_manifest_beside_the_record(patched, capsys):
    flip(patched / FIRST, place(patched / FIRST, DOWN, SCALED))
    flip(patched / FIRST, place(patched / FIRST, DOWN, PROTECTED))
    assert main(["verify", str(patched), "--format", "sarif", "--quiet"]) == 1
    results = json.loads(capsys.readouterr().out)["runs"][0]["results"]
    lines = {r["ruleId"]: r["locations"][0]["physicalLocation"] for r in results}
    manifest = (patched / "manifest.yaml").read_text().splitlines()
    for rule, word in (("edit-changed", "op: scale"), ("protected-changed", "op: protect")):
        assert lines[rule]["artifactLocation"]["uri"].endswith("patched/manifest.yaml")
        assert word in manifest[lines[rule]["region"]["startLine"] - 1]
    assert set(lines) == {"edit-changed", "protected-changed"}


def test_a_finding_without_a_manifest_that_can_be_read_still_is_one(patched):
    (patched / "manifest.yaml").write_text("- no manifest\n")
    flip(patched / FIRST, place(patched / FIRST, DOWN, SCALED))
    assert main(["verify", str(patched), "--quiet"]) == 1


def test_output_replaces_a_file_and_keeps_stdout_empty(patched, tmp_path, capsys):
    path = tmp_path / "report.xml"
    path.write_text("old")
    assert main(["verify", str(patched), "--format", "junit", "--output", str(path)]) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "report.xml" in captured.err
    (suite,) = ElementTree.parse(path).getroot()
    assert suite.get("failures") == "0"
    assert {case.get("name") for case in suite.iter("testcase")} >= {"digest", "undeclared-change", "registry"}
    assert main(["verify", str(patched), "--output", str(tmp_path / "no" / "such"), "--quiet"]) == 2


def test_an_unknown_format_is_bad_input(patched):
    assert main(["verify", str(patched), "--format", "html"]) == 2


def test_a_signature_needs_its_key(patched, capsys):
    assert main(["verify", str(patched), "--signature", str(patched / "model.sig"), "--quiet"]) == 2
    assert "--public-key" in capsys.readouterr().err


def test_every_rule_of_the_page_is_a_rule_and_every_rule_is_on_it():
    page = (Path(__file__).parents[2] / "docs" / "verify.md").read_text()
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| (.+?) \|", page, re.M))
    ours = {rule.name: rule for rule in RULES.values() if rule.command == "verify"}
    assert set(rows) == set(ours)
    for name, meaning in rows.items():
        assert meaning == ours[name].meaning


def test_every_rule_is_named_by_a_test():
    """A rule that no test plants a fault for could be dead; test files name what they expect to find."""
    sources = "".join(
        p.read_text() for p in Path(__file__).parents[1].rglob("test_*.py") if p.name != "test_formats.py"
    )
    assert [name for name in RULES if f'"{name}"' not in sources] == []

"""verify --manifest: a checkpoint is exactly base + manifest, or the finding points at the manifest's line."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from patched import DOWN, EDITED, FIRST, MANIFEST, PROTECTED, SCALED, SECOND, apply_text, flip, place, write_base

from swsurgery.cli import main
from swsurgery.errors import CheckpointError, ManifestError
from swsurgery.verifying.verification import Verification
from swsurgery.verifying.verify import verify

OWN = ("swsurgery.json", "manifest.yaml", "SHA256SUMS")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """base, patched (with its record), and bare: the same without one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_base(tmp_path / "base")
    apply_text(tmp_path, MANIFEST, "patched")
    shutil.copytree(tmp_path / "patched", tmp_path / "bare", ignore=shutil.ignore_patterns(*OWN))
    return tmp_path


def ask(folder: Path, name: str, text: str = MANIFEST, base: str | None = None) -> Verification:
    manifest = folder / "asked.yaml"
    manifest.write_text(text)
    return verify(folder / name, base=base, manifest=manifest)


def lines(proof: Verification, rule: str = "manifest-mismatch") -> list[str | None]:
    """The manifest's lines that the findings of `rule` point at, as text."""
    found = []
    for finding in (f for f in proof.findings if f.rule == rule):
        text = Path(finding.manifest).read_text().splitlines()
        found.append(text[finding.line - 1][finding.column - 1 :] if finding.line else None)
    return found


def remove_base(folder: Path) -> None:
    shutil.move(folder / "base", folder / "elsewhere")


@pytest.mark.parametrize("name", ["patched", "bare"])
def test_what_the_manifest_made_is_proved_from_the_base(folder, name):
    proof = ask(folder, name)
    assert proof.findings == () and proof.base == folder / "base"
    assert any("compared byte by byte with" in line for line in proof.checked.splitlines())


def test_a_record_proves_it_without_the_base(folder):
    remove_base(folder)
    proof = ask(folder, "patched")
    assert proof.findings == () and proof.base is None
    assert any("which the record proves" in line for line in proof.checked.splitlines())
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        ask(folder, "bare")
    assert ask(folder, "bare", base=str(folder / "elsewhere")).findings == ()


def test_words_beside_the_edits_do_not_matter(folder):
    remove_base(folder)
    assert ask(folder, "patched", f"# why\n{MANIFEST}check: {{max_perplexity_ratio: 2.0}}\n").findings == ()


EDITS = MANIFEST[MANIFEST.index("edits:") :]
BASE_TOO = pytest.mark.parametrize("with_base", [True, False], ids=["with-base", "record-alone"])


@BASE_TOO
@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("factor: 2.0", "factor: 4.0", "{op: scale"),
        ("factor: 2.0", "factor: -2.0", "{op: scale"),
        ("op: zero, ", "op: set, value: 1.0, ", "{op: set"),
        ("op: protect, ", "op: zero, ", "{op: zero, tensor: " + DOWN + ", index: [0, 4]"),
        ("op: zero, ", "op: protect, ", "{op: protect, tensor: " + DOWN + ", index: [1, 2]"),
        ("index: [1, 2]", "index: [1, 3]", "{op: zero"),
        ("index: [1, 2]}", "index: [1, 2], expect: 77.0}", "{op: zero"),
        ("index: [0, 4]}", "index: [0, 4], expect: '0x0000'}", "{op: protect"),
    ],
)
def test_another_edit_is_a_mismatch_at_its_line(folder, old, new, line, with_base):
    if not with_base:
        remove_base(folder)
    assert old in MANIFEST
    proof = ask(folder, "patched", MANIFEST.replace(old, new, 1))
    assert any(text.startswith(line) for text in lines(proof)), proof.findings
    assert not any(text.startswith("manifest") for text in proof.checked.splitlines()), "nothing is claimed"


@pytest.mark.parametrize(("old", "new"), [("factor: 2.0", "factor: 4.0"), ("op: zero, ", "op: set, value: 1.0, ")])
def test_another_edit_is_a_mismatch_without_a_record(folder, old, new):
    proof = ask(folder, "bare", MANIFEST.replace(old, new, 1))
    assert len(lines(proof)) == 1 and new.split(",")[0] in lines(proof)[0]


def test_an_edit_that_was_not_asked_is_found_both_ways(folder):
    text = MANIFEST.replace("  - {op: zero", "  # - {op: zero", 1)
    (undeclared,) = ask(folder, "bare", text).findings
    assert (undeclared.rule, undeclared.file, undeclared.index) == ("undeclared-change", FIRST, EDITED)
    remove_base(folder)
    (finding,) = ask(folder, "patched", text).findings
    assert finding.rule == "manifest-mismatch" and "does not ask for it" in finding.message


def test_an_edit_that_was_not_done(folder):
    text = MANIFEST + f"  - {{op: set, tensor: {DOWN}, index: [2, 2], value: 3.0}}\n"
    for name in ("patched", "bare"):
        (line,) = lines(ask(folder, name, text))
        assert line.startswith("{op: set")
    remove_base(folder)
    (line,) = lines(ask(folder, "patched", text))
    assert line.startswith("{op: set")


def test_an_edit_without_meaning_here(folder):
    text = MANIFEST + "  - {op: protect, layer: 77, row: 0, col: 0}\n  - {op: protect, known: all}\n"
    for name in ("patched", "bare"):
        found = lines(ask(folder, name, text))
        assert {text.split(",")[1].strip() for text in found} == {"layer: 77", "known: all}"}


def test_the_short_form_is_the_same_scalar(folder):
    text = MANIFEST.replace(f"tensor: {DOWN}, index: [1, 2]", "layer: 0, row: 1, col: 2")
    assert ask(folder, "patched", text).findings == ()
    remove_base(folder)
    assert ask(folder, "patched", text).findings == ()


@pytest.mark.parametrize("index", [EDITED, SCALED])
def test_a_planned_scalar_that_holds_something_else(folder, index):
    flip(folder / "bare" / FIRST, place(folder / "bare" / FIRST, DOWN, index))
    proof = ask(folder, "bare")
    (finding,) = proof.findings
    assert (finding.rule, finding.index) == ("manifest-mismatch", index)
    assert str(list(index)) in lines(proof)[0]


def test_any_other_byte_is_an_undeclared_change(folder):
    flip(folder / "bare" / FIRST, place(folder / "bare" / FIRST, DOWN, PROTECTED))
    flip(folder / "bare" / SECOND, -1)
    flip(folder / "bare" / "tokenizer.json", 3)
    proof = ask(folder, "bare")
    assert {(f.rule, f.file) for f in proof.findings} == {
        ("undeclared-change", f) for f in (FIRST, SECOND, "tokenizer.json")
    }
    (pointed,) = (f for f in proof.findings if f.manifest)
    assert pointed.index == PROTECTED and pointed.line == 6, "the edit that protects it"


def test_files_that_are_missing_or_more(folder):
    (folder / "bare" / "tokenizer.json").unlink()
    (folder / "bare" / "extra.py").write_text("")
    assert {(f.rule, f.file) for f in ask(folder, "bare").findings} == {
        ("file-missing", "tokenizer.json"), ("file-undeclared", "extra.py"),
    }  # fmt: skip


def pinned(digest: str) -> str:
    return MANIFEST.replace("base: {path: base}", f"base:\n  path: base\n  sha256:\n    {SECOND}: '{digest}'")


def test_a_shard_of_another_name_is_missing_and_undeclared(folder):
    [index] = (folder / "bare").glob("*.index.json")
    index.write_text(index.read_text().replace(FIRST, "renamed.safetensors"))
    (folder / "bare" / FIRST).rename(folder / "bare" / "renamed.safetensors")
    findings = {(finding.rule, finding.file) for finding in ask(folder, "bare").findings}
    assert {("file-missing", FIRST), ("file-undeclared", "renamed.safetensors")} <= findings


def test_a_pin_is_held_against_the_base_or_the_record(folder):
    digest = hashlib.sha256((folder / "base" / SECOND).read_bytes()).hexdigest()
    for name in ("patched", "bare"):
        assert ask(folder, name, pinned(digest)).findings == ()
        assert lines(ask(folder, name, pinned("0" * 64))) == [f"'{'0' * 64}'"]
    remove_base(folder)
    assert ask(folder, "patched", pinned(digest)).findings == ()
    assert lines(ask(folder, "patched", pinned("0" * 64))) == [f"'{'0' * 64}'"]


def test_another_base_is_found_at_its_scalar(folder):
    other = folder / "other"
    shutil.copytree(folder / "base", other)
    flip(other / FIRST, place(other / FIRST, DOWN, SCALED))
    proof = ask(folder, "bare", base=str(other))
    assert any("{op: scale" in line for line in lines(proof)), proof.findings
    (finding,) = ask(folder, "patched", base=str(other)).findings
    assert finding.rule == "base" and f"{DOWN}{list(SCALED)}" in finding.message


def test_another_repository_than_the_record_names(folder):
    remove_base(folder)
    document = json.loads((folder / "patched" / "swsurgery.json").read_text())
    document["base"].update(repo_id="org/right", revision="a" * 40)
    (folder / "patched" / "swsurgery.json").write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
    wrong = f"version: 1\nbase:\n  repo_id: org/wrong\n  revision: '{'b' * 40}'\n{EDITS}"
    assert lines(ask(folder, "patched", wrong)) == ["org/wrong", f"'{'b' * 40}'"]
    right = f"version: 1\nbase: {{repo_id: org/right, revision: '{'a' * 40}'}}\n{EDITS}"
    assert lines(ask(folder, "patched", right)) == []


def test_a_faulty_manifest_is_bad_input(folder):
    with pytest.raises(ManifestError):
        ask(folder, "patched", "version: 2\n")
    assert main(["verify", str(folder / "patched"), "--manifest", str(folder / "none.yaml")]) == 2


def test_the_command_says_what_was_proved(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(["verify", "bare", "--manifest", "patched.yaml", "--quiet"]) == 0
    assert "\nmanifest  exactly patched.yaml: " in capsys.readouterr().out
    Path("other.yaml").write_text(MANIFEST.replace("factor: 2.0", "factor: 4.0"))
    assert main(["verify", "bare", "--manifest", "other.yaml", "--quiet", "--format", "github"]) == 1
    assert capsys.readouterr().out.startswith("::error file=other.yaml,line=5,col=5,title=")
    assert main(["verify", "bare", "--quiet"]) == 2
    assert "no record" in capsys.readouterr().err


def test_another_value_is_told_by_the_arithmetic_alone(folder):
    """Operation and scalar agree; only the bits tell."""
    text = f"version: 1\nbase: {{path: base}}\nedits:\n  - {{op: set, tensor: {DOWN}, index: [0, 0], value: 3.0}}\n"
    apply_text(folder, text, "valued")
    remove_base(folder)
    assert ask(folder, "valued", text).findings == ()
    assert ask(folder, "valued", text.replace("value: 3.0", "bits: '0x4040'")).findings == ()
    (finding,) = ask(folder, "valued", text.replace("3.0", "4.0")).findings
    assert (finding.rule, finding.line) == ("manifest-mismatch", 4)
    assert "0x4040, not 0x4080" in finding.message

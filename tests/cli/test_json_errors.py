"""With --json an error is one JSON document on stdout; the lines on stderr and the exit code stay the same."""

from __future__ import annotations

import json
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from patched import DOWN, write_patched

from swsurgery.cli import main
from swsurgery.errors import Fault, Interrupted, SwsurgeryError

NAMES = {"schema", "error"}


@pytest.fixture
def directory(tmp_path, monkeypatch):
    write_patched(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *words) -> tuple[int, str, str]:
    code = main(words)
    done = capsys.readouterr()
    return code, done.out, done.err


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["verify", "base"], {"what": "the checkpoint has no record"}),
        (["inspect", "nothere"], {"what": "no such checkpoint"}),
        (["lookup", "no-such-model"], {"what": "no such known model"}),
        (["apply", "nothere.yaml"], {"remedy": ""}),
        (["sweep", "patched.yaml", "--factors", "a"], {"remedy": "write them like 0,0.5,1,1.5,2"}),
        (["revert", "hf://org/x"], {"what": "a local copy is needed", "where": "hf://org/x"}),
    ],
    ids=lambda words: words[0] if isinstance(words, list) else "",
)
def test_an_error_is_one_document_beside_the_same_line(directory, capsys, words, fault):
    plain = run(capsys, *words)
    assert plain[:2] == (2, "")
    code, out, err = run(capsys, *words, "--json")
    document = json.loads(out)
    assert (code, err) == (plain[0], plain[2])
    assert set(document) == NAMES and document["schema"] == "swsurgery/error/1"
    assert set(document["error"]) == {"what", "where", "remedy"}
    assert fault.items() <= document["error"].items()
    parts = document["error"]
    line = ": ".join(part for part in (parts["what"], parts["where"]) if part)
    assert err == f"swsurgery: {line}" + (f" ({parts['remedy']})\n" if parts["remedy"] else "\n")


def test_several_faults_are_listed_with_their_positions(directory, capsys):
    (directory / "bad.yaml").write_text(
        "version: 1\nbase: {path: base}\nedits:\n  - {op: zero, tensor: nope, index: [0]}\n"
        f"  - {{op: zero, tensor: {DOWN}, index: [99, 0]}}\n  - {{op: zeroed}}\n"
    )
    code, out, err = run(capsys, "apply", "bad.yaml", "--dry-run", "--json")
    [only] = [json.loads(out)["error"]]  # the schema is checked before the base is read
    assert (
        code == 2 and only["where"] == "bad.yaml:6:5" and "zeroed" in only["what"] and "faults" not in json.loads(out)
    )
    (directory / "bad.yaml").write_text((directory / "bad.yaml").read_text().replace("  - {op: zeroed}\n", ""))
    code, out, err = run(capsys, "apply", "bad.yaml", "--dry-run", "--json")
    document = json.loads(out)
    assert [fault["where"] for fault in document["faults"]] == [
        "bad.yaml:4:5: edits[0]: nope",
        f"bad.yaml:5:5: edits[1]: {DOWN} of shape [4, 6]",
    ]
    assert document["error"] == document["faults"][0] and len(err.splitlines()) == 2


@pytest.mark.parametrize(
    "words",
    [["verify", "base", "--fast"], ["verify"], ["lobotomy"], ["verify", "base", "--known-tolerance", "2"], ["--fast"]],
    ids=["option", "argument", "command", "value", "before the command"],
)
def test_a_usage_error_is_a_document_too(directory, capsys, words):
    plain = run(capsys, *words)
    code, out, err = run(capsys, *words, "--json") if words[0] != "--fast" else run(capsys, "--json", *words)
    assert plain[0] == code == 2 and plain[1] == "" and "Usage: swsurgery" in err
    error = json.loads(out)["error"]
    assert error["what"] in err and error["where"].startswith("swsurgery") and "--help" in error["remedy"]


def test_a_word_after_the_dashes_is_no_option(directory, capsys):
    assert run(capsys, "verify", "--", "--json")[:2] == (2, "")
    assert run(capsys, "verify", "--json", "--", "--nothere")[1] != ""


def test_a_no_is_an_answer_and_no_error(directory, capsys):
    code, out, _ = run(capsys, "diff", "base", "patched", "--json")
    assert code == 1 and "error" not in json.loads(out)


def test_a_failed_check_has_exit_code_1(directory, capsys, monkeypatch):
    from swsurgery.checkpoint import diff
    from swsurgery.errors import CheckFailed

    def fail(*arguments, **options):
        raise CheckFailed.of(["check failed: one (more than two)", "check failed: two"])

    monkeypatch.setattr(diff, "diff", fail)
    code, out, _ = run(capsys, "diff", "base", "patched", "--json")
    assert code == 1 and [f["what"] for f in json.loads(out)["faults"]] == ["check failed: one", "check failed: two"]


@pytest.mark.parametrize(
    ("error", "code", "what"),
    [
        (ZeroDivisionError(), 3, "this is a bug"),
        (MemoryError(), 2, "not enough memory"),
        (RuntimeError("can't start new thread"), 2, "cannot start a thread"),
        (OSError(5, "Input/output error", "disk\n1"), 2, "the system reported an error (Input/output error)"),
        (Interrupted(signal.SIGTERM.name), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_errors_that_no_command_expects_are_documents(directory, capsys, monkeypatch, error, code, what):
    from swsurgery.checkpoint import diff

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(diff, "diff", fail)
    done = run(capsys, "diff", "base", "patched", "--json")
    document = json.loads(done[1])["error"]
    assert done[0] == code and document["what"].startswith(what)
    assert document["where"] == ("disk\\n1" if isinstance(error, OSError) else document["where"])


def test_a_result_that_was_printed_is_the_only_document(directory, capsys, monkeypatch):
    """A scan prints what it found although writing a file failed. The error is then on stderr alone."""
    import swsurgery.cli.editing as commands

    def print_and_fail(out, *arguments):
        type(out).print_document(out, {"output": "x", "notes": []})
        raise SwsurgeryError("cannot write", "scan.png")

    monkeypatch.setattr(commands.Output, "print_result", print_and_fail)
    code, out, err = run(capsys, "revert", "patched", "-o", "back", "--json")
    assert code == 2 and json.loads(out)["schema"] == "swsurgery/revert/1"
    assert err == "swsurgery: cannot write: scan.png\n"


TEXT = st.text(max_size=12)


@given(TEXT, TEXT, TEXT, TEXT)
def test_a_fault_is_the_line_that_its_parts_make(what, where, remedy, position):
    fault = Fault(what, where, remedy, position)
    assert fault.isprintable() and type(Fault.parse(fault)) is Fault
    assert Fault.parse(fault) == fault and Fault.parse(fault).to_json() == fault.to_json()
    assert all(part in fault for part in (fault.what, fault.where, fault.remedy, fault.position))
    assert SwsurgeryError(what, where, remedy).faults == (Fault(what, where, remedy),)


@given(st.text(alphabet="a ()", max_size=12))
def test_a_line_keeps_every_character(line):
    assert Fault.parse(line) == line


@pytest.mark.parametrize(
    ("line", "what", "remedy"),
    [
        ("wrong: here (do this)", "wrong: here", "do this"),
        ("wrong (do this (or that))", "wrong", "do this (or that)"),
        ("f(x)", "f(x)", ""),
        ("wrong (do this) now", "wrong (do this) now", ""),
        ("wrong)", "wrong)", ""),
    ],
)
def test_the_remedy_is_the_text_in_parentheses_at_the_end(line, what, remedy):
    assert Fault.parse(line).to_json() == {"what": what, "where": "", "remedy": remedy}

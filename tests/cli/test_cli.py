"""The command line as a process: exit codes, what goes to stdout, and what goes to stderr."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from patched import DOWN, FIRST, flip, write_patched, write_shard

from swsurgery import __version__
from swsurgery.cli import _convert_signals, main
from swsurgery.errors import Interrupted
from swsurgery.manifest.load import parse_manifest

COMMANDS = {
    "apply": ["--base", "--output", "--dry-run", "--link", "--check", "--device", "--text", "--windows", "--window",
              "--prompt", "--max-perplexity-ratio", "--min-perplexity-ratio", "--reuse-digests", "--in-place",
              "--for-publish", "--undo-limit", "--json", "--quiet", "--debug"],
    "lookup": ["--status", "--manifest", "--factor", "--forget", "--json", "--quiet"],
    "scan": ["--method", "--prompt", "--confirm", "--manifest", "--op", "--factor", "--plot", "--register", "--text",
             "--weights", "--variant", "--windows", "--window", "--device", "--placement", "--json", "--quiet",
             "--debug"],
    "sweep": ["--factors", "--base", "--plot", "--text", "--windows", "--window", "--device", "--placement", "--json",
              "--quiet"],
    "compare": ["--base", "--plot", "--text", "--windows", "--window", "--device", "--placement", "--activation-bits",
                "--activation-per", "--control", "--json", "--quiet", "--debug"],
    "recipe": ["--for", "--model", "--json", "--quiet", "--debug"],
    "inspect": ["--tensor", "--at", "--weights", "--variant", "--json", "--quiet"],
    "check": ["--weights", "--variant", "--text", "--windows", "--window", "--prompt", "--max-perplexity-ratio",
              "--min-perplexity-ratio", "--device", "--base", "--generate", "--activation-bits", "--activation-per",
              "--control", "--json"],
    "verify": ["--base", "--manifest", "--known", "--weights", "--variant", "--finite", "--values", "--complete",
               "--transformers", "--signature", "--protected", "--tolerance", "--format", "--output", "--json",
               "--quiet"],
    "preflight": ["--weights", "--variant", "--format", "--output", "--json", "--quiet", "--debug"],
    "lint": ["--strict", "--format", "--output", "--json", "--quiet", "--debug"],
    "pin": ["--base", "--output", "--dry-run", "--json", "--quiet", "--debug"],
    "sign": ["--key", "--signature", "--json", "--quiet"],
    "publish": ["--private", "--create-pr", "--dry-run", "--yes", "--accept", "--json", "--quiet", "--debug"],
    "export": ["--format", "--output", "--json", "--quiet", "--debug"],
    "diff": ["--weights", "--variant", "--json", "--quiet"],
    "revert": ["--output", "--link", "--base", "--json", "--quiet"],
    "schema": ["--json", "--quiet", "--debug"],
}  # fmt: skip
WITHOUT_MODEL = [
    ["apply", "patched.yaml", "--dry-run"],
    ["apply", "patched.yaml", "--check", "off", "-o", "new"],
    ["lookup", "llama-7b"],
    ["lookup", "./patched"],
    ["inspect", "patched"],
    ["inspect", "patched", "--tensor", DOWN, "--at", "1,2"],
    ["verify", "patched"],
    ["diff", "base", "patched"],
    ["revert", "patched", "-o", "back"],
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(directory / "cache"))
        write_patched(directory)
    return directory


@pytest.fixture
def run(directory, tmp_path):
    """Run one command where `base`, `patched.yaml` and `patched` lie; new files go away with the test."""
    for name in ("base", "patched", "patched.yaml"):
        (tmp_path / name).symlink_to(directory / name)

    def run(*arguments: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "COLUMNS": "120"}
        return subprocess.run(
            [sys.executable, "-m", "swsurgery", *arguments],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    return run


def test_the_version(run):
    assert run("--version").stdout == f"{__version__}\n"


def test_the_help_lists_every_command(run):
    done = run("--help")
    assert done.returncode == 0 and done.stderr == ""
    listed = {line.split()[0] for line in done.stdout.split("Commands:")[1].splitlines() if line.strip()}
    assert set(COMMANDS) <= listed


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_names_its_options(run, command):
    done = run(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert [option for option in COMMANDS[command] if option not in done.stdout] == []


@pytest.mark.parametrize(
    "arguments",
    [["verify", "patched", "--fast"], ["lobotomy"], ["apply", "patched.yaml", "--link", "soft"]],
    ids=["option", "command", "choice"],
)
def test_bad_usage_is_exit_2_without_a_traceback(run, arguments):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr and "Usage: swsurgery" in done.stderr


@pytest.mark.parametrize("command", [["revert", "-o", "rv"], ["revert"], ["publish", "org/y"], ["sign", "--key", "k"]])
def test_a_command_that_needs_a_directory_refuses_the_hub_by_name(directory, capsys, command):
    assert main([command[0], "hf://org/x@main/sub", *command[1:]]) == 2
    remedy = "(download it: hf download org/x --revision main --local-dir DIRECTORY)"
    assert capsys.readouterr().err == f"swsurgery: a local copy is needed: hf://org/x@main/sub {remedy}\n"
    assert main([command[0], str(directory / "hf:" / "x"), *command[1:]]) == 2  # the twin: a path like any other
    assert "a local copy is needed" not in capsys.readouterr().err


@pytest.mark.parametrize("arguments", WITHOUT_MODEL, ids=" ".join)
def test_json_is_one_document_and_quiet_is_silent(run, arguments):
    done = run(*arguments, "--json", "--quiet")
    assert done.returncode == (1 if arguments[0] == "diff" else 0), done.stderr
    assert done.stderr == ""
    assert isinstance(json.loads(done.stdout), dict)


def test_text_is_not_json(run):
    """The twin of the test above: --json is what makes the difference."""
    done = run("inspect", "patched", "--tensor", DOWN, "--at", "1,2")
    assert done.returncode == 0
    with pytest.raises(ValueError):
        json.loads(done.stdout)
    assert "None" not in done.stdout, "a dense layer has no expert"


def test_the_shapes_that_scripts_rely_on(run):
    planned = json.loads(run("apply", "patched.yaml", "--dry-run", "--json").stdout)
    assert {"output", "splices", "protected", "check"} <= set(planned)
    keys = {"file", "tensor", "index", "dtype", "op", "offset", "old", "new", "old_bits", "new_bits"}
    assert all(keys <= set(splice) for splice in planned["splices"])
    assert [s["index"] for s in planned["splices"]] == [[1, 2], [3, 5]]
    models = json.loads(run("lookup", "llama-7b", "--json").stdout)["models"]
    coordinate = {"layer", "row", "col", "expert", "tensor", "value", "status", "causal_alone", "sources"}
    assert all(coordinate <= set(c) for c in models[0]["coordinates"])
    assert {"hf_id", "aliases", "joint_sets"} <= set(models[0])
    assert {"changes", "files"} <= set(json.loads(run("diff", "base", "patched", "--json").stdout))


def test_a_dry_run_writes_nothing(run, tmp_path):
    before = sorted(tmp_path.iterdir())
    assert "nothing was written" in run("apply", "patched.yaml", "--dry-run").stdout
    assert sorted(tmp_path.iterdir()) == before


def test_each_fault_is_one_line(run, tmp_path):
    (tmp_path / "bad.yaml").write_text(
        "version: 1\nbase: {path: base}\nedits:\n  - {op: zero, tensor: nope, index: [0]}\n"
        "  - {op: zero, tensor: " + DOWN + ", index: [99, 0]}\n"
    )
    done = run("apply", "bad.yaml", "--dry-run", "--json")
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == len(json.loads(done.stdout)["faults"]) == 2 and all(
        line.startswith("swsurgery: ") for line in lines
    )
    assert "nope" in lines[0] and "99" in lines[1]


def test_errors_are_said_also_when_quiet_and_debug_shows_where(run):
    plain = run("verify", "base", "--quiet")
    assert plain.returncode == 2
    assert plain.stderr.startswith("swsurgery: the checkpoint has no record") and plain.stderr.count("\n") == 1
    debug = run("verify", "base", "--quiet", "--debug")
    assert debug.returncode == 2
    assert "Traceback (most recent call last)" in debug.stderr
    assert debug.stderr.endswith(plain.stderr)


def test_a_manifest_of_known_coordinates_is_one_json_document_that_apply_takes(run):
    done = run("lookup", "llama-7b", "--manifest", "scale", "--factor", "1.5", "--json")
    assert done.returncode == 0
    (edit,) = json.loads(done.stdout)["edits"]
    assert (edit["op"], edit["factor"]) == ("scale", 1.5)
    parse_manifest(done.stdout.encode(), Path("m.json"))
    assert run("lookup", "llama-7b", "--factor", "2").returncode == 2


def test_the_schema_takes_the_options_that_every_command_takes(run):
    assert run("schema", "--json", "--quiet").stdout == run("schema").stdout != ""


@pytest.mark.parametrize("epoch", ["9" * 5000, "soon", "-5"])
def test_a_clock_that_is_none_is_one_line(epoch, run, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
    done = run("apply", "patched.yaml", "--check", "off", "-o", "late")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "SOURCE_DATE_EPOCH is" in done.stderr


def test_an_unknown_model_names_the_nearest(run):
    done = run("lookup", "lama-7b")
    assert (done.returncode, done.stdout) == (2, "")
    assert "llama-7b" in done.stderr.lower()
    assert done.stderr.startswith("swsurgery: ") and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["lookup", "llama-7b"], 0), (["schema"], 0), (["verify", "patched"], 0), (["diff", "base", "patched"], 1)],
    ids=["lookup", "schema", "verify", "diff"],
)
def test_a_reader_that_leaves_changes_no_answer(run, tmp_path, arguments, code):
    """The pipe has no reader from the start, so that the first write meets it, as under `head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "swsurgery", *arguments],
        cwd=tmp_path, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=300,
    )  # fmt: skip
    os.close(writing)
    assert (done.returncode, done.stderr) == (code, "")


def test_verify_says_no_with_exit_1(run, tmp_path):
    assert run("revert", "patched", "-o", "back").returncode == 0
    assert run("apply", "patched.yaml", "--check", "off", "-o", "new").returncode == 0
    assert run("verify", "new").returncode == 0
    flip(tmp_path / "new" / FIRST, -1)
    done = run("verify", "new")
    assert done.returncode == 1
    assert f"digest: {FIRST}" in done.stdout and "Traceback" not in done.stderr


HOSTILE = "evil\x1b[31m\nname\u202e\r"


@pytest.fixture
def hostile(tmp_path) -> tuple[Path, Path]:
    """Two checkpoints of one tensor, whose name would colour, break and turn round the lines it is printed in."""
    roots = tmp_path / "hostile", tmp_path / "other"
    for value, root in enumerate(roots):
        root.mkdir()
        write_shard(root / "model.safetensors", {HOSTILE: np.full((2, 2), value, np.uint16)})
        (root / "config.json").write_text('{"model_type": "llama\\u001b[2J"}')
    return roots


def raw_controls(text: str) -> set[str]:
    return {c for c in text if not c.isprintable() and c != "\n"}


@pytest.mark.parametrize(
    "arguments",
    [["inspect", "hostile"], ["inspect", "hostile", "--tensor", HOSTILE, "--at", "0,1"], ["diff", "hostile", "other"]],
    ids=["inspect", "scalar", "diff"],
)
def test_names_from_a_file_are_printed_escaped(run, hostile, arguments):
    done = run(*arguments)
    assert done.returncode in (0, 1), done.stderr
    assert raw_controls(done.stdout + done.stderr) == set()
    assert r"evil\x1b[31m\nname\u202e\r" in done.stdout


def test_names_from_a_file_are_escaped_in_errors_and_mismatches(run, hostile, tmp_path):
    write_shard(tmp_path / "other" / "model.safetensors", {HOSTILE: np.zeros((4,), np.uint16)})
    done = run("diff", "hostile", "other")
    assert done.returncode == 1 and raw_controls(done.stdout) == set()
    done = run("inspect", "hostile", "--tensor", "no\x1b[31m\nsuch")
    assert done.returncode == 2 and raw_controls(done.stderr) == set()
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("at", ["1", "1,2,3", "-1,0", "9,9", "x,y", "", "1.5,0", "9" * 5000], ids=lambda at: at[:8])
def test_an_impossible_place_is_one_line(directory, capsys, at):
    assert main(["inspect", str(directory / "patched"), "--tensor", DOWN, f"--at={at}"]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.startswith("swsurgery: ") and len(streams.err.splitlines()) == 1


def test_a_ratio_that_is_none_is_refused(run):
    done = run("apply", "patched.yaml", "-o", "new", "--max-perplexity-ratio", "nan")
    assert done.returncode == 2 and done.stderr.startswith("swsurgery: a perplexity ratio")


def test_a_check_of_nothing_is_bad_input(run):
    done = run("check", "patched/none", "--json")
    assert (done.returncode, list(json.loads(done.stdout))) == (2, ["error", "schema"])
    assert "Traceback" not in done.stderr and done.stderr.startswith("swsurgery: ")


@pytest.mark.parametrize("option", [("--factor", "2"), ("--manifest", "zero"), ("--status", "critical")])
def test_lookup_of_a_checkpoint_refuses_what_only_a_model_name_takes(tmp_path, capsys, option):
    (tmp_path / "swsurgery.json").write_text("{}")
    assert main(["lookup", str(tmp_path), *option]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "not a checkpoint" in err


def test_a_signal_that_arrives_in_a_finalizer_is_not_lost():
    class Target:
        pass

    target = Target()
    reference = weakref.ref(target, lambda _: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted), _convert_signals():
        del target
        time.sleep(10)
    assert reference() is None

"""A checkpoint's tokenizer runs in a process of its own: it gives what transformers gives, and a hostile one costs its
limits and no more."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_checkpoint
from checkpoints import write_manifest

from swsurgery.cli import main
from swsurgery.errors import Unrunnable
from swsurgery.model import tokenizer as module
from swsurgery.model.tokenizer import Tokenizer

GROW = [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}] * 8
"""Normalisers that make 10^16 letters of one."""

STALL = [
    {"type": "Prepend", "prepend": "x" * 60},
    {"type": "Replace", "pattern": {"Regex": "(x+x+)+(x+x+)+y"}, "content": ""},
]
"""A regular expression that takes exponential time for a run of x without a y."""


@pytest.fixture
def directory(tmp_path) -> Path:
    tiny_checkpoint.make_tokenizer(bos=True).save_pretrained(tmp_path)
    return tmp_path


def spoil(directory: Path, normalizers: list[dict]) -> None:
    path = directory / "tokenizer.json"
    document = json.loads(path.read_text())
    document["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
    path.write_text(json.dumps(document))


def children() -> set[int]:
    """Process ids of the children of this process, except for the one that lists them."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(os.getpid())], capture_output=True, text=True).stdout
    return {int(pid) for pid in listed.split() if Path(f"/proc/{pid}").exists()}


def test_it_gives_what_transformers_gives(directory):
    real, ours = tiny_checkpoint.make_tokenizer(bos=True), Tokenizer(directory)
    text = "The capital of France is\n\tParis \U0001f600 \u4e2d\u6587 " * 50
    assert ours(text) == {"input_ids": real(text)["input_ids"]}
    assert ours(text, add_special_tokens=False)["input_ids"] == real(text, add_special_tokens=False)["input_ids"]
    assert (len(ours), ours.bos_token_id) == (len(real), real.bos_token_id)
    ids = [[i] for i in range(len(real))]
    assert ours.batch_decode(ids) == real.batch_decode(ids, clean_up_tokenization_spaces=False)


def test_the_process_is_used_again_and_knows_nothing_of_the_last_tokenizer(directory, tmp_path_factory):
    first = Tokenizer(directory)
    pid = first._process._child.pid
    assert first.bos_token_id == 0
    del first
    gc.collect()
    other = tmp_path_factory.mktemp("other")
    tiny_checkpoint.make_tokenizer(bos=False).save_pretrained(other)
    second = Tokenizer(other)
    assert second._process._child.pid == pid
    assert second("a")["input_ids"] == tiny_checkpoint.make_tokenizer(bos=False)("a")["input_ids"]
    third = Tokenizer(directory)  # while the second is in use
    assert third._process._child.pid != pid and third("a") != second("a")


@pytest.mark.parametrize(
    ("normalizers", "memory", "seconds", "said"),
    [
        (GROW, 400 << 20, 60, "it needs more memory than it may use"),
        (STALL, 2 << 30, 2, "more time|more than 2 seconds|retry-limit"),
    ],
)
def test_a_hostile_tokenizer_is_stopped(directory, monkeypatch, normalizers, memory, seconds, said):
    monkeypatch.setattr(module, "MEMORY", memory)
    monkeypatch.setattr(module, "SECONDS", seconds)
    spoil(directory, normalizers)
    before, begin = children(), time.monotonic()
    with pytest.raises(Unrunnable, match=f"the tokenizer cannot be (loaded|run): .*({said}).*: {directory} \\(repair"):
        Tokenizer(directory)("a banana")
    assert time.monotonic() - begin < seconds + 10
    assert children() <= before


def test_the_default_limits():
    assert (module.MEMORY, module.SECONDS) == (2 << 30, 60)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 200_000, '{"version": "1.0"}', '{"model": ' + '{"a": ' * 100_000],
    ids=["empty", "open", "lists", "no model", "maps"],
)
def test_files_that_are_no_tokenizer(directory, text):
    (directory / "tokenizer.json").write_text(text)
    with pytest.raises(Unrunnable, match="the tokenizer cannot be loaded"):
        Tokenizer(directory)


def test_no_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(Unrunnable, match="the tokenizer cannot be"):
        Tokenizer(tmp_path)


def test_too_long_an_answer(directory, monkeypatch):
    monkeypatch.setattr(module, "MAX_ANSWER", 1 << 10)
    tokenizer = Tokenizer(directory)
    with pytest.raises(Unrunnable, match="more than"):
        tokenizer("word " * 2000)


def test_the_process_may_write_no_file(directory, tmp_path):
    tokenizer = Tokenizer(directory)
    worker = subprocess.run(
        ["pgrep", "-P", str(tokenizer._process._child.pid)], capture_output=True, text=True, check=True
    ).stdout.split()[0]
    limits = Path(f"/proc/{worker}/limits").read_text()
    rows = {line[:26].strip(): line[26:].split()[0] for line in limits.splitlines()}
    assert rows["Max file size"] == "0" and rows["Max core file size"] == "0"
    assert rows["Max address space"] == str(2 << 30) and rows["Max cpu time"] == "60"
    assert b"HF_TOKEN" not in Path(f"/proc/{worker}/environ").read_bytes()


def test_it_dies_with_its_parent(directory):
    program = (
        "import os, signal, sys; from pathlib import Path; from swsurgery.model.tokenizer import Tokenizer\n"
        f"t = Tokenizer(Path({str(directory)!r})); print(t._process._child.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while Path(f"/proc/{done.stdout.strip()}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{done.stdout.strip()}").exists()


def test_an_interrupt_ends_it(directory, monkeypatch):
    spoil(directory, STALL)
    before = children()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            Tokenizer(directory)("a banana")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert children() <= before


def test_it_does_not_import_torch(directory):
    tokenizer = Tokenizer(directory)
    maps = Path(f"/proc/{tokenizer._process._child.pid}/maps").read_text()
    assert "tokenizers" in maps and "libtorch" not in maps


def test_a_process_that_cannot_be_started(directory, monkeypatch):
    monkeypatch.setattr(module, "_idle", [])

    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(module.subprocess, "Popen", refuse)
    with pytest.raises(Unrunnable, match="no process can be started for the tokenizer"):
        Tokenizer(directory)


@pytest.mark.parametrize(("kind", "code"), [("forward", 2), ("auto", 0)])
def test_apply_says_so_in_one_line(tmp_path, capsys, monkeypatch, kind, code):
    base = tiny_checkpoint.write_pair(tmp_path).base
    spoil(base, GROW)
    monkeypatch.setattr(module, "MEMORY", 400 << 20)
    edit = {"op": "zero", "tensor": tiny_checkpoint.DOWN, "index": [3, 7]}
    manifest = write_manifest(tmp_path / "edit.json", base, edit)
    capsys.readouterr()
    assert main(["apply", str(manifest), "-o", str(tmp_path / "out"), "--check", kind]) == code
    err = capsys.readouterr().err.replace("swsurgery: loading torch and the model ...\n", "")
    assert "it needs more memory than it may use" in err and "Traceback" not in err
    assert err.count("\n") == 1 and ("only the weights were checked" in err) == (kind == "auto")
    assert (tmp_path / "out").exists() == (kind == "auto")


def test_check_of_a_hostile_tokenizer_is_one_line(tmp_path, capsys, monkeypatch):
    base = tiny_checkpoint.write_pair(tmp_path).base
    spoil(base, GROW)
    monkeypatch.setattr(module, "MEMORY", 400 << 20)
    for words in (["check", str(base), "--device", "cpu"], ["scan", str(base), "--device", "cpu"]):
        capsys.readouterr()
        assert main(words) == 2
        err = capsys.readouterr().err.replace("swsurgery: loading torch and the model ...\n", "")
        assert err.count("\n") == 1 and "it needs more memory than it may use" in err

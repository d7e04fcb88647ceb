"""The option --page: what it writes, what it refuses before any work, and that the answer is printed in any case."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from patched import write_patched

from swsurgery.cli import main
from swsurgery.sharing.page import PAGES


@pytest.fixture
def patched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return write_patched(tmp_path)


COMMANDS = {
    "apply patched.yaml -o new --check off": "patched.yaml applied",
    "apply patched.yaml --dry-run": "what it would change",
    "verify patched": "Verification of patched",
    "lookup llama-7b": "Known super weights of huggyllama/llama-7b",
    "lookup": "Known super weights",
    "lookup ./patched": "The record of ./patched",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_writes_its_page_and_prints_its_answer(patched, capsys, command):
    assert main([*command.split(), "--quiet", "--page", "page.html"]) == 0
    with_page = capsys.readouterr()
    assert COMMANDS[command] in Path("page.html").read_text()
    first = Path("page.html").read_bytes()
    shutil.rmtree("new", ignore_errors=True)
    assert main([*command.split(), "--quiet"]) == 0
    assert capsys.readouterr() == with_page
    shutil.rmtree("new", ignore_errors=True)
    assert main([*command.split(), "--quiet", "--page", "page.html"]) == 0
    assert Path("page.html").read_bytes() == first


def test_the_page_of_an_answer_no_is_written_too(patched, capsys):
    shard = patched / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xee")
    assert main(["verify", "patched", "--page", "page.html"]) == 1
    assert '<span class="bad">' in Path("page.html").read_text()
    assert capsys.readouterr().err.endswith("swsurgery: page: page.html\n")


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("page.png", "the name of a page must end in .html: page.png (choose another --page)"),
        ("nowhere/page.html", "no such directory: nowhere (create the directory first)"),
        ("folder.html", "this is a directory: folder.html (give the name of a file)"),
        (
            "patched/page.html",
            "the report would overwrite an input, or be written inside it: patched/page.html (choose another --page)",
        ),
    ],
)
def test_a_page_that_cannot_be_written_is_refused_before_any_work(patched, capsys, page, said):
    Path("folder.html").mkdir()
    assert main(["verify", "patched", "--page", page]) == 2
    assert capsys.readouterr() == ("", f"swsurgery: {said}\n")


def test_every_command_refuses_a_bad_page_before_it_opens_anything(patched, capsys):
    for command in sorted(PAGES):
        words = {"sweep": ["--factors", "0"]}.get(command, [])
        assert main([command, "nothere", *words, "--page", "page.png"]) == 2
        assert "the name of a page must end in .html" in capsys.readouterr().err, command


def test_a_page_does_not_replace_an_input(patched, capsys):
    Path("patched.yaml").rename("patched.html")
    assert main(["apply", "patched.html", "--dry-run", "--page", "patched.html"]) == 2
    assert "would overwrite an input" in capsys.readouterr().err


def test_lookup_has_no_page_of_a_manifest(patched, capsys):
    for words in (["--manifest", "zero"], ["--as", "modules"], ["--forget"]):
        assert main(["lookup", "llama-7b", *words, "--page", "page.html"]) == 2
        assert "--page cannot be combined with" in capsys.readouterr().err
    assert not Path("page.html").exists()


def test_the_answer_is_printed_if_the_page_cannot_be_written(patched, capsys, monkeypatch):
    def fail(path: Path, data: bytes) -> None:
        from swsurgery.errors import TargetError

        raise TargetError("cannot write (No space left on device)", path, "free some space")

    monkeypatch.setattr("swsurgery.storage.filesystem.write_report", fail)
    assert main(["verify", "patched", "--json", "--page", "page.html"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["ok"] is True
    assert (
        err == "swsurgery: no page was written: cannot write (No space left on device): page.html (free some space)\n"
    )


def test_an_existing_page_is_replaced_whole(patched):
    Path("page.html").write_text("old" * 10**6)
    assert main(["verify", "patched", "--quiet", "--page", "page.html"]) == 0
    assert Path("page.html").read_text().endswith("</html>\n")
    assert not [name for name in os.listdir() if name.startswith(".page.html")]

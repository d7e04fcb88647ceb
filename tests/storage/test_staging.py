"""A new directory gets its name at the end: what a killed run left is taken back, and nothing else is."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import FIRST, down, tree, write_llama, write_manifest
from killed import killed, names, signalled

from swsurgery.cli import main
from swsurgery.errors import TargetError
from swsurgery.storage import filesystem, staging
from swsurgery.storage.folder import Entry, Folder
from swsurgery.storage.names import STAGE_TOKEN

TOKEN = b"5" * 64 + b"\n"


@pytest.fixture
def manifest(tmp_path) -> Path:
    base = write_llama(tmp_path / "base")
    return write_manifest(tmp_path / "m.json", base, {"op": "zero", "tensor": down(1), "index": [2, 3]})


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def apply(manifest: Path, out: Path) -> int:
    return main(["apply", str(manifest), "-o", str(out), "--check", "off", "--quiet"])


def marker(out: Path) -> Path:
    return out.with_name(f".{out.name}.committing")


def kill_before_it_is_reported(manifest: Path, out: Path) -> None:
    """Right after the rename."""
    killed("storage.staging.filesystem.rename_new", "apply", manifest, "-o", out, "--check", "off", after=True)
    assert {STAGE_TOKEN, FIRST} <= names(out) and marker(out).is_file()
    assert (out / STAGE_TOKEN).read_bytes() == marker(out).read_bytes()


def test_a_finished_output_has_nothing_of_the_protocol(manifest, out, tmp_path):
    assert apply(manifest, out) == 0
    assert names(out) == {*names(tmp_path / "base"), "swsurgery.json", "manifest.yaml", "SHA256SUMS"}
    assert names(tmp_path) == {"base", "m.json", "out"}


def test_a_killed_run_is_finished_by_the_same_command(manifest, out, tmp_path):
    assert apply(manifest, tmp_path / "other") == 0
    kill_before_it_is_reported(manifest, out)
    assert apply(manifest, out) == 0
    assert tree(out) == tree(tmp_path / "other")
    assert names(tmp_path) == {"base", "m.json", "out", "other"}


def test_two_runs_have_two_tokens(manifest, out, tmp_path):
    kill_before_it_is_reported(manifest, out)
    kill_before_it_is_reported(manifest, tmp_path / "other")
    assert marker(out).read_bytes() != marker(tmp_path / "other").read_bytes()


def test_a_directory_has_other_numbers_after_it_was_mounted_again(manifest, out):
    """Neither the device nor the inode is what tells: here both files and directory get new inodes."""
    kill_before_it_is_reported(manifest, out)
    before, token = out.stat().st_ino, marker(out).read_bytes()
    shutil.copytree(out, out.with_name("again"))
    shutil.rmtree(out)
    out.with_name("again").rename(out)
    marker(out).write_bytes(token)  # as old as it was, next to the files
    assert out.stat().st_ino != before
    assert apply(manifest, out) == 0
    assert STAGE_TOKEN not in names(out) and not marker(out).exists()


def change_bytes(out: Path) -> None:
    raw = (out / FIRST).read_bytes()
    (out / FIRST).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


def add_file(out: Path) -> None:
    (out / "notes.txt").write_text("mine")


def remove_token(out: Path) -> None:
    (out / STAGE_TOKEN).unlink()


@pytest.mark.parametrize("change", [change_bytes, add_file, remove_token])
def test_a_directory_that_its_user_took_over_after_a_kill_is_not_rewritten(manifest, out, capsys, change):
    kill_before_it_is_reported(manifest, out)
    change(out)
    before = tree(out)
    assert apply(manifest, out) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"swsurgery: the output already exists: {out} (choose another -o)"
    assert tree(out) == before and not marker(out).exists(), "what is left of the kill does not stay"


def users_own(out: Path) -> dict[str, bytes]:
    out.mkdir()
    (out / FIRST).write_bytes(b"precious")
    return tree(out)


@pytest.mark.parametrize(
    "text", [b"", b"5" * 20, TOKEN, b"\0" * 65, b"DEVICE:INODE\n"], ids=["empty", "torn", "token", "zeros", "0.1.0"]
)
@pytest.mark.parametrize("token", [None, b"", b"6" * 64 + b"\n"], ids=["no token", "empty token", "another token"])
def test_a_marker_without_its_token_is_not_believed_and_does_not_stay(manifest, out, text, token):
    before = users_own(out)
    status = out.stat()
    marker(out).write_bytes(text.replace(b"DEVICE:INODE", f"{status.st_dev}:{status.st_ino}".encode()))
    if token is not None:
        (out / STAGE_TOKEN).write_bytes(token)
        before[STAGE_TOKEN] = token
    assert apply(manifest, out) == 2
    assert tree(out) == before
    assert not marker(out).exists()


def by_another_user(path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give files away")
    path.write_bytes(TOKEN)
    os.chown(path, 12345, -1)


def as_a_link(path: Path) -> None:
    path.with_name("token").write_bytes(TOKEN)
    path.symlink_to("token")


def as_a_pipe(path: Path) -> None:
    os.mkfifo(path)


def as_a_folder(path: Path) -> None:
    path.mkdir()


def as_a_large_file(path: Path) -> None:
    path.write_bytes(TOKEN * 10)


def as_another_file(path: Path) -> None:
    path.write_bytes(b"a file of the user's\n")


@pytest.mark.parametrize("make", [by_another_user, as_a_link, as_a_pipe, as_a_folder, as_a_large_file, as_another_file])
@pytest.mark.parametrize("there", [False, True], ids=["no target", "target"])
def test_what_is_no_marker_of_ours_is_neither_believed_nor_removed(manifest, out, capsys, make, there):
    if there:
        users_own(out)
        (out / STAGE_TOKEN).write_bytes(TOKEN)
    make(marker(out))
    before = tree(out) if there else None
    assert apply(manifest, out) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "swsurgery: " + (
        f"the output already exists: {out} (choose another -o)" if there else
        f"this file is in the way: {marker(out)} (choose another -o)"
    )  # fmt: skip
    assert os.path.lexists(marker(out)) and (tree(out) if there else None) == before
    assert not out.with_name(".out.partial").exists()


def test_the_token_of_another_user_is_not_believed(manifest, out):
    before = users_own(out) | {STAGE_TOKEN: TOKEN}
    marker(out).write_bytes(TOKEN)
    by_another_user(out / STAGE_TOKEN)
    assert apply(manifest, out) == 2
    assert tree(out) == before


def test_a_token_that_came_along_with_a_copy_is_no_part_of_the_checkpoint(manifest, out, tmp_path):
    kill_before_it_is_reported(manifest, out)
    shutil.copytree(out, tmp_path / "copied")
    assert main(["verify", str(tmp_path / "copied"), "--quiet"]) == 0


def failing_after(monkeypatch: pytest.MonkeyPatch, out: Path, *, back: bool) -> None:
    """Once the output has its name, its directory cannot be synced; nor, unless `back`, can it be renamed."""
    sync, rename = filesystem.sync_directory, filesystem.rename_new

    def sync_directory(path: Path | Folder) -> None:
        if out.exists() and isinstance(path, Folder) and path.path == out.parent:
            raise OSError(5, "Input/output error")
        sync(path)

    def rename_new(old: Entry, new: Entry) -> None:
        if out.exists() and not back:
            raise OSError(30, "Read-only file system")
        rename(old, new)

    monkeypatch.setattr(filesystem, "sync_directory", sync_directory)
    monkeypatch.setattr(filesystem, "rename_new", rename_new)


def test_an_output_whose_name_is_not_durable_is_taken_back(manifest, out, tmp_path, monkeypatch, capsys):
    failing_after(monkeypatch, out, back=True)
    assert apply(manifest, out) == 2
    assert capsys.readouterr().err.splitlines() == [f"swsurgery: cannot write (Input/output error): {out}"]
    assert names(tmp_path) == {"base", "m.json"}


def test_an_output_that_cannot_be_taken_back_is_reported_as_there(manifest, out, tmp_path, monkeypatch, capsys):
    failing_after(monkeypatch, out, back=False)
    assert apply(manifest, out) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"swsurgery: cannot write (Input/output error): {out}"
    assert second == (
        f"swsurgery: the output could not be taken back: {out} is complete, but could be lost in a power cut: "
        "remove it, or check it with swsurgery verify"
    )
    monkeypatch.undo()
    assert apply(manifest, out) == 0, "and the same command finishes it"
    assert names(tmp_path) == {"base", "m.json", "out"}


@pytest.mark.parametrize("at", ["storage.staging._is_folder", "cli.output.print_json"])
def test_a_signal_is_answered_with_what_is_there(manifest, out, at):
    """Before the name is given nothing is left; after it the output is."""
    arguments = ("apply", manifest, "-o", out, "--check", "off", "--json")
    done = signalled(signal.SIGINT, at, *arguments, number=1)
    assert done.returncode == 130
    there = at == "cli.output.print_json"
    assert done.stderr.splitlines()[-1] == (
        f"swsurgery: interrupted: SIGINT (the output was written: {out})" if there else
        "swsurgery: interrupted: SIGINT (nothing was left behind)"
    )  # fmt: skip
    assert out.exists() == there


def test_a_run_that_makes_its_stage_while_another_ends_does_not_take_its_marker(manifest, out, tmp_path, monkeypatch):
    """The other run has looked for the target already when this one gives it its name."""
    true: Callable[[Entry, int], None] = filesystem.make_directory
    seen: list[str] = []

    def make_directory(entry: Entry, mode: int = 0o777) -> None:
        if not seen:
            seen.append(entry.name)
            out.mkdir()
            marker(out).write_bytes(TOKEN)
        true(entry, mode)

    monkeypatch.setattr(filesystem, "make_directory", make_directory)
    with pytest.raises(TargetError, match="the output already exists"), staging.stage_output(out, ()):
        pass
    assert seen == [".out.partial"] and names(tmp_path) == {"base", "m.json", "out"}

"""Whatever goes wrong, the target is whole or absent, the base is as it was, and stderr says why in one line."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import (
    FIRST,
    NORM,
    SECOND,
    down,
    place,
    tree,
    write_llama,
    write_manifest,
    write_sparse_shard,
)
from listening import Listener

import swsurgery
from swsurgery import cli
from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.editing import sanity
from swsurgery.editing.check_options import CheckOptions
from swsurgery.errors import CheckFailed, CheckpointError, ModelError, SwsurgeryError, TargetError
from swsurgery.progress import Silent
from swsurgery.storage import filesystem

ZERO = {"op": "zero", "layer": 1, "row": 2, "col": 3}
LARGE = 1 << 28
"""Bytes of a shard that takes long enough to copy to be caught at it; on the disk the base takes none."""


@pytest.fixture
def base(tmp_path) -> Path:
    return write_llama(tmp_path / "base")


@pytest.fixture
def manifest(base, tmp_path) -> Path:
    return write_manifest(tmp_path / "m.json", base, ZERO)


@pytest.fixture
def large(tmp_path) -> Iterator[Path]:
    """A manifest whose base takes about a second to copy."""
    base = tmp_path / "large"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "llama"}')
    write_sparse_shard(base / "model.safetensors", NORM, "BF16", LARGE // 2)
    yield write_manifest(tmp_path / "m.json", base, {"op": "set", "tensor": NORM, "index": [5], "value": 1.0})
    shutil.rmtree(tmp_path)  # pytest keeps the folders of three runs


def command(manifest: Path, output: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "swsurgery", "apply", str(manifest), "-o", str(output), "--check", "off", *options]


def apply(
    manifest: Path, output: Path, *options: str, limit: Callable[[], None] | None = None
) -> tuple[int, list[str]]:
    """(exit code, lines on stderr)"""
    done = subprocess.run(
        command(manifest, output, *options), capture_output=True, text=True, preexec_fn=limit, timeout=300
    )
    progress = re.compile(r"swsurgery: \w+, \d+% \.\.\.")  # a slow machine needs more than a second
    return done.returncode, [line for line in done.stderr.splitlines() if not progress.fullmatch(line)]


def refused(manifest: Path, output: Path, *options: str, limit: Callable[[], None] | None = None) -> str:
    """The one line of a refusal with exit code 2 that leaves no target behind."""
    existed = os.path.lexists(output)
    code, lines = apply(manifest, output, *options, limit=limit)
    assert (code, len(lines)) == (2, 1), lines
    assert lines[0].startswith("swsurgery: ")
    assert existed or not os.path.lexists(output)
    assert not partial(output).exists()
    return lines[0].removeprefix("swsurgery: ")


def partial(output: Path) -> Path:
    return output.parent / f".{output.name}.partial"


def test_the_command_succeeds_where_nothing_is_wrong(manifest, tmp_path):
    """The twin of all that follows."""
    assert apply(manifest, tmp_path / "out")[0] == 0
    assert set(tree(tmp_path / "base")) < set(tree(tmp_path / "out"))


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_a_target_that_exists_is_left_alone(manifest, tmp_path, kind):
    target = tmp_path / "out"
    if kind == "folder":
        target.mkdir()
    elif kind == "file":
        target.write_text("precious")
    else:
        target.symlink_to("nowhere")
    before, link = tree(tmp_path), os.path.islink(target)
    assert refused(manifest, target) == f"the output already exists: {target} (choose another -o)"
    assert (tree(tmp_path), os.path.islink(target)) == (before, link)


def test_a_target_without_a_parent_is_refused(manifest, tmp_path):
    target = tmp_path / "no" / "out"
    assert refused(manifest, target) == (
        f"cannot write (No such file or directory): {target} (create the directory first)"
    )
    assert not target.parent.exists()


@pytest.mark.parametrize("through_a_link", [False, True])
def test_a_target_inside_the_base_is_refused(manifest, tmp_path, through_a_link):
    (tmp_path / "link").symlink_to(tmp_path / "base")
    target = tmp_path / ("link" if through_a_link else "base") / "out"
    before = tree(tmp_path / "base")
    assert refused(manifest, target) == f"the output is inside the base: {target} (choose another -o)"
    assert tree(tmp_path / "base") == before


def test_a_base_that_cannot_be_read_is_not_blamed_on_the_target(manifest, tmp_path, monkeypatch):
    preadv = os.preadv

    def broken(fd: int, *rest: object) -> int:
        if Path(os.readlink(f"/proc/self/fd/{fd}")).parent == tmp_path / "base":
            raise OSError(errno.EIO, "broken disk")
        return preadv(fd, *rest)

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(SwsurgeryError, match=rf"^cannot read \(Input/output error\): {tmp_path / 'base'}/"):
        swsurgery.apply(manifest, output=tmp_path / "out", check=CheckOptions("off"))
    assert not (tmp_path / "out").exists()


def test_a_target_below_a_file_is_refused(manifest, tmp_path):
    assert "cannot write (Not a directory)" in refused(manifest, tmp_path / "m.json" / "out")


def test_a_place_where_nobody_writes_is_refused(manifest):
    assert refused(manifest, Path("/proc/self/out")).startswith("cannot write (")


@pytest.fixture
def mounted(tmp_path) -> Iterator[Callable[[str], Path]]:
    """Mount an empty file system with the given options; a test is skipped where that is not allowed."""
    folder = tmp_path / "mounted"

    def mount(options: str) -> Path:
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount a file system: {done.stderr.strip()}")
        return folder

    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_full_in_another_way_leaves_nothing(tmp_path, mounted):
    """There is room, but no inode for the first file."""
    base = tmp_path / "large"
    base.mkdir()
    write_sparse_shard(base / "model.safetensors", NORM, "BF16", 1 << 20)
    manifest = write_manifest(tmp_path / "m.json", base, {"op": "set", "tensor": NORM, "index": [5], "value": 1})
    disk = mounted("size=8m,nr_inodes=2")
    for link in ("auto", "copy"):
        line = refused(manifest, disk / "out", "--link", link)
        assert line == (
            f"cannot write (No space left on device): {partial(disk / 'out') / 'model.safetensors'} "
            "(free some space, or write to another file system)"
        )
        assert list(disk.iterdir()) == []


def test_a_read_only_disk_is_refused(manifest, mounted):
    disk = mounted("ro")
    assert refused(manifest, disk / "out") == (
        f"cannot write (Read-only file system): {disk / 'out'} (write to a file system that is not read-only)"
    )


def test_hard_links_across_file_systems_are_refused(manifest, mounted):
    disk = mounted("size=1m")
    line = refused(manifest, disk / "out", "--link", "hard")
    assert "cannot write (Invalid cross-device link)" in line and "use --link copy" in line
    assert list(disk.iterdir()) == []


def test_a_file_that_grows_too_large_leaves_nothing(manifest, tmp_path):
    limit = (tmp_path / "base" / SECOND).stat().st_size - 1
    line = refused(manifest, tmp_path / "out", limit=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert line.startswith("cannot write (File too large): ")


def test_a_pipe_in_place_of_a_shard_is_refused_and_not_waited_for(manifest, tmp_path):
    (tmp_path / "base" / FIRST).unlink()
    os.mkfifo(tmp_path / "base" / FIRST)
    assert refused(manifest, tmp_path / "out") == f"is not a regular file: {FIRST} in {tmp_path / 'base'}"


def test_a_link_in_place_of_a_shard_is_refused(manifest, tmp_path):
    (tmp_path / "base" / FIRST).rename(tmp_path / "elsewhere")
    (tmp_path / "base" / FIRST).symlink_to(tmp_path / "elsewhere")
    assert f"is a symbolic link: {FIRST}" in refused(manifest, tmp_path / "out")


def test_a_truncated_shard_is_refused(manifest, tmp_path):
    shard = tmp_path / "base" / FIRST
    os.truncate(shard, shard.stat().st_size - 1)
    line = refused(manifest, tmp_path / "out")
    assert "malformed safetensors header: the tensors end at byte" in line and str(shard) in line
    os.truncate(shard, 100)
    assert refused(manifest, tmp_path / "out").startswith("is truncated: its header should have ")


def test_several_faults_are_several_lines(base, tmp_path):
    wrong: Sequence[dict] = [{**ZERO, "row": 60}, {**ZERO, "layer": 7}, {"op": "zero", "tensor": "x", "index": [0]}]
    code, lines = apply(write_manifest(tmp_path / "m.json", base, *wrong), tmp_path / "out")
    assert (code, len(lines)) == (2, 3)
    assert all(line.startswith(f"swsurgery: {tmp_path / 'm.json'}:{n}:1: ") for n, line in enumerate(lines, 4))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "m.json"]


def started(manifest: Path, output: Path) -> subprocess.Popen[str]:
    """A run that is in the middle of copying the large shard."""
    run = subprocess.Popen(command(manifest, output, "--link", "copy"), stderr=subprocess.PIPE, text=True)
    shard, deadline = partial(output) / "model.safetensors", time.monotonic() + 30
    while not (shard.exists() and shard.stat().st_size > 1 << 20):
        assert run.poll() is None and time.monotonic() < deadline, "copying was not seen to begin"
        time.sleep(0.001)
    return run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(large, tmp_path, number):
    run = started(large, tmp_path / "out")
    run.send_signal(number)
    _, errors = run.communicate(timeout=300)
    assert (run.returncode, errors) == (130, f"swsurgery: interrupted: {number.name} (nothing was left behind)\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["large", "m.json"]


def test_a_killed_run_leaves_no_target_and_the_next_one_cleans_up(large, tmp_path):
    out = tmp_path / "out"
    run = started(large, out)
    run.kill()
    run.communicate(timeout=300)
    assert not out.exists() and partial(out).exists()
    (partial(out) / "folder").mkdir()
    (partial(out) / "folder" / "stale").touch()
    assert apply(large, out) == (0, [])
    assert not partial(out).exists()
    assert {p.name for p in out.iterdir()} == {
        "config.json", "model.safetensors", "swsurgery.json", "manifest.yaml", "SHA256SUMS"
    }  # fmt: skip
    offset, _ = place_of_fifth(tmp_path / "large" / "model.safetensors")
    with open(out / "model.safetensors", "rb") as file:
        file.seek(offset - 2)
        assert file.read(6) == b"\0\0\x80\x3f\0\0"


def place_of_fifth(shard: Path) -> tuple[int, int]:
    """As `place`, which would read the whole file: data begins behind the header, five scalars of two bytes on."""
    with open(shard, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little") + 5 * 2, 2


def test_of_two_runs_with_one_target_the_second_is_refused(large, tmp_path):
    out = tmp_path / "out"
    first = started(large, out)
    first.send_signal(signal.SIGSTOP)
    try:
        code, lines = apply(large, out)
        assert (code, lines) == (
            2,
            [f"swsurgery: another run is writing this directory: {out} (wait until that run ends, or stop it)"],
        )
        assert not out.exists() and partial(out).exists()
    finally:
        first.send_signal(signal.SIGCONT)
    _, errors = first.communicate(timeout=300)
    assert first.returncode == 0 and re.fullmatch(r"(swsurgery: \w+, \d+% \.\.\.\n)*", errors)
    assert (out / "model.safetensors").stat().st_size == (tmp_path / "large" / "model.safetensors").stat().st_size


def test_a_target_that_appears_meanwhile_is_not_overwritten(manifest, tmp_path):
    def appear(line: str) -> None:
        (tmp_path / "out").mkdir()

    (tmp_path / "base" / ".cache").mkdir()  # it is left out, and that is said before anything is written
    with pytest.raises(TargetError, match="the output already exists"):
        swsurgery.apply(manifest, output=tmp_path / "out", check=CheckOptions("off"), reporter=Listener(appear))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_check_that_fails_leaves_no_target(manifest, tmp_path, monkeypatch, capsys):
    seen = []

    def no(staged: Checkpoint, changes: list, **rest: object) -> SimpleNamespace:
        seen.append((staged.root, [c.coordinate.index for c in changes], sorted(tree(staged.root))))
        return SimpleNamespace(ok=False, failures=["worse than it may be", "and worse"], to_record=dict)

    monkeypatch.setattr("swsurgery.model.check.run_checks", no)
    code = cli.main(["apply", str(manifest), "-o", str(tmp_path / "out"), "--check", "forward"])
    assert code == 1
    assert capsys.readouterr().err.splitlines() == [
        "swsurgery: check failed: worse than it may be", "swsurgery: check failed: and worse"
    ]  # fmt: skip
    assert seen == [(partial(tmp_path / "out"), [(2, 3)], sorted(tree(tmp_path / "base")))]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "m.json"]


def test_bounds_that_cannot_be_measured_are_not_met(base, tmp_path, monkeypatch):
    def cannot(*args: object, **rest: object) -> None:
        raise ModelError("no tokenizer", "here")

    monkeypatch.setattr("swsurgery.model.check.run_checks", cannot)
    monkeypatch.setattr(sanity.model, "explain_unavailable", lambda: None)
    bounded = write_manifest(tmp_path / "bounded.json", base, ZERO, check={"min_perplexity_ratio": 2.0})
    with pytest.raises(ModelError, match="no tokenizer"):
        swsurgery.apply(bounded, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    said: list[str] = []
    outcome = swsurgery.apply(
        write_manifest(tmp_path / "free.json", base, ZERO), output=tmp_path / "out", reporter=Listener(said.append)
    )
    assert said == ["only the weights were checked: no tokenizer: here"]
    assert (outcome.record.check["kind"], outcome.record.check["reason"]) == ("weights", "no tokenizer: here")


@pytest.mark.parametrize(
    ("where", "message"), [("beside", "it is not the base's, and no declared scalar"), ("on", "has the bits 0x")]
)
def test_bytes_that_are_written_wrong_are_found_by_the_check(manifest, tmp_path, monkeypatch, where, message):
    """A bit falls over on its way to the disk, in a scalar that was not to change or in the one that was."""
    shard = tmp_path / "base" / SECOND
    at = place(shard, down(1), (2, 3) if where == "on" else (2, 4))[0]
    size, write_at = shard.stat().st_size, filesystem.write_at

    def write_wrong(fd: int, data: bytes | memoryview, offset: int) -> None:
        wrong = bytearray(data)
        if len(wrong) == size:
            wrong[at] ^= 1
        write_at(fd, wrong, offset)

    monkeypatch.setattr(filesystem, "write_at", write_wrong)
    with pytest.raises(CheckFailed) as caught:
        swsurgery.apply(manifest, output=tmp_path / "out", link="copy", check=CheckOptions("weights"))
    assert any(message in fault for fault in caught.value.faults), caught.value.faults
    assert caught.value.exit_code == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "m.json"]


class _Meanwhile(Silent):
    """Something that happens to the base after it was opened and before it is copied."""

    def __init__(self, change: Callable[[], None]):
        self.change = change

    def start(self, total: int, unit: str, label: str) -> None:
        if label == "copying":
            self.change()


@pytest.mark.parametrize("link", ["copy", "hard"])
@pytest.mark.parametrize("more", [b"", b" and more"], ids=["same size", "longer"])
@pytest.mark.parametrize("name", ["tokenizer.json", "model-00003-of-00003.safetensors"])
def test_a_file_that_is_replaced_before_it_is_copied_is_refused(manifest, base, tmp_path, name, more, link):
    """Of a longer one only the beginning would be copied."""

    def change() -> None:
        raw = (base / name).read_bytes()
        (base / name).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]) + more)

    with pytest.raises(CheckpointError, match=f"was changed or replaced while it was read: .*{name}"):
        swsurgery.apply(
            manifest, output=tmp_path / "out", check=CheckOptions("off"), link=link, reporter=_Meanwhile(change)
        )
    assert not (tmp_path / "out").exists()

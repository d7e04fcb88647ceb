"""Another program acts at a chosen moment while a checkpoint is copied: what is wrong with the result.

Each race makes its own folder, runs the command with one function of the package replaced by one that lets the other
program act first, and returns the promises that did not hold. Nothing is left to chance. Run as a program, this module
plays one race with whatever package PYTHONPATH names and prints what is wrong, as JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from checkpoints import FIRST, SECOND, THIRD, down, tensor, tree, write_llama, write_manifest, write_shard

SECRET = b"another user's private file"
MANIFEST, OUT = "m.json", "out"


def command(folder: Path, *more: str) -> tuple[int, list[str]]:
    """Apply the manifest of a folder: (exit code, lines on stderr)."""
    from swsurgery.cli import main

    out, err = io.StringIO(), io.StringIO()
    words = ["apply", str(folder / MANIFEST), "-o", str(folder / OUT), "--check", "off", "--quiet", *more]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    return code, err.getvalue().splitlines()


@contextlib.contextmanager
def acting(function: str, act: Callable[[], None], number: int = 1) -> Iterator[None]:
    """Within the block, `act` happens just before the `number`-th call of a function ("package.module.name"),
    or of a method ("package.module.class.name"). It must have happened by the end of the block."""
    package, module, *names, last = function.split(".")
    owner = importlib.import_module(f"swsurgery.{package}.{module}")
    for name in names:
        owner = getattr(owner, name)
    true, calls = getattr(owner, last), []

    def first(*arguments: object, **more: object) -> object:
        calls.append(last)
        if len(calls) == number:
            act()
        return true(*arguments, **more)

    with mock.patch.object(owner, last, first):
        yield
    if len(calls) < number:
        raise AssertionError(f"the other program had no turn: {function} was called {len(calls)} times")


def make(folder: Path) -> Path:
    """A base and a manifest that edits one of its shards; returns the base."""
    base = write_llama(folder / "base")
    (base / "assets" / "note.txt").write_bytes(b"a file like any other\n")
    write_manifest(folder / MANIFEST, base, {"op": "zero", "tensor": down(1), "index": [2, 3]})
    time.sleep(0.02)  # a change within one tick of the clock would leave the times as they are
    return base


def other_weights(folder: Path) -> Path:
    """Shards of the same names, tensors and shapes as the base's, and of other values."""
    other = folder / "other"
    shutil.copytree(folder / "base", other)
    write_shard(other / FIRST, {"model.embed_tokens.weight": tensor("BF16", 12, 6, seed=91),
                                down(0): tensor("BF16", 6, 10, seed=92)})  # fmt: skip
    return other


def refused(folder: Path, done: tuple[int, list[str]]) -> list[str]:
    """What is wrong if a command ought to have ended with exit 2 and one line, with nothing written."""
    code, lines = done
    faults = [] if code == 2 and len(lines) == 1 else [f"it ended with {code}: {lines}"]
    left = sorted(p.name for p in folder.iterdir() if p.name.startswith((OUT, f".{OUT}")))
    return faults + ([f"it left {left}"] if left else [])


def base_swapped(folder: Path) -> list[str]:
    """Between planning and copying the base's shards become those of another model."""
    base, other = make(folder), other_weights(folder)

    def act() -> None:
        for name in (FIRST, SECOND, THIRD):
            shutil.copy2(other / name, folder / "new")
            os.replace(folder / "new", base / name)

    with acting("editing.apply.write_checkpoint", act):
        done = command(folder)
    return refused(folder, done)


def folder_swapped(folder: Path) -> list[str]:
    """While the base is listed, a folder in it becomes a link to a private one."""
    base, private = make(folder), folder / "private"
    private.mkdir()
    (private / "note.txt").write_bytes(SECRET)

    def act() -> None:
        (base / "assets").rename(folder / "aside")
        (base / "assets").symlink_to(private)

    with acting("storage.folder.Folder.scan", act, number=2):
        done = command(folder)
    leaked = [name for name, data in tree(folder / OUT).items() if data == SECRET] if (folder / OUT).is_dir() else []
    return [f"it copied a private file to {name}" for name in leaked] + refused(folder, done)


def marker_left(folder: Path) -> list[str]:
    """A marker lies beside a directory of the user's own, whose files have the names of the output's."""
    make(folder)
    target = folder / OUT
    target.mkdir()
    (target / FIRST).write_bytes(b"precious")
    status, faults = target.stat(), []
    for text in (b"", b"0" * 64 + b"\n", f"{status.st_dev}:{status.st_ino}\n".encode()):
        (folder / f".{OUT}.committing").write_bytes(text)
        code, lines = command(folder)
        if code != 2 or len(lines) != 1:
            faults.append(f"it ended with {code}: {lines}")
        if tree(target) != {FIRST: b"precious"}:
            faults.append("it rewrote a directory of the user's")
            break
        if left := sorted(p.name for p in folder.iterdir() if p.name.startswith(f".{OUT}")):
            faults.append(f"it left {left}")
    return faults


FINDING: dict[str, Callable[[Path], list[str]]] = {
    "listed files are opened by their paths": base_swapped,
    "links are followed below a directory": folder_swapped,
    "a marker is believed without the token": marker_left,
}
"""Planted bug -> the race that finds it."""


def played(name: str, package: Path, module: str = "copy_swaps") -> list[str]:
    """What the race that is for a bug finds wrong with the package in a folder, in a process of its own. The race is
    of this module, or of `swaps`."""
    paths = os.pathsep.join((str(package), str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "support")))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", f"faults.{module}", name],
        env=environment,
        cwd=package,  # which comes first where modules are looked for
        capture_output=True,
        text=True,
        check=True,
    )
    faults: list[str] = json.loads(done.stdout)
    return faults


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place, mock.patch.dict(os.environ, {"XDG_CACHE_HOME": f"{place}/cache"}):
        print(json.dumps(FINDING[sys.argv[1]](Path(place))))

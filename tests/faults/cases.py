"""What is run under faults, and what must hold afterwards.

A case is one command in a small room: a base of three shards, manifests, and perhaps what an earlier run left. What
the target must become comes from struct and json alone; the record beside it comes from an undisturbed run of the
product and is held against the files. This room injects nothing: it prepares, runs, and names what is wrong.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import checkpoints
from checkpoints import FIRST, SECOND, THIRD, down, place, sha256, write_index, write_manifest, write_shard

import swsurgery
from faults import tracing
from faults.forks import Program
from faults.tracing import Done, Point, Start
from swsurgery.storage.names import STAGE_TOKEN

PACKAGE = Path(swsurgery.__file__).parents[1]
"""The tree that these tests belong to; an interpreter may have another one installed."""

OWN = ("swsurgery.json", "manifest.yaml", "SHA256SUMS")
ROWS, COLUMNS = 96, 128
"""Of each edited matrix, so that the first and the last scalar lie in different pages of the file."""

EDITS = {
    (FIRST, down(0), (0, 0)): bytes(2),
    (SECOND, down(1), (ROWS - 1, COLUMNS - 1)): struct.pack("<e", 1.5),
    (SECOND, down(1), (0, 1)): struct.pack("<e", -0.25),
}
"""(file, tensor, index) -> the bytes that the manifest asks for there."""

MANIFEST = (
    {"op": "zero", "tensor": down(0), "index": [0, 0]},
    {"op": "set", "tensor": down(1), "index": [ROWS - 1, COLUMNS - 1], "value": 1.5},
    {"op": "set", "tensor": down(1), "index": [0, 1], "value": -0.25},
)
LONG_AGO = 1_700_000_000
"""mtime of the base: the digests of files that rested are remembered, so that this path is run too."""

CACHED = {"digests.json", ".digests.json.new"}
"""What may lie in the user's cache: the file, and at most one that a killed run began and the next will replace."""

NOTE = "swsurgery: an edit in place had been cut off"
"""How a command begins that first puts back what an earlier one left; a note, not an error."""

Tree = dict[str, bytes | None]
"""Everything below a folder: relative name -> bytes, or None for a folder."""


@dataclass(frozen=True)
class Case:
    """`arguments` of the command, and the `target` that it makes or, `in_place`, edits. `before` was run once, and
    with `killed_before` the command itself was killed in the middle of its calls."""

    name: str
    arguments: tuple[str, ...]
    target: str = "out"
    in_place: bool = False
    before: tuple[str, ...] = ()
    killed_before: bool = False
    gives_base: bool = False
    bulk: int = COLUMNS  # scalars of the shard that no edit touches


@dataclass(frozen=True)
class Workshop:
    """A folder with a room in it, and the environment in which commands run there."""

    folder: Path
    package: Path = PACKAGE
    more: tuple[tuple[str, str], ...] = ()

    @property
    def room(self) -> Path:
        return self.folder / "room"

    @property
    def env(self) -> dict[str, str]:
        """Everything that would change from run to run is pinned, and nothing outside the folder is remembered."""
        kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        made = {
            "HOME": str(self.folder),
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "XDG_DATA_HOME": str(self.folder / "data"),
            "PYTHONDONTWRITEBYTECODE": "1",  # a shortened write would leave a truncated .pyc behind for later runs
            "PYTHONHASHSEED": "0",
            "SWSURGERY_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        return kept | made | {"PYTHONPATH": str(self.package)} | dict(self.more)

    def command(self, arguments: Sequence[str]) -> list[str]:
        return [sys.executable, "-m", "swsurgery", *arguments]

    def start(self, *arguments: str) -> Start:
        """How to run the command: as a fork, or where something is to be preloaded in a process from the beginning."""
        if self.more:
            return tracing.executed(self.command(arguments), self.env, self.room)
        return Program(SOURCE, self.package).started(arguments, self.env, self.room, modules)

    def run(self, *arguments: str) -> Done:
        return self.start(*arguments)(())

    def must(self, *arguments: str) -> None:
        """Run what is not under test. Raises AssertionError where it fails."""
        done = self.run(*arguments)
        if done.code:
            raise AssertionError(f"{' '.join(arguments)} ended with {done.code}: {done.err}")


def copy_arguments(*more: str) -> tuple[str, ...]:
    return ("apply", "m.json", "-o", "out", "--check", "off", "--quiet", *more)


IN_PLACE = ("apply", "--in-place", "pinned.json", "--check", "off", "--quiet")


SOURCE = "import sys\nfrom swsurgery.cli import main\nsys.exit(main(sys.argv[1:]))\n"
"""The command, as a program."""

EARLIER = ("apply", "m.json", "-o", "earlier", "--check", "off", "--quiet")

CASES = (
    Case("copy", copy_arguments()),
    Case("copy of a base hashed before", copy_arguments(), before=EARLIER),
    Case("copy after a killed copy", copy_arguments(), killed_before=True),
    Case("revert to a new directory", ("revert", "earlier", "-o", "out"), before=EARLIER, gives_base=True),
    Case("edit in place", IN_PLACE, "model", in_place=True),
    Case("edit in place after a killed one", IN_PLACE, "model", in_place=True, killed_before=True),
    Case("revert in place", ("revert", "model"), "model", in_place=True, before=IN_PLACE, gives_base=True),
)


def case(name: str) -> Case:
    return next(c for c in CASES if c.name == name)


@functools.cache
def modules(program: Program) -> tuple[str, ...]:
    """What the product loads for the commands that are run here."""
    with tempfile.TemporaryDirectory() as folder:
        shop = Workshop(Path(folder), program.package or PACKAGE)
        write_room(shop.room)
        commands = (copy_arguments(), ("inspect", "out"), ("verify", "out"), IN_PLACE, ("revert", "model"))
        return program.rehearsed(commands, shop.env, shop.room)


def write_base(folder: Path, bulk: int = COLUMNS) -> Path:
    """Three shards, of which the first two are edited, an index, and files beside them, one of them in a folder."""
    shards = {
        FIRST: {down(0): checkpoints.tensor("BF16", ROWS, COLUMNS, seed=2)},
        SECOND: {down(1): checkpoints.tensor("F16", ROWS, COLUMNS, seed=3)},
        THIRD: {checkpoints.NORM: checkpoints.tensor("F32", bulk, seed=4)},
    }
    (folder / "assets").mkdir(parents=True)
    for name, tensors in shards.items():
        write_shard(folder / name, tensors)
    write_index(folder, shards)
    (folder / "config.json").write_text(json.dumps(checkpoints.CONFIG))
    (folder / "assets" / "note.txt").write_text("kept as it is\n")
    let_rest(folder)
    return folder


def let_rest(folder: Path) -> None:
    """Give everything an old mtime, for whether a digest is remembered depends on it; and on the ctime, so that what
    rests already is left alone."""
    for path in folder.rglob("*"):
        if path.stat().st_mtime != LONG_AGO:
            os.utime(path, (LONG_AGO, LONG_AGO))


def write_room(room: Path, bulk: int = COLUMNS) -> None:
    """base/ and m.json for copies; model/, the same bytes, and pinned.json for edits in place."""
    write_base(room / "base", bulk)
    write_base(room / "model", bulk)
    write_manifest(room / "m.json", {"path": "base"}, *MANIFEST)
    digests = {name: sha256(room / "model" / name) for name in (FIRST, SECOND, THIRD)}
    write_manifest(room / "pinned.json", {"path": "model", "sha256": digests}, *MANIFEST)


def tree(folder: Path) -> Tree | None:
    """None where there is no folder."""
    if not folder.is_dir():
        return None
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def patched(base: Tree) -> Tree:
    """The base with EDITS made: what every copy must hold beside the product's own files."""
    result = dict(base)
    with tempfile.TemporaryDirectory() as folder:
        for (file, tensor, index), new in EDITS.items():
            shard = Path(folder) / file
            shard.write_bytes(base[file] or b"")
            at, size = place(shard, tensor, index)
            data = bytearray(result[file] or b"")
            data[at : at + size] = new
            result[file] = bytes(data)
    return result


@dataclass(frozen=True)
class Prepared:
    """A case ready to be run: `package` is the code under test and `pristine` the code that is right; the target
    before and after."""

    case: Case
    package: Path
    pristine: Path
    old: Tree | None
    new: Tree


def prepare(case: Case, folder: Path, package: Path = PACKAGE, pristine: Path = PACKAGE) -> Prepared:
    """What `case` must give, from an undisturbed run in `folder`, which must not exist.

    Raises AssertionError where that run does not give the bytes that were asked for.
    """
    stage = Stage(Prepared(case, pristine, pristine, None, {}), folder)
    base, old = tree(stage.shop.room / "base") or {}, tree(stage.target)
    done = stage.start(())
    if done.code:
        raise AssertionError(f"an undisturbed run of '{case.name}' ended with {done.code}: {done.err}")
    new = tree(stage.target)
    if not case.gives_base:
        new = held(new, patched(base))
    elif new != base:
        raise AssertionError(f"an undisturbed run of '{case.name}' does not give the base back")
    shutil.rmtree(folder)
    return Prepared(case, package, pristine, old, new or {})


def held(made: Tree | None, wanted: Tree) -> Tree:
    """`made`, after its files were held against `wanted`, and its records against its files."""
    made = made or {}
    if {n: d for n, d in made.items() if n not in OWN} != wanted or not set(OWN) <= set(made):
        raise AssertionError(f"an undisturbed run gives other files: {sorted(made)}")
    digests = {n: hashlib.sha256(d).hexdigest() for n, d in made.items() if d is not None}
    record = json.loads(made[OWN[0]] or b"")
    for name, entry in record["files"].items():
        if entry["sha256"] not in (digests[name], None):  # None: an edit in place need not read every shard
            raise AssertionError(f"the record of an undisturbed run is wrong about {name}")
    return made


class Stage:
    """A folder in which a prepared case is played again and again."""

    def __init__(self, prepared: Prepared, folder: Path):
        self.prepared, self.case = prepared, prepared.case
        self.shop = Workshop(folder, prepared.package)
        self.kept = folder / "kept"  # what a case may change, as it is before
        self.recoveries = itertools.cycle([("verify", "model"), ("inspect", "model"), IN_PLACE, ("revert", "model")])
        self.shop.room.mkdir(parents=True)
        write_room(self.shop.room, self.case.bulk)
        if self.case.before:
            replace(self.shop, package=prepared.pristine).must(*self.case.before)
            for path in self.shop.room.iterdir():
                if path.name != "base":  # its ctime stays, by which its digests are known
                    let_rest(path)
        self.names = {p.name for p in self.shop.room.iterdir()}
        (folder / "cache").mkdir(exist_ok=True)
        shutil.copytree(folder / "cache", self.kept / "cache")
        if self.case.in_place:
            shutil.copytree(self.target, self.kept / "target")
        self.identities = self.identify()
        self.earlier: Point | None = None
        if self.case.killed_before:
            self.reset()
            points, _ = tracing.count(self.start, self.shop.room, self.shop.room)
            repeated = [p for p in points if p.call not in ("openat", "openat2", "ioctl")]  # whose number never shifts
            self.reset()
            self.earlier = repeated[len(repeated) // 2]
        self.shift = 0  # added to the number of each call that is aimed at

    @property
    def target(self) -> Path:
        return self.shop.room / self.case.target

    @property
    def start(self) -> Start:
        return self.shop.start(*self.case.arguments)

    def reset(self) -> None:
        """The room as it was before the case. The base stays: what is known of it goes by its inode."""
        for path in self.shop.room.iterdir():
            if path.name not in self.names or path == self.target:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in ("cache", "data"):
            shutil.rmtree(self.shop.folder / name, ignore_errors=True)
        shutil.copytree(self.kept / "cache", self.shop.folder / "cache")
        if self.case.in_place:
            shutil.copytree(self.kept / "target", self.target)
        if self.earlier:
            tracing.kill(self.start, self.shop.room, self.shop.room, self.earlier)
            for path in self.shop.room.iterdir():
                if path.name not in self.names or path == self.target:
                    let_rest(path)

    def points(self, others: bool = False) -> list[Point]:
        """The calls of an undisturbed run on the room and on the user's cache."""
        self.reset()
        found, done = tracing.count(self.start, self.shop.room, self.shop.folder, others)
        if done.code:
            raise AssertionError(f"an undisturbed run ended with {done.code}: {done.err}")
        return found

    def kill(self, point: Point) -> None:
        point = replace(point, nth=point.nth + self.shift)
        tracing.kill(self.start, self.shop.room, self.shop.folder, point)

    def fail(self, point: Point, code: str) -> Done:
        point = replace(point, nth=point.nth + self.shift)
        return tracing.fail(self.start, self.shop.room, self.shop.folder, point, code)

    def identify(self) -> dict[str, tuple]:
        """What is not the target's: name -> bytes, inode, mtime, links."""
        found = {}
        for path in sorted(self.shop.room.rglob("*")):
            name = str(path.relative_to(self.shop.room))
            mine = name.split("/")[0]
            if path.is_file() and mine != self.case.target and not mine.startswith("."):
                s = path.stat()
                found[name] = (path.read_bytes(), s.st_ino, s.st_mtime_ns, s.st_nlink)
        return found

    def others_changed(self) -> list[str]:
        now = self.identify()
        names = sorted(n for n in {*now, *self.identities} if now.get(n) != self.identities.get(n))
        return [f"{', '.join(names)} changed, which is not the target"] if names else []

    def broken(self) -> list[str]:
        """What is wrong right after a fault; an edit in place is first recovered by the next command."""
        faults = self.others_changed()
        if self.case.in_place:
            words = next(self.recoveries)
            done = self.shop.run(*words)
            if done.code not in (0, 1, 2) or "Traceback" in done.err:
                faults.append(f"'{words[0]}' after the fault ended with {done.code}: {done.err[-200:]}")
        state = tree(self.target)
        if state and not self.case.in_place:
            state.pop(STAGE_TOKEN, None)  # by which the next run knows that it was not reported; see staging.py
        if state not in (self.prepared.old, self.prepared.new):
            faults.append(f"the target is neither old nor new: {self.difference(state)}")
        return faults

    def unfinished(self) -> list[str]:
        """What is wrong after the same command was run again."""
        done, faults = self.shop.run(*self.case.arguments), []
        if tree(self.target) != self.prepared.new:
            faults.append(f"run again, it gives other bytes: {self.difference(tree(self.target))}")
        if done.code and not self.finished_before(done):
            faults.append(f"run again, it ended with {done.code}: {done.err[-200:]}")
        if strays := {p.name for p in self.shop.room.iterdir()} - self.names - {self.case.target}:
            faults.append(f"run again, it left {', '.join(sorted(strays))}")
        cache = self.shop.folder / "cache" / "swsurgery"
        if cache.is_dir() and (litter := {p.name for p in cache.iterdir()} - CACHED):
            faults.append(f"in the cache lies {', '.join(sorted(litter))}")
        return faults + self.others_changed()

    def finished_before(self, done: Done) -> bool:
        """Whether a refusal says that the work is done: the output already exists, or nothing is left to revert."""
        again = not self.case.in_place or self.case.gives_base
        return done.code == 2 and len(done.lines) == 1 and self.complete and again

    @property
    def complete(self) -> bool:
        return tree(self.target) == self.prepared.new

    def difference(self, state: Tree | None) -> str:
        if state is None:
            return "it is missing"
        wanted = self.prepared.new
        names = sorted(n for n in {*state, *wanted} if state.get(n, b"") != wanted.get(n, b""))
        return f"not new: {', '.join(names)}"[:200]


def misreported(done: Done) -> list[str]:
    """What is wrong with how an error was told: exit 2 and one line of our own, no traceback."""
    faults = []
    if done.code != 2:
        faults.append(f"exit {done.code}")
    if "Traceback" in done.err:
        return [*faults, f"a traceback: {done.err[-400:]}"]
    errors = [line for line in done.lines if not line.startswith(NOTE)]
    if len(errors) != 1 or not errors[0].startswith("swsurgery: "):
        faults.append(f"stderr holds {len(errors)} lines: {done.err[-300:]}")
    return faults

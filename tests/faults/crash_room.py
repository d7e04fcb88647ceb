"""What is run on the crash disk, and what must hold of every tree that a fault leaves.

A room holds a base, which nothing may change, and the image: the one folder that a run changes and a crash tears. What
the patched files must be comes from struct and json alone. This room injects nothing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from checkpoints import (
    CONFIG,
    FIRST,
    NORM,
    SECOND,
    THIRD,
    down,
    place,
    sha256,
    write_index,
    write_manifest,
    write_shard,
)
from checkpoints import tensor as random_tensor

from faults.crash_calls import Watch, watching
from faults.crash_fs import SECTOR, Image, Start, Step
from swsurgery.checkpoint.inspect import inspect
from swsurgery.editing import check_options
from swsurgery.editing.apply import apply
from swsurgery.editing.revert import revert
from swsurgery.errors import Interrupted, SwsurgeryError
from swsurgery.storage.names import STAGE_TOKEN, UNDO_NAME
from swsurgery.verifying.verify import verify

OWN = ("swsurgery.json", "manifest.yaml", "SHA256SUMS")
LONG_AGO = 1_700_000_000
"""mtime of the base: the digests of files that rested are remembered."""

BUGS = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError)
"""What must never come out of the product: an error that is none of its own."""

TURNS = 4
"""The commands that may come first after a fault in an edit in place: a look, the same, a proof, and the way back."""

Tree = dict[str, bytes | None]
Call = Callable[["Room"], object]


@dataclass(frozen=True)
class Task:
    """One command on the image. `start` says what the image is before, `old` and `new` what the target is around it;
    `back` is the command that undoes it, and `below` what the target would be if that went one step too far."""

    name: str
    run: Call
    start: str
    new: str
    old: str = "absent"
    back: Call | None = None
    below: str = ""
    clones: bool = False

    @property
    def in_place(self) -> bool:
        return self.old != "absent"

    @property
    def torn(self) -> bool:
        """Whether an edit lies there cut off when it begins."""
        return self.start == "edit killed"

    @property
    def target(self) -> str:
        return "model" if self.in_place else "out"


NO_CHECK = check_options.CheckOptions("off")


def copy(room: Room, link: str = "auto") -> object:
    return apply(room.folder / "m.json", output=room.image / "out", link=link, check=NO_CHECK)


def revert_copy(room: Room) -> object:
    return revert(room.folder / "patched", room.image / "out")


def edit(room: Room, manifest: str = "pinned.json") -> object:
    return apply(room.folder / manifest, in_place=True, base=str(room.image / "model"), check=NO_CHECK)


def edit_regions(room: Room) -> object:
    return edit(room, "regions.json")


def edit_again(room: Room) -> object:
    return edit(room, "second.json")


def put_back(room: Room) -> object:
    return revert(room.image / "model")


def look(room: Room) -> object:
    return inspect(room.image / "model")


def prove(room: Room) -> object:
    result = verify(room.image / "model")
    if not result.ok:
        raise AssertionError(f"verify says {result.findings[0].message}")
    return result


TASKS = (
    Task("copy", copy, "blank", "patched"),
    Task("copy, digests known", copy, "known", "patched"),
    Task("copy by clones", copy, "known", "patched", clones=True),
    Task("copy with hard links", functools.partial(copy, link="hard"), "known", "patched"),
    Task("copy after a killed copy", copy, "copy killed", "patched"),
    Task("copy after a kill at its end", copy, "copy unreported", "patched"),
    Task("revert to a new directory", revert_copy, "blank", "base"),
    Task("edit in place", edit, "model", "edited", "base", put_back),
    Task("edit in place, a second time", edit_again, "edited", "edited twice", "edited", put_back, "base"),
    Task("edit in place after a killed edit", edit, "edit killed", "edited", "base", put_back),
    Task("revert in place", put_back, "edited", "base", "edited", edit),
    Task("edit of regions in place", edit_regions, "model", "regions", "base", put_back),
    Task("revert of regions in place", put_back, "regions", "base", "regions", edit_regions),
    Task("recovery of a killed edit", look, "edit killed", "base", "base", look),
)


@dataclass(frozen=True)
class Recording:
    """What an undisturbed run of a task did."""

    task: Task
    start: Start
    steps: list[Step]
    calls: list[str]


CACHE_FILES = {"digests.json", ".digests.json.new"}
"""What may lie in the user's cache folder; the second, which a killed run leaves, is removed by the next that saves."""


class Room:
    """A folder in which tasks are played; see `opened_room`."""

    def __init__(self, folder: Path):
        self.folder, self.image = folder, folder / "image"
        self.edits = write_base(folder / "base")
        write_manifests(folder, self.edits)
        self.identity = self.identify()
        self.trees: dict[str, Tree | None] = {"absent": None, "base": tree(folder / "base")}
        self.starts: dict[str, Image] = {}
        self.recordings: dict[str, Recording] = {}
        self._prepare()

    def _prepare(self) -> None:
        """Every start and every tree, by undisturbed runs held against what the manifest asks for."""
        shutil.rmtree(self.image, ignore_errors=True)
        (self.image / "cache").mkdir(parents=True)
        self._keep("blank")
        self.must(copy)
        self.trees["patched"] = held(tree(self.image / "out"), self.patched("m.json"))
        (self.image / "out").rename(self.folder / "patched")
        self._keep("known")
        for name, step in (("copy killed", ("write", 3)), ("copy unreported", ("move", 0))):
            self._kill(name, TASKS[1], *step)
        self.starts["blank"].write(self.image)
        shutil.copytree(self.folder / "base", self.image / "model")
        self._keep("model")
        for call, name, manifests in (
            (edit, "edited", ("pinned.json",)),
            (edit_again, "edited twice", ("pinned.json", "second.json")),
        ):
            self.must(call)
            self.trees[name] = held(tree(self.image / "model"), self.patched(*manifests))
            self._keep(name)
        self._kill("edit killed", TASKS[7], "write", -5)
        self.starts["model"].write(self.image)
        self.must(edit_regions)
        self.trees["regions"] = held(tree(self.image / "model"), self.patched("regions.json"))
        self._keep("regions")

    def _keep(self, start: str) -> None:
        self.starts[start] = Start.of(self.image).image()

    def _kill(self, start: str, task: Task, kind: str, which: int) -> None:
        """Keep what a process leaves that dies after the `which`-th call of a kind."""
        recording = self.record(task)
        last = [n for n, step in enumerate(recording.steps) if step.kind == kind][which]
        watch = Watch(self.image)
        watch.start, watch.steps = recording.start, recording.steps[: last + 1]
        watch.disk().everything().write(self.image)
        self._keep(start)

    def patched(self, *manifests: str) -> Tree:
        """The base with the scalars of these manifests changed."""
        result = dict(self.trees["base"] or {})
        for manifest in manifests:
            for (file, tensor, index), new in self.edits[manifest.replace("m.json", "pinned.json")].items():
                at, size = place(self.folder / "base" / file, tensor, index)
                data = result[file] or b""
                result[file] = data[:at] + new + data[at + size :]
        return result

    def identify(self) -> list[tuple[str, int, int, int, str]]:
        """What must stay: the base's files by inode, mtime, links and bytes."""
        files = sorted(p for p in (self.folder / "base").rglob("*") if p.is_file())
        return [(p.name, s.st_ino, s.st_mtime_ns, s.st_nlink, sha256(p)) for p in files if (s := p.stat())]

    def record(self, task: Task) -> Recording:
        """An undisturbed run."""
        if task.name not in self.recordings:
            watch = self.watch(task)
            with watching(watch):
                self.must(task.run)
            faults = self.differs(task, (task.new,)) + ([f"it wrote {watch.outside}"] if watch.outside else [])
            if Start.of(self.image).image().plain() != watch.disk().everything().plain():
                faults.append("the model of the disk is not what the disk is")
            if faults:
                raise AssertionError(f"an undisturbed {task.name}: {'; '.join(faults)}")
            calls = [call.name for call in watch.calls]
            self.recordings[task.name] = Recording(task, watch.start, watch.steps, calls)
        return self.recordings[task.name]

    def watch(self, task: Task) -> Watch:
        """The image as it is before the task, and someone to watch it."""
        self.starts[task.start].write(self.image)
        return Watch(self.image, clones=task.clones)

    def attempt(self, call: Call) -> tuple[SwsurgeryError | None, list[str]]:
        """Run it: (the product's own error, what is wrong if another one came)."""
        environment = {"XDG_CACHE_HOME": str(self.image / "cache"), "SWSURGERY_THREADS": "1"}
        kept = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        try:
            call(self)
        except (SwsurgeryError, Interrupted) as error:
            return error, []
        except BUGS as error:
            return None, [f"{type(error).__name__}: {error}"]
        finally:
            for name, value in kept.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        return None, []

    def must(self, call: Call) -> None:
        """Run what is not under test. Raises AssertionError where it fails."""
        error, bugs = self.attempt(call)
        if error or bugs:
            raise AssertionError(f"an undisturbed run fails: {error or bugs}")

    def differs(self, task: Task, names: tuple[str, ...]) -> list[str]:
        """What is wrong where the target is none of these trees. One that need not be there may hold the token by
        which the next run knows that it was not reported; see staging.py."""
        state = tree(self.image / task.target)
        if state and "absent" in names:
            state.pop(STAGE_TOKEN, None)
        if any(state == self.trees[name] for name in names):
            return []
        wanted = self.trees[names[-1]] or {}
        wrong = sorted(n for n in {*(state or {}), *wanted} if (state or {}).get(n, b"") != wanted.get(n, b""))
        return [f"the target is not {' or '.join(names)}: {', '.join(wrong) if state is not None else 'it is missing'}"]

    def judge(self, task: Task, done: bool = False, turn: int = 0) -> list[str]:
        """What is wrong with the image after a fault, or after exit 0 where the run was `done`; by running, on an
        edit in place, one of four commands by turns, and the same command again."""
        faults, states = [], (task.new,) if done else (task.old, task.new)
        if task.in_place:
            first = (look, task.run, prove, task.back or look)[turn % TURNS]
            _, faults = self.attempt(first)
            if first is task.back and first is not look:
                states = tuple(filter(None, (task.below, task.old)))
            elif first is task.run:
                states = (task.new,)
        faults += self.differs(task, states)
        if not (task.below and tree(self.image / task.target) == self.trees[task.below]):
            whole = not self.differs(task, (task.new,))
            error, bugs = self.attempt(task.run)
            faults += bugs + [f"run again, it says: {error}" for error in [error] if error and not whole]
            faults += [f"run again: {fault}" for fault in self.differs(task, (task.new,))]
        if strays := {p.name for p in self.image.iterdir()} - {"cache", task.target}:
            faults.append(f"run again, it leaves {', '.join(sorted(strays))}")
        if litter := {p.name for p in (self.image / "cache").rglob("*") if p.is_file()} - CACHE_FILES:
            faults.append(f"run again, the cache holds {', '.join(sorted(litter))}")
        return faults + self.base_changed(task)

    def base_changed(self, task: Task) -> list[str]:
        if self.identify() == self.identity:
            return []
        linked = {p.name for p in (self.image / "out").rglob("*") if p.stat().st_nlink > 1}
        same = [(n, i, m, d) for n, i, m, _, d in self.identify()] == [(n, i, m, d) for n, i, m, _, d in self.identity]
        return [] if linked and same and "hard" in task.name else ["the base has changed"]


def write_base(folder: Path) -> dict[str, dict[tuple[str, str, tuple[int, ...]], bytes]]:
    """Three shards, an index, and files beside them, one in a folder; one of the scalars to be edited lies across two
    sectors. Returns what the manifests ask for: manifest -> (file, tensor, index) -> bytes."""
    shards = {
        FIRST: {down(0): random_tensor("F32", 16, 24, seed=2)},
        SECOND: {down(1): random_tensor("BF16", 16, 24, seed=3)},
        THIRD: {NORM: random_tensor("F32", 16, seed=4)},
    }
    (folder / "assets").mkdir(parents=True)
    for name, tensors in shards.items():
        write_shard(folder / name, tensors, padding=1)  # at odd offsets, so that some scalar lies across
    write_index(folder, shards)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "assets" / "note.txt").write_text("kept as it is\n")
    for path in folder.rglob("*"):
        os.utime(path, (LONG_AGO, LONG_AGO))
    across = next(i for i in ((r, c) for r in range(1, 16) for c in range(24)) if _is_across(folder, i))
    return {
        "pinned.json": {
            (FIRST, down(0), (0, 0)): bytes(4),
            (FIRST, down(0), across): struct.pack("<f", 1.5),
            (SECOND, down(1), (15, 23)): bytes(2),
        },
        "second.json": {(FIRST, down(0), (0, 1)): struct.pack("<f", -0.25)},
        "regions.json": {
            **{(FIRST, down(0), (3, col)): bytes(4) for col in range(24)},
            **{(SECOND, down(1), (row, 5)): bytes(2) for row in range(16)},
            (SECOND, down(1), (15, 23)): bytes(2),
        },
    }


def _is_across(folder: Path, index: tuple[int, int]) -> bool:
    at, size = place(folder / FIRST, down(0), index)
    return at // SECTOR != (at + size - 1) // SECTOR


def write_manifests(folder: Path, edits: dict[str, dict[tuple[str, str, tuple[int, ...]], bytes]]) -> None:
    """m.json for copies of the base, pinned.json and then second.json for edits in place, and regions.json alone."""
    scalars = {name: those for name, those in edits.items() if name != "regions.json"}
    asked = {
        name: [
            {"op": "set", "tensor": t, "index": list(i), "value": struct.unpack("<f", new)[0]} if any(new) else
            {"op": "zero", "tensor": t, "index": list(i)}
            for (_, t, i), new in those.items()
        ]
        for name, those in scalars.items()
    }  # fmt: skip
    regions = (
        {"op": "zero", "tensor": down(0), "slice": "3"},
        {"op": "zero", "tensor": down(1), "slice": ":, 5"},
        {"op": "zero", "tensor": down(1), "index": [15, 23]},
        {"op": "protect", "tensors": NORM},
    )
    pins = {name: sha256(folder / "base" / name) for name in (FIRST, SECOND)}
    write_manifest(folder / "m.json", {"path": "base"}, *asked["pinned.json"])
    write_manifest(folder / "pinned.json", {"path": "model", "sha256": pins}, *asked["pinned.json"])
    write_manifest(folder / "second.json", {"path": "model"}, *asked["second.json"])
    write_manifest(folder / "regions.json", {"path": "model", "sha256": pins}, *regions)


def tree(folder: Path) -> Tree | None:
    """Everything below a folder: relative name -> bytes, or None for a folder; None where it is not there."""
    if not folder.is_dir():
        return None
    return {str(p.relative_to(folder)): None if p.is_dir() else p.read_bytes() for p in folder.rglob("*")}


def held(made: Tree | None, wanted: Tree) -> Tree:
    """`made`, after its files were held against `wanted`, and its sums against its files."""
    made = made or {}
    sums = "".join(f"{hashlib.sha256(d).hexdigest()}  {n}\n" for n, d in sorted(made.items()) if d is not None)
    if {n: d for n, d in made.items() if n not in (*OWN, UNDO_NAME)} != wanted or not set(OWN) <= set(made):
        raise AssertionError(f"an undisturbed run gives other files: {sorted(made)}")
    listed = (made[OWN[2]] or b"").decode().splitlines()
    if not listed or not set(listed) <= set(sums.splitlines()):
        raise AssertionError("SHA256SUMS does not have the files' digests")
    return made


@contextlib.contextmanager
def opened_room() -> Iterator[Room]:
    """A room in memory where there is some, silent about the recoveries that are its business."""
    memory = Path("/dev/shm")
    log = logging.getLogger("swsurgery.checkpoint.journal")
    disabled, log.disabled = log.disabled, True
    try:
        with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
            yield Room(Path(folder))
    finally:
        log.disabled = disabled

"""A model of a disk whose power can be cut: what was synced is there, and of the rest anything may be.

It is fed with the calls of a real run (crash_calls.py) and gives the trees of files that a crash after any of them may
leave. Of a file, each sector holds what it held at the last sync or after any write since, and the size is one that it
had since, the rest zeros. Of directories there are two modes:

- "no order": any subset of the changes since the last sync of that directory is kept. Only barriers count, so
  everything that the product promises is held to this mode: after exit 0 all is there, a new directory is whole or
  absent, an edit in place is the old bytes or the new ones. No promise needs more.
- "journal": changes are kept in order, all up to some point, as on ext4 and xfs; a sync of a file brings all changes
  up to the last one that concerned it. Its crashes are a subset of the former's, only likelier to be met by chance.

In both a rename is one change: no file system in use shows half of one. Data are in no order in either.

What a failed fsync leaves is modelled as Linux does it: the pages are clean from then on and still hold what was
written, the disk does not, and a later fsync says that all is well.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Literal

SECTOR = 512
"""Bytes that are written as a whole or not at all."""

NOWHERE = 0
"""The inode number that stands for a file which the crash took."""

Mode = Literal["no order", "journal"]
MODES: tuple[Mode, ...] = ("no order", "journal")

Place = tuple[int, str]
"""An entry of a directory: the directory's node and the name."""

Content = bytes | Path | None
"""Of a file; a path for a file outside the tree that was hard-linked into it; None for a directory."""


@dataclass(frozen=True)
class Step:
    """One call that changed something. `place` and `to` are entries, `number` is the inode of what was made; `offset`
    and `data` are what was written, and for "grow" `offset` is the least size."""

    kind: Literal["make", "move", "remove", "write", "grow", "sync", "sync failed"]
    node: int
    place: Place | None = None
    to: Place | None = None
    content: Content = b""
    number: int = 0
    offset: int = 0
    data: bytes = b""


@dataclass(frozen=True)
class Start:
    """A tree at rest, node 0 being its root: all of it is on the disk."""

    entries: dict[Place, int]
    contents: dict[int, Content]
    numbers: dict[int, int]

    @classmethod
    def of(cls, root: Path) -> Start:
        start = cls({}, {0: None}, {os.stat(root).st_ino: 0})
        nodes = {root: 0}
        for path in sorted(root.rglob("*")):
            nodes[path] = node = len(nodes)
            start.entries[nodes[path.parent], path.name] = node
            start.contents[node] = None if path.is_dir() else path.read_bytes()
            start.numbers[path.stat().st_ino] = node
        return start

    def image(self) -> Image:
        return Disk(self, "journal").everything()


@dataclass(frozen=True)
class Image:
    """A tree that a crash may leave: relative path -> (node, content), and the nodes by the inode numbers of the run
    that was cut off."""

    files: dict[str, tuple[int, Content]]
    numbers: dict[int, int]

    @property
    def fingerprint(self) -> bytes:
        digest = hashlib.sha256()
        for path, (node, content) in sorted(self.files.items()):
            digest.update(f"{path}\0{node}\0{type(content).__name__}\0".encode())
            digest.update(hashlib.sha256(content).digest() if isinstance(content, bytes) else b"")
        return digest.digest()

    def plain(self) -> dict[str, bytes | None]:
        """What a reader sees."""
        return {p: c.read_bytes() if isinstance(c, Path) else c for p, (_, c) in self.files.items()}

    def write(self, root: Path) -> None:
        """Make `root` this tree. Its files get new inodes, so the numbers that files hold are changed alike."""
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        new = {0: root.stat().st_ino}
        for path, (node, content) in sorted(self.files.items()):
            if content is None:
                (root / path).mkdir()
            elif isinstance(content, Path):
                os.link(content, root / path)
            else:
                (root / path).touch()
            new[node] = (root / path).stat().st_ino
        renumbered = {old: new.get(node, NOWHERE) for old, node in self.numbers.items()}
        # Files keep their times over a crash, and a marker is younger than what it speaks of.
        for path, (_, content) in sorted(self.files.items(), key=lambda file: file[0].endswith(".committing")):
            if isinstance(content, bytes) and content:
                (root / path).write_bytes(_renumber(Path(path).name, content, renumbered))


def _renumber(name: str, content: bytes, numbers: Mapping[int, int]) -> bytes:
    """A journal that speaks of the same files by their new inodes; anything else, and what is torn, as it is."""
    if name in (".swsurgery-journal", ".swsurgery-journal.new"):
        body, digest = content[:-65], content[-65:]
        if digest == hashlib.sha256(body).hexdigest().encode() + b"\n":
            line, end, own = body.partition(b"\n")
            journal = json.loads(line)
            for record in (journal, *journal["files"].values()):
                record["inode"] = numbers.get(record["inode"], NOWHERE)
            body = json.dumps(journal, sort_keys=True).encode() + end + own
            return body + hashlib.sha256(body).hexdigest().encode() + b"\n"
    return content


@dataclass
class Disk:
    """What is on the disk (`entries`, `contents`) and what is not yet: `changes` of directories, `writes` of files."""

    start: Start
    mode: Mode
    entries: dict[Place, int] = field(init=False)
    contents: dict[int, Content] = field(init=False)
    numbers: dict[int, int] = field(init=False)
    changes: list[Step] = field(default_factory=list)
    writes: dict[int, list[Step]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.entries, self.contents = dict(self.start.entries), dict(self.start.contents)
        self.numbers = dict(self.start.numbers)

    def play(self, step: Step) -> None:
        match step.kind:
            case "make" | "move" | "remove":
                self.changes.append(step)
                if step.kind == "make":
                    self.contents.setdefault(step.node, step.content)
                    self.numbers[step.number] = step.node
            case "write" | "grow":
                self.writes.setdefault(step.node, []).append(step)
            case "sync":
                self.contents[step.node] = self.content(step.node)
                self.writes.pop(step.node, None)
                self._settle(step.node)
            case "sync failed":
                self.writes.pop(step.node, None)

    def _settle(self, node: int) -> None:
        """A sync of `node` brings these changes to the disk."""
        if self.mode == "journal":
            last = max((i for i, c in enumerate(self.changes) if node in _concerned(c)), default=-1)
            settled, self.changes = self.changes[: last + 1], self.changes[last + 1 :]
        else:
            settled, rest, nodes = [], [], {node}
            for change in reversed(self.changes):
                # What was done to the same file or name before cannot come after what is settled.
                if _folders(change) & {node} or change.node in nodes - {node}:
                    nodes.add(change.node)
                    settled.insert(0, change)
                else:
                    rest.insert(0, change)
            self.changes = rest
        self.entries = _changed(self.entries, settled)

    def content(self, node: int, random: Random | None = None) -> Content:
        """A file's content with all its writes, or with what `random` picks of them."""
        durable, writes = self.contents[node], self.writes.get(node, ())
        if not isinstance(durable, bytes) or not writes:
            return durable
        states = list(itertools.accumulate(writes, _written, initial=durable))
        if random is None:
            return states[-1]
        size = len(random.choice(states))
        result = bytearray(size)
        for at in range(0, size, SECTOR):
            sector = random.choice(states)[at : min(at + SECTOR, size)]
            result[at : at + len(sector)] = sector
        return bytes(result)

    def emptied(self, node: int) -> Content:
        """A file whose size is on the disk before its data."""
        durable, full = self.contents[node], self.content(node)
        if not isinstance(durable, bytes) or not isinstance(full, bytes):
            return durable
        return durable[: len(full)].ljust(len(full), b"\0")

    def everything(self) -> Image:
        """What is there when only the process dies."""
        return self._image(self.changes, {n: self.content(n) for n in self.writes})

    def nothing(self) -> Image:
        """What is there when the power goes and no byte more than asked for was on the disk."""
        return self._image([], {})

    def images(self, random: Random, rounds: int) -> Iterator[Image]:
        """What a crash may leave here: the extremes, and `rounds` by chance."""
        full = {n: self.content(n) for n in self.writes}
        yield self.everything()
        if not self.changes and not self.writes:
            return
        yield self.nothing()
        yield self._image([], full)
        yield self._image(self.changes, {})
        yield self._image(self.changes, {n: self.emptied(n) for n in self.writes})
        for _ in range(rounds):
            if self.mode == "journal":
                kept = self.changes[: random.randint(0, len(self.changes))]
            else:
                kept = [c for c in self.changes if random.random() < 0.5]
            yield self._image(kept, {n: self.content(n, random) for n in self.writes})

    def _image(self, kept: list[Step], contents: Mapping[int, Content]) -> Image:
        below: dict[int, list[tuple[str, int]]] = {}
        for (folder, name), node in _changed(self.entries, kept).items():
            below.setdefault(folder, []).append((name, node))
        files: dict[str, tuple[int, Content]] = {}
        folders = [("", 0)]
        while folders:
            prefix, folder = folders.pop()
            for name, node in below.get(folder, ()):
                files[prefix + name] = node, contents.get(node, self.contents[node])
                if self.contents[node] is None:
                    folders.append((f"{prefix}{name}/", node))
        return Image(files, dict(self.numbers))


def _folders(change: Step) -> set[int]:
    return {place[0] for place in (change.place, change.to) if place}


def _concerned(change: Step) -> set[int]:
    return {change.node, *_folders(change)}


def _changed(entries: Mapping[Place, int], changes: list[Step]) -> dict[Place, int]:
    """The entries after some changes, of which those before may be missing."""
    result = dict(entries)
    for change in changes:
        if change.kind == "make":
            result[change.place] = change.node
        elif change.kind == "remove":
            if result.get(change.place) == change.node:
                del result[change.place]
        else:
            result = {place: node for place, node in result.items() if node != change.node}
            result[change.to] = change.node
    return result


def _written(content: bytes, write: Step) -> bytes:
    """The content after one write."""
    if write.kind == "grow":
        return content.ljust(write.offset, b"\0")
    end = write.offset + len(write.data)
    return content[: write.offset].ljust(write.offset, b"\0") + write.data + content[end:]

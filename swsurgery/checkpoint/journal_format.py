"""Render and parse the journal of an edit in place: version 2 is written, versions 1 and 2 are read.

Version 2 is a line of JSON, followed by the old contents of swsurgery's own files and by the sha256 of all that in
hexadecimal. Version 1, which swsurgery 0.1.0 wrote, is a line of JSON and its sha256; it has the own files in base64,
and does not contain the new bytes. This module must not open files.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, Field, ValidationError

from swsurgery.errors import CheckpointError
from swsurgery.storage.folder import Entry
from swsurgery.storage.names import JOURNAL, OWN_FILES, SHARD_NAME
from swsurgery.storage.schema import Position, Strict, Version, require_whole_number
from swsurgery.storage.strict_json import parse_json

MAX_JOURNAL = 256 << 20
"""Maximum size in bytes: a line of at most 32 MB, and the old contents of swsurgery's own files."""

Inode = Annotated[int, Field(ge=0, lt=1 << 64)]
Name = Annotated[str, Field(pattern=f"^{SHARD_NAME.pattern}$")]
Hex = Annotated[str, Field(pattern=r"^([0-9a-f]{2})*$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
if TYPE_CHECKING:
    OwnName: TypeAlias = str
else:
    OwnName = Literal[OWN_FILES]  # pydantic reads the names from the table


@dataclass(frozen=True, slots=True)
class JournalPlace:
    """Consecutive bytes of a file before and after the edit; `new` is None in a journal of version 1."""

    offset: int
    old: bytes
    new: bytes | None

    def is_ours(self, now: bytes) -> bool:
        """Return True if every byte of `now` has its old or its new value, or if the new values are unknown."""
        if self.new is None or now in (self.old, self.new):
            return True
        return all(a in (b, c) for a, b, c in zip(now, self.old, self.new, strict=True))


@dataclass(frozen=True)
class JournalFile:
    """One edited file: its inode, its size in bytes, and the edited places in rising order without overlap."""

    inode: int
    size: int
    places: list[JournalPlace]


@dataclass(frozen=True)
class Journal:
    """Everything needed to restore a directory to its state before an edit in place.

    `own` maps swsurgery's own files to their old contents, None for a file that did not exist. `made` maps them to the
    digests of their new contents, None for a file that is removed; it is None until the new contents are known, and
    none of these files is written before. `inode` belongs to the directory: it identifies a journal that was copied
    with its directory and describes other files. `reverts` is True if the interrupted run was a `revert`.
    """

    version: Literal[1, 2]
    reverts: bool
    inode: int
    files: dict[str, JournalFile]
    own: dict[str, bytes | None]
    made: dict[str, str | None] | None = None

    def list_blocks(self, size: int) -> int:
        """Count the blocks of `size` bytes that the edit writes to."""
        return sum(
            len({b for p in file.places for b in range(p.offset // size, (p.offset + len(p.old) - 1) // size + 1)})
            for file in self.files.values()
        )

    def render(self) -> bytes:
        """Render the journal in version 2."""
        files = {
            name: {
                "inode": file.inode,
                "size": file.size,
                "offsets": [p.offset for p in file.places],
                "sizes": [len(p.old) for p in file.places],
                "old": b"".join(p.old for p in file.places).hex(),
                "new": b"".join(p.new or b"" for p in file.places).hex(),
            }
            for name, file in self.files.items()
        }
        head = {
            "version": 2,
            "reverts": self.reverts,
            "inode": self.inode,
            "files": files,
            "own": {name: None if data is None else len(data) for name, data in self.own.items()},
            "made": self.made,
        }
        parts = [json.dumps(head, sort_keys=True).encode(), b"\n", *(self.own[n] or b"" for n in sorted(self.own))]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        return b"".join([*parts, digest.hexdigest().encode(), b"\n"])


class _Place1(Strict):
    offset: Position
    old: Annotated[str, Field(pattern=r"^([0-9a-f]{2}){1,8}$")]


class _File1(Strict):
    inode: Inode
    size: Position
    places: list[_Place1]


class _Head1(Strict):
    version: Version
    reverts: bool
    inode: Inode
    files: dict[Name, _File1]
    own: dict[OwnName, Annotated[str, Field(pattern=r"^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2,3}={1,2})?$")] | None]


class _File2(Strict):
    inode: Inode
    size: Position
    offsets: list[Position]
    sizes: list[Annotated[int, Field(ge=1, lt=1 << 31)]]
    old: Hex
    new: Hex


class _Head2(Strict):
    version: Annotated[Literal[2], BeforeValidator(require_whole_number)]
    reverts: bool
    inode: Inode
    files: dict[Name, _File2]
    own: dict[OwnName, Position | None]
    made: dict[OwnName, Digest | None] | None


def parse_journal(raw: bytes, path: Entry) -> Journal:
    """Parse a journal of either version. Raises CheckpointError if it is damaged, invalid or too large."""
    if len(raw) > MAX_JOURNAL:
        what = f"the journal would have more than the {MAX_JOURNAL} bytes accepted"
        raise CheckpointError(what, path, "use apply -o")
    body = memoryview(raw)[:-65]
    if raw[-65:] != hashlib.sha256(body).hexdigest().encode() + b"\n":
        remedy = "restore the directory, or hold it against the base with swsurgery diff"
        raise CheckpointError("the journal of an edit in place is damaged", path, remedy)
    line = raw[: raw.find(b"\n", 0, len(body)) + 1] or bytes(body)
    document = parse_json(line, JOURNAL)
    try:
        if document.get("version") == 1 and type(document["version"]) is int:
            return _build_version_1(_Head1.model_validate(document), len(line) == len(body))
        return _build_version_2(_Head2.model_validate(document), body[len(line) :])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"is not a sound journal: {place}: {first['msg']}", path) from None
    except ValueError as error:
        raise CheckpointError(f"is not a sound journal: {error}", path) from None


def _build_version_1(head: _Head1, alone: bool) -> Journal:
    """Build a journal of version 1; `alone` is True if nothing follows its line. Raises ValueError."""
    if not alone:
        raise ValueError("something follows its line")
    files = {
        name: JournalFile(f.inode, f.size, [JournalPlace(p.offset, bytes.fromhex(p.old), None) for p in f.places])
        for name, f in head.files.items()
    }
    own = {n: None if data is None else base64.b64decode(data, validate=True) for n, data in head.own.items()}
    return Journal(1, head.reverts, head.inode, files, own)


def _build_version_2(head: _Head2, rest: memoryview) -> Journal:
    """Build a journal of version 2; `rest` is what follows its line, without the digest. Raises ValueError."""
    files = {name: JournalFile(f.inode, f.size, _build_places(f)) for name, f in head.files.items()}
    if set(head.own) != set(OWN_FILES):
        raise ValueError("it does not speak of each of swsurgery's own files")
    own: dict[str, bytes | None] = {}
    at = 0
    for name in sorted(head.own):
        size = head.own[name]
        own[name] = None if size is None else bytes(rest[at : at + size])
        at += size or 0
    if at != len(rest):
        raise ValueError(f"{len(rest)} bytes follow its line, not {at}")
    return Journal(2, head.reverts, head.inode, files, own, head.made)


def _build_places(file: _File2) -> list[JournalPlace]:
    """Divide the bytes of a file into its places. Raises ValueError."""
    old, new = bytes.fromhex(file.old), bytes.fromhex(file.new)
    total = sum(file.sizes)
    if len(file.offsets) != len(file.sizes) or not total == len(old) == len(new):
        raise ValueError("its places have another number of bytes than its bytes")
    places, at = [], 0
    for offset, size in zip(file.offsets, file.sizes, strict=True):
        places.append(JournalPlace(offset, old[at : at + size], new[at : at + size]))
        at += size
    if any(a.offset + len(a.old) > b.offset for a, b in pairwise(places)):
        raise ValueError("its places do not rise, or overlap")
    return places

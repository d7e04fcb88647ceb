"""Render and parse the journal of an edit in place: versions 2 and 3 are written, versions 1 to 3 are read.

The journal contains what is needed to undo the edit. Version 2 consists of a line of JSON, the old contents of
swsurgery's own files (such as swsurgery.json), and the sha256 of these two parts in hexadecimal. Version 3 is written
for changes of regions: the old and the new bytes of the shards follow the JSON line as they are, not in hexadecimal,
and the undo file may be one of swsurgery's own files. Version 1, which swsurgery 0.1.0 wrote, is a line of JSON and its
sha256. That line contains the old contents of swsurgery's own files in base64, and only the old bytes of the shards,
not the new ones. This module must not open files.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, Field, ValidationError

from swsurgery.errors import CheckpointError
from swsurgery.storage.folder import Entry
from swsurgery.storage.names import EDITABLE_NAME, JOURNAL, OWN_FILES, is_undo_name
from swsurgery.storage.schema import Position, Strict, Version, require_whole_number
from swsurgery.storage.strict_json import parse_json

MAX_JOURNAL = 256 << 20
"""Maximum size of a journal in bytes. Its JSON line may have at most 32 MB; the rest is for the old contents of
swsurgery's own files."""

Inode = Annotated[int, Field(ge=0, lt=1 << 64)]
Name = Annotated[str, Field(pattern=f"^{EDITABLE_NAME.pattern}$")]
Hex = Annotated[str, Field(pattern=r"^([0-9a-f]{2})*$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
if TYPE_CHECKING:
    OwnName: TypeAlias = str
else:
    OwnName = Literal[OWN_FILES]  # pydantic reads the names from the table


@dataclass(frozen=True, slots=True)
class JournalPlace:
    """Consecutive bytes of a shard before and after the edit.

    `offset` counts bytes from the start of the file. `new` is None in a journal of version 1, which lacks the new
    bytes.
    """

    offset: int
    old: bytes
    new: bytes | None

    @property
    def end(self) -> int:
        """Offset of the first byte after the place."""
        return self.offset + len(self.old)

    def is_ours(self, now: bytes) -> bool:
        """Return True if each of the present bytes `now` has its old or its new value, so no other program wrote here.

        Always True in a journal of version 1, which lacks the new values.
        """
        if self.new is None or now in (self.old, self.new):
            return True
        return all(a in (b, c) for a, b, c in zip(now, self.old, self.new, strict=True))


@dataclass(frozen=True)
class JournalFile:
    """One edited shard: its inode, its size in bytes, and its edited places, sorted by offset without overlap."""

    inode: int
    size: int
    places: list[JournalPlace]


@dataclass(frozen=True)
class Journal:
    """Everything needed to restore a directory to its state before an edit in place.

    `files` maps the names of the edited shards to their old and new bytes. `own` maps the names of swsurgery's own
    files to their old contents, or to None for a file that did not exist. `made` maps these names to the digests of the
    new contents, or to None for a file that is removed. While the new contents are unknown, `made` is None, and none of
    swsurgery's own files has been written.

    `inode` is that of the directory. If the directory has another inode now, it was copied together with the journal,
    and the inodes in `files` are those of the original files. `reverts` is True if the run was a `revert`.
    """

    version: Literal[1, 2, 3]
    reverts: bool
    inode: int
    files: dict[str, JournalFile]
    own: dict[str, bytes | None]
    made: dict[str, str | None] | None = None

    def list_blocks(self, size: int) -> int:
        """Return the number of file system blocks, each of `size` bytes, to which the edit writes."""
        return sum(
            len({b for p in file.places for b in range(p.offset // size, (p.offset + len(p.old) - 1) // size + 1)})
            for file in self.files.values()
        )

    def render(self) -> bytes:
        """Return the bytes of the journal's file, in version 3 of the format or, if the journal has it, version 2."""
        files: dict[str, dict[str, object]] = {}
        stored: list[bytes] = []
        for name, file in sorted(self.files.items()):
            files[name] = {
                "inode": file.inode,
                "size": file.size,
                "offsets": [p.offset for p in file.places],
                "sizes": [len(p.old) for p in file.places],
            }
            both = b"".join(p.old for p in file.places), b"".join(p.new or b"" for p in file.places)
            if self.version == 3:
                stored += both
            else:
                files[name] |= {"old": both[0].hex(), "new": both[1].hex()}
        head = {
            "version": self.version,
            "reverts": self.reverts,
            "inode": self.inode,
            "files": files,
            "own": {name: None if data is None else len(data) for name, data in self.own.items()},
            "made": self.made,
        }
        line = json.dumps(head, sort_keys=True).encode()
        parts = [line, b"\n", *stored, *(self.own[n] or b"" for n in sorted(self.own))]
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


class _File3(Strict):
    inode: Inode
    size: Position
    offsets: list[Position]
    sizes: list[Annotated[int, Field(ge=1, lt=1 << 31)]]


class _File2(_File3):
    old: Hex
    new: Hex


class _Head2(Strict):
    version: Annotated[Literal[2], BeforeValidator(require_whole_number)]
    reverts: bool
    inode: Inode
    files: dict[Name, _File2]
    own: dict[OwnName, Position | None]
    made: dict[OwnName, Digest | None] | None


class _Head3(Strict):
    version: Annotated[Literal[3], BeforeValidator(require_whole_number)]
    reverts: bool
    inode: Inode
    files: dict[Name, _File3]
    own: dict[str, Position | None]
    made: dict[str, Digest | None] | None


def parse_journal(raw: bytes, path: Entry) -> Journal:
    """Parse the bytes `raw` of a journal of any version.

    `path` is named in messages. Raises CheckpointError if the journal is damaged, invalid or too large.
    """
    if len(raw) > MAX_JOURNAL:
        what = f"the edit is too large to be done in place: its journal would have more than {MAX_JOURNAL} bytes"
        raise CheckpointError(what, path, "write a patched copy with apply -o")
    body = memoryview(raw)[:-65]
    if raw[-65:] != hashlib.sha256(body).hexdigest().encode() + b"\n":
        remedy = "restore the directory from the base, or compare it with the base by swsurgery diff"
        raise CheckpointError("the journal of an edit in place is damaged", path, remedy)
    line = raw[: raw.find(b"\n", 0, len(body)) + 1] or bytes(body)
    document = parse_json(line, JOURNAL)
    try:
        if document.get("version") == 1 and type(document["version"]) is int:
            return _build_version_1(_Head1.model_validate(document), len(line) == len(body))
        if document.get("version") == 3 and type(document["version"]) is int:
            return _build_version_3(_Head3.model_validate(document), body[len(line) :])
        return _build_version_2(_Head2.model_validate(document), body[len(line) :])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"the journal of an edit in place is invalid: {place}: {first['msg']}", path) from None
    except ValueError as error:
        raise CheckpointError(f"the journal of an edit in place is invalid: {error}", path) from None


def _build_version_1(head: _Head1, alone: bool) -> Journal:
    """Build a journal of version 1 from its JSON line.

    `alone` is True if the digest follows the JSON line immediately. Raises ValueError if it does not.
    """
    if not alone:
        raise ValueError("there are bytes between the JSON line and the digest")
    files = {
        name: JournalFile(f.inode, f.size, [JournalPlace(p.offset, bytes.fromhex(p.old), None) for p in f.places])
        for name, f in head.files.items()
    }
    own = {n: None if data is None else base64.b64decode(data, validate=True) for n, data in head.own.items()}
    return Journal(1, head.reverts, head.inode, files, own)


def _build_version_2(head: _Head2, rest: memoryview) -> Journal:
    """Build a journal of version 2 from its JSON line and the bytes after that line.

    `rest` is the part between the JSON line and the digest: the old contents of swsurgery's own files, joined in the
    order of the files' names. Raises ValueError if the sizes in the JSON line do not fit these bytes.
    """
    files = {}
    for name, file in head.files.items():
        old, new = bytes.fromhex(file.old), bytes.fromhex(file.new)
        files[name] = JournalFile(file.inode, file.size, _build_places(file.offsets, file.sizes, old, new))
    if set(head.own) != set(OWN_FILES):
        raise ValueError(f"`own` must name these files and no others: {', '.join(OWN_FILES)}")
    return Journal(2, head.reverts, head.inode, files, _divide_own(head.own, rest), head.made)


def _build_version_3(head: _Head3, rest: memoryview) -> Journal:
    """Build a journal of version 3 from its JSON line and the bytes after that line.

    `rest` begins with the old and the new bytes of each shard, in the order of the shards' names. The old contents of
    swsurgery's own files follow, as in version 2. Raises ValueError if the sizes in the JSON line do not fit.
    """
    files = {}
    at = 0
    for name, file in sorted(head.files.items()):
        middle = at + sum(file.sizes)
        end = middle + sum(file.sizes)
        old, new = bytes(rest[at:middle]), bytes(rest[middle:end])
        files[name] = JournalFile(file.inode, file.size, _build_places(file.offsets, file.sizes, old, new))
        at = end
    more = set(head.own) - set(OWN_FILES)
    if not set(OWN_FILES) <= set(head.own) or len(more) > 1 or not all(map(is_undo_name, more)):
        raise ValueError(f"`own` must name {', '.join(OWN_FILES)}, and otherwise at most one undo file")
    if head.made is not None and not set(head.made) <= set(head.own):
        raise ValueError("`made` names a file that `own` does not name")
    return Journal(3, head.reverts, head.inode, files, _divide_own(head.own, rest[at:]), head.made)


def _divide_own(sizes: Mapping[str, int | None], rest: memoryview) -> dict[str, bytes | None]:
    """Divide `rest` into the old contents of swsurgery's own files. Raises ValueError if the sizes do not fit."""
    own: dict[str, bytes | None] = {}
    at = 0
    for name in sorted(sizes):
        size = sizes[name]
        own[name] = None if size is None else bytes(rest[at : at + size])
        at += size or 0
    if at != len(rest):
        raise ValueError(f"there are {len(rest)} bytes between the JSON line and the digest, but there should be {at}")
    return own


def _build_places(offsets: Sequence[int], sizes: Sequence[int], old: bytes, new: bytes) -> list[JournalPlace]:
    """Divide the old and the new bytes of a shard into its edited places.

    Raises ValueError if the sizes of the places do not fit the bytes, or the places overlap or are not sorted.
    """
    if len(offsets) != len(sizes) or not sum(sizes) == len(old) == len(new):
        raise ValueError("the offsets, sizes, old bytes and new bytes of a file do not fit together")
    places, at = [], 0
    for offset, size in zip(offsets, sizes, strict=True):
        places.append(JournalPlace(offset, old[at : at + size], new[at : at + size]))
        at += size
    if any(a.end > b.offset for a, b in pairwise(places)):
        raise ValueError("the places of a file overlap or are not sorted by offset")
    return places

"""The registry: what was done to a checkpoint, from which base, and the bytes that prove it and undo it.

Lies in the patched checkpoint as `swsurgery.json`. The same inputs give the same bytes: sorted keys, and no
clock unless SOURCE_DATE_EPOCH is set.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import (
    BeforeValidator,
    FailFast,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from swsurgery.checkpoint import journal
from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.listing import is_cache_snapshot
from swsurgery.checkpoint.weight_files import Weights
from swsurgery.errors import (
    CheckpointError,
)
from swsurgery.hub.names import hub_hint
from swsurgery.storage import dtypes, filesystem
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.dtypes import DTYPES
from swsurgery.storage.files import Place, Repository
from swsurgery.storage.folder import Folder
from swsurgery.storage.names import OWN_FILES
from swsurgery.storage.schema import OfVariant, Position, Strict, Version
from swsurgery.storage.strict_json import RECORD, first_fault, parse_json, read_small, rendered_pieces

REGISTRY_NAME, MANIFEST_NAME, SUMS_NAME = OWN_FILES

MAX_FIELDS = 100
"""Maximum number of fields of a registry or of one of its records; more could only be unknown ones."""


if TYPE_CHECKING:
    DtypeName: TypeAlias = str
else:
    DtypeName = Literal[tuple(DTYPES)]  # pydantic reads the names from the table
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Bits = Annotated[str, Field(pattern=r"^0x[0-9a-f]{1,16}$")]
Index = Annotated[tuple[Position, ...], FailFast(), BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]


class FileRecord(Strict):
    """One file: size in bytes and sha256 in the base and here. An edit in place does not read the files that it does
    not touch, so their digests are None where nobody knew them; then both are. `unverified` is True if the digests were
    not computed when the record was made, but copied from the cache of digests or from an earlier record."""

    size: Position
    base_sha256: Digest | None
    sha256: Digest | None
    unverified: bool = False

    @model_serializer(mode="wrap")
    def _only_if_unverified(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave the field out if it is False: a record without it has the bytes that swsurgery 0.1.0 wrote."""
        fields: dict[str, Any] = serialize(self)
        if not self.unverified:
            fields.pop("unverified", None)  # it may be excluded already
        return fields


class KnownFacts(Strict):
    """What the registry of known super weights says of a coordinate."""

    id: str
    status: str
    causal_alone: str
    sources: list[dict[str, Any]]


class ScalarRecord(Strict):
    """One scalar as the base has it."""

    file: str
    tensor: str
    index: Index
    dtype: DtypeName
    offset: Position
    old: int | float | str | None
    old_bits: Bits
    known: KnownFacts | None = None

    @property
    def coordinate(self) -> Coordinate:
        return Coordinate(self.tensor, self.index)

    @property
    def old_bytes(self) -> bytes:
        """Raises NumberError where the bits are not of the dtype's width."""
        return dtypes.from_bits(DTYPES[self.dtype], self.old_bits)


class EditRecord(ScalarRecord):
    """One changed scalar."""

    op: Literal["zero", "scale", "set"]
    new: int | float | str | None
    new_bits: Bits
    factor: float | None = None

    @property
    def new_bytes(self) -> bytes:
        return dtypes.from_bits(DTYPES[self.dtype], self.new_bits)


class BaseRecord(OfVariant):
    """Which checkpoint the base was, and in which folder `sub` of its repository. `named_by` says how that is known:
    by the Hub or the cache it lay in, or from the manifest only. `weights` is the choice between an index and a single
    file, where both were there. `variant` is the variant of the weights that the manifest chose, such as fp16."""

    repo_id: str | None
    revision: str | None
    named_by: Literal["cache", "manifest"] | None
    sub: str = ""
    weights: Weights | None = None


class HistoryStep(Strict):
    """An earlier registry of this checkpoint (without its own history) and the manifest applied then."""

    registry: dict[str, Any]
    manifest: str

    def read(self) -> Registry:
        """That registry. Raises CheckpointError where it is not sound."""
        return _validated(self.registry | {"history": []})


class Registry(Strict):
    """See the module. `files` are all files of the patched checkpoint but swsurgery's own three; those in `elsewhere`
    are unchanged, stay in the base's repository, and come from there when it is published."""

    registry_version: Version
    swsurgery_version: str
    created: int | None = None
    base: BaseRecord
    files: dict[str, FileRecord]
    omitted: Annotated[list[str], FailFast()]
    elsewhere: Annotated[list[str], FailFast()] = []
    edits: Annotated[list[EditRecord], FailFast()]
    protected: Annotated[list[ScalarRecord], FailFast()]
    known: dict[str, Any] | None
    check: dict[str, Any]
    manifest_sha256: Digest
    history: Annotated[list[HistoryStep], FailFast()]

    def inherited(self) -> list[tuple[int, ScalarRecord]]:
        """What earlier steps protect, each scalar once with the number (from 1) of the first step that does; not what
        this step protects once more with the same bits. Raises CheckpointError where an earlier registry is not sound.
        """
        found: dict[tuple[str, int, str], tuple[int, ScalarRecord]] = {}
        for number, step in enumerate(self.history, 1):
            for record in step.read().protected:
                found.setdefault((record.file, record.offset, record.old_bits), (number, record))
        again = {(record.file, record.offset, record.old_bits) for record in self.protected}
        return [found[key] for key in found if key not in again]

    def protectors(self) -> dict[Coordinate, int]:
        """Every scalar that this registry or an earlier one protects -> the number of the step."""
        steps = {record.coordinate: len(self.history) + 1 for record in self.protected}
        return steps | {record.coordinate: number for number, record in self.inherited()}

    def pieces(self) -> Iterator[str]:
        """Render swsurgery.json piece by piece."""
        lists = {
            "edits": (e.model_dump(mode="json") for e in self.edits),
            "protected": (p.model_dump(mode="json") for p in self.protected),
            "history": (step.model_dump(mode="json") for step in self.history),
        }
        return rendered_pieces(self.model_dump(mode="json", exclude={*lists}), lists)

    def render(self) -> bytes:
        """The bytes of swsurgery.json."""
        out = io.BytesIO()
        for piece in self.pieces():
            out.write(piece.encode())
        return out.getvalue()


@dataclass(frozen=True)
class Patched:
    """A patched checkpoint's own records, as read from its directory."""

    registry: Registry
    registry_raw: bytes
    manifest_raw: bytes

    def as_history(self) -> list[HistoryStep]:
        """Its history with itself as the last step. Raises CheckpointError where that would not be reversible."""
        if self.registry.render() != self.registry_raw or _sha256(self.manifest_raw) != self.registry.manifest_sha256:
            raise CheckpointError("the base's registry or manifest was changed by hand", REGISTRY_NAME,
                                  "restore it, or remove swsurgery's files to begin a new history")  # fmt: skip
        own = {k: v for k, v in self.registry.model_dump(mode="json").items() if k != "history"}
        return [*self.registry.history, HistoryStep(registry=own, manifest=self.manifest_raw.decode())]

    def previous(self) -> Patched | None:
        """The records of the checkpoint that this one was made from; None where that was no patched one.

        Raises CheckpointError.
        """
        if not self.registry.history:
            return None
        *earlier, last = self.registry.history
        data = last.registry | {"history": [step.model_dump(mode="json") for step in earlier]}
        registry = _validated(data)
        return Patched(registry, registry.render(), last.manifest.encode())

    def own_files(self) -> dict[str, bytes]:
        """Name -> bytes of swsurgery's own three files."""
        sums = {name: record.sha256 for name, record in self.registry.files.items() if record.sha256}
        sums |= {REGISTRY_NAME: _sha256(self.registry_raw), MANIFEST_NAME: _sha256(self.manifest_raw)}
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
        return {REGISTRY_NAME: self.registry_raw, MANIFEST_NAME: self.manifest_raw, SUMS_NAME: lines.encode()}


def read_patched(root: Path | Folder | Repository | Checkpoint) -> Patched | None:
    """Read the records in a directory or repository, or those that an opened checkpoint lists; None if it has none.

    An edit in place that was cut off is undone first, except in a `Folder`: whoever opened it has done that.
    Raises CheckpointError for damaged records, and for a directory that does not exist.
    """
    places: Mapping[str, Place]
    if isinstance(root, Checkpoint):
        places = {file.name: file.path for file in root.files}
        root = root.root
    elif isinstance(root, Folder):
        places = {n: root / n for n in (REGISTRY_NAME, MANIFEST_NAME) if filesystem.is_there(root / n)}
    elif isinstance(root, Path):
        given, root = root, Path(os.path.realpath(root))
        if not root.exists():
            raise CheckpointError("no such checkpoint", root, hub_hint(str(given)))
        cached = is_cache_snapshot(root)
        if not cached:
            journal.recover(root)  # or the registry would be of an edit that is undone
        paths = {n: Path(os.path.realpath(root / n)) if cached else root / n for n in (REGISTRY_NAME, MANIFEST_NAME)}
        places = {name: path for name, path in paths.items() if filesystem.is_there(path)}
    else:
        places = root.files
    if REGISTRY_NAME not in places:
        return None
    raw = read_small(places[REGISTRY_NAME], REGISTRY_NAME, RECORD.size)
    registry = _validated(parse_json(raw, REGISTRY_NAME, limits=RECORD), consume=True)
    if MANIFEST_NAME not in places:
        raise CheckpointError("the manifest beside the registry is missing", f"{root}/{MANIFEST_NAME}")
    return Patched(registry, raw, read_small(places[MANIFEST_NAME], MANIFEST_NAME))


def _validated(data: dict[str, Any], consume: bool = False) -> Registry:
    """Build a registry from its JSON; `consume` empties the lists of `data` on the way, which saves their memory.

    Raises CheckpointError.
    """
    path = ""
    models: dict[str, type[ScalarRecord]] = {"edits": EditRecord, "protected": ScalarRecord}
    try:
        if len(data) > MAX_FIELDS:
            raise CheckpointError(f"is not a sound registry: it has {len(data)} fields", REGISTRY_NAME)
        made: dict[str, list[ScalarRecord]] = {}
        for key, model in models.items():
            items = data.get(key)
            if type(items) is not list:
                continue  # the model below says what is wrong
            records: list[ScalarRecord] = []
            made[key] = records
            items = items if consume else [*items]
            items.reverse()
            while items:
                path = f"{key}.{len(records)}"
                records.append(model.model_validate(_interned(items.pop(), path)))
        path = ""
        return Registry.model_validate(data | made)
    except ValidationError as error:
        raise CheckpointError(f"is not a sound registry: {first_fault(error, path)}", REGISTRY_NAME) from None


def _interned(record: object, path: str) -> object:
    """Replace texts that thousands of records share by one copy each. Raises CheckpointError for too many fields."""
    if type(record) is not dict:
        return record
    if len(record) > MAX_FIELDS:
        raise CheckpointError(f"is not a sound registry: {path} has {len(record)} fields", REGISTRY_NAME)
    return {key: sys.intern(value) if type(value) is str else value for key, value in record.items()}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_records(root: Path | Folder | Repository) -> Patched:
    """The records of a patched checkpoint. Raises CheckpointError where it has none."""
    patched = read_patched(root)
    if patched is None:
        raise CheckpointError(
            "no registry", f"{root}/{OWN_FILES[0]}", "only a checkpoint that swsurgery patched has one"
        )
    return patched

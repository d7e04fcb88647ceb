"""Define and read the record, the file `swsurgery.json` of a patched checkpoint.

The record contains the edits, the identity of the base, and the old and new bits by which the edits are proved and
undone. The same edits of the same base always give a record with the same bytes: its keys are sorted, and it contains
no time unless SOURCE_DATE_EPOCH is set.
"""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import (
    BeforeValidator,
    FailFast,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.listing import find_files
from swsurgery.checkpoint.weight_files import Weights
from swsurgery.errors import (
    CheckpointError,
)
from swsurgery.hub.remote import RemoteTree
from swsurgery.storage import dtypes
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.dtypes import DTYPES
from swsurgery.storage.files import File
from swsurgery.storage.folder import Folder
from swsurgery.storage.names import OWN_FILES
from swsurgery.storage.result import TableResult
from swsurgery.storage.schema import OfVariant, Position, Strict, Version
from swsurgery.storage.splice import list_scalar_rows
from swsurgery.storage.strict_json import RECORD, describe_first_fault, parse_json, read_small, render_pieces

RECORD_NAME, MANIFEST_NAME, SUMS_NAME = OWN_FILES

MAX_FIELDS = 100
"""Maximum number of fields in a record, and in each of its entries. Valid ones have at most 13 and 12 fields."""


if TYPE_CHECKING:
    DtypeName: TypeAlias = str
else:
    DtypeName = Literal[tuple(DTYPES)]  # pydantic reads the names from the table
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Bits = Annotated[str, Field(pattern=r"^0x[0-9a-f]{1,16}$")]
Index = Annotated[tuple[Position, ...], FailFast(), BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]


class FileRecord(Strict):
    """One file of the patched checkpoint: its size in bytes, and its sha256 in the base and after the edit.

    Both digests are None for a file that an edit in place does not change, because such an edit does not read it.
    `unverified` is True if the digests were not computed for this record, but copied from the cache of digests or from
    an earlier record.
    """

    size: Position
    base_sha256: Digest | None
    sha256: Digest | None
    unverified: bool = False

    @model_serializer(mode="wrap")
    def _only_if_unverified(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out `unverified` if it is False, because swsurgery 0.1.0 wrote records without this field."""
        fields: dict[str, Any] = serialize(self)
        if not self.unverified:
            fields.pop("unverified", None)  # it may be excluded already
        return fields


class KnownFacts(Strict):
    """What the known super weights state about one coordinate of the record: its id, its status and its sources."""

    id: str
    status: str
    causal_alone: str
    sources: list[dict[str, Any]]


class ScalarRecord(Strict):
    """One scalar of the base: where it is stored, and its value before the edit.

    `offset` counts bytes from the start of the file. `old_bits` are the bits in the base in hexadecimal, such as
    "0xbf17" for a BF16 scalar.
    """

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
        """The coordinate of the scalar: the tensor's name and the index in its stored shape."""
        return Coordinate(self.tensor, self.index)

    @property
    def old_bytes(self) -> bytes:
        """The scalar's bytes in the base. Raises NumberError if `old_bits` has more or fewer bits than the dtype."""
        return dtypes.parse_bits(DTYPES[self.dtype], self.old_bits)


class EditRecord(ScalarRecord):
    """One scalar that was edited: its operation, and its value before and after the edit.

    `new_bits` are the bits after the edit in hexadecimal. `factor` is the factor of the operation "scale".
    """

    op: Literal["zero", "scale", "set"]
    new: int | float | str | None
    new_bits: Bits
    factor: float | None = None

    @property
    def new_bytes(self) -> bytes:
        """The scalar's bytes after the edit.

        Raises NumberError if `new_bits` has more or fewer bits than the dtype.
        """
        return dtypes.parse_bits(DTYPES[self.dtype], self.new_bits)


class BaseRecord(OfVariant):
    """The identity of the base: its repository, the commit `revision`, and the folder `sub` in the repository.

    `named_by` is the source of the identity: "cache" if the base was read from the Hub or from its local cache,
    "manifest" if only the manifest states it. `weights` tells which set of weights was edited if the base has both an
    index and a single file. `variant` (such as "fp16") is the variant of the weights that the manifest chose.
    """

    repo_id: str | None
    revision: str | None
    named_by: Literal["cache", "manifest"] | None
    sub: str = ""
    weights: Weights | None = None


class HistoryStep(Strict):
    """One earlier edit of a checkpoint that was edited several times.

    Contains the record of that edit, without the field `history`, and the text of the manifest that was applied.
    """

    registry: dict[str, Any]
    manifest: str

    def read(self) -> Record:
        """Return the earlier record with an empty history. Raises CheckpointError if it is not valid."""
        return _validate(self.registry | {"history": []})


class Record(TableResult, Strict):
    """The contents of swsurgery.json.

    `files` maps the name of every file of the patched checkpoint to its digests, except the three files that swsurgery
    adds. `elsewhere` lists files of the base that are unchanged and were not downloaded: publishing copies them from
    the base's repository. `protected` lists scalars that must keep the bits they have in the base.

    A checkpoint may be edited several times. Each edit is a step: `history` lists the earlier ones, the oldest first.
    """

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

    def to_json(self) -> dict[str, Any]:
        """Return the contents of swsurgery.json as a dict of JSON values."""
        return self.model_dump(mode="json")

    def to_rows(self) -> list[dict[str, object]]:
        """Return one row per edited and per protected scalar: op, tensor, index, dtype, old, new, file, offset."""
        document = self.to_json()
        return list_scalar_rows(document["edits"], document["protected"])

    def list_inherited(self) -> list[tuple[int, ScalarRecord]]:
        """Return the scalars that earlier steps protect, each as (number of the step, scalar).

        Steps are numbered from 1. If several steps protect a scalar with the same bits, it is listed once, with the
        first of them. Scalars that this step protects with the same bits are left out. Raises CheckpointError if an
        earlier record is not valid.
        """
        found: dict[tuple[str, int, str], tuple[int, ScalarRecord]] = {}
        for number, step in enumerate(self.history, 1):
            for record in step.read().protected:
                found.setdefault((record.file, record.offset, record.old_bits), (number, record))
        again = {(record.file, record.offset, record.old_bits) for record in self.protected}
        return [found[key] for key in found if key not in again]

    def map_protectors(self) -> dict[Coordinate, int]:
        """Map every scalar that this step or an earlier step protects to the number of that step, counted from 1."""
        steps = {record.coordinate: len(self.history) + 1 for record in self.protected}
        return steps | {record.coordinate: number for number, record in self.list_inherited()}

    def render_pieces(self) -> Iterator[str]:
        """Yield the text of swsurgery.json piece by piece, so that the text of a large record need not be in memory."""
        lists = {
            "edits": (e.model_dump(mode="json") for e in self.edits),
            "protected": (p.model_dump(mode="json") for p in self.protected),
            "history": (step.model_dump(mode="json") for step in self.history),
        }
        return render_pieces(self.model_dump(mode="json", exclude={*lists}), lists)

    def render(self) -> bytes:
        """Return the bytes of swsurgery.json."""
        out = io.BytesIO()
        for piece in self.render_pieces():
            out.write(piece.encode())
        return out.getvalue()


@dataclass(frozen=True)
class Patched:
    """The record of a patched checkpoint, with the bytes of the files swsurgery.json and manifest.yaml as read."""

    record: Record
    record_raw: bytes
    manifest_raw: bytes

    def extend_history(self) -> list[HistoryStep]:
        """Return the history for the record of the next edit: the history of this record, and this record as last step.

        Raises CheckpointError if the record or the manifest was edited by hand, because this step could not be undone.
        """
        if self.record.render() != self.record_raw or _compute_sha256(self.manifest_raw) != self.record.manifest_sha256:
            what = "the base's record or manifest was changed by hand"
            remedy = f"restore the file, or remove {', '.join(OWN_FILES)} to begin a new history"
            raise CheckpointError(what, RECORD_NAME, remedy)
        own = {k: v for k, v in self.record.model_dump(mode="json").items() if k != "history"}
        return [*self.record.history, HistoryStep(registry=own, manifest=self.manifest_raw.decode())]

    def rebuild_previous(self) -> Patched | None:
        """Return the record that the checkpoint had before this step; None if this step is its first.

        Raises CheckpointError if the earlier record is not valid.
        """
        if not self.record.history:
            return None
        *earlier, last = self.record.history
        data = last.registry | {"history": [step.model_dump(mode="json") for step in earlier]}
        record = _validate(data)
        return Patched(record, record.render(), last.manifest.encode())

    def render_own_files(self) -> dict[str, bytes]:
        """Return the three files that swsurgery adds, as a dict from name to bytes."""
        sums = {name: record.sha256 for name, record in self.record.files.items() if record.sha256}
        sums |= {RECORD_NAME: _compute_sha256(self.record_raw), MANIFEST_NAME: _compute_sha256(self.manifest_raw)}
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
        return {RECORD_NAME: self.record_raw, MANIFEST_NAME: self.manifest_raw, SUMS_NAME: lines.encode()}


def read_record(root: Folder | RemoteTree) -> Patched:
    """Read the record of a patched checkpoint.

    Works like `find_record`, but also raises CheckpointError if the checkpoint has no record.
    """
    patched = find_record(root)
    if patched is None:
        remedy = "give a checkpoint that swsurgery patched; verify --known and verify --manifest need no record"
        raise CheckpointError("the checkpoint has no record", f"{root}/{RECORD_NAME}", remedy)
    return patched


def find_record(root: Folder | RemoteTree | Checkpoint) -> Patched | None:
    """Read the record of a directory, a repository or an open checkpoint; None if there is no record.

    The caller must have entered a directory with `opening.held`. Raises CheckpointError if the record is damaged.
    """
    if isinstance(root, Checkpoint):
        return find_record_among({file.name: file.source for file in root.files}, root.root)
    if isinstance(root, Folder):
        return find_record_among(find_files(root, (RECORD_NAME, MANIFEST_NAME)), root)
    return find_record_among(root.files, root)


def find_record_among(files: Mapping[str, File], root: object) -> Patched | None:
    """Read the record among the files of a checkpoint (name -> file); None if there is no record.

    `root` is the checkpoint's place, which messages name. Raises CheckpointError if the record is damaged or has no
    manifest beside it.
    """
    if RECORD_NAME not in files:
        return None
    raw = read_small(files[RECORD_NAME], RECORD_NAME, RECORD.size)
    record = _validate(parse_json(raw, RECORD_NAME, limits=RECORD), consume=True)
    if MANIFEST_NAME not in files:
        what = "the checkpoint has a record, but its manifest is missing"
        raise CheckpointError(what, f"{root}/{MANIFEST_NAME}")
    return Patched(record, raw, read_small(files[MANIFEST_NAME], MANIFEST_NAME))


def _validate(data: dict[str, Any], consume: bool = False) -> Record:
    """Build a record from the JSON values `data`. Raises CheckpointError if they are not valid.

    If `consume` is True, the lists in `data` are emptied while the record is built, which saves memory.
    """
    path = ""
    models: dict[str, type[ScalarRecord]] = {"edits": EditRecord, "protected": ScalarRecord}
    try:
        if len(data) > MAX_FIELDS:
            what = f"is not a valid record: it has {len(data)} fields, and at most {MAX_FIELDS} are allowed"
            raise CheckpointError(what, RECORD_NAME)
        made: dict[str, list[ScalarRecord]] = {}
        for key, model in models.items():
            items = data.get(key)
            if type(items) is not list:
                continue  # Record.model_validate reports the fault
            records: list[ScalarRecord] = []
            made[key] = records
            items = items if consume else [*items]
            items.reverse()
            while items:
                path = f"{key}.{len(records)}"
                records.append(model.model_validate(_intern_strings(items.pop(), path)))
        path = ""
        return Record.model_validate(data | made)
    except ValidationError as error:
        raise CheckpointError(f"is not a valid record: {describe_first_fault(error, path)}", RECORD_NAME) from None


def _intern_strings(record: object, path: str) -> object:
    """Return one entry of a record with interned strings, because thousands of entries have the same strings.

    `path` is the place of the entry in the record, such as "edits.3". Raises CheckpointError for too many fields.
    """
    if type(record) is not dict:
        return record
    if len(record) > MAX_FIELDS:
        what = f"is not a valid record: {path} has {len(record)} fields, and at most {MAX_FIELDS} are allowed"
        raise CheckpointError(what, RECORD_NAME)
    return {key: sys.intern(value) if type(value) is str else value for key, value in record.items()}


def _compute_sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

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
    model_validator,
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
from swsurgery.storage.names import OWN_FILES, make_undo_name
from swsurgery.storage.region import Region
from swsurgery.storage.result import TableResult
from swsurgery.storage.schema import OfVariant, Position, Strict, require_whole_number
from swsurgery.storage.splice import list_rows
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


LATER_OPERATIONS = ("flip", "restore")
"""Operations on single scalars that version 1 of the record does not have."""

RecordVersion = Annotated[Literal[1, 2], BeforeValidator(require_whole_number)]


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

    `new_bits` are the bits after the edit in hexadecimal. `factor` is the factor of the operation "scale", and `bit`
    contains the numbers of the bits that the operation "flip" inverts.
    """

    op: Literal["zero", "scale", "set", "flip", "restore"]
    new: int | float | str | None
    new_bits: Bits
    factor: float | None = None
    bit: Annotated[tuple[Position, ...] | None, BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)] = (
        None
    )

    @model_serializer(mode="wrap")
    def _only_if_flipped(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out `bit` if it is None, so that version 1 of the record keeps its bytes."""
        fields: dict[str, Any] = serialize(self)
        if self.bit is None:
            fields.pop("bit", None)
        return fields

    @property
    def new_bytes(self) -> bytes:
        """The scalar's bytes after the edit.

        Raises NumberError if `new_bits` has more or fewer bits than the dtype.
        """
        return dtypes.parse_bits(DTYPES[self.dtype], self.new_bits)


class RegionRecord(Strict):
    """A region that an edit protects: its tensor, its bounds in the stored shape, and the sha256 of its bytes.

    `bounds` contains the first index and the index after the last one of each axis. The bytes are hashed in C order, so
    that the digest of a whole tensor is that of its data. `target` is the edit's target as text, such as "L3 row 12".
    """

    target: str
    file: str
    tensor: str
    bounds: Annotated[list[Annotated[list[Position], Field(min_length=2, max_length=2)]], FailFast()]
    dtype: DtypeName
    scalars: Position
    sha256: Digest | None

    @property
    def region(self) -> Region:
        """The region as a value."""
        return Region(self.tensor, tuple((begin, end) for begin, end in self.bounds))


class ChangeRecord(RegionRecord):
    """A region that edit number `edit` of the manifest (from 0) changed by an operation with `options`.

    `base_sha256` and `sha256` are digests of the region's bytes in the base and after the edit. Both are None for a
    large region, because the digests of its file prove its bytes. `changed` is the number of scalars with other bits.
    `undo` is the prefix of the names of the undo file's tensors with the old bytes; None if undoing needs the base.
    """

    edit: Position
    op: Literal["zero", "scale", "set", "clip", "prune_outliers", "round", "restore"]
    options: dict[str, Any]
    changed: Position
    base_sha256: Digest | None
    undo: Annotated[str, Field(pattern=r"^edit\.[0-9]+\.[0-9]+$")] | None


class ElementRecord(Strict):
    """One stored number: the name of its tensor, and its index in the stored shape."""

    tensor: str
    index: Annotated[tuple[Position, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]

    @property
    def coordinate(self) -> Coordinate:
        """The stored number as a value."""
        return Coordinate(self.tensor, self.index)


class CodeRecord(Strict):
    """One element of a quantised matrix that edit number `edit` of the manifest (from 0) changed or protects.

    `weight` and `index` name the element in the weight that the codes encode, and `layout` is the layout of the matrix.
    `wanted` is the value that the edit asked for; `old` and `new` are the values of `old_code` and `new_code`.
    `elements` are the stored numbers with the bits of the code, which `edits` or `protected` lists.
    """

    edit: Position
    op: Literal["zero", "scale", "set", "restore", "protect"]
    factor: float | None
    weight: str
    index: Annotated[tuple[Position, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]
    layout: str
    wanted: Annotated[float, Field(allow_inf_nan=False)]
    old: Annotated[float, Field(allow_inf_nan=False)]
    new: Annotated[float, Field(allow_inf_nan=False)]
    old_code: Position
    new_code: Position
    elements: Annotated[list[ElementRecord], Field(min_length=1)]

    @property
    def coordinate(self) -> Coordinate:
        """The element in the weight that the codes encode."""
        return Coordinate(self.weight, self.index)


class UndoRecord(Strict):
    """The undo file: its sha256, and its size in bytes."""

    sha256: Digest
    size: Position


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

    @property
    def is_later(self) -> bool:
        """True if the step has a record of version 2."""
        return self.registry.get("registry_version") == 2

    def read(self) -> Record:
        """Return the earlier record with an empty history. Raises CheckpointError if it is not valid."""
        return _validate(self.registry | {"history": []})


class Record(TableResult, Strict):
    """The contents of swsurgery.json.

    `files` maps the name of every file of the patched checkpoint to its digests, except the three files that swsurgery
    adds. `elsewhere` lists files of the base that are unchanged and were not downloaded: publishing copies them from
    the base's repository. `protected` lists scalars that must keep the bits they have in the base.

    A checkpoint may be edited several times. Each edit is a step: `history` lists the earlier ones, the oldest first.

    Version 2 is written if this or an earlier step needs it. It adds the operations "flip" and "restore", and the
    fields `changes` (changed regions), `protected_regions` and `undo` (the undo file, None without one). The field
    `codes` (elements of quantised matrices) exists only if there are any.
    """

    registry_version: RecordVersion
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
    changes: Annotated[list[ChangeRecord], FailFast()] = []
    protected_regions: Annotated[list[RegionRecord], FailFast()] = []
    undo: UndoRecord | None = None
    codes: Annotated[list[CodeRecord], FailFast()] = []

    @model_validator(mode="after")
    def _fits_version(self) -> Record:
        needed = 2 if needs_version_2(self) else 1
        if self.registry_version != needed:
            raise ValueError(f"registry_version is {self.registry_version}, but these fields need version {needed}")
        return self

    @model_serializer(mode="wrap")
    def _only_in_version_2(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the fields of version 2 in version 1, so that version 1 keeps its bytes."""
        fields: dict[str, Any] = serialize(self)
        if self.registry_version == 1:
            for name in ("changes", "protected_regions", "undo"):
                fields.pop(name, None)
        if not self.codes:
            fields.pop("codes", None)
        return fields

    @property
    def undo_name(self) -> str | None:
        """Name of the undo file of this step; None if it has none."""
        return make_undo_name(len(self.history) + 1) if self.undo else None

    @property
    def own_names(self) -> tuple[str, ...]:
        """Names of the files that swsurgery added in this step. The undo files of earlier steps are in `files`."""
        return (*OWN_FILES, self.undo_name) if self.undo_name else OWN_FILES

    def list_protected_regions(self) -> list[tuple[int, RegionRecord]]:
        """Return the regions that this step and earlier steps protect, each as (number of the step, region).

        Raises CheckpointError if an earlier record is not valid.
        """
        steps = [*(step.read() for step in self.history), self]
        return [(number, entry) for number, step in enumerate(steps, 1) for entry in step.protected_regions]

    def to_json(self) -> dict[str, Any]:
        """Return the contents of swsurgery.json as a dict of JSON values."""
        return self.model_dump(mode="json")

    def to_rows(self) -> list[dict[str, object]]:
        """Return one row per edited scalar, protected scalar, changed region and protected region; see `list_rows`."""
        document = self.to_json()
        regions = (document.get(name, ()) for name in ("changes", "protected_regions"))
        return list_rows(document["edits"], document["protected"], *regions)

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
        if self.registry_version == 2:
            lists["changes"] = (change.model_dump(mode="json") for change in self.changes)
        return render_pieces(self.model_dump(mode="json", exclude={*lists}), lists)

    def render(self) -> bytes:
        """Return the bytes of swsurgery.json."""
        out = io.BytesIO()
        for piece in self.render_pieces():
            out.write(piece.encode())
        return out.getvalue()


def needs_version_2(record: Record) -> bool:
    """Return True if version 1 of the format cannot store what this step or an earlier one did."""
    later = any(edit.op in LATER_OPERATIONS for edit in record.edits)
    earlier = any(step.is_later for step in record.history)
    return bool(later or earlier or record.changes or record.protected_regions or record.undo or record.codes)


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
        """Return the files that swsurgery adds, without the undo file, as a dict from name to bytes."""
        sums = {name: record.sha256 for name, record in self.record.files.items() if record.sha256}
        sums |= {RECORD_NAME: _compute_sha256(self.record_raw), MANIFEST_NAME: _compute_sha256(self.manifest_raw)}
        if self.record.undo and self.record.undo_name:
            sums[self.record.undo_name] = self.record.undo.sha256
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

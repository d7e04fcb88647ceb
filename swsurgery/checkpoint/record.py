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
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    FailFast,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.listing import find_files
from swsurgery.checkpoint.record_entries import (
    BaseRecord,
    ChangeRecord,
    CodeRecord,
    Digest,
    EditRecord,
    FileRecord,
    RegionRecord,
    ScalarRecord,
    UndoRecord,
)
from swsurgery.errors import (
    CheckpointError,
)
from swsurgery.hub.remote import RemoteTree
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.files import File
from swsurgery.storage.folder import Folder, SingleFile
from swsurgery.storage.names import OWN_FILES, make_undo_name
from swsurgery.storage.result import TableResult
from swsurgery.storage.schema import Strict, require_whole_number
from swsurgery.storage.splice import list_rows
from swsurgery.storage.strict_json import RECORD, describe_first_fault, parse_json, read_small, render_pieces

RECORD_NAME, MANIFEST_NAME, SUMS_NAME = OWN_FILES

MAX_FIELDS = 100
"""Maximum number of fields in a record, and in each of its entries. Valid ones have at most 13 and 12 fields."""


LATER_OPERATIONS = ("flip", "restore")
"""Operations on single scalars that version 1 of the record does not have."""

RecordVersion = Annotated[Literal[1, 2], BeforeValidator(require_whole_number)]


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

    @property
    def has_codes(self) -> bool:
        """True if the step edited or protected an element of a quantised matrix."""
        return bool(self.registry.get("codes"))

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

    def list_protected_codes(self) -> list[tuple[int, CodeRecord]]:
        """Return the quantised elements that this step and earlier steps protect, each as (number of the step, code).

        Raises CheckpointError if an earlier record is not valid.
        """
        earlier = [(n, step.read()) for n, step in enumerate(self.history, 1) if step.has_codes]
        steps = [*earlier, (len(self.history) + 1, self)]
        return [(number, code) for number, step in steps for code in step.codes if code.op == "protect"]

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
        if isinstance(root, SingleFile):
            raise CheckpointError("a single file has no record", root, f"give the directory {root.path}")
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

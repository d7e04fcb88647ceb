"""Define the entries of the record: files, edited and protected scalars, regions and codes, the base and the undo file.

record.py contains the record itself. Each entry checks the types and the form of its fields, and nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, FailFast, Field, SerializerFunctionWrapHandler, model_serializer

from swsurgery.checkpoint.weight_files import Weights
from swsurgery.storage import dtypes
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.dtypes import DTYPES
from swsurgery.storage.region import Region
from swsurgery.storage.schema import OfVariant, Position, Strict

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
    "manifest" if only the manifest states it. `weights` states which set of weights was edited if the base has both an
    index and a single file. `variant` (such as "fp16") is the variant of the weights that the manifest chose.
    """

    repo_id: str | None
    revision: str | None
    named_by: Literal["cache", "manifest"] | None
    sub: str = ""
    weights: Weights | None = None

"""Read and write patches: small safetensors files with the old and new bits of each edited scalar.

The metadata lists the edited tensors of the base. Tensor number n of this list has three arrays in the file:
`n.indices` (I64, row-major positions of the edited scalars, in increasing order), `n.new` and `n.old` (in the tensor's
dtype). The base's tensor names are only in the metadata, so they cannot collide with names of arrays. The same edits
give the same bytes. To apply a patch, `render_manifest` converts it to a manifest. This module must not depend on
checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, FailFast, Field, TypeAdapter, ValidationError

from swsurgery._version import __version__
from swsurgery.errors import CheckpointError, ManifestError, NumberError
from swsurgery.manifest.operations import ScalarEdit
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.dtypes import DTYPES, Dtype, decode, format_bits, make_zero
from swsurgery.storage.names import SHARD_NAME
from swsurgery.storage.schema import OfVariant, Position, Strict
from swsurgery.storage.shard import TensorInfo, decode_header_length, parse_header
from swsurgery.storage.strict_json import describe_first_fault, parse_json

FORMAT, VERSION, LATER_VERSION = "swsurgery.sparse", "1", "2"
"""Values of `format` and `format_version` in the metadata. Version 2 has the operation "flip" or more than
MAX_SCALARS_OF_VERSION_1 scalars; version 1 is written if it suffices."""

MAX_SCALARS_OF_VERSION_1 = 8000
"""Maximum number of scalars in a patch of version 1."""

MAX_SCALARS = 32_768
"""Maximum number of scalars in a patch: enough for one row or neuron of a model of 72 billion parameters. `apply` needs
11 s and 350 MB for that many, because a patch becomes a manifest with one edit per scalar."""

NAMELESS_BASE = "base"
"""The directory that a patch's manifest names as its base (`base.path`) if the patch names no repository."""

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ShardName = Annotated[str, Field(pattern=f"^{SHARD_NAME.pattern}$")]
Shape = Annotated[
    tuple[Position, ...],
    FailFast(),
    BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v),
    Field(max_length=16),
]
Ratio = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class PatchBase(OfVariant):
    """The base to which a patch applies. `sha256` contains the known digests of the edited shards."""

    repo_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?$")] | None = None
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    model: str | None = None
    sha256: dict[ShardName, Digest] = {}
    weights: Literal["index", "single"] | None = None
    copies: Literal["omit", "keep"] | None = None


class PatchBounds(Strict):
    """Limits on the perplexity ratio, patched / base, in the sanity check, as in a manifest."""

    max_perplexity_ratio: Ratio | None = None
    min_perplexity_ratio: Ratio | None = None


class _Operation(Strict):
    op: Literal["zero", "scale", "set", "flip"]
    factor: float | None = None


if TYPE_CHECKING:
    _DtypeName = str
else:
    _DtypeName = Literal[tuple(DTYPES)]  # a type checker cannot evaluate this


class _Tensor(Strict):
    """An edited tensor in the metadata of a patch. `edits` has one operation per scalar, ordered as `n.indices`."""

    name: Annotated[str, Field(min_length=1, max_length=1024)]
    dtype: _DtypeName
    shape: Shape
    file: ShardName
    edits: Annotated[list[_Operation], FailFast(), Field(min_length=1, max_length=MAX_SCALARS)]


class _Header(Strict):
    swsurgery_version: str
    manifest_sha256: Digest
    base: PatchBase
    check: PatchBounds
    tensors: Annotated[list[_Tensor], FailFast(), Field(min_length=1, max_length=MAX_SCALARS)]


@dataclass(frozen=True)
class PatchScalar:
    """One edited scalar of a patch.

    `flat` is its row-major position in the tensor, and `file` is the shard. `old` and `new` are its bytes before and
    after the edit, little-endian. `op`, with `factor` for scale, is the operation that turned `old` into `new`.
    """

    tensor: str
    shape: tuple[int, ...]
    dtype: Dtype
    flat: int
    file: str
    old: bytes
    new: bytes
    op: str
    factor: float | None = None

    @property
    def index(self) -> tuple[int, ...]:
        return TensorInfo(self.tensor, self.dtype, self.shape, (0, 0)).unflatten(self.flat)

    @property
    def coordinate(self) -> Coordinate:
        return Coordinate(self.tensor, self.index)

    def to_edit(self) -> dict[str, Any]:
        """Return the fields of an edit that makes exactly this change in a manifest."""
        edit: dict[str, object] = {
            "op": self.op,
            "tensor": self.tensor,
            "index": list(self.index),
            "expect": format_bits(self.old),
        }
        if self.op == "scale":
            edit["factor"] = self.factor
        elif self.op == "set":
            edit["bits"] = format_bits(self.new)
        elif self.op == "flip":
            changed = int.from_bytes(self.old, "little") ^ int.from_bytes(self.new, "little")
            edit["bit"] = [number for number in range(self.dtype.bits) if changed >> number & 1]
            edit["raw"] = True  # the manifest of the patch permitted to edit this tensor
        return edit


@dataclass(frozen=True)
class Patch:
    """The changes that a manifest makes to a base, without the base's files.

    `scalars` are sorted by tensor and position. `manifest_sha256` is the digest of the manifest.
    """

    base: PatchBase
    check: PatchBounds
    manifest_sha256: str
    scalars: tuple[PatchScalar, ...]
    swsurgery_version: str = __version__

    def group_by_tensor(self) -> list[list[PatchScalar]]:
        """Group the scalars by tensor."""
        groups: dict[str, list[PatchScalar]] = {}
        for scalar in self.scalars:
            groups.setdefault(scalar.tensor, []).append(scalar)
        return list(groups.values())

    def describe_origin(self) -> dict[str, Any]:
        """Return the version, manifest digest and base of the edits, for the metadata of an exported file."""
        return {
            "swsurgery_version": self.swsurgery_version,
            "manifest_sha256": self.manifest_sha256,
            "base": self.base.model_dump(mode="json"),
        }


def choose_operation(op: str, dtype: Dtype, new: bytes) -> str:
    """Return an operation of a patch that gives a scalar the bytes `new`. `op` is the operation that it was edited by.

    Scale and flip stay what they are. Any other operation becomes "zero", "set", or, for a value that is not finite and
    that `set` therefore refuses, "flip".
    """
    if op in ("scale", "flip"):
        return op
    with contextlib.suppress(NumberError):  # the dtype may have no zero
        if make_zero(dtype) == new:
            return "zero"
    return "set" if math.isfinite(decode(dtype, new)) else "flip"


def render(patch: Patch) -> bytes:
    """Render a patch as the bytes of a safetensors file (`swsurgery export --format sparse`).

    Raises ManifestError if the patch has no scalars, more than MAX_SCALARS, or values that the schema rejects.
    """
    if not 0 < len(patch.scalars) <= MAX_SCALARS:
        raise ManifestError(f"a patch has 1 to {MAX_SCALARS} changed scalars, not {len(patch.scalars)}")
    groups = patch.group_by_tensor()
    header = {
        **patch.describe_origin(),
        "check": patch.check.model_dump(mode="json"),
        "tensors": [
            {
                "name": group[0].tensor,
                "dtype": group[0].dtype.name,
                "shape": list(group[0].shape),
                "file": group[0].file,
                "edits": [{"op": s.op, "factor": s.factor} for s in group],
            }
            for group in groups
        ],
    }
    try:
        _Header.model_validate(header)
    except ValidationError as error:
        raise ManifestError(f"cannot be written as a patch: {describe_first_fault(error)}") from None
    arrays: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for number, group in enumerate(groups):
        dtype, count = group[0].dtype.name, (len(group),)
        arrays[f"{number}.indices"] = "I64", count, struct.pack(f"<{len(group)}q", *(s.flat for s in group))
        arrays[f"{number}.new"] = dtype, count, b"".join(s.new for s in group)
        arrays[f"{number}.old"] = dtype, count, b"".join(s.old for s in group)
    metadata = {
        "format": FORMAT,
        "format_version": _choose_version(patch.scalars),
        "patch": json.dumps(header, sort_keys=True, ensure_ascii=False, separators=(",", ":")),
    }
    return render_safetensors(arrays, metadata)


def _choose_version(scalars: Sequence[PatchScalar]) -> str:
    """Return the version of the format in which a patch with these scalars is written."""
    later = len(scalars) > MAX_SCALARS_OF_VERSION_1 or any(scalar.op == "flip" for scalar in scalars)
    return LATER_VERSION if later else VERSION


def render_safetensors(arrays: Mapping[str, tuple[str, Sequence[int], bytes]], metadata: Mapping[str, str]) -> bytes:
    """Render a safetensors file that contains `arrays`: name -> (dtype, shape, little-endian bytes).

    Arrays are sorted by width of the dtype, widest first, and then by name, so that each is aligned. Equal arguments
    give equal bytes.
    """
    order = sorted(arrays, key=lambda name: (-DTYPES[arrays[name][0]].bits, name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for name in order:
        dtype, shape, data = arrays[name]
        end = position + len(data)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(arrays[name][2] for name in order)


def render_json(document: dict[str, Any]) -> bytes:
    """Render a JSON file with sorted keys, so that equal documents give equal bytes."""
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()


def parse(raw: bytes, path: Path) -> Patch:
    """Read a patch from the bytes that `render` wrote. `path` appears only in messages.

    Raises ManifestError with one fault if the bytes are not a valid patch.
    """
    try:
        size = decode_header_length(raw[:8], len(raw), path)
        tensors, metadata = parse_header(raw[8 : 8 + size], len(raw) - 8 - size)
        form, version = metadata.get("format"), metadata.get("format_version")
        if form != FORMAT or version not in (VERSION, LATER_VERSION):
            what = (
                f"unsupported version {version} of a patch" if form == FORMAT else "a safetensors file, but not a patch"
            )
            raise ManifestError(what, path, "give a manifest, or what swsurgery export --format sparse wrote")
        header = _Header.model_validate(parse_json(metadata.get("patch", "").encode(), "its metadata"))
        data = memoryview(raw)[8 + size :]
        scalars = tuple(_list_scalars(header, {name: (i, data[slice(*i.data_offsets)]) for name, i in tensors.items()}))
        if version != (needed := _choose_version(scalars)):
            raise ValueError(f"its format_version is {version}, but these scalars need {needed}")
    except ValidationError as error:
        raise ManifestError(f"invalid patch: {describe_first_fault(error)}", path) from None
    except (CheckpointError, NumberError) as error:
        raise ManifestError(f"invalid patch: {error.faults[0]}", path) from None
    except ValueError as error:
        raise ManifestError(f"invalid patch: {error}", path) from None
    return Patch(header.base, header.check, header.manifest_sha256, scalars, header.swsurgery_version)


def render_manifest(raw: bytes, path: Path) -> bytes:
    """Convert the bytes of a patch to a manifest in JSON that makes the same changes.

    Each edit expects the old bits. The manifest pins each file of the base whose digest the patch contains. Raises
    ManifestError for a damaged patch.
    """
    patch = parse(raw, path)
    base = {key: value for key, value in patch.base.model_dump(mode="json").items() if value}
    if "repo_id" not in base:
        base["path"] = NAMELESS_BASE
    head = {
        "version": 1,
        "description": f"from a patch of swsurgery {patch.swsurgery_version}, made of the manifest with sha256 "
        f"{patch.manifest_sha256}",
        "base": base,
        "check": {key: value for key, value in patch.check.model_dump().items() if value is not None},
    }
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    edits = ",\n".join(json.dumps(scalar.to_edit()) for scalar in patch.scalars)
    return ("{" + ",\n".join([*lines, f'"edits": [\n{edits}\n]']) + "}\n").encode()


_EDIT: TypeAdapter[ScalarEdit] = TypeAdapter(Annotated[ScalarEdit, Field(discriminator="op")])


def _list_scalars(header: _Header, arrays: Mapping[str, tuple[TensorInfo, memoryview]]) -> Iterator[PatchScalar]:
    """Yield every scalar of a patch. Raises ValueError or NumberError with the reason if the patch is invalid."""
    numbers = range(len(header.tensors))
    entries = {f"{number}.{part}" for number in numbers for part in ("indices", "new", "old")}
    if odd := sorted(entries ^ set(arrays)):
        raise ValueError(f"its metadata and its entries disagree about {odd[0]!r:.60}")
    if sum(len(tensor.edits) for tensor in header.tensors) > MAX_SCALARS:
        raise ValueError(f"it has more than {MAX_SCALARS} scalars")
    names = [tensor.name for tensor in header.tensors]
    if names != sorted(set(names)):
        raise ValueError("its tensors are not sorted by name, or one is repeated")
    for number, tensor in zip(numbers, header.tensors, strict=True):
        where, count, dtype = f"{tensor.name!r:.90}", len(tensor.edits), DTYPES[tensor.dtype]
        if dtype.kind == "opaque":
            raise ValueError(f"{where} is {dtype.name}, which {dtype.refusal}")
        parts = {}
        for part, wanted in (("indices", "I64"), ("new", dtype.name), ("old", dtype.name)):
            info, parts[part] = arrays[f"{number}.{part}"]
            if (info.dtype.name, info.shape) != (wanted, (count,)):
                raise ValueError(
                    f"{number}.{part} is {info.dtype.name} of shape {list(info.shape)}, but {where} "
                    f"needs {wanted} of [{count}]"
                )
        positions = struct.unpack(f"<{count}q", parts["indices"])
        size, last = math.prod(tensor.shape), -1
        for at, (flat, operation) in enumerate(zip(positions, tensor.edits, strict=True)):
            if not 0 <= flat < size:
                raise ValueError(f"position {flat} is out of range for {where} of shape {list(tensor.shape)}")
            if flat <= last:
                raise ValueError(f"positions of {where} do not increase: {flat} after {last}")
            if (operation.op == "scale") != (operation.factor is not None):
                raise ValueError(f"{where} has op {operation.op} and factor {operation.factor}")
            last, here = flat, slice(at * dtype.size, (at + 1) * dtype.size)
            scalar = PatchScalar(
                tensor.name,
                tensor.shape,
                dtype,
                flat,
                tensor.file,
                bytes(parts["old"][here]),
                bytes(parts["new"][here]),
                operation.op,
                operation.factor,
            )
            edit = _EDIT.validate_python(scalar.to_edit())
            if edit.compute_bytes(dtype, scalar.old) != scalar.new:
                raise ValueError(
                    f"{scalar.coordinate} is {format_bits(scalar.new)}, which op {scalar.op} does not produce"
                )
            yield scalar

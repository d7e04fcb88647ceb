"""Define the operations of a manifest and what each does to the bytes of one scalar.

targets.py defines what an edit names. The functions that compute new values for whole regions are in the package
`rewriting`, which gets an operation's options as JSON. To add an operation, write its class here and add it to `Edit`.
Must not depend on checkpoints.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic.config import JsonDict

from swsurgery.errors import NumberError
from swsurgery.manifest.targets import (
    REGION_FORMS,
    SCALAR_FORMS,
    TARGET_FIELDS,
    Bits,
    Exact,
    Finite,
    MeasuredValue,
    Number,
    Target,
    make_tuple,
    require_fields,
    require_one_of,
    select_forms,
)
from swsurgery.storage import dtypes
from swsurgery.storage.dtypes import DTYPES, Dtype
from swsurgery.storage.numbers import Written, format_exact
from swsurgery.storage.schema import Strict

Bit = Annotated[int, Field(ge=0, lt=64)]
Share = Annotated[float, Field(gt=0, lt=1)]
Width = Annotated[int, Field(ge=1, lt=1 << 31)]
Block = Width | Annotated[tuple[Width, Width], BeforeValidator(make_tuple)]
"""The size of a block: n consecutive scalars of a row, or [rows, columns]."""


class Operation(Target):
    """An edit: a target, and an operation with its options.

    `writes` is False if the operation changes nothing. `on_scalars` is True if the operation accepts single scalars.
    `on_regions` is True if it accepts rows, columns, neurons, experts, slices and whole tensors.
    """

    op: str
    writes: ClassVar[bool] = True
    on_regions: ClassVar[bool] = True
    on_scalars: ClassVar[bool] = True

    @property
    def options(self) -> dict[str, Any]:
        """The fields of the operation itself as JSON, such as {"factor": 2.0}. A field with its default is left out."""
        fields: dict[str, Any] = self.model_dump(
            mode="json", by_alias=True, exclude_defaults=True, exclude={"op", *TARGET_FIELDS}
        )
        return fields

    @classmethod
    def describe_targets(cls) -> JsonDict:
        """Return the part of a JSON Schema that requires a target on which the operation works."""
        if cls.on_scalars:
            return select_forms(SCALAR_FORMS + (REGION_FORMS if cls.on_regions else ()))
        return {**select_forms(REGION_FORMS), "properties": {"known": {"not": {"const": "all"}}}}

    @model_validator(mode="after")
    def _fits_target(self) -> Operation:
        if self.on_scalars and self.on_regions:
            return self
        form = self.form
        if not self.on_scalars and (form.name not in REGION_FORMS or self.known == "all"):
            named = "known: all names single scalars" if self.known else f"it names {form.phrase}"
            raise ValueError(f"{self.op} needs more than one scalar, but {named} (give tensors, or a slice)")
        if not self.on_regions and form.name not in SCALAR_FORMS:
            raise ValueError(f"{self.op} changes single scalars, but it names {form.phrase}")
        return self


class _OfStoredNumbers(Operation):
    """An operation that may change a stored number of a quantised layer, instead of the weight that it encodes."""

    raw: bool = Field(
        False, description="change a stored number itself: packed integers, scales and zero points of quantised layers"
    )

    @classmethod
    def describe_targets(cls) -> JsonDict:
        """Return the part of a JSON Schema that requires a target on which the operation and its options work."""
        raw: JsonDict = {"required": ["raw"], "properties": {"raw": {"const": True}}}
        return {"allOf": [super().describe_targets(), {"if": raw, "then": select_forms(SCALAR_FORMS)}]}

    @model_validator(mode="after")
    def _raw_scalar(self) -> _OfStoredNumbers:
        if self.raw and self.form.name not in SCALAR_FORMS:
            raise ValueError(f"has raw: true, which changes one stored number, but it names {self.form.phrase}")
        return self


class _OfValues(_OfStoredNumbers):
    """An operation that stores a value. In a quantised layer, that is the nearest value which the layer can store."""

    max_error: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        None, description="largest difference between the wanted value and the nearest value that a quantised layer has"
    )

    @classmethod
    def describe_targets(cls) -> JsonDict:
        """Return the part of a JSON Schema that requires a target on which the operation and its options work."""
        limited: JsonDict = require_fields("max_error")
        then: JsonDict = {**select_forms(SCALAR_FORMS), "properties": {"raw": {"const": False}}}
        return {"allOf": [super().describe_targets(), {"if": limited, "then": then}]}

    @model_validator(mode="after")
    def _limits_one_element(self) -> _OfValues:
        if self.max_error is not None and self.form.name not in SCALAR_FORMS:
            raise ValueError(f"has max_error, which limits the error of one element, but it names {self.form.phrase}")
        if self.max_error is not None and self.raw:
            raise ValueError("has both max_error and raw: true, which stores the exact number")
        return self


class Zero(_OfStoredNumbers):
    """Set all bits to zero. In a quantised layer, the element gets the code whose value is 0."""

    op: Literal["zero"]

    def compute_bytes(self, dtype: Dtype, old: bytes) -> bytes:
        """Return the bytes of zero. Raises NumberError for a dtype without a zero."""
        return dtypes.make_zero(dtype)


class Scale(_OfValues):
    """Multiply the stored value by `factor`: the exact product, rounded once to the stored dtype, half to even."""

    op: Literal["scale"]
    factor: Finite = Field(
        description="rounded to the nearest binary64 number; not 0", json_schema_extra={"not": {"const": 0}}
    )

    @model_validator(mode="after")
    def _not_zero(self) -> Scale:
        if self.factor == 0:
            raise ValueError("has factor 0: use op zero")
        return self

    def compute_bytes(self, dtype: Dtype, old: bytes) -> bytes:
        """Return the bytes of the scaled value. Raises NumberError if the dtype cannot represent it."""
        return dtypes.scale_value(dtype, old, self.factor)


class Set(_OfValues):
    """Store a given value, rounded once to the stored dtype, or given bits."""

    model_config = ConfigDict(json_schema_extra={"allOf": [require_one_of("value", "bits")]})
    op: Literal["set"]
    value: Annotated[Number | None, Exact] = None
    bits: Bits | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The value or the bits. A value that is no float64 is its text, because JSON readers would round it."""
        if isinstance(self.value, Written) and self.value.exact != float(self.value):
            return {"value": self.value.text}
        return super().options

    @model_validator(mode="after")
    def _value_or_bits(self) -> Set:
        if (self.value is None) == (self.bits is None):
            raise ValueError("needs either value or bits")
        return self

    def compute_bytes(self, dtype: Dtype, old: bytes) -> bytes:
        """Return the bytes of `value` or `bits`. Raises NumberError if the dtype cannot represent the value."""
        if self.bits is None:
            assert self.value is not None  # the validator accepts exactly one of the two
            return dtypes.encode(dtype, self.value)
        new = dtypes.parse_bits(dtype, self.bits)
        value = dtypes.decode(dtype, new)
        if value != value or value in (float("inf"), float("-inf")):
            raise NumberError(f"{self.bits} is {value} in {dtype.name}", remedy="only finite values are set")
        return new


class Flip(_OfStoredNumbers):
    """Invert bits of one stored scalar. Bit 0 is the least significant one: bit 15 of a BF16 is its sign."""

    on_regions: ClassVar[bool] = False
    op: Literal["flip"]
    bit: Annotated[
        Bit
        | Annotated[
            tuple[Bit, ...], Field(min_length=1, json_schema_extra={"uniqueItems": True}), BeforeValidator(make_tuple)
        ],
        Field(description="number of the bit, or a list of numbers; bit 0 is the least significant one"),
    ]

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of the bits to invert."""
        return self.bit if isinstance(self.bit, tuple) else (self.bit,)

    @field_validator("bit")
    @classmethod
    def _different(cls, value: int | tuple[int, ...]) -> int | tuple[int, ...]:
        if isinstance(value, tuple) and len(set(value)) < len(value):
            raise ValueError("names a bit twice")
        return value

    def compute_bytes(self, dtype: Dtype, old: bytes) -> bytes:
        """Return the bytes with the bits inverted. Raises NumberError for a bit that the dtype does not have."""
        if max(self.numbers) >= dtype.bits:
            raise NumberError(f"{dtype.name} has no bit {max(self.numbers)}", remedy=f"give 0 to {dtype.bits - 1}")
        mask = sum(1 << number for number in self.numbers)
        return (int.from_bytes(old, "little") ^ mask).to_bytes(dtype.size, "little")


class ClipRule(Strict):
    """The threshold of a clip, by exactly one rule. `z` is the rule of arXiv:2411.07191, section 4."""

    model_config = ConfigDict(json_schema_extra=require_one_of("z", "fraction", "iqr"))
    z: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="|w| above mean(|w|) + z * std(|w|) is clipped"
    )
    fraction: Share | None = Field(None, description="this fraction of the scalars, those of largest |w|, is clipped")
    iqr: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        None, description="values outside [Q1 - iqr * (Q3 - Q1), Q3 + iqr * (Q3 - Q1)] are clipped"
    )

    @model_validator(mode="after")
    def _one_rule(self) -> ClipRule:
        if sum(rule is not None for rule in (self.z, self.fraction, self.iqr)) != 1:
            raise ValueError("needs exactly one of z, fraction and iqr")
        return self


_ONE_SCOPE: JsonDict = {"not": require_fields("per", "block")}

_NF4: JsonDict = {
    "if": {"required": ["levels"], "properties": {"levels": {"const": "nf4"}}},
    "then": {"properties": {"bits": {"const": 4}, "symmetric": {"const": True}}},
}


class _Scoped(Operation):
    """An operation that computes its statistics for each tensor, channel or block separately."""

    on_scalars: ClassVar[bool] = False
    per: Literal["tensor", "channel"] = Field("tensor", description="scalars that share one statistic; channel: a row")
    block: Block | None = Field(
        None, description="scalars that share one statistic: n along a row, or [rows, columns]; instead of per"
    )

    @model_validator(mode="after")
    def _one_scope(self) -> _Scoped:
        if self.block is not None and "per" in self.model_fields_set:
            raise ValueError("has both per and block: give one of them")
        return self


class Clip(_Scoped, ClipRule):
    """Limit values to a threshold. Values beyond it become the threshold, with their sign."""

    model_config = ConfigDict(json_schema_extra={"allOf": [_ONE_SCOPE, require_one_of("z", "fraction", "iqr")]})
    op: Literal["clip"]


class PruneOutliers(Operation):
    """Set the scalars of largest |w| to zero: `count` of them or a fraction, over all tensors of the edit together."""

    model_config = ConfigDict(json_schema_extra={"allOf": [require_one_of("count", "fraction")]})
    on_scalars: ClassVar[bool] = False
    op: Literal["prune_outliers"]
    count: Annotated[int, Field(ge=1, lt=1 << 63)] | None = None
    fraction: Share | None = None

    @model_validator(mode="after")
    def _count_or_fraction(self) -> PruneOutliers:
        if (self.count is None) == (self.fraction is None):
            raise ValueError("needs either count or fraction")
        return self


class Round(_Scoped):
    """Round values to the nearest of a few levels, as simple quantisation does, and store them in the same dtype."""

    model_config = ConfigDict(json_schema_extra={"allOf": [_ONE_SCOPE, _NF4]})
    op: Literal["round"]
    bits: Annotated[int, Field(ge=2, le=8, description="2 to 8; the number of levels is 2**bits")]
    symmetric: bool = Field(True, description="levels from -max|w| to max|w|; false: from the minimum to the maximum")
    levels: Literal["integer", "nf4"] = Field(
        "integer", description="evenly spaced levels, or the 16 levels of NF4 (arXiv:2305.14314)"
    )
    clip: ClipRule | None = Field(None, description="clip first, by this rule")

    @model_validator(mode="after")
    def _nf4(self) -> Round:
        if self.levels == "nf4" and (self.bits != 4 or not self.symmetric):
            raise ValueError("has levels nf4, which need bits 4 and symmetric levels")
        return self


class Restore(_OfValues):
    """Put back the values of another checkpoint, or the known values of super weights."""

    model_config = ConfigDict(
        json_schema_extra={"anyOf": [require_fields(*one) for one in (["from"], ["row", "col"], ["index"], ["known"])]}
    )
    op: Literal["restore"]
    source: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        alias="from",
        description="the checkpoint with the bytes to restore: a directory, relative to the manifest, or hf://",
    )

    @model_validator(mode="after")
    def _known_or_from(self) -> Restore:
        if self.source is None and self.form.name not in SCALAR_FORMS:
            raise ValueError(f"is missing from: known values exist only for scalars, but it names {self.form.phrase}")
        return self


class Protect(Operation):
    """Keep the base's bits. An edit of the same scalar is an error, also in a later manifest.

    A rewrite of the scalar's tensor leaves it unchanged.
    """

    writes: ClassVar[bool] = False
    op: Literal["protect"]

    def compute_bytes(self, dtype: Dtype, old: bytes) -> bytes:
        """Return `old`, because a protected scalar keeps its bytes."""
        return old


Edit = Annotated[
    Zero | Scale | Set | Flip | Clip | PruneOutliers | Round | Restore | Protect, Field(discriminator="op")
]

OPERATIONS: tuple[type[Operation], ...] = get_args(get_args(Edit)[0])
"""Every operation, in the order of `Edit`."""

ScalarEdit = Zero | Scale | Set | Flip | Protect
"""Operations that compute the new bytes of a scalar from its old bytes alone."""


def is_of_stored_number(edit: Edit) -> bool:
    """Return True if an edit of a scalar names a stored number, and not the weight that the number may encode."""
    return isinstance(edit, Flip) or (isinstance(edit, _OfStoredNumbers) and edit.raw)


def explain_expectation(expect: float | str | MeasuredValue, dtype: Dtype, stored: bytes) -> str | None:
    """Describe how the stored bytes differ from the value or bits that an edit expects; None if they agree."""
    if isinstance(expect, str):
        found = dtypes.format_bits(stored)
        return None if found == expect.lower() else f"expected bits {expect}, stored are {found}"
    value = dtypes.decode(dtype, stored)
    if isinstance(expect, MeasuredValue):
        coarse = DTYPES[expect.dtype]
        # Values that differ only by a conversion between the dtypes are equal after rounding to the coarser dtype.
        same = dtypes.round_to(coarse, value) == dtypes.round_to(coarse, expect.value)
        if same or value == dtypes.round_to(dtype, expect.value):
            return None
        return f"expected {format_exact(expect.value)} ({expect.dtype}), stored is {format_exact(value)}"
    try:
        same = dtypes.decode(dtype, dtypes.encode(dtype, expect)) == value
    except NumberError:
        same = False
    return None if same else f"expected {format_exact(expect)}, stored is {format_exact(value)} ({dtype.name})"

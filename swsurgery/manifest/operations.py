"""Define the four operations of a manifest and what each does to the bytes of one scalar.

An edit names its scalars in one of three forms: `layer`, `row`, `col` (and `expert`), the short form used in papers;
`tensor` and `index`, in the stored shape; or `known`, coordinates of known super weights. To add an operation, write
its class here and add it to `Edit`. Must not depend on checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    WrapValidator,
    model_validator,
)
from pydantic.config import JsonDict

from swsurgery.errors import NumberError
from swsurgery.storage import dtypes
from swsurgery.storage.dtypes import DTYPES, Dtype
from swsurgery.storage.numbers import Written, format_exact
from swsurgery.storage.schema import Position, Strict

Finite = Annotated[float, Field(allow_inf_nan=False)]
Bits = Annotated[str, Field(pattern=r"^0x([0-9a-fA-F]{2}|[0-9a-fA-F]{4}|[0-9a-fA-F]{8}|[0-9a-fA-F]{16})$")]
Number = Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | Finite


def _keep_exact(value: object, validate: Callable[[object], object]) -> object:
    """Validate a number, and return the number as written, because pydantic would round it to float64."""
    validated = validate(value)
    return value if isinstance(value, Written) or type(value) is int else validated


Exact = WrapValidator(_keep_exact)

_ONE_TARGET: JsonDict = {
    "oneOf": [{"required": ["layer", "row", "col"]}, {"required": ["tensor", "index"]}, {"required": ["known"]}]
}


class MeasuredValue(Strict):
    """An expected value that was measured in `dtype`, which may differ from the tensor's dtype.

    The stored value agrees if both are equal after rounding to `dtype`, or after rounding `value` to the stored dtype.
    """

    value: Annotated[Number, Exact]
    dtype: Literal["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"]


class Target(Strict):
    """The scalars that an edit names, in exactly one of the three forms, and optionally their expected value."""

    layer: Position | None = Field(None, description="0-based decoder layer")
    row: Position | None = Field(None, description="output channel of the down projection")
    col: Position | None = Field(None, description="intermediate neuron: input of the down projection")
    expert: Position | Literal["shared"] | None = Field(None, description="expert of a mixture-of-experts layer")
    tensor: str | None = Field(None, description="name of the stored tensor")
    index: Annotated[
        tuple[Position, ...] | None,
        # YAML and JSON give lists, but strict mode accepts only a tuple.
        BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v),
        Field(description="index in the stored shape"),
    ] = None
    known: str | None = Field(None, description="the id of a known super weight, such as L2.3968.7003, or all")
    expect: Annotated[Number | Bits | MeasuredValue | None, Exact] = Field(
        None, description="the stored value (a value, bits, or a value and its dtype); another one is an error"
    )

    @model_validator(mode="after")
    def _one_form(self) -> Target:
        short = [self.layer, self.row, self.col]
        forms = {
            "layer, row, col": any(f is not None for f in [*short, self.expert]),
            "tensor, index": self.tensor is not None or self.index is not None,
            "known": self.known is not None,
        }
        given = [form for form, present in forms.items() if present]
        if not given:
            raise ValueError("names no scalar: give layer, row and col; or tensor and index; or known")
        if len(given) > 1:
            raise ValueError(f"names its scalar in more than one way ({'; '.join(given)}): give one of them")
        if forms["layer, row, col"] and None in short:
            missing = [n for n, f in zip(("layer", "row", "col"), short, strict=True) if f is None]
            raise ValueError(f"is missing {' and '.join(missing)}")
        if forms["tensor, index"] and (self.tensor is None or self.index is None):
            raise ValueError(f"is missing {'tensor' if self.tensor is None else 'index'}")
        if self.known is not None and self.expect is not None:
            raise ValueError("has both known and expect: known super weights already have expected values")
        return self


class Zero(Target):
    """Set all bits to zero."""

    model_config = ConfigDict(json_schema_extra=_ONE_TARGET)
    writes: ClassVar[bool] = True
    op: Literal["zero"]

    def compute_bytes(self, dtype: Dtype, old: bytes) -> bytes:
        """Return the bytes of zero. Raises NumberError for a dtype without a zero."""
        return dtypes.make_zero(dtype)


class Scale(Target):
    """Multiply the stored value by `factor`: the exact product, rounded once to the stored dtype, half to even."""

    model_config = ConfigDict(json_schema_extra=_ONE_TARGET)
    writes: ClassVar[bool] = True
    op: Literal["scale"]
    factor: Finite = Field(description="rounded to the nearest binary64 number; not 0")

    @model_validator(mode="after")
    def _not_zero(self) -> Scale:
        if self.factor == 0:
            raise ValueError("has factor 0: use op zero")
        return self

    def compute_bytes(self, dtype: Dtype, old: bytes) -> bytes:
        """Return the bytes of the scaled value. Raises NumberError if the dtype cannot represent it."""
        return dtypes.scale_value(dtype, old, self.factor)


class Set(Target):
    """Store a given value, rounded once to the stored dtype, or given bits."""

    model_config = ConfigDict(
        json_schema_extra={"allOf": [_ONE_TARGET, {"oneOf": [{"required": ["value"]}, {"required": ["bits"]}]}]}
    )
    writes: ClassVar[bool] = True
    op: Literal["set"]
    value: Annotated[Number | None, Exact] = None
    bits: Bits | None = None

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


class Protect(Target):
    """Keep the base's bits. Another edit of the scalar in this manifest, or a change by a later one, is an error."""

    model_config = ConfigDict(json_schema_extra=_ONE_TARGET)
    writes: ClassVar[bool] = False
    op: Literal["protect"]

    def compute_bytes(self, dtype: Dtype, old: bytes) -> bytes:
        """Return `old`, because a protected scalar keeps its bytes."""
        return old


Edit = Annotated[Zero | Scale | Set | Protect, Field(discriminator="op")]


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

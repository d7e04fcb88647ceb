"""Define the targets of a manifest: the forms in which an edit names what it changes.

Scalars: `layer`, `row`, `col`, the short form used in papers; `tensor` and `index`, in the stored shape. Structures:
`layer` with `row`, `col`, `neuron` or `expert`. Parts of tensors: `tensor` and `slice`. Whole tensors: `tensors`, a
name or glob. `known` names known super weights. To add a form, add it to `FORMS`. Must not depend on checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, WrapValidator, model_validator
from pydantic.config import JsonDict

from swsurgery.storage.numbers import Written
from swsurgery.storage.schema import Position, Strict

Finite = Annotated[float, Field(allow_inf_nan=False)]
Bits = Annotated[str, Field(pattern=r"^0x([0-9a-fA-F]{2}|[0-9a-fA-F]{4}|[0-9a-fA-F]{8}|[0-9a-fA-F]{16})$")]
Number = Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | Finite


def _keep_exact(value: object, validate: Callable[[object], object]) -> object:
    """Validate a number, and return the number as written, because pydantic would round it to float64."""
    validated = validate(value)
    return value if isinstance(value, Written) or type(value) is int else validated


Exact = WrapValidator(_keep_exact)


@dataclass(frozen=True)
class Form:
    """One form of a target: the fields that it requires, and the fields that it may have in addition.

    `phrase` names what the target is in a message, such as "a row".
    """

    name: str
    phrase: str
    fields: tuple[str, ...]
    optional: tuple[str, ...] = ()


FORMS: tuple[Form, ...] = (
    Form("scalar", "a scalar", ("layer", "row", "col"), ("expert", "expect")),
    Form("scalar by index", "a scalar", ("tensor", "index"), ("expect",)),
    Form("row", "a row", ("layer", "row"), ("expert",)),
    Form("column", "a column", ("layer", "col"), ("expert",)),
    Form("neuron", "a neuron", ("layer", "neuron"), ("expert",)),
    Form("expert", "an expert", ("layer", "expert")),
    Form("slice", "a slice", ("tensor", "slice")),
    Form("tensors", "whole tensors", ("tensors",)),
    Form("known", "known super weights", ("known",)),
)
"""Every form of a target. The fields of an edit fit at most one form."""

TARGET_FIELDS = ("layer", "row", "col", "neuron", "expert", "tensor", "index", "slice", "tensors", "known", "expect")
"""All fields of a target. The other fields of an edit belong to its operation."""

SCALAR_FORMS = ("scalar", "scalar by index", "known")
"""Forms that can name single scalars. Only the known model shows whether the id after `known` is that of a scalar."""

REGION_FORMS = tuple(form.name for form in FORMS if form.name not in ("scalar", "scalar by index"))
"""Forms that can name more than one scalar. `known: all` cannot: it names single scalars."""

_PLACES = tuple(field for field in TARGET_FIELDS if field != "expect")

_FORM_OF: dict[frozenset[str], Form] = {
    frozenset((*form.fields, *extra)): form
    for form in FORMS
    for count in range(len(form.optional) + 1)
    for extra in combinations(form.optional, count)
}
"""Maps each set of fields that a target may have to its form."""


def describe_forms() -> dict[str, JsonDict]:
    """Return the definition of each form in a JSON Schema, by name. A field that is null counts as absent."""
    definitions: dict[str, JsonDict] = {}
    for form in FORMS:
        given = require_fields(*form.fields)
        absent: JsonDict = {f: {"type": "null"} for f in TARGET_FIELDS if f not in (*form.fields, *form.optional)}
        definitions[_make_definition_name(form)] = {"allOf": [given, {"properties": absent}]}
    return definitions


def select_forms(names: Sequence[str]) -> JsonDict:
    """Return the part of a JSON Schema that requires one of the named forms, which `describe_forms` defines."""
    return {"oneOf": [{"$ref": f"#/$defs/{_make_definition_name(form)}"} for form in FORMS if form.name in names]}


def _make_definition_name(form: Form) -> str:
    return f"{form.name.replace(' ', '_')}_target"


def require_fields(*fields: str) -> JsonDict:
    """Return the part of a JSON Schema that requires the fields. A field that is null counts as absent."""
    return {"required": [*fields], "properties": {field: {"not": {"type": "null"}} for field in fields}}


def require_one_of(*fields: str) -> JsonDict:
    """Return the part of a JSON Schema that requires exactly one of the fields."""
    return {"oneOf": [require_fields(field) for field in fields]}


class MeasuredValue(Strict):
    """An expected value that was measured in `dtype`, which may differ from the tensor's dtype.

    The stored value agrees if both are equal after rounding to `dtype`, or after rounding `value` to the stored dtype.
    """

    value: Annotated[Number, Exact]
    dtype: Literal["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"]


def make_tuple(value: object) -> object:
    """Convert a list to a tuple, because YAML and JSON give lists, but strict mode accepts only a tuple."""
    return tuple(value) if isinstance(value, list) else value


_AXIS = " *(?:-?[0-9]{1,18}|(?:-?[0-9]{1,18})? *: *(?:-?[0-9]{1,18})?) *"
"""Pattern of one axis of a slice: an index such as 3, or a range such as 10:20, :20 or 10: without a step."""

_INDEX_LIMITS: JsonDict = {"exclusiveMinimum": -(10**18), "exclusiveMaximum": 10**18}

SLICE = f"^{_AXIS}(?:,{_AXIS})*$"
"""Pattern of a slice."""


@dataclass(frozen=True)
class AxisSlice:
    """The indices that a slice selects on one axis.

    `index` is a single index, and removes the axis; None for a range. `begin` and `end` limit a range as in numpy; None
    leaves that side open. Negative numbers count from the end.
    """

    begin: int | None = None
    end: int | None = None
    index: int | None = None


def parse_slice(text: str) -> tuple[AxisSlice, ...]:
    """Parse a slice such as "3, 10:20", which has numpy's meaning. A step is not allowed. Raises ValueError."""
    if not re.fullmatch(SLICE, text):
        raise ValueError(f"{text!r:.60} is not a slice")
    axes: list[AxisSlice] = []
    for part in text.split(","):
        begin, colon, end = (None if not word.strip() else word for word in part.partition(":"))
        first, last = (None if word is None else int(word) for word in (begin, end))
        axes.append(AxisSlice(first, last) if colon else AxisSlice(index=first))
    return tuple(axes)


def _convert_index(value: object) -> object:
    """Convert an index that is not in quotes to text, because YAML reads `slice: 3` as a number."""
    return str(value) if type(value) is int else value


Slice = Annotated[
    str,
    BeforeValidator(_convert_index),
    Field(pattern=SLICE),
    WithJsonSchema({"anyOf": [{"type": "string", "pattern": SLICE}, {"type": "integer", **_INDEX_LIMITS}]}),
]
"""A slice as text. An index alone may be a number."""


class Target(Strict):
    """What an edit changes, in exactly one of the forms, and optionally the expected value of a scalar."""

    layer: Position | None = Field(None, description="0-based decoder layer")
    row: Position | None = Field(None, description="output channel of the down projection")
    col: Position | None = Field(None, description="intermediate neuron: input of the down projection")
    neuron: Position | None = Field(None, description="intermediate neuron: its gate row, up row and down column")
    expert: Position | Literal["shared"] | None = Field(None, description="expert of a mixture-of-experts layer")
    tensor: str | None = Field(None, description="name of the stored tensor")
    index: Annotated[
        tuple[Position, ...] | None, BeforeValidator(make_tuple), Field(description="index in the stored shape")
    ] = None
    slice: Slice | None = Field(
        None, description='part of the tensor in the stored shape, as in numpy and without steps: "3, 10:20"'
    )
    tensors: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="whole tensors: a name, or a glob in which * matches any text, dots too"
    )
    known: str | None = Field(
        None, description="the id of a known super weight, row, column or expert, such as L2.3968.7003; or all"
    )
    expect: Annotated[Number | Bits | MeasuredValue | None, Exact] = Field(
        None, description="the stored value (a value, bits, or a value and its dtype); another one is an error"
    )

    @property
    def form(self) -> Form:
        """The form in which the target is given."""
        return _FORM_OF[frozenset(self._list_given())]

    def _list_given(self) -> list[str]:
        """List the fields that name the target, without `expect`."""
        return [field for field in _PLACES if field in self.model_fields_set and getattr(self, field) is not None]

    @model_validator(mode="after")
    def _one_form(self) -> Target:
        given = self._list_given()
        form = _FORM_OF.get(frozenset(given))
        if form is None:
            raise ValueError(_explain_misfit(given))
        if self.expect is not None and "expect" not in form.optional:
            if self.known is not None:
                raise ValueError("has both known and expect: known super weights already have expected values")
            raise ValueError(f"has expect, which is the value of one scalar, but names {form.phrase}")
        return self


_WAYS = {
    "layer": ("layer", "row", "col", "neuron", "expert"),
    "tensor": ("tensor", "index", "slice"),
    "tensors": ("tensors",),
    "known": ("known",),
}
"""The fields of a target by the way in which they name it. The fields of an edit belong to one way."""


def _explain_misfit(given: Sequence[str]) -> str:
    """Explain why the fields of a target fit no form."""
    if not given:
        return (
            "names no target: give layer and row, col, neuron or expert; tensor and index or slice; tensors; or known"
        )
    used = {way: [f for f in fields if f in given] for way, fields in _WAYS.items() if {*fields} & {*given}}
    if len(used) > 1:
        fields = "; ".join(", ".join(found) for found in used.values())
        return f"names its target in more than one way ({fields}): give one of them"
    if "tensor" in used:
        if "tensor" not in given:
            return "is missing tensor"
        both = len(given) > 1
        return "has both index and slice: give one of them" if both else "is missing index or slice (or use tensors)"
    if "layer" not in given:
        return "is missing layer"
    if "neuron" in given:
        return "has neuron with row or col: a neuron is its gate row, up row and down column"
    return "is missing row, col, neuron or expert"

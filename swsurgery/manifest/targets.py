"""Define the targets of a manifest: the forms in which an edit names what it changes.

Scalars: `layer`, `row`, `col`, the short form used in papers; `tensor` and `index`, in the stored shape. Structures:
`layer` with `row`, `col`, `neuron` or `expert`. Parts of tensors: `tensor` and `slice`. Whole tensors: `tensors`, a
name or glob. `known` names known super weights. To add a form, add it to `FORMS`. Must not depend on checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, WrapValidator, model_validator
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
    """One form of a target: the fields that it requires, and the fields that it may have in addition."""

    name: str
    fields: tuple[str, ...]
    optional: tuple[str, ...] = ()


FORMS: tuple[Form, ...] = (
    Form("scalar", ("layer", "row", "col"), ("expert", "expect")),
    Form("scalar by index", ("tensor", "index"), ("expect",)),
    Form("row", ("layer", "row"), ("expert",)),
    Form("column", ("layer", "col"), ("expert",)),
    Form("neuron", ("layer", "neuron"), ("expert",)),
    Form("expert", ("layer", "expert")),
    Form("slice", ("tensor", "slice")),
    Form("tensors", ("tensors",)),
    Form("known", ("known",)),
)
"""Every form of a target. The fields of an edit fit at most one form."""

TARGET_FIELDS = ("layer", "row", "col", "neuron", "expert", "tensor", "index", "slice", "tensors", "known", "expect")
"""All fields of a target. The other fields of an edit belong to its operation."""

SCALAR_FORMS = ("scalar", "scalar by index", "known")
"""Forms that name single scalars. `known` with the id of a row, column or expert is found out with the known model."""

REGION_FORMS = tuple(form.name for form in FORMS if form.name not in ("scalar", "scalar by index"))
"""Forms that name more than one scalar."""

_PLACES = tuple(field for field in TARGET_FIELDS if field != "expect")


def describe_forms(names: Sequence[str] | None = None) -> JsonDict:
    """Return the part of a JSON Schema that requires exactly one of the named forms; of all forms for None."""
    choices: list[JsonDict] = []
    for form in FORMS:
        if names is None or form.name in names:
            excluded = [f for f in TARGET_FIELDS if f not in (*form.fields, *form.optional)]
            choices.append({"required": [*form.fields], "properties": {field: {"type": "null"} for field in excluded}})
    return {"oneOf": [*choices]}


class MeasuredValue(Strict):
    """An expected value that was measured in `dtype`, which may differ from the tensor's dtype.

    The stored value agrees if both are equal after rounding to `dtype`, or after rounding `value` to the stored dtype.
    """

    value: Annotated[Number, Exact]
    dtype: Literal["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"]


def _make_tuple(value: object) -> object:
    """Convert a list to a tuple, because YAML and JSON give lists, but strict mode accepts only a tuple."""
    return tuple(value) if isinstance(value, list) else value


_AXIS = re.compile(r"\s*(?:(?P<index>-?\d{1,18})|(?P<begin>-?\d{1,18})?\s*:\s*(?P<end>-?\d{1,18})?)\s*")
"""One axis of a slice: an index such as 3, or a range such as 10:20, :20 or 10: without a step."""


@dataclass(frozen=True)
class AxisSlice:
    """The indices that a slice selects on one axis: from `begin` to before `end`, as in numpy; None is open.

    `index` is set instead if the slice selects a single index.
    """

    begin: int | None = None
    end: int | None = None
    index: int | None = None


def parse_slice(text: str) -> tuple[AxisSlice, ...]:
    """Parse a slice such as "3, 10:20" with numpy's semantics, without steps. Raises ValueError."""
    axes: list[AxisSlice] = []
    for part in text.split(","):
        match = _AXIS.fullmatch(part)
        if match is None:
            raise ValueError(f"{part.strip()!r} is not a slice: give indices and ranges such as 3, 10:20")
        index, begin, end = (None if value is None else int(value) for value in match.group("index", "begin", "end"))
        axes.append(AxisSlice(begin, end, index))
    return tuple(axes)


def _check_slice(text: object) -> object:
    if isinstance(text, str):
        parse_slice(text)
    elif type(text) is int:
        return str(text)  # `slice: 3` is read by YAML as a number
    return text


class Target(Strict):
    """What an edit changes, in exactly one of the forms, and optionally the expected value of a scalar."""

    layer: Position | None = Field(None, description="0-based decoder layer")
    row: Position | None = Field(None, description="output channel of the down projection")
    col: Position | None = Field(None, description="intermediate neuron: input of the down projection")
    neuron: Position | None = Field(None, description="intermediate neuron: its gate row, up row and down column")
    expert: Position | Literal["shared"] | None = Field(None, description="expert of a mixture-of-experts layer")
    tensor: str | None = Field(None, description="name of the stored tensor")
    index: Annotated[
        tuple[Position, ...] | None, BeforeValidator(_make_tuple), Field(description="index in the stored shape")
    ] = None
    slice: Annotated[
        str | None,
        BeforeValidator(_check_slice),
        Field(description='part of the tensor in the stored shape, as in numpy and without steps: "3, 10:20"'),
    ] = None
    tensors: Annotated[
        str | None,
        Field(min_length=1, description="whole tensors: a name, or a glob in which * matches any text, dots too"),
    ] = None
    known: str | None = Field(
        None, description="the id of a known super weight, row, column or expert, such as L2.3968.7003; or all"
    )
    expect: Annotated[Number | Bits | MeasuredValue | None, Exact] = Field(
        None, description="the stored value (a value, bits, or a value and its dtype); another one is an error"
    )

    @property
    def form(self) -> Form:
        """The form in which the target is given."""
        given = {field for field in _PLACES if getattr(self, field) is not None}
        return next(f for f in FORMS if set(f.fields) <= given <= {*f.fields, *f.optional})

    @model_validator(mode="after")
    def _one_form(self) -> Target:
        given = [field for field in _PLACES if getattr(self, field) is not None]
        fitting = [f for f in FORMS if set(f.fields) <= set(given) <= {*f.fields, *f.optional}]
        if not given:
            raise ValueError("names no target: give layer, row and col; tensor and index; known; or another form")
        if not fitting:
            raise ValueError(_explain_misfit(given))
        if self.expect is not None and "expect" not in fitting[0].optional:
            if self.known is not None:
                raise ValueError("has both known and expect: known super weights already have expected values")
            raise ValueError(f"has expect, which is the value of one scalar, but it names a {fitting[0].name}")
        return self


def _explain_misfit(given: Sequence[str]) -> str:
    """Explain why the fields of a target fit no form, from the ways in which it begins to name one."""
    ways = {
        "layer": {"layer", "row", "col", "neuron", "expert"},
        "tensor": {"tensor", "index", "slice"},
        "tensors": {"tensors"},
        "known": {"known"},
    }
    used = [name for name, fields in ways.items() if fields & set(given)]
    if len(used) > 1:
        fields = "; ".join(", ".join(f for f in given if f in ways[name]) for name in used)
        return f"names its target in more than one way ({fields}): give one of them"
    if "neuron" in given and {"row", "col"} & set(given):
        return "has neuron with row or col: a neuron is a whole gate row, up row and down column"
    if used == ["tensor"]:
        if {"index", "slice"} <= set(given):
            return "has both index and slice: give one of them"
        return "is missing tensor" if "tensor" not in given else "is missing index or slice (tensors names whole ones)"
    if "layer" not in given:
        return "is missing layer"
    return "is missing row, col, neuron or expert"

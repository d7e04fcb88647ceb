"""Define the base classes and field types of the pydantic models that describe file formats."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from swsurgery.storage.names import VARIANT

Position = Annotated[int, Field(ge=0, lt=1 << 63)]
"""An index or offset that fits a signed 64-bit integer."""


class Strict(BaseModel):
    """A model that coerces no value, refuses unknown fields and cannot be changed."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, defer_build=True)


class OfVariant(Strict):
    """A reference to a base with an optional variant of its weights.

    Without a variant, the JSON has no key `variant`. Earlier versions of swsurgery can therefore read such files.
    """

    variant: Annotated[str, Field(pattern=f"^{VARIANT}$")] | None = None

    @model_serializer(mode="wrap")
    def _drop_absent(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = serialize(self)
        return data if self.variant else {key: value for key, value in data.items() if key != "variant"}


def require_whole_number(value: object) -> int:
    """Return `value` if it is an int and not a bool. Raises ValueError otherwise.

    A Literal compares with ==, so it would accept true and 1.0 in place of 1, even in strict mode.
    """
    if type(value) is not int:
        raise ValueError("should be a whole number")
    return value


Version = Annotated[Literal[1], BeforeValidator(require_whole_number)]
"""The version number in a file that swsurgery writes. Only 1 is valid."""

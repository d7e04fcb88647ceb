"""Hold what belongs together."""

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


class Strict(BaseModel):
    """No coercion, no unknown field, no change after loading."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class OfVariant(Strict):
    """What names a base, perhaps one variant of its weights.

    Without a variant the key is left out, so that records and patches keep the form that earlier versions read.
    """

    variant: Annotated[str, Field(pattern=f"^{VARIANT}$")] | None = None

    @model_serializer(mode="wrap")
    def _without_absent(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = serialize(self)
        return data if self.variant else {key: value for key, value in data.items() if key != "variant"}


def whole_number(value: Any) -> Any:
    """A literal compares by ==, so true and 1.0 would pass for 1 even in strict mode."""
    if type(value) is not int:
        raise ValueError("should be a whole number")
    return value


Version = Annotated[Literal[1], BeforeValidator(whole_number)]
"""Of a file format of swsurgery's."""

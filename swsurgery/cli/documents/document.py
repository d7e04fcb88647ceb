"""Define the base class of all descriptions of JSON documents, and the types of numbers in them.

The classes are never instantiated: `schemas.py` makes JSON Schemas from them. A field with the default ABSENT may be
missing from a document.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

ABSENT: Any = None
"""Default of the fields that a document may lack."""

Number = float | None
"""A measured number; null if it is not finite."""

PlainNumber = float | Literal["nan", "inf", "-inf"]
"""A measured number; a text if it is not finite."""

StoredNumber = int | float | str | None
"""A stored value: a number, "nan", "inf" or "-inf"; null if its dtype has no numbers."""

ExpertNumber = int | Literal["shared"] | None
"""The number of an expert, or "shared"; null for a layer without experts."""


class DocumentPart(BaseModel):
    """Describes an object inside a document. The docstrings of the subclasses are the descriptions in the schema."""


class ProtocolItem(DocumentPart):
    """How the text was cut into windows and scored.

    `changed` names the options by which the user changed the protocol `name`. A window of `window` tokens begins
    `stride` tokens after the one before it. `bos` says whether BOS was in front of the windows.
    """

    name: Literal["default", "paper", "lm-eval"]
    description: str
    window: int | None
    stride: int | None
    bos: Literal["auto", "yes", "no"]
    score_first: bool
    changed: list[str]


class Document(DocumentPart):
    """Describes a document: the object that a command prints with --json, without its field `schema`."""

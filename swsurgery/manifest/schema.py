"""Define the schema of a manifest as pydantic models.

Must not depend on how a manifest is read or written.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from swsurgery.manifest.operations import OPERATIONS, Edit
from swsurgery.manifest.targets import describe_forms
from swsurgery.storage.names import VARIANT
from swsurgery.storage.schema import Strict, Version

MAX_EDITS = 150_000
"""Maximum number of edits in a manifest.

A manifest must be able to edit 100,000 scalars. The largest published set of weights removed together has 7,000.
"""

FILE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,250}$"
"""Pattern of a manifest's name and of a shard's file name."""

Ratio = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Base(Strict):
    """The checkpoint to edit: a repository at a revision, or a directory."""

    repo_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?$")] | None = None
    revision: (
        Annotated[str, Field(pattern=r"^[0-9a-f]{40}$", description="the commit: 40 hex digits, quoted")] | None
    ) = None
    path: Annotated[str, Field(min_length=1, description="a directory, relative to the manifest")] | None = None
    model: Annotated[str, Field(description="name of the known model, if repo_id does not identify it")] | None = None
    sha256: Annotated[
        dict[Annotated[str, Field(pattern=FILE_NAME)], Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]],
        Field(description="digests of shards; a base with other digests is an error"),
    ] = {}
    weights: Annotated[
        Literal["index", "single"] | None,
        Field(description="which weights to edit if there are both an index and a single file"),
    ] = None
    variant: Annotated[
        str | None,
        Field(pattern=f"^{VARIANT}$", description="which variant of the weights to edit, such as fp16"),
    ] = None
    copies: Annotated[
        Literal["omit", "keep"] | None,
        Field(description="further copies of the weights: omit them, or copy them unedited"),
    ] = None

    @model_validator(mode="after")
    def _one_place(self) -> Base:
        if (self.repo_id is None) == (self.path is None):
            raise ValueError("needs either repo_id or path")
        if self.revision is not None and self.repo_id is None:
            raise ValueError("has a revision without a repo_id")
        if "\0" in (self.path or ""):
            raise ValueError("has a path that contains a NUL character")
        return self


class Bounds(Strict):
    """Limits on the perplexity ratio, patched / base, in the sanity check."""

    max_perplexity_ratio: Ratio | None = None
    min_perplexity_ratio: Ratio | None = None


class Manifest(Strict):
    """The base, the edits, and the limits of the sanity check."""

    version: Version
    name: Annotated[str, Field(pattern=FILE_NAME)] | None = None
    description: str | None = None
    base: Base
    edits: Annotated[list[Edit], Field(min_length=1)]
    check: Bounds = Bounds()


def render_schema() -> dict[str, Any]:
    """Return the manifest's JSON Schema (draft 2020-12)."""
    generated = Manifest.model_json_schema()
    definitions = generated["$defs"]
    for operation in OPERATIONS:
        definitions[operation.__name__].setdefault("allOf", []).append(operation.describe_targets())
    definitions |= describe_forms()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **generated,
        "title": "swsurgery manifest",
    }

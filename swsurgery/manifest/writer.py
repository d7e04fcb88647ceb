"""Write a manifest as YAML text.

Must not depend on checkpoints; callers pass plain values.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol

from swsurgery.errors import ManifestError, escape_control

Operation = Literal["zero", "scale", "protect", "restore"]
"""The operations in a written manifest. Only manifests of known super weights have `restore`."""

ASKED_RATIO = 2.0
"""Value of `min_perplexity_ratio` in a written manifest whose edits are expected to damage the model.

It is below the published ratios because the sanity check uses another text and another context length than the papers.
"""

PERMITTED_RATIO = 1.5
"""Value of `max_perplexity_ratio` in a written manifest that scales weights by a factor near 1."""

_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9._-]*(?:[/ ][A-Za-z0-9._-]+)*")
"""Text that needs no quotes in YAML, except the words that _RESERVED matches."""

_RESERVED = re.compile(r"true|false|null|[0-9a-f]{40}")  # a commit is always quoted, because it may look like a number


class ScalarPlace(Protocol):
    """The position of a scalar in the short form used in papers."""

    @property
    def layer(self) -> int: ...
    @property
    def expert(self) -> int | str | None: ...
    @property
    def row(self) -> int: ...
    @property
    def col(self) -> int | None: ...


def refuse_unfit(op: str, factor: float | None, *, values_known: bool = False) -> None:
    """Raise ManifestError if `op` cannot be applied to known super weights, or if `factor` is invalid for `op`.

    `restore` is accepted only with `values_known`: it writes values that are known from the original model.
    """
    if op not in ("zero", "scale", "protect") and not (values_known and op == "restore"):
        remedy = "use zero, scale, protect or restore" if values_known else "use zero, scale or protect"
        raise ManifestError("no such operation for known super weights", op, remedy)
    if (op == "scale") != (factor is not None):
        raise ManifestError(f"{op} {'needs a' if op == 'scale' else 'takes no'} factor")
    if factor is not None and (not math.isfinite(factor) or factor == 0):
        raise ManifestError(
            "the factor has to be a finite number other than 0", factor, "for 0, use the operation zero"
        )


def is_gentle(op: str, factor: float | None) -> bool:
    """Return True if an edit of super weights should leave a model almost as good: a scale by 0.75 to 1.5.

    Sweeps of Mistral-7B and OLMo-1B show perplexity x1.03 at the factor 0.75, and little change above 1.
    """
    return op == "scale" and factor is not None and 0.75 <= factor <= 1.5


def write_manifest(
    *,
    head: Iterable[str],
    name: str,
    description: str,
    base: Mapping[str, str | None],
    edits: Iterable[tuple[str, Mapping[str, Any]]],
    damaging: bool,
    gentle: bool = False,
) -> str:
    """Render a manifest as YAML text.

    The lines of `head` and the text of each edit become comments. Fields of `base` that are None are omitted.
    `damaging` makes the sanity check require a perplexity ratio of at least ASKED_RATIO. `gentle` makes it require a
    ratio of at most PERMITTED_RATIO.
    """
    fitting = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("._-")[:200]
    lines = [
        *(f"# {escape_control(line)}" for line in head),
        "version: 1",
        *([f"name: {fitting}"] if fitting else []),
        f"description: {_render_yaml(description)}",
        "base:",
        *(f"  {key}: {_render_yaml(value)}" for key, value in base.items() if value is not None),
        "edits:",
    ]
    for comment, fields in edits:
        lines += [f"  # {escape_control(comment)}", f"  - {_render_yaml(fields)}"]
    if damaging:
        lines += ["check:", f"  min_perplexity_ratio: {ASKED_RATIO!r}"]
    elif gentle:
        lines += ["check:", f"  max_perplexity_ratio: {PERMITTED_RATIO!r}"]
    return "\n".join(lines) + "\n"


def _render_yaml(value: object) -> str:
    """Render a scalar or a map in YAML's flow style.

    Text is quoted only if YAML would read it as another type or as syntax. YAML understands the escapes that JSON and
    `escape_control` write.
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_render_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str) and _PLAIN.fullmatch(value) and not _RESERVED.fullmatch(value):
        return value
    return escape_control(json.dumps(value, ensure_ascii=False))


def list_edit_fields(place: ScalarPlace, op: Operation, factor: float | None, expect: object) -> dict[str, Any]:
    """Return the fields of one edit in the order in which a manifest prints them. Fields that are None are left out."""
    fields: dict[str, object] = {
        "op": op,
        "layer": place.layer,
        "expert": place.expert,
        "row": place.row,
        "col": place.col,
    }
    return {k: v for k, v in (fields | {"factor": factor, "expect": expect}).items() if v is not None}

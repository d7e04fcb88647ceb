"""Hold what belongs together."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from swsurgery.errors import ManifestError, printable

Operation = Literal["zero", "scale", "protect"]


ASKED_RATIO = 2.0
"""... of at least this ratio: text and context of the check differ from the published ones."""


_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9._-]*(?:[/ ][A-Za-z0-9._-]+)*")


_OTHER = re.compile(r"true|false|null|[0-9a-f]{40}")  # a commit is always quoted: many a one reads as a number


def refuse_unfit(op: str, factor: float | None) -> None:
    """Raises ManifestError for an operation that known coordinates do not have, or a factor that does not fit it."""
    if op not in ("zero", "scale", "protect"):
        raise ManifestError("no such operation for known coordinates", op, "zero, scale or protect")
    if (op == "scale") != (factor is not None):
        raise ManifestError(f"{op} {'needs a' if op == 'scale' else 'takes no'} factor")
    if factor is not None and (not math.isfinite(factor) or factor == 0):
        raise ManifestError("the factor has to be a finite number other than 0", factor, "use zero to zero")


def manifest_text(
    *,
    head: Iterable[str],
    name: str,
    description: str,
    base: Mapping[str, str | None],
    edits: Iterable[tuple[str, Mapping[str, Any]]],
    damaging: bool,
) -> str:
    """The YAML text of a manifest. `head` and the text of each edit become comments; fields of `base` that are None
    are left out; `damaging` asks the sanity check to see damage."""
    fitting = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("._-")[:200]
    lines = [
        *(f"# {printable(line)}" for line in head),
        "version: 1",
        *([f"name: {fitting}"] if fitting else []),
        f"description: {_yaml(description)}",
        "base:",
        *(f"  {key}: {_yaml(value)}" for key, value in base.items() if value is not None),
        "edits:",
    ]
    for comment, fields in edits:
        lines += [f"  # {printable(comment)}", f"  - {_yaml(fields)}"]
    if damaging:
        lines += ["check:", f"  min_perplexity_ratio: {ASKED_RATIO!r}"]
    return "\n".join(lines) + "\n"


def _yaml(value: Any) -> str:
    """A scalar or a map in flow style. Words that YAML would read as text anyway stand without quotes; the escapes of
    JSON and of `printable` are YAML's too."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str) and _PLAIN.fullmatch(value) and not _OTHER.fullmatch(value):
        return value
    return printable(json.dumps(value, ensure_ascii=False))


def edit_fields(place: Any, op: Operation, factor: float | None, expect: Any) -> dict[str, Any]:
    """The fields of one edit, in the order of print. `place` has layer, expert, row and col; what is None is left
    out."""
    fields = {"op": op, "layer": place.layer, "expert": place.expert, "row": place.row, "col": place.col}
    return {k: v for k, v in (fields | {"factor": factor, "expect": expect}).items() if v is not None}

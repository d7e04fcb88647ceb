"""Choose the fields of a card's front matter: the YAML block at its top, which the Hub reads.

Values from the base's card are not trusted: a field is copied only if it matches the pattern of the field.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from swsurgery.checkpoint.record import Record
from swsurgery.sharing.markdown import MAX_CARD_ROWS

FIELDS = (
    "base_model",
    "base_model_relation",
    "library_name",
    "pipeline_tag",
    "language",
    "license",
    "license_name",
    "license_link",
    "tags",
)
"""Fields that the front matter, the YAML block at the top of the card, may contain, in order."""

RELATION = "finetune"
"""How the Hub relates a patched checkpoint to its base. The Hub has four relations: adapter, merge, quantized and
finetune. "finetune" fits best, because values change and the format does not.
"""

PATCH_RELATION = "adapter"
"""How the Hub relates a patch to its base: as an adapter, because the patch is useless without the base."""

OWN_TAGS = ("swsurgery", "super-weights")
"""Tags of every published checkpoint."""

PATCH_TAGS = (*OWN_TAGS, "patch")
"""Tags of every published patch."""

_LINE = re.compile(r"(?=.*\S)[^<>]{1,200}")
"""Pattern for free text in the front matter, such as a licence's name. It excludes < and >, because a Markdown reader
that does not know front matter would read them as HTML. `is_match` refuses line breaks and control characters."""

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._:/+-]{0,99}")
REPO_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
"""Pattern for the name of a repository on the Hub."""

_LINK = re.compile(r"(?=.{1,500}\Z)(https?://[A-Za-z0-9.-]+(/[A-Za-z0-9._~/%#?=&+-]*)?|[A-Za-z0-9][A-Za-z0-9._/-]*)")
_CARRIED = {
    "library_name": _WORD,
    "pipeline_tag": _WORD,
    "language": _LINE,
    "license": _LINE,
    "license_name": _LINE,
    "license_link": _LINK,
    "tags": _TAG,
}
"""Fields copied from the base's front matter, and the pattern that each value must match."""

LICENCE = ("language", "license", "license_name", "license_link")
"""Fields that the card of a patch copies from the base's card."""

_LISTS = ("language", "license", "tags")


def make_fields(record: Record, base_fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the front matter: the base, the tags, and what is copied from the base's card."""
    found: dict[str, Any] = {}
    if record.base.repo_id and REPO_ID.fullmatch(record.base.repo_id):
        found["base_model"], found["base_model_relation"] = record.base.repo_id, RELATION
    for name, pattern in _CARRIED.items():
        value = base_fields.get(name)
        if values := [each for each in _list_values(name, value)[:MAX_CARD_ROWS] if is_match(pattern, each)]:
            found[name] = values if isinstance(value, list) or name in ("language", "tags") else values[0]
    carried = [tag for tag in found.get("tags", ()) if not tag.startswith("base_model:")]
    found["tags"] = list(dict.fromkeys([*carried, *OWN_TAGS]))
    return {name: found[name] for name in FIELDS if name in found}


def list_omitted_fields(base_fields: Mapping[str, Any], of: Iterable[str] = _CARRIED) -> list[str]:
    """List the fields of the base's card that the front matter omits completely or in part."""
    found = []
    for name in of:
        values = _list_values(name, base_fields.get(name))
        if len(values) > MAX_CARD_ROWS or not all(is_match(_CARRIED[name], each) for each in values):
            found.append(name)
    return found


def make_patch_fields(record: Record, base_fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a patch's front matter, with the base's licence and languages.

    The library is swsurgery and the task is omitted, because no other library can load a patch as a model.
    """
    found = make_fields(record, base_fields)
    if "base_model_relation" in found:
        found["base_model_relation"] = PATCH_RELATION
    found |= {"library_name": "swsurgery", "tags": list(PATCH_TAGS)}
    return {name: found[name] for name in FIELDS if name in found and name != "pipeline_tag"}


def is_match(pattern: re.Pattern[str], value: object) -> bool:
    """Return True for printable text that the whole of `pattern` matches."""
    return isinstance(value, str) and value.isprintable() and pattern.fullmatch(value) is not None


def _list_values(name: str, value: object) -> list[Any]:
    """Return the values of one field as a list. The language code "no" (Norwegian) is false in YAML 1.1."""
    values = value if isinstance(value, list) and name in _LISTS else [] if value is None else [value]
    return ["no" if name == "language" and each is False else each for each in values]

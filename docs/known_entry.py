"""Render an own entry (a result saved by `scan --register`) as TOML, in the format of the shipped files.

No number has to be copied by hand. The standard library cannot write TOML, so this module writes the few forms of TOML
that the schema needs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from swsurgery.errors import LookupFailed
from swsurgery.known.schema import KnownEffect, KnownModel

_TABLES = ("coordinates", "joint_sets")
_FROM_ID = {"layer", "expert", "row", "col", "tensor"}


def render_entry(model: KnownModel) -> str:
    """Render a model as TOML, as in a shipped file. Sources of the kind "own scan" get the kind "scan".

    Raises LookupFailed if the tensor of a coordinate does not follow the model's template.
    """
    for c in model.coordinates:
        if c.tensor != model.tensor.format(layer=c.layer, expert=c.expert):
            raise LookupFailed(
                "the tensor does not follow the model's template", c.tensor, f"the template is {model.tensor}"
            )
    fields = model.model_dump(exclude_defaults=True, exclude={*_TABLES, "path", "aliases", "scans", "effects"})
    short = (model.hf_id.rpartition("/")[2].lower(),)
    fields["aliases"] = short if model.aliases == (model.hf_id,) else model.aliases
    if model.effects:
        fields["effects"] = [_effect(e) for e in model.effects]
    if model.scans:
        fields["scans"] = [s.key for s in model.scans]
    sources = {s.key: s.model_dump(exclude_none=True, exclude={"key"}) for s in model.sources}
    for source in sources.values():
        source["kind"] = "scan" if source["kind"] == "own scan" else source["kind"]
    lines = [f"# {model.family}", "", "[sources]", *_assignments(sources), "", "[[models]]", *_assignments(fields)]
    for c in model.coordinates:
        entry = c.model_dump(exclude_defaults=True, exclude=_FROM_ID | {"sources", "effects"})
        entry |= {"effects": [_effect(e) for e in c.effects], "sources": [s.key for s in c.sources]}
        lines += ["", "[[models.coordinates]]", *_assignments(entry)]
    for j in model.joint_sets:
        entry = j.model_dump(exclude_defaults=True, exclude={"effects"})
        lines += ["", "[[models.joint_sets]]", *_assignments(entry | {"effects": [_effect(e) for e in j.effects]})]
    return "\n".join(lines) + "\n"


def _effect(effect: KnownEffect) -> dict[str, Any]:
    return effect.model_dump(exclude_defaults=True, exclude={"source"}) | {"source": effect.source.key}


def _assignments(fields: Mapping[str, Any]) -> Iterable[str]:
    for name, value in fields.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            yield f"{name} = ["
            yield from (f"  {_value(item)}," for item in value)
            yield "]"
        else:
            yield f"{name} = {_value(value)}"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if isinstance(value, str):
        # TOML has the same escapes as JSON, but DEL must be escaped in TOML only.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)

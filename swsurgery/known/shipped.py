"""Reading the shipped facts from the TOML files beside this one, and finding a name or a coordinate in them.

One file per model family. `[sources]` lists what is cited, once; `[[models]]` follow, each with its coordinates,
joint sets and effects. TOML, because it reads well in a diff and the standard library reads it in milliseconds. A
file that breaks a rule of the schema is a bug and raises ValueError. This room opens no checkpoint and no network,
and knows nothing of the user's own entries: that is overlay.py.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from swsurgery.errors import LookupFailed
from swsurgery.known.schema import STATUSES, Effect, JointSet, KnownCoordinate, KnownModel, Related, Source, with_status

_FOLDER = Path(__file__).parent
_RELATED, _NAMES = "related.toml", "names.toml"
_ID = re.compile(r"L(\d+)(?:\.E(\d+|shared))?\.(\d+)\.(\d+|\*)")


def load_file(path: Path) -> tuple[KnownModel, ...]:
    """The models of one family's file. Raises ValueError where it breaks the schema, cites a source that it does not
    list, or lists one that it does not cite."""
    raw = _frozen(tomllib.loads(path.read_text("utf-8")))
    extra = set(raw) ^ {"sources", "models"}
    if extra:
        raise ValueError(f"{path.name}: unknown or missing tables {sorted(extra)}")
    sources = _Sources({key: Source(key=key, **fields) for key, fields in raw["sources"].items()})
    models = tuple(_model(fields, sources) for fields in raw["models"])
    unused = set(sources) - {s.key for m in models for s in m.sources}
    if unused:
        raise ValueError(f"{path.name}: sources {sorted(unused)} are listed and not cited")
    return models


@cache
def shipped_models() -> tuple[KnownModel, ...]:
    """Every shipped model, in the order of the files' names and of the models in each."""
    return tuple(model for family in families() for model in _family(family))


def families() -> list[str]:
    """The names of the families' files, without their ending."""
    return sorted(file.stem for file in _FOLDER.glob("*.toml") if file.name not in (_RELATED, _NAMES))


@cache
def _family(name: str) -> tuple[KnownModel, ...]:
    return load_file(_FOLDER / f"{name}.toml")


@cache
def related() -> Related:
    """What is known without an exact coordinate: super experts, sink neurons, searches that found nothing."""
    raw = tomllib.loads((_FOLDER / _RELATED).read_text("utf-8"))
    return Related.model_validate(_frozen(raw))


def normalised(name: str) -> str:
    """A name without case and punctuation: its runs of letters and of digits. So `LLaMA 7B`, `llama_7b` and `llama7b`
    are one, and Qwen2-57B is not Qwen2.5-7B."""
    return "-".join(re.findall(r"[^\W\d_]+|\d+", name.casefold()))


def names_of(model: KnownModel) -> tuple[str, ...]:
    """Every name that finds this model: its repository and aliases, and each without its organisation."""
    names = (model.hf_id, *model.aliases)
    return (*names, *(name.split("/")[-1] for name in names if "/" in name))


def shipped_of_repo(repo_id: str) -> KnownModel | None:
    """The shipped model that is published under this very repo_id, if there is one."""
    models = (m for m in shipped_near(repo_id) if repo_id.lower() in (name.lower() for name in (m.hf_id, *m.aliases)))
    return next(models, None)


def shipped_near(name: str) -> list[KnownModel]:
    """The shipped models of the families that have this name: a tenth of the work of opening all. Empty where no
    shipped model has it."""
    key = normalised(name)
    index = tomllib.loads((_FOLDER / _NAMES).read_text("utf-8"))
    return [model for family, names in index.items() if key in names for model in _family(family)]


def render_names() -> str:
    """The text of names.toml: for each file, the normalised names of its models."""
    lines = ["# Which file knows which name; written by `python -m swsurgery.known names`", ""]
    for family in families():
        names = sorted({normalised(name) for model in _family(family) for name in names_of(model)})
        lines += [f'"{family}" = [', *(f'  "{name}",' for name in names), "]"]
    return "\n".join(lines) + "\n"


def lookup_in(models: Iterable[KnownModel], name: str) -> KnownModel:
    """The model of this name, whatever the case and punctuation, among the given ones; never a guess. Raises
    LookupFailed for a name that is unknown (with the nearest ones) or that several models have (with all of them)."""
    table: dict[str, dict[str, KnownModel]] = {}
    for model in models:
        for known_name in names_of(model):
            table.setdefault(normalised(known_name), {})[model.hf_id] = model
    key = normalised(name)
    found = list(table.get(key, {}).values())
    if len(found) == 1:
        return found[0]
    if found:
        raise LookupFailed(
            "several known models have this name", name, f"give one of {', '.join(m.hf_id for m in found)}"
        )
    for result in related().negative_results:
        if key in (normalised(n) for hf_id in result.hf_ids for n in (hf_id, hf_id.split("/")[-1])):
            raise LookupFailed("no super weight is known", name, f"published result: {result.finding}")
    near = {hf_id: m for n in difflib.get_close_matches(key, table, 6, 0.5) for hf_id, m in table[n].items()}
    hint = f"did you mean {_either([m.slug for m in list(near.values())[:3]])}?" if near else "no known name is near"
    raise LookupFailed("no such known model", name, hint)


def find(model: KnownModel, coordinate_id: str) -> KnownCoordinate:
    """The coordinate of this id, `L2.3968.7003` or, with a name of the model, `llama-7b:L2.3968.7003`. Raises
    LookupFailed, with the nearest ids, for one that the model does not have."""
    name, _, short = coordinate_id.rpartition(":")
    if name and normalised(name) not in map(normalised, names_of(model)):
        raise LookupFailed("a coordinate of another model", coordinate_id, f"this one is {model.slug}")
    for coordinate in model.coordinates:
        if coordinate.id == short:
            return coordinate
    near = difflib.get_close_matches(short, [c.id for c in model.coordinates], 3, 0.5)
    hint = f"did you mean {_either(near)}?" if near else f"swsurgery lookup {model.slug} lists them"
    raise LookupFailed(f"no such known coordinate of {model.slug}", coordinate_id, hint)


def addressable(model: KnownModel, status: str | Collection[str] | None = None) -> tuple[KnownCoordinate, ...]:
    """The coordinates that name one scalar. Without `status` the refuted ones are left out: places where tests found
    nothing. This is what `known: all` means in a manifest."""
    chosen = set(STATUSES) - {"refuted"} if status is None else status
    return tuple(c for c in with_status(model, chosen) if c.col is not None)


def to_json(models: KnownModel | Iterable[KnownModel], status: str | Collection[str] | None = None) -> dict[str, Any]:
    """The document of `lookup --json`: plain values only, infinities as the text "inf"."""
    listed = [models] if isinstance(models, KnownModel) else models
    # Through JSON once, so that tuples become lists for callers that compare.
    return {"models": [json.loads(json.dumps(m.to_json(status), allow_nan=False)) for m in listed]}


class _Sources(dict[str, Source]):
    def __missing__(self, key: str) -> Source:
        raise ValueError(f"source {key!r} is cited and not listed")


def _model(fields: dict[str, Any], sources: _Sources) -> KnownModel:
    resolved = _effects(fields, sources, "scans")
    resolved["coordinates"] = tuple(
        KnownCoordinate(**_place(c, fields.get("tensor", "")), **_effects(c, sources, "sources"))
        for c in fields.get("coordinates", ())
    )
    resolved["joint_sets"] = tuple(JointSet(**_effects(j, sources)) for j in fields.get("joint_sets", ()))
    return KnownModel(**resolved)


def _effects(fields: dict[str, Any], sources: _Sources, *lists: str) -> dict[str, Any]:
    """The same fields, with the keys of sources replaced by the sources."""
    effects = tuple(Effect(**(e | {"source": sources[e.get("source")]})) for e in fields.get("effects", ()))
    return fields | {"effects": effects} | {name: tuple(sources[key] for key in fields.get(name, ())) for name in lists}


def _place(fields: dict[str, Any], template: str) -> dict[str, Any]:
    match = _ID.fullmatch(fields.get("id", ""))
    if match is None:
        raise ValueError(f"{fields.get('id')!r} is no id such as L2.3968.7003, L1.E68.940.711 or L11.507.*")
    layer, expert, row, col = (int(p) if p and p.isdigit() else None for p in match.groups())
    if match[2] == "shared":
        expert = "shared"
    tensor = template.format(layer=layer, expert=expert)
    return {"layer": layer, "expert": expert, "row": row, "col": col, "tensor": tensor}


def _frozen(value: Any) -> Any:
    """TOML's lists as tuples: a strict schema takes nothing else for them."""
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _either(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]

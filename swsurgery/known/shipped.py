"""Read the shipped TOML files and find models and coordinates in them by name.

Each model family has one file: `[sources]` lists each cited source once, and `[[models]]` contain coordinates, joint
sets and effects. TOML is readable in a diff, and the standard library reads it in milliseconds. A file that breaks the
schema is a bug and raises ValueError. Must not depend on checkpoints, the network or the user's own entries.
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
from swsurgery.known.related import NegativeResult, Related
from swsurgery.known.schema import (
    STATUSES,
    Citation,
    KnownColumn,
    KnownCoordinate,
    KnownEffect,
    KnownEntry,
    KnownExpert,
    KnownJointSet,
    KnownModel,
    MaxActivation,
    select_by_status,
)

_FOLDER = Path(__file__).parent
_RELATED, _NAMES = "related.toml", "names.toml"
_LAYER = r"L(\d+)(?:\.E(\d+|shared))?"
_ID = re.compile(_LAYER + r"\.(\d+)\.(\d+|\*)")
_EXPERT_ID = re.compile(r"L(\d+)\.E(\d+|shared)")
_COLUMN_ID = re.compile(_LAYER + r"\.\*\.(\d+)")


def load_file(path: Path) -> tuple[KnownModel, ...]:
    """Read the models of one family's file.

    Raises ValueError if the file breaks the schema, or if the sources that it lists and that it cites differ.
    """
    raw = _freeze(tomllib.loads(path.read_text("utf-8")))
    extra = set(raw) ^ {"sources", "models"}
    if extra:
        raise ValueError(f"{path.name}: unknown or missing tables {sorted(extra)}")
    sources = _Sources({key: Citation.model_validate(fields | {"key": key}) for key, fields in raw["sources"].items()})
    models = tuple(_build_model(fields, sources) for fields in raw["models"])
    unused = set(sources) - {s.key for m in models for s in m.sources}
    if unused:
        raise ValueError(f"{path.name}: sources {sorted(unused)} are listed but not cited")
    return models


@cache
def list_shipped_models() -> tuple[KnownModel, ...]:
    """Return every shipped model, sorted by file name and then in file order."""
    return tuple(model for family in list_families() for model in load_family(family))


def list_families() -> list[str]:
    """Return the sorted file names of the model families, without their extension."""
    return sorted(file.stem for file in _FOLDER.glob("*.toml") if file.name not in (_RELATED, _NAMES))


@cache
def load_family(name: str) -> tuple[KnownModel, ...]:
    """Return the models of one family. `name` is the name of its file without the extension, such as `llama`."""
    return load_file(_FOLDER / f"{name}.toml")


@cache
def list_related() -> Related:
    """Return results without an exact coordinate: super experts, sink neurons and searches that found nothing."""
    raw = tomllib.loads((_FOLDER / _RELATED).read_text("utf-8"))
    return Related.model_validate(_freeze(raw))


def list_negative_results(model: KnownModel) -> tuple[NegativeResult, ...]:
    """Return the published searches and tests of this model that found nothing."""
    names = set(map(normalise, list_names(model)))
    return tuple(r for r in list_related().negative_results if names.intersection(map(normalise, r.hf_ids)))


def normalise(name: str) -> str:
    """Normalise a name: its runs of letters and its runs of digits in lower case, joined by hyphens.

    `LLaMA 7B`, `llama_7b` and `llama7b` all become `llama-7-b`; Qwen2-57B and Qwen2.5-7B stay different.
    """
    return "-".join(re.findall(r"[^\W\d_]+|\d+", name.casefold()))


def list_names(model: KnownModel) -> tuple[str, ...]:
    """Return every name that finds this model: repository and aliases, with and without organisation."""
    names = (model.hf_id, *model.aliases)
    return (*names, *(name.split("/")[-1] for name in names if "/" in name))


def find_shipped_by_repo(repo_id: str) -> KnownModel | None:
    """Return the shipped model with this repo_id or alias, ignoring case; None if there is none."""
    models = (
        m for m in find_shipped_near(repo_id) if repo_id.lower() in (name.lower() for name in (m.hf_id, *m.aliases))
    )
    return next(models, None)


def find_shipped_near(name: str) -> list[KnownModel]:
    """Return all models of each family that contains a model with this name; empty if no family does.

    Reading the index of names and one family is ten times as fast as reading every family.
    """
    key = normalise(name)
    index = tomllib.loads((_FOLDER / _NAMES).read_text("utf-8"))
    return [model for family, names in index.items() if key in names for model in load_family(family)]


def lookup_in(models: Iterable[KnownModel], name: str) -> KnownModel:
    """Return the model in `models` with this name, ignoring case and punctuation but never guessing.

    Raises LookupFailed if the name is unknown (the message suggests similar names) or if several models have it (the
    message lists them).
    """
    table: dict[str, dict[str, KnownModel]] = {}
    for model in models:
        for known_name in list_names(model):
            table.setdefault(normalise(known_name), {})[model.hf_id] = model
    key = normalise(name)
    found = list(table.get(key, {}).values())
    if len(found) == 1:
        return found[0]
    if found:
        raise LookupFailed(
            "several known models have this name", name, f"give one of {', '.join(m.hf_id for m in found)}"
        )
    for result in list_related().negative_results:
        if key in (normalise(n) for hf_id in result.hf_ids for n in (hf_id, hf_id.split("/")[-1])):
            raise LookupFailed("no super weight is known", name, f"published result: {result.finding}")
    near = {hf_id: m for n in difflib.get_close_matches(key, table, 6, 0.5) for hf_id, m in table[n].items()}
    hint = (
        f"did you mean {_join_either([m.slug for m in list(near.values())[:3]])}?"
        if near
        else "no known name is similar; swsurgery lookup lists all names"
    )
    raise LookupFailed("no such known model", name, hint)


def find(model: KnownModel, coordinate_id: str) -> KnownEntry:
    """Return the coordinate, expert or column with this id.

    An id is such as `L2.3968.7003`, `L1.E68` for an expert and `L1.*.7890` for a column. A name of the model may
    precede it, as in `llama-7b:L2.3968.7003`. Raises LookupFailed if nothing of the model has this id; the message
    suggests similar ids.
    """
    name, _, short = coordinate_id.rpartition(":")
    if name and normalise(name) not in map(normalise, list_names(model)):
        raise LookupFailed("this is a coordinate of another model", coordinate_id, f"give one of {model.slug}")
    for entry in model.entries:
        if entry.id == short:
            return entry
    kind, alike = _list_alike(model, short)
    if not alike:
        raise LookupFailed(f"no {kind} of {model.slug} is known", coordinate_id, f"see swsurgery lookup {model.slug}")
    near = difflib.get_close_matches(short, alike, 3, 0.5)
    hint = f"did you mean {_join_either(near)}?" if near else f"swsurgery lookup {model.slug} lists them"
    raise LookupFailed(f"no such known {kind} of {model.slug}", coordinate_id, hint)


def _list_alike(model: KnownModel, entry_id: str) -> tuple[str, list[str]]:
    """Return what an id names by its form, and the ids of the model that have this form."""
    if _EXPERT_ID.fullmatch(entry_id):
        return "expert", [e.id for e in model.experts]
    if _COLUMN_ID.fullmatch(entry_id):
        return "column", [c.id for c in model.columns]
    return "coordinate", [c.id for c in model.coordinates]


def list_addressable(model: KnownModel, status: str | Collection[str] | None = None) -> tuple[KnownCoordinate, ...]:
    """Return the coordinates with a known column, each of which identifies one scalar.

    Without `status`, refuted coordinates are omitted, because tests found no lasting effect of them. The result is then
    what `known: all` in a manifest names.
    """
    chosen = set(STATUSES) - {"refuted"} if status is None else status
    return tuple(c for c in select_by_status(model, chosen) if c.col is not None)


def list_modules(model: KnownModel, status: str | Collection[str] | None = None) -> tuple[str, ...]:
    """Return the names of the modules that contain the known super weights, each once, without the ending ".weight".

    Without `status`, refuted coordinates are omitted. A coordinate without a column counts, because its row is known.
    """
    chosen = set(STATUSES) - {"refuted"} if status is None else status
    return tuple(dict.fromkeys(c.tensor.removesuffix(".weight") for c in select_by_status(model, chosen)))


def build_json(
    models: KnownModel | Iterable[KnownModel], status: str | Collection[str] | None = None
) -> dict[str, Any]:
    """Convert models to the document that `lookup --json` prints. Infinity becomes the text "inf"."""
    listed = [models] if isinstance(models, KnownModel) else models
    documents = [
        model.to_json(status) | {"negative_results": [r.model_dump() for r in list_negative_results(model)]}
        for model in listed
    ]
    # The round trip through JSON converts tuples to lists, so that callers can compare documents.
    return {"models": json.loads(json.dumps(documents, allow_nan=False))}


class _Sources(dict[str, Citation]):
    def __missing__(self, key: str) -> Citation:
        raise ValueError(f"source {key!r} is cited but not listed")


def _build_model(fields: dict[str, Any], sources: _Sources) -> KnownModel:
    resolved = _expand_effects(fields, sources, "scans")
    resolved["coordinates"] = tuple(
        KnownCoordinate.model_validate(_parse_id(c, fields.get("tensor", "")) | _expand_effects(c, sources, "sources"))
        for c in fields.get("coordinates", ())
    )
    resolved["joint_sets"] = tuple(
        KnownJointSet.model_validate(_expand_effects(j, sources)) for j in fields.get("joint_sets", ())
    )
    resolved["experts"] = tuple(
        KnownExpert.model_validate(_parse_expert_id(e) | _expand_effects(e, sources, "sources"))
        for e in fields.get("experts", ())
    )
    resolved["columns"] = tuple(
        KnownColumn.model_validate(_parse_column_id(c) | _expand_effects(c, sources, "sources"))
        for c in fields.get("columns", ())
    )
    if measured := fields.get("max_activation"):
        source = sources[measured.get("source")]
        resolved["max_activation"] = MaxActivation.model_validate(measured | {"source": source})
    return KnownModel.model_validate(resolved)


def _expand_effects(fields: dict[str, Any], sources: _Sources, *lists: str) -> dict[str, Any]:
    """Replace the keys of sources in effects, and in the fields named by `lists`, by the sources themselves."""
    effects = tuple(
        KnownEffect.model_validate(e | {"source": sources[e.get("source")]}) for e in fields.get("effects", ())
    )
    return fields | {"effects": effects} | {name: tuple(sources[key] for key in fields.get(name, ())) for name in lists}


def _parse_id(fields: dict[str, Any], template: str) -> dict[str, Any]:
    match = _ID.fullmatch(fields.get("id", ""))
    if match is None:
        raise ValueError(f"{fields.get('id')!r} is not an id like L2.3968.7003, L1.E68.940.711 or L11.507.*")
    row, col = (_parse_number(part) for part in match.groups()[2:])
    place = _parse_layer(match)
    return {**place, "row": row, "col": col, "tensor": template.format(**place)}


def _parse_expert_id(fields: dict[str, Any]) -> dict[str, Any]:
    match = _EXPERT_ID.fullmatch(fields.get("id", ""))
    if match is None:
        raise ValueError(f"{fields.get('id')!r} is not the id of an expert, like L1.E68 or L8.Eshared")
    return _parse_layer(match)


def _parse_column_id(fields: dict[str, Any]) -> dict[str, Any]:
    match = _COLUMN_ID.fullmatch(fields.get("id", ""))
    if match is None:
        raise ValueError(f"{fields.get('id')!r} is not the id of a column, like L1.*.7890 or L1.E68.*.711")
    return {**_parse_layer(match), "col": int(match[3])}


def _parse_layer(match: re.Match[str]) -> dict[str, Any]:
    """Return layer and expert, the first two groups of every id."""
    return {"layer": int(match[1]), "expert": "shared" if match[2] == "shared" else _parse_number(match[2])}


def _parse_number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


def _freeze(value: Any) -> Any:
    """Convert TOML's lists to tuples, because a strict schema accepts nothing else for a tuple."""
    if isinstance(value, dict):
        return {key: _freeze(item) for key, item in value.items()}
    return tuple(map(_freeze, value)) if isinstance(value, list) else value


def _join_either(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]

"""The user's own entries, which `swsurgery scan` makes, beside the shipped ones; and lookup by name in both.

An own entry is one JSON file in the platform's data directory, named after its model, so that a name finds its file
without opening another one: a damaged file is no trouble to the models of the others. Where the model is shipped too,
lookup shows both merged, and nothing that is shipped gives way. Opens no checkpoint and no network.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from swsurgery.errors import LookupFailed
from swsurgery.known.schema import JointSet, KnownCoordinate, KnownModel
from swsurgery.known.shipped import lookup_in, normalised, shipped_models, shipped_near, shipped_of_repo

_LONGEST, _KEPT = 100, 80
"""Bytes of an organisation's or model's name in a file's name, and how many of a longer one stand before its digest:
two of them and an ending stay below the 255 that a file's name may have."""
_LETTERS = str.maketrans("0123456789", "ghijklmnop")


def folder() -> Path:
    """Where own entries lie; it need not exist."""
    from platformdirs import user_data_path  # only those pay for it who ask for a model

    return user_data_path("swsurgery") / "known"


def save(model: KnownModel, mode: int = 0o666) -> Path:
    """Keep an own entry, in place of an older one of this name (whatever its case and punctuation); returns its file,
    which gets the permissions `mode` as far as the umask allows.

    Raises LookupFailed for a name without a letter or a digit, one that cannot be printed, or that of a shipped model
    of other sizes; TargetError where the file cannot be written.
    """
    from swsurgery.storage import filesystem  # its libraries are slow to load, and a lookup writes nothing

    stem = refuse_name(model.hf_id, _sizes(model))
    shipped = _shipped(model.hf_id)
    # An entry that was saved under another name of the same shipped model is the one to replace.
    path = next(iter(_files_of(shipped) if shipped else []), folder() / f"{stem}.json")
    with filesystem.reported(path.parent):
        filesystem.make_directories(path.parent)
    data = (model.model_dump_json(indent=1, exclude_defaults=True) + "\n").encode()
    filesystem.replace_shared(path, data, mode=mode)
    return path


def refuse_name(name: str, sizes: tuple[int, int, int]) -> str:
    """The name of the file of an own entry for a model of `sizes`: layers, hidden and intermediate size. Raises
    LookupFailed for a name that no entry can have, and for that of a shipped model of other sizes."""
    stem = _stem(name)
    if not stem or not name.isprintable():
        raise LookupFailed("a model's name needs a letter or a digit and no control characters", repr(name))
    shipped = _shipped(name)
    if shipped and _sizes(shipped) != sizes:
        raise LookupFailed(
            f"the name of another model: layers, hidden and intermediate size of {shipped.hf_id} are "
            f"{_sizes(shipped)}, not {sizes}", name, "give this one another name",
        )  # fmt: skip
    return stem


def forget(name: str) -> Path:
    """Remove the own entry of this name, sound or damaged; returns the file that is gone. Raises LookupFailed where
    there is none, for shipped entries stay, and TargetError where it cannot be removed."""
    from swsurgery.storage import filesystem

    path = _own_file(name)
    with filesystem.reported(path):
        filesystem.remove_file(path)
    return path


def own_entry(name: str) -> KnownModel:
    """The own entry of this name, by itself. Raises LookupFailed where there is none, or it is damaged."""
    return _load(_own_file(name))


def own_models() -> tuple[KnownModel, ...]:
    """Every own entry that can be read, by the names of their files."""
    return tuple(model for _, model in _readable())


def all_models() -> tuple[KnownModel, ...]:
    """Every known model: the shipped ones, each with its own entries merged in, then the other own entries."""
    own = dict(_readable())
    merged = []
    for model in shipped_models():
        for path in _files_of(model) if own else ():
            if path in own:
                model = merge(model, own.pop(path))
        merged.append(model)
    return (*merged, *own.values())


def lookup(name: str) -> KnownModel:
    """The model of this name, whatever the case and punctuation; never a guess. A shipped model goes before an own
    entry of the same name without organisation. Raises LookupFailed for a name that is unknown (with the nearest
    ones) or that several models have (with all of them), and where its own entry is damaged."""
    if near := shipped_near(name):
        return _with_own(lookup_in(near, name))
    paths = _files_named(name)
    if len(paths) == 1:
        return _load(paths[0])
    if paths:
        raise _several(name, paths)
    return lookup_in(all_models(), name)


def of_repo(repo_id: str) -> KnownModel | None:
    """The model of this very repo_id, shipped or own, if it is known. Raises LookupFailed where its own entry is
    damaged."""
    if model := shipped_of_repo(repo_id):
        return _with_own(model)
    path = folder() / f"{_stem(repo_id)}.json"
    own = _load(path) if os.path.isfile(path) else None
    return own if own and own.hf_id.lower() == repo_id.lower() else None


def merge(shipped: KnownModel, own: KnownModel) -> KnownModel:
    """The shipped entry with what the own one adds: measurements of coordinates and joint sets that both have, and
    those that only the own one has. Only a class that was untested is replaced, by the measured one."""
    measured = {c.id: c for c in own.coordinates}
    coordinates = [_merge_coordinate(c, measured.pop(c.id, None)) for c in shipped.coordinates]
    joint = {frozenset(j.coordinates): j for j in own.joint_sets}
    joint_sets = [_merge_joint_set(j, joint.pop(frozenset(j.coordinates), None)) for j in shipped.joint_sets]
    return shipped.model_copy(
        update={
            "coordinates": (*coordinates, *measured.values()),
            "joint_sets": (*joint_sets, *joint.values()),
            "effects": shipped.effects + own.effects,
            "notes": shipped.notes + own.notes,
            "disputes": shipped.disputes + own.disputes,
            "scans": shipped.scans + own.scans,
        }
    )


def _merge_coordinate(shipped: KnownCoordinate, own: KnownCoordinate | None) -> KnownCoordinate:
    if own is None:
        return shipped
    notes = [shipped.note] if shipped.note else []
    if own.value is not None and (own.value, own.dtype) != (shipped.value, shipped.dtype):
        notes.append(f"The own scan read {own.value!r} {own.dtype}.")
    if own.note:
        notes.append(f"Own scan: {own.note}")
    return shipped.model_copy(
        update={
            "causal_alone": own.causal_alone if shipped.causal_alone == "untested" else shipped.causal_alone,
            "located_by": shipped.located_by + own.located_by,
            "note": " ".join(notes) or None,
            "effects": shipped.effects + own.effects,
            "sources": shipped.sources + own.sources,
        }
    )


def _merge_joint_set(shipped: JointSet, own: JointSet | None) -> JointSet:
    return shipped.model_copy(update={"effects": shipped.effects + own.effects}) if own else shipped


def _with_own(shipped: KnownModel) -> KnownModel:
    for path in _files_of(shipped):
        shipped = merge(shipped, _load(path))
    return shipped


def _shipped(name: str) -> KnownModel | None:
    near = shipped_near(name)
    return lookup_in(near, name) if near else None


def _sizes(model: KnownModel) -> tuple[int, int, int]:
    return model.num_layers, model.hidden_size, model.intermediate_size


def _stem(name: str) -> str:
    """What the file of a model's entry is called, without its ending: `organisation.model`, each normalised, so that
    neither a dot nor a separator of the name is left. Empty for a name without a letter or a digit."""
    organisation, _, model = name.rpartition("/")
    parts = [_shortened(normalised(part)) for part in (organisation, model)]
    return ".".join(part for part in parts if part) if parts[1] else ""


def _shortened(text: str) -> str:
    """A normalised name of at most _LONGEST bytes; the result is normalised too, so it is a name of the same file."""
    raw = text.encode()
    if len(raw) <= _LONGEST:
        return text
    digest = hashlib.sha256(raw).hexdigest()[:16].translate(_LETTERS)
    return f"{raw[:_KEPT].decode(errors='ignore').rstrip('-')}-{digest}"


def _files() -> list[Path]:
    """Every own entry's file; none where the folder is not there or may not be read."""
    try:
        names = os.listdir(folder())
    except OSError:
        return []
    return [folder() / name for name in sorted(names) if name.endswith(".json") and not name.startswith(".")]


def _files_of(shipped: KnownModel) -> list[Path]:
    """The files of own entries under any name of a shipped model."""
    names = dict.fromkeys((shipped.hf_id, *shipped.aliases))
    paths = dict.fromkeys(folder() / f"{_stem(name)}.json" for name in names)
    return [path for path in paths if os.path.isfile(path)]


def _files_named(name: str) -> list[Path]:
    """The files whose entry this name means: the very name, else the name without organisation or punctuation."""
    stem, key = _stem(name), _shortened(normalised(name))
    paths = _files()
    exact = [path for path in paths if path.stem == stem]
    return exact or [p for p in paths if key in (p.stem.replace(".", "-"), p.stem.rpartition(".")[2])]


def _own_file(name: str) -> Path:
    """The one file of an own entry that this name means. Raises LookupFailed."""
    shipped = _shipped(name)
    paths = _files_of(shipped) if shipped else _files_named(name)
    if len(paths) == 1 or paths and shipped:
        return paths[0]
    if paths:
        raise _several(name, paths)
    if shipped:
        raise LookupFailed("no own entry of this model", name, "what is shipped cannot be forgotten")
    names = ", ".join(model.hf_id for model in own_models())
    raise LookupFailed("no own entry of this name", name, f"own entries: {names}" if names else "there are none")


def _several(name: str, paths: list[Path]) -> LookupFailed:
    """Names that the entries have or, where one is damaged, whose file has: both are found."""
    readable = dict(_readable())
    names = [readable[path].hf_id if path in readable else path.stem.replace(".", "/") for path in paths]
    return LookupFailed("several own entries have this name", name, f"give one of {', '.join(names)}")


def _readable() -> Iterator[tuple[Path, KnownModel]]:
    for path in _files():
        try:
            yield path, _load(path)
        except LookupFailed:
            continue  # whoever asks for that model will hear of it


def _load(path: Path) -> KnownModel:
    """Raises LookupFailed where the file breaks the schema or cannot be read."""
    try:
        return KnownModel.model_validate_json(path.read_bytes())
    except OSError as error:
        raise LookupFailed(f"the own entry cannot be read ({error.strerror})", path, "make the file readable") from None
    except ValueError:  # of the schema, of JSON or of UTF-8
        name = path.stem.replace(".", "/")
        raise LookupFailed(
            "the own entry is damaged", path, f"swsurgery lookup {name} --forget removes it; then scan again"
        ) from None

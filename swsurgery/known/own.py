"""Store the user's own entries, made by `swsurgery scan`, and look up names in own and shipped entries.

An own entry is one JSON file in the platform's data directory. The file is named after the model, so a lookup opens no
other file, and a damaged file affects only its own model. If the model is also shipped, lookup merges both entries and
removes nothing shipped. Must not depend on checkpoints or the network.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from swsurgery.errors import LookupFailed
from swsurgery.known.schema import KnownCoordinate, KnownJointSet, KnownModel
from swsurgery.known.shipped import find_shipped_by_repo, find_shipped_near, list_shipped_models, lookup_in, normalise

_REPO_ID = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?")

_LONGEST, _KEPT = 100, 80
"""Maximum length in bytes of an organisation's or a model's name in a file name, and the length to which a longer name
is cut before a digest of the whole name is appended.

Two such names and an extension fit into the 255 bytes that a file name may have.
"""

_LETTERS = str.maketrans("0123456789", "ghijklmnop")
"""Replaces the digits of a digest by letters, because a normalised name has hyphens between letters and digits."""


def get_own_folder() -> Path:
    """Return the directory of own entries; it may not exist."""
    from platformdirs import user_data_path  # imported here because most commands do not need it

    return user_data_path("swsurgery") / "known"


def save(model: KnownModel, mode: int = 0o666) -> Path:
    """Save an own entry, in a file with the permissions `mode` restricted by the umask, and return the file's path.

    The entry replaces an older one with the same name, ignoring case and punctuation. Raises LookupFailed if the name
    has neither letter nor digit, is not printable, or belongs to a shipped model of other sizes. Raises TargetError if
    the file cannot be written.
    """
    from swsurgery.storage import filesystem  # slow to load, and a lookup writes nothing

    stem = refuse_name(model.hf_id, _get_sizes(model))
    shipped = _find_shipped(model.hf_id)
    # An entry saved under another name of the same shipped model is replaced.
    path = next(iter(_list_files_of(shipped) if shipped else []), get_own_folder() / f"{stem}.json")
    with filesystem.convert_os_errors(path.parent):
        filesystem.make_directories(path.parent)
    data = (model.model_dump_json(indent=1, exclude_defaults=True) + "\n").encode()
    filesystem.replace_shared(path, data, mode=mode)
    return path


def refuse_name(name: str, sizes: tuple[int, int, int]) -> str:
    """Return the file name, without extension, of the own entry for a model called `name`.

    `sizes` are the model's number of layers, hidden size and intermediate size. Raises LookupFailed if the name has
    neither letter nor digit, is not printable, or belongs to a shipped model of other sizes.
    """
    stem = _make_stem(name)
    if not stem or not name.isprintable():
        raise LookupFailed("a model's name needs a letter or a digit and no control characters", repr(name))
    shipped = _find_shipped(name)
    if shipped and _get_sizes(shipped) != sizes:
        raise LookupFailed(
            f"this is the name of another model: layers, hidden and intermediate size of {shipped.hf_id} are "
            f"{_get_sizes(shipped)}, not {sizes}",
            name,
            "choose another name",
        )
    return stem


def forget(name: str) -> Path:
    """Remove the own entry with this name, even if it is damaged, and return the path of the removed file.

    Raises LookupFailed if there is no such entry, because shipped entries cannot be removed. Raises TargetError if the
    file cannot be removed.
    """
    from swsurgery.storage import filesystem

    path = _find_own_file(name)
    with filesystem.convert_os_errors(path):
        filesystem.remove_file(path)
    return path


def load_own_entry(name: str) -> KnownModel:
    """Return the user's own entry for the model `name`, without the data of a shipped entry.

    Raises LookupFailed if the entry is missing or damaged.
    """
    return _load(_find_own_file(name))


def list_own_models() -> tuple[KnownModel, ...]:
    """Return every readable own entry, sorted by file name."""
    return tuple(model for _, model in _list_readable())


def list_all_models() -> tuple[KnownModel, ...]:
    """Return every known model: shipped models, each merged with its own entries, and then the other own entries."""
    own = dict(_list_readable())
    merged = []
    for model in list_shipped_models():
        for path in _list_files_of(model) if own else ():
            if path in own:
                model = merge(model, own.pop(path))
        merged.append(model)
    return (*merged, *own.values())


def find_model(name: str) -> KnownModel:
    """Return the model with this name, ignoring case and punctuation but never guessing.

    If `name` has no organisation, a shipped model takes precedence over an own entry. Raises LookupFailed if the name
    is unknown (the message suggests similar names), if several models have it (the message lists them), or if the
    model's own entry is damaged.
    """
    if near := find_shipped_near(name):
        return _merge_own(lookup_in(near, name))
    paths = _list_files_named(name)
    if len(paths) == 1:
        return _load(paths[0])
    if paths:
        raise _make_several_error(name, paths)
    return lookup_in(list_all_models(), name)


def is_known(name: str) -> bool:
    """Return True if `find_model` finds a model with this name."""
    try:
        find_model(name)
    except LookupFailed:
        return False
    return True


def find_by_repo(repo_id: str) -> KnownModel | None:
    """Return the shipped or own model with this repo_id, ignoring case; None if there is none.

    Raises LookupFailed if the own entry of this model is damaged.
    """
    if model := find_shipped_by_repo(repo_id):
        return _merge_own(model)
    path = get_own_folder() / f"{_make_stem(repo_id)}.json"
    own = _load(path) if os.path.isfile(path) else None
    return own if own and own.hf_id.lower() == repo_id.lower() else None


def identify(name: str | None, repo_ids: Iterable[object]) -> KnownModel | None:
    """Return the known model with this name or, if `name` is None, the first known model with one of `repo_ids`.

    Values in `repo_ids` that are not repository ids are skipped. Returns None if no known model has any of the ids.
    Raises LookupFailed if the name is unknown, or if the model's own entry is damaged.
    """
    if name:
        return find_model(name)
    valid = (repo_id for repo_id in repo_ids if isinstance(repo_id, str) and _REPO_ID.fullmatch(repo_id))
    return next(filter(None, map(find_by_repo, valid)), None)


def merge(shipped: KnownModel, own: KnownModel) -> KnownModel:
    """Add the contents of an own entry to a shipped one.

    The result contains the measurements of both entries, and the coordinates and joint sets of both. A measured
    `causal_alone` replaces "untested"; nothing else is replaced.
    """
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


def _merge_joint_set(shipped: KnownJointSet, own: KnownJointSet | None) -> KnownJointSet:
    return shipped.model_copy(update={"effects": shipped.effects + own.effects}) if own else shipped


def _merge_own(shipped: KnownModel) -> KnownModel:
    for path in _list_files_of(shipped):
        shipped = merge(shipped, _load(path))
    return shipped


def _find_shipped(name: str) -> KnownModel | None:
    near = find_shipped_near(name)
    return lookup_in(near, name) if near else None


def _get_sizes(model: KnownModel) -> tuple[int, int, int]:
    return model.num_layers, model.hidden_size, model.intermediate_size


def _make_stem(name: str) -> str:
    """Compute the file name, without extension, of a model's entry: `organisation.model`, both normalised.

    Neither part contains a dot or a path separator. Returns "" if the model's name has neither letter nor digit.
    """
    organisation, _, model = name.rpartition("/")
    parts = [_shorten(normalise(part)) for part in (organisation, model)]
    return ".".join(part for part in parts if part) if parts[1] else ""


def _shorten(text: str) -> str:
    """Shorten a normalised name to at most _LONGEST bytes. The result is normalised too."""
    raw = text.encode()
    if len(raw) <= _LONGEST:
        return text
    digest = hashlib.sha256(raw).hexdigest()[:16].translate(_LETTERS)
    return f"{raw[:_KEPT].decode(errors='ignore').rstrip('-')}-{digest}"


def list_own_files() -> list[Path]:
    """List the files of own entries; empty if the folder does not exist or cannot be read."""
    try:
        names = os.listdir(get_own_folder())
    except OSError:
        return []
    return [get_own_folder() / name for name in sorted(names) if name.endswith(".json") and not name.startswith(".")]


def _list_files_of(shipped: KnownModel) -> list[Path]:
    """List the files of own entries under any name of a shipped model."""
    names = dict.fromkeys((shipped.hf_id, *shipped.aliases))
    paths = dict.fromkeys(get_own_folder() / f"{_make_stem(name)}.json" for name in names)
    return [path for path in paths if os.path.isfile(path)]


def _list_files_named(name: str) -> list[Path]:
    """List the files of the own entries with this name.

    If there are none, list those whose model name without the organisation, or whose organisation and model joined by a
    hyphen, equal `name`.
    """
    stem, key = _make_stem(name), _shorten(normalise(name))
    paths = list_own_files()
    exact = [path for path in paths if path.stem == stem]
    return exact or [p for p in paths if key in (p.stem.replace(".", "-"), p.stem.rpartition(".")[2])]


def _find_own_file(name: str) -> Path:
    """Find the file of the own entry with this name. Raises LookupFailed if no entry or several entries have it."""
    shipped = _find_shipped(name)
    paths = _list_files_of(shipped) if shipped else _list_files_named(name)
    if len(paths) == 1 or paths and shipped:
        return paths[0]
    if paths:
        raise _make_several_error(name, paths)
    if shipped:
        raise LookupFailed("no own entry of this model", name, "shipped entries cannot be removed")
    names = ", ".join(model.hf_id for model in list_own_models())
    raise LookupFailed("no own entry of this name", name, f"own entries: {names}" if names else "there are none")


def _make_several_error(name: str, paths: list[Path]) -> LookupFailed:
    """Make the error that lists the entries with this name. A damaged entry is listed by its file name."""
    readable = dict(_list_readable())
    names = [readable[path].hf_id if path in readable else path.stem.replace(".", "/") for path in paths]
    return LookupFailed("several own entries have this name", name, f"give one of {', '.join(names)}")


def _list_readable() -> Iterator[tuple[Path, KnownModel]]:
    for path in list_own_files():
        try:
            yield path, _load(path)
        except LookupFailed:
            continue  # a lookup of this model reports the fault


def _load(path: Path) -> KnownModel:
    """Load an own entry. Raises LookupFailed if the file cannot be read or breaks the schema."""
    try:
        return KnownModel.model_validate_json(path.read_bytes())
    except OSError as error:
        raise LookupFailed(f"the own entry cannot be read ({error.strerror})", path, "make the file readable") from None
    except ValueError:  # invalid UTF-8, JSON or schema
        name = path.stem.replace(".", "/")
        raise LookupFailed(
            "the own entry is damaged", path, f"swsurgery lookup {name} --forget removes it; then scan again"
        ) from None

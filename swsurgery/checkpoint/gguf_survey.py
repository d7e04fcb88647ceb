"""Open a GGUF file, or the parts of a split one, although parts may be missing or truncated.

Reports each fault as a `Damage`. All other commands use `opening.read_checkpoint`, which raises an error for the same
faults.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from swsurgery.checkpoint.damage import Damage, find_gaps
from swsurgery.checkpoint.weight_files import is_gguf
from swsurgery.errors import CheckpointError
from swsurgery.storage.files import BaseFile
from swsurgery.storage.gguf import GgufFile, HeaderCutOff, MetadataValue, open_truncated_gguf
from swsurgery.storage.numbers import format_size

_PART = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf")
"""The pattern of the names that llama.cpp gives to the parts of a split GGUF file, and that it requires."""

Opened = tuple[GgufFile | None, Damage | None]
"""The header of a file if it could be read, and what is wrong with the file, or None."""


def find_parts(root: object, names: Collection[str]) -> tuple[list[str], list[Damage]]:
    """Find the GGUF file with the weights, or all parts of a split one.

    Returns the names of the files, in order, and a damage for each missing part. Raises CheckpointError if there are
    several models.
    """
    found = sorted(name for name in names if is_gguf(name))
    matches = [match for match in map(_PART.fullmatch, found) if match]
    if len(matches) == len(found) and len({(m["stem"], m["count"]) for m in matches}) == 1:
        return found, list(_list_missing(matches[0]["stem"], int(matches[0]["count"]), matches))
    if len(found) > 1:
        what = f"there are {len(found)} GGUF files, such as {found[0]}"
        raise CheckpointError(what, root, f"choose one: give {root}/NAME.gguf")
    return found, []


def refuse_part(path: object, name: str) -> None:
    """Raise CheckpointError if a file that was given alone is one of several parts, according to its name."""
    match = _PART.fullmatch(name)
    if match and int(match["count"]) > 1:
        what = f"is one of {int(match['count'])} parts of a model"
        raise CheckpointError(what, path, "give the directory that contains all parts")


def _list_missing(stem: str, count: int, present: Iterable[re.Match[str]]) -> Iterator[Damage]:
    """Yield a damage for each number from 1 to `count` that no part has."""
    gaps, missing = find_gaps({int(match["number"]) for match in present}, 1, count + 1)
    for number in gaps:
        what = "is missing: the other parts are numbered as if it existed"
        yield Damage("missing", f"{stem}-{number:05}-of-{count:05}.gguf", what)
    if missing > len(gaps):
        yield Damage("missing", f"{stem}-*.gguf", f"{missing - len(gaps)} more parts are missing")


def read_damaged_parts(
    files: Sequence[BaseFile],
    read_headers: Callable[[Sequence[BaseFile], Callable[[BaseFile], Opened]], Iterable[tuple[str, Opened]]],
) -> tuple[dict[str, GgufFile], list[Damage]]:
    """Read the headers of GGUF files that may be truncated. Returns them by name, and what is wrong with the files.

    `read_headers` applies a function to each file.
    """
    parts: dict[str, GgufFile] = {}
    damages: list[Damage] = []
    for name, (part, damage) in read_headers(files, _open_damaged):
        damages += [damage] if damage else []
        if part is not None:
            parts[name] = part
    return parts, damages


def _open_damaged(file: BaseFile) -> Opened:
    """Read the header of one file. Returns the header, or None, and what is wrong with the file, or None."""
    try:
        part, short = open_truncated_gguf(file.source)
    except HeaderCutOff:
        return None, Damage("truncated", file.name, f"is truncated in its header: it has only {format_size(file.size)}")
    except CheckpointError as error:
        return None, Damage("unreadable", file.name, error.faults[0])
    if not short:
        return part, None
    what = f"is {format_size(short)} short: it has {file.size} bytes, and its header needs {file.size + short}"
    return part, Damage("truncated", file.name, what)


def check_parts(parts: Mapping[str, GgufFile], missing: bool) -> Iterator[Damage]:
    """Yield a damage for each part that states another number or count of parts than its name or the other parts.

    If no part is `missing`, also compares the number of tensors of all parts with the number that they state.
    """
    for name, part in parts.items():
        match = _PART.fullmatch(name)
        number, count = (int(match["number"]), int(match["count"])) if match else (1, 1)
        stated = [_read_count(part.metadata, key) for key in ("split.no", "split.count")]
        if (stated[0] or 0, max(stated[1] or 1, 1)) != (number - 1, count):
            what = f"states that it is part {(stated[0] or 0) + 1} of {stated[1] or 1}"
            yield Damage("unreadable", name, f"{what}, but its name says part {number} of {count}")
    total = sum(len(part.shard.tensors) for part in parts.values())
    for name, part in parts.items():
        declared = _read_count(part.metadata, "split.tensors.count")
        if not missing and declared is not None and declared != total:
            what = f"states that all parts have {declared} tensors, but they have {total}"
            yield Damage("unreadable", name, what)
            return


def _read_count(metadata: Mapping[str, MetadataValue], key: str) -> int | None:
    """Return an integer of the metadata; None if there is none."""
    value = metadata.get(key)
    return value if type(value) is int else None

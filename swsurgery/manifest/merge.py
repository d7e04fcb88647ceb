"""Merge several manifests or patches for one base into one manifest.

The merged manifest has the edits of all manifests, in their order, and stores the file of each edit for messages.
Whether two edits change the same scalar depends on the base, so the planner decides that. This module must not depend
on checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from swsurgery.errors import ManifestError
from swsurgery.manifest.load import LoadedManifest, ManifestLike, Origin, load_manifest, parse_manifest
from swsurgery.manifest.operations import Edit
from swsurgery.manifest.schema import Manifest
from swsurgery.storage.arguments import is_path
from swsurgery.storage.numbers import Written

ManifestsLike = ManifestLike | Sequence[str | Path | bytes | Manifest | LoadedManifest]
"""The forms in which a function accepts one manifest, or several manifests for one base."""


def load_merged(manifests: ManifestsLike, base: str | Path | None = None) -> LoadedManifest:
    """Load one manifest, or load several ones and merge them.

    Several manifests are a list of paths, texts as bytes, Manifest or LoadedManifest. A list of dicts is a list of
    edits. With `base`, the manifests may name different directories as their base.

    Raises TypeError. Raises ManifestError with the faults of all files, or if the files contradict each other about the
    base.
    """
    given = cast("Sequence[ManifestLike]", manifests)
    if not isinstance(manifests, list | tuple) or not manifests or not all(map(_is_manifest, manifests)):
        return load_manifest(cast(ManifestLike, manifests), base)
    parts: list[LoadedManifest] = []
    faults: list[str] = []
    for each in given:
        try:
            parts.append(load_manifest(each, base))
        except ManifestError as error:
            faults += error.faults
    if faults:
        raise ManifestError.of(faults)
    return parts[0] if len(parts) == 1 else _merge(parts, base is not None)


def select_edits(loaded: LoadedManifest, kept: Collection[Origin]) -> LoadedManifest:
    """Return a merged manifest with only the edits in `kept`."""
    document = json.loads(loaded.raw, parse_float=Written)
    pairs = [pair for pair in zip(document["edits"], loaded.origins, strict=True) if pair[1] in kept]
    raw = _render({key: value for key, value in document.items() if key != "edits"}, [edit for edit, _ in pairs])
    return replace(parse_manifest(raw, loaded.path), parts=loaded.parts, origins=tuple(origin for _, origin in pairs))


def _is_manifest(value: object) -> bool:
    return is_path(value) or isinstance(value, bytes | Manifest | LoadedManifest)


def _merge(parts: Sequence[LoadedManifest], has_base: bool) -> LoadedManifest:
    """Merge manifests.

    `has_base` is True if the user gave the base, so that the manifests may name different directories.
    """
    first = parts[0]
    path = first.path.parent / f"{'+'.join(part.path.stem for part in parts)[:200]}.yaml"
    sources = (f"{part.path.name} (sha256 {hashlib.sha256(part.raw).hexdigest()})" for part in parts)
    head = {
        "version": 1,
        "description": f"merged from {', '.join(sources)}",
        "base": _merge_bases(parts, has_base),
        "check": _merge_bounds(parts),
    }
    origins = [Origin(at, number) for at, part in enumerate(parts) for number in range(len(part.manifest.edits))]
    edits = [_dump(edit, part.path.parent, path.parent) for part in parts for edit in part.manifest.edits]
    return replace(parse_manifest(_render(head, edits), path), parts=tuple(parts), origins=tuple(origins))


def _merge_bases(parts: Sequence[LoadedManifest], has_base: bool) -> dict[str, Any]:
    """Merge what manifests state about their base. Raises ManifestError for each contradiction."""
    merged: dict[str, Any] = {}
    said_by: dict[str, Path] = {}
    faults: list[str] = []
    for part in parts:
        said = part.manifest.base.model_dump(mode="json", exclude_unset=True)
        for name, value in _flatten(said, part.path.parent).items():
            by = said_by.setdefault(name, part.path)
            if merged.setdefault(name, value) != value and not (has_base and name == "path"):
                remedy = " (give one base with --base)" if name == "path" else ""
                faults.append(f"{part.path}: {name} is {value}, but {merged[name]} in {by}{remedy}")
    if "base.repo_id" in merged and merged.pop("path", None) and not has_base:
        what = f"{said_by['path']} names a directory as its base, and {said_by['base.repo_id']} a repository"
        faults.append(f"{what} (give one base with --base)")
    if faults:
        raise ManifestError.of(faults)
    base: dict[str, Any] = {"sha256": {}}
    for name, value in merged.items():
        if name == "path":
            base["path"] = parts[0].manifest.base.path or os.path.relpath(value, parts[0].path.parent)
        elif name.startswith("base.sha256."):
            base["sha256"][name.removeprefix("base.sha256.")] = value
        else:
            base[name.removeprefix("base.")] = value
    return base


def _flatten(base: Mapping[str, Any], beside: Path) -> dict[str, str]:
    """Return the stated facts about a base by name: `base.revision`, `base.sha256.FILE`; `path` is made absolute."""
    found = {f"base.{key}": value for key, value in base.items() if isinstance(value, str) and key != "path"}
    found |= {f"base.sha256.{name}": digest for name, digest in base.get("sha256", {}).items()}
    return found | ({"path": os.path.realpath(beside / base["path"])} if base.get("path") else {})


def _merge_bounds(parts: Sequence[LoadedManifest]) -> dict[str, float]:
    """Merge the limits on the perplexity ratio: each side is as strict as the strictest manifest."""
    checks = [part.manifest.check for part in parts]
    most = [c.max_perplexity_ratio for c in checks if c.max_perplexity_ratio is not None]
    least = [c.min_perplexity_ratio for c in checks if c.min_perplexity_ratio is not None]
    bounds = {"max_perplexity_ratio": min(most, default=None), "min_perplexity_ratio": max(least, default=None)}
    return {name: bound for name, bound in bounds.items() if bound is not None}


def _dump(edit: Edit, beside: Path, there: Path) -> dict[str, Any]:
    """Return the fields of an edit as written. A directory in `from:` is made relative to the directory `there`."""
    fields = edit.model_dump(exclude_unset=True, by_alias=True)
    source = fields.get("from")
    if isinstance(source, str) and not source.startswith("hf://") and beside != there:
        fields["from"] = os.path.relpath(beside / source, there)
    return fields


def _render(head: Mapping[str, object], edits: Sequence[object]) -> bytes:
    """Render a manifest in JSON, with one edit per line."""
    lines = [f"{json.dumps(key)}: {_render_value(value)}" for key, value in head.items()]
    text = ",\n".join(map(_render_value, edits))
    return ("{" + ",\n".join([*lines, f'"edits": [\n{text}\n]']) + "}\n").encode()


def _render_value(value: object) -> str:
    """Render a JSON value. A number keeps the text in which it was written."""
    if isinstance(value, Written):
        return value.text
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)}: {_render_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_render_value, value))}]"
    return json.dumps(value)

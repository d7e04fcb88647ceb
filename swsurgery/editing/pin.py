"""Pin a manifest to its base: fill in the commit, the digests of the edited shards, and the values to expect."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.opening import held
from swsurgery.editing.base import find_base, read_base
from swsurgery.editing.plan import Plan, make_plan
from swsurgery.editing.resolve import resolve
from swsurgery.editing.targets import find_known
from swsurgery.errors import ManifestError
from swsurgery.hub import open_location
from swsurgery.manifest.insertions import CannotInsert, FieldValue, Insertion, add_fields
from swsurgery.manifest.load import IN_MEMORY, LoadedManifest, ManifestLike, load_manifest, parse_manifest
from swsurgery.manifest.operations import Restore
from swsurgery.manifest.yaml_reader import format_path
from swsurgery.progress import Progress, Reporter, require_reporter
from swsurgery.storage import filesystem
from swsurgery.storage.arguments import is_path, require_path, require_type
from swsurgery.storage.dtypes import Dtype, decode, format_bits
from swsurgery.storage.hashing import hash_file
from swsurgery.storage.result import Result


@dataclass(frozen=True, repr=False)
class Pinned(Result):
    """A manifest with its pins. `text` is the whole manifest, and `added` names the fields that were filled in.

    `output` is the file that contains it now; None if nothing was written.
    """

    manifest: Path
    output: Path | None
    added: tuple[str, ...]
    text: str = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return the document that `pin --json` prints."""
        output = None if self.output is None else str(self.output)
        return {"manifest": str(self.manifest), "output": output, "added": list(self.added), "text": self.text}


def pin(
    manifest: ManifestLike,
    base: str | Path | None = None,
    output: str | Path | None = None,
    *,
    dry_run: bool = False,
    reporter: Reporter | None = None,
) -> Pinned:
    """Fill in the fields of a manifest that pin it to its base, and write it to `output`.

    These are `base.revision` for a repository, `base.sha256` of the files with edits and protected scalars, and the
    `expect` of each edit of one scalar that has none. Fields that exist are kept, and so are comments and the layout.
    `base` replaces the base that the manifest names. Without `output`, a manifest that is a file is replaced. With
    `dry_run`, nothing is written.

    Raises TypeError, HubError, CheckpointError; PlanError if the manifest does not fit the base; ManifestError if the
    manifest is a patch, or if its layout has no place for a field; TargetError if the output cannot be written.
    """
    reporter = require_reporter(reporter)
    require_type("dry_run", dry_run, bool)
    loaded = load_manifest(manifest, base)
    path = _find_file(loaded, manifest) if is_path(manifest) else None
    target = path if output is None else require_path("output", output)
    with held(open_location(find_base(loaded, base))) as root:
        pinned = pin_manifest(loaded, read_base(root, loaded), reporter)
    if dry_run or target is None:
        return pinned
    if pinned.added or target != path:
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o666
        filesystem.replace_file(target, pinned.text.encode(), mode=mode)
    return Pinned(pinned.manifest, target, pinned.added, pinned.text)


def _find_file(loaded: LoadedManifest, manifest: ManifestLike) -> Path:
    """Return the file of a manifest, without links. Raises ManifestError for a patch, which is not a text."""
    path = Path(os.path.realpath(str(manifest)))
    if path.read_bytes() != loaded.raw:
        raise ManifestError("is a patch, which has digests and values already", path)
    return path


def pin_manifest(loaded: LoadedManifest, checkpoint: Checkpoint, progress: Progress) -> Pinned:
    """Fill in the pins of a manifest for an open base. Writes nothing. Raises the errors of `pin`."""
    plan = make_plan(loaded, checkpoint)
    insertions = [*_pin_base(plan, progress), *_expect_values(plan)]
    try:
        text = add_fields(loaded.raw.decode(), insertions)
        if parse_manifest(text.encode(), IN_MEMORY).to_json() != _add_fields(loaded, insertions):
            raise CannotInsert
    except (CannotInsert, ManifestError):
        message = "the layout of the manifest has no place for a pin"
        raise ManifestError(message, loaded.path, "write base and edits as mappings, one field per line") from None
    names = tuple(format_path((*one.path, one.key)).removesuffix(": ") for one in insertions)
    return Pinned(loaded.path, None, names, text)


def _add_fields(loaded: LoadedManifest, insertions: Sequence[Insertion]) -> dict[str, object]:
    """Return the fields of a manifest with the insertions, to which the inserted text is compared."""
    document = loaded.to_json()
    for one in insertions:
        node: Any = document
        for part in one.path:
            node = node[part]
        node[one.key] = one.value
    return document


def _pin_base(plan: Plan, progress: Progress) -> Iterator[Insertion]:
    """Yield the commit of the base, and the digests of the files with edits or protected scalars."""
    base, checkpoint = plan.loaded.manifest.base, plan.checkpoint
    if base.repo_id is not None and base.revision is None and checkpoint.revision is not None:
        yield Insertion(("base",), "revision", checkpoint.revision)
    names = plan.touched | {one.file for one in plan.protected} | {one.file for one in plan.protected_regions}
    digests: dict[str, str] = {}
    for name in sorted(names - set(base.sha256)):
        file = checkpoint.get_file(name)
        digest = hash_file(file.source, progress) if file.is_here else file.digest
        if digest is not None:
            digests[name] = digest
    if digests and not base.sha256:
        yield Insertion(("base",), "sha256", digests)
    elif digests:
        yield from (Insertion(("base", "sha256"), name, digest) for name, digest in digests.items())


def _expect_values(plan: Plan) -> Iterator[Insertion]:
    """Yield the stored value for each edit of one scalar that expects none."""
    checkpoint, found = plan.checkpoint, partial(find_known, plan.model)
    done: set[int] = set()
    for asked in resolve(plan.loaded.manifest, checkpoint, found).asked:
        tensor, index = asked.coordinate
        plain = checkpoint.quantisation.explain_refusal(tensor) is None
        edit = asked.edit
        if asked.number in done:
            continue
        done.add(asked.number)
        if asked.expect is None and edit.expect is None and not edit.known and plain and not isinstance(edit, Restore):
            info = checkpoint.get_info(tensor)
            raw = checkpoint.shards[checkpoint.weight_map[tensor]].read_scalar(tensor, index)
            yield Insertion(("edits", asked.number), "expect", _describe_stored(info.dtype, raw))


def _describe_stored(dtype: Dtype, raw: bytes) -> FieldValue:
    """Return the stored value as a number, or its bits if the number is not finite or might be read as another one."""
    value = decode(dtype, raw)
    number = float(value)
    return number if number == value and abs(number) < 1e300 and number != 0 else format_bits(raw)

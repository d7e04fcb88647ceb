"""Registry + files -> Verification. Needs neither the planner nor, unless asked to compare with it, the base.

The proof: while a patched shard is hashed, the registry's old bytes are put back in a second hash. Where that
gives the base's digest (which a hub publishes), the shard is the base with exactly the declared bytes changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swsurgery.checkpoint import OWN_FILES, BaseFile, Checkpoint, open_checkpoint
from swsurgery.errors import CheckpointError, NumberError
from swsurgery.progress import Progress
from swsurgery.registry import EditRecord, Patched, Registry, ScalarRecord, read_patched
from swsurgery.shard import opened, read_exactly
from swsurgery.splice import json_value

CHUNK = 1 << 20
MAX_NAMED = 10


@dataclass(frozen=True)
class Finding:
    """One thing that is not as the registry says. `rule` is a stable name."""

    rule: str
    message: str
    file: str | None = None
    tensor: str | None = None
    index: tuple[int, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        index = None if self.index is None else list(self.index)
        return {"rule": self.rule, "file": self.file, "tensor": self.tensor, "index": index, "message": self.message}


@dataclass(frozen=True)
class Verification:
    """What was proved: `ok` where nothing was found. `proved` are files whose base digest came out again."""

    findings: tuple[Finding, ...]
    files: int
    edits: int
    protected: int
    proved: tuple[str, ...]
    compared_with_base: bool

    @property
    def ok(self) -> bool:
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "findings": [f.to_json() for f in self.findings],
            "files": self.files,
            "edits": self.edits,
            "protected": self.protected,
            "proved": list(self.proved),
            "compared_with_base": self.compared_with_base,
        }


def verify(root: Path, progress: Progress, base: Path | None = None) -> Verification:
    """Re-read the patched checkpoint in `root` and hold it against its registry, and against `base` if given.

    Raises CheckpointError where there is no registry, or it or the base cannot be read.
    """
    patched = read_patched(root)
    if patched is None:
        raise CheckpointError("no registry", root / OWN_FILES[0], "only a checkpoint that swsurgery patched has one")
    registry = patched.registry
    base_checkpoint = open_checkpoint(base, registry.base.weights) if base is not None else None
    try:
        checkpoint = open_checkpoint(root, registry.base.weights)
    except CheckpointError as error:
        findings = [Finding("structure", fault) for fault in error.faults]
        return Verification(tuple(findings), 0, 0, 0, (), False)
    names = {f.name: f for f in checkpoint.files}
    findings = [Finding("structure", f"index and shards disagree: {why}", tensor=t)
                for t, why in checkpoint.disagreements.items()]  # fmt: skip
    findings += _file_list(registry, names) + _own_files(patched, names)
    for record in (*registry.edits, *registry.protected):
        findings += _placed(record, checkpoint)
    findings += _named_twice(registry)
    present = [name for name in registry.files if name in names]
    proved = []
    progress.start(sum(names[n].size for n in present), "B", "verifying")
    try:
        for name in present:
            found = _file_digests(names[name], registry, progress)
            findings += found
            if not found:
                proved.append(name)
    finally:
        progress.close()
    if base_checkpoint is not None:
        findings += _against_base(checkpoint, base_checkpoint, registry, progress)
    return Verification(
        tuple(findings), len(present), len(registry.edits), len(registry.protected), tuple(proved),
        base_checkpoint is not None,
    )  # fmt: skip


def _file_list(registry: Registry, names: dict[str, BaseFile]) -> list[Finding]:
    missing = [Finding("file-missing", "the registry lists it, it is not there", name)
               for name in registry.files if name not in names]  # fmt: skip
    extra = [Finding("file-undeclared", "it is there, the registry does not list it", name)
             for name in names if name not in registry.files and name not in OWN_FILES]  # fmt: skip
    return missing + extra


def _own_files(patched: Patched, names: dict[str, BaseFile]) -> list[Finding]:
    """Registry, manifest and SHA256SUMS agree with each other."""
    findings = []
    if hashlib.sha256(patched.manifest_raw).hexdigest() != patched.registry.manifest_sha256:
        findings.append(Finding("manifest", "it is not the manifest that the registry was made from", "manifest.yaml"))
    expected = patched.own_files()["SHA256SUMS"]
    if "SHA256SUMS" not in names:
        findings.append(Finding("file-missing", "the registry goes with it, it is not there", "SHA256SUMS"))
    elif names["SHA256SUMS"].size != len(expected) or names["SHA256SUMS"].path.read_bytes() != expected:
        findings.append(Finding("digest", "it does not list what the registry lists", "SHA256SUMS"))
    return findings


def _placed(record: ScalarRecord, checkpoint: Checkpoint) -> list[Finding]:
    """The record's tensor, index, dtype and offset mean the same scalar in this checkpoint's headers, which holds the
    recorded bits."""
    is_edit = isinstance(record, EditRecord)
    rule, wanted = ("edit-changed", record.new_bits) if is_edit else ("protected-changed", record.old_bits)

    def finding(rule: str, message: str) -> list[Finding]:
        return [Finding(rule, message, record.file, record.tensor, record.index)]

    shard = checkpoint.shards.get(record.file)
    if shard is None or record.tensor not in shard.tensors:
        return finding("registry", "the registry names a scalar that the shards do not have")
    info = shard.tensors[record.tensor]
    try:
        offset = shard.offset(record.tensor, record.index)
        old = record.old_bytes
        recorded = record.new_bytes if is_edit else old
    except (IndexError, NumberError) as error:
        return finding("registry", f"the registry's entry is not possible: {error}")
    if offset != record.offset or info.dtype.name != record.dtype:
        return finding("registry", f"the registry puts it at byte {record.offset} as {record.dtype}, "
                                   f"the header at byte {offset} as {info.dtype.name}")  # fmt: skip
    values = [(record.old, old)] + ([(record.new, recorded)] if is_edit else [])
    if any(value != json_value(info.dtype, bits) for value, bits in values):
        return finding("registry", "the registry's values are not what its bits mean")
    stored = shard.read_scalar(record.tensor, record.index)
    return [] if stored == recorded else finding(rule, f"it holds 0x{stored[::-1].hex()}, not {wanted}")


def _named_twice(registry: Registry) -> list[Finding]:
    """A scalar that two records name: what is put back for one would vouch for the other."""
    seen: set[tuple[str, int]] = set()
    findings = []
    for record in (*registry.edits, *registry.protected):
        if (record.file, record.offset) in seen:
            findings.append(
                Finding("registry", "the registry names this scalar twice", record.file, record.tensor, record.index)
            )
        seen.add((record.file, record.offset))
    return findings


def _file_digests(file: BaseFile, registry: Registry, progress: Progress) -> list[Finding]:
    """One reading, two hashes: the file as it is, and with the old bytes put back."""
    record = registry.files[file.name]
    edits = sorted((e for e in registry.edits if e.file == file.name), key=lambda e: e.offset)
    here, restored = hashlib.sha256(), hashlib.sha256()
    try:
        old = [(e.offset, e.old_bytes) for e in edits]
    except NumberError as error:
        return [Finding("registry", f"the registry's old bits are not possible: {error}", file.name)]
    for offset, chunk in _chunks(file, [(at, len(b)) for at, b in old]):
        here.update(chunk)
        if old:
            for at, data in old:
                if offset <= at < offset + len(chunk):
                    chunk[at - offset : at - offset + len(data)] = data
            restored.update(chunk)
        progress.advance(len(chunk))
    findings = []
    if file.size != record.size:
        findings.append(Finding("digest", f"it has {file.size} bytes, not {record.size}", file.name))
    if here.hexdigest() != record.sha256:
        findings.append(Finding("digest", f"its sha256 is {here.hexdigest()}, not {record.sha256}", file.name))
    if (restored if old else here).hexdigest() != record.base_sha256:
        findings.append(
            Finding("undeclared-change", "with the declared scalars put back it is not the base's file", file.name)
        )
    return findings


def _chunks(file: BaseFile, places: list[tuple[int, int]]) -> Iterator[tuple[int, bytearray]]:
    """(offset, bytes) over the file; none of the (offset, size) places lies across two chunks."""
    with opened(file.path) as fd:
        offset = 0
        while offset < file.size:
            end = min(offset + CHUNK, file.size)
            for at, size in places:
                if offset < at < end < at + size:
                    end = at
            yield offset, bytearray(read_exactly(fd, end - offset, offset, file.path))
            offset = end


def _against_base(checkpoint: Checkpoint, base: Checkpoint, registry: Registry, progress: Progress) -> list[Finding]:
    theirs, findings = {f.name: f for f in base.files}, []
    for name in registry.files:
        if name not in theirs:
            findings.append(Finding("base", "the base does not have it", name))
    declared: dict[str, set[int]] = {}
    for edit in registry.edits:
        declared.setdefault(edit.file, set()).update(range(edit.offset, edit.offset + len(edit.old_bits) // 2 - 1))
    names = [f.name for f in checkpoint.files if f.name in registry.files and f.name in theirs]
    return findings + undeclared_changes(checkpoint, base, names, declared, progress)


def undeclared_changes(
    checkpoint: Checkpoint, base: Checkpoint, names: list[str], declared: dict[str, set[int]], progress: Progress
) -> list[Finding]:
    """Compare the named files of both byte by byte. `declared` maps a file to the offsets that may differ."""
    findings = []
    progress.start(sum(checkpoint.file(n).size for n in names), "B", "comparing with the base")
    try:
        for name in names:
            ours, theirs = checkpoint.file(name), base.file(name)
            if ours.size != theirs.size:
                findings.append(Finding("base", f"it has {ours.size} bytes, in the base {theirs.size}", name))
                continue
            places = [at for at in _differences(ours, theirs, progress) if at not in declared.get(name, ())]
            findings += _name_bytes(name, places, checkpoint)
    finally:
        progress.close()
    return findings


def _differences(file: BaseFile, other: BaseFile, progress: Progress) -> list[int]:
    """Offsets of the bytes that differ (at most a few thousand)."""
    places: list[int] = []
    for (offset, ours), (_, theirs) in zip(_chunks(file, []), _chunks(other, []), strict=True):
        if ours != theirs and len(places) < 4096:
            places += [offset + i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
        progress.advance(len(ours))
    return places


def _name_bytes(name: str, places: list[int], checkpoint: Checkpoint) -> list[Finding]:
    """Undeclared bytes as the scalars they belong to."""
    shard = checkpoint.shards.get(name)
    found: dict[tuple, Finding] = {}
    for at in places:
        info = shard and next(
            (t for t in shard.tensors.values()
             if shard.data_start + t.data_offsets[0] <= at < shard.data_start + t.data_offsets[1]), None)  # fmt: skip
        if info is None:
            found.setdefault((), Finding("undeclared-change", f"byte {at} is not the base's", name))
        elif info.dtype.bits % 8:
            found.setdefault((info.name,), Finding("undeclared-change", "it is not the base's", name, info.name))
        else:
            index = info.index((at - shard.data_start - info.data_offsets[0]) // info.dtype.size)
            found.setdefault((info.name, index), Finding("undeclared-change", "it is not the base's, and no declared "
                                                         "scalar", name, info.name, index))  # fmt: skip
    findings = list(found.values())
    if len(findings) > MAX_NAMED:
        more = len(findings) - MAX_NAMED
        findings = [*findings[:MAX_NAMED], Finding("undeclared-change", f"and at least {more} more of these", name)]
    return findings

"""Check the digests of one file of a patched checkpoint: as stored, and with the recorded old bytes put back.

Must not import the planner.
"""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.compare import read_chunks
from swsurgery.checkpoint.record import Record
from swsurgery.checkpoint.record_entries import EditRecord, FileRecord
from swsurgery.checkpoint.scalars import list_protected
from swsurgery.errors import NumberError, SwsurgeryError
from swsurgery.progress import Progress, Silent
from swsurgery.storage.files import BaseFile
from swsurgery.verifying.findings import Finding

if TYPE_CHECKING:  # these import numpy, which only regions and the search of values need
    from swsurgery.verifying.regions import RegionProof
    from swsurgery.verifying.value_search import ShardScan


@dataclass(frozen=True)
class Explanation:
    """The findings about single scalars and regions of one file, which may explain a wrong digest of the file.

    `changed` is True if there is any such finding. `protected` contains offset and recorded bytes of each protected
    scalar that was changed.
    """

    changed: bool
    protected: tuple[tuple[int, bytes], ...]

    @classmethod
    def of(cls, file: str, known: Sequence[Finding], record: Record, checkpoint: Checkpoint) -> Explanation:
        """Collect the findings about the scalars and regions of `file`."""
        mine = [f for f in known if f.file == file and f.rule in ("edit-changed", "protected-changed")]
        wrong = {(f.tensor, f.index) for f in mine if f.rule == "protected-changed"}
        entries = list_protected(record, checkpoint) if wrong else ()
        protected = tuple((e.offset, e.old_bytes) for e in entries if (e.tensor, e.index) in wrong and e.file == file)
        return cls(bool(mine), protected)

    def explains(self, file: BaseFile, old: list[tuple[int, bytes]], restored: str, wanted: str | None) -> bool:
        """Return True if the file differs from the record only in the scalars and regions that were found changed.

        `restored` is the sha256 of the file with the bytes `old` put back, and `wanted` that of the base. If protected
        scalars were changed, the file is read once more with their recorded bytes put back too.
        """
        if not self.changed or wanted is None:
            return False
        if restored == wanted:
            return True
        both = sorted({*old, *self.protected})
        return bool(self.protected) and _hash_twice(file, both, True, None, Silent())[1] == wanted


def check_digests(
    file: BaseFile,
    record: FileRecord,
    edits: list[EditRecord],
    scan: ShardScan | None,
    progress: Progress,
    changed: Explanation,
    regions: RegionProof | None = None,
) -> tuple[list[Finding], bool]:
    """Check the digests of one file: of its stored bytes, and of the same bytes with the edits' old bytes put back.

    `scan` gets the stored bytes and counts their values. Returns the findings, and True if both digests are correct.
    Each fault is one finding. A file of another size or with a changed scalar also has another digest, but the digest
    is not reported then.
    """
    try:
        old = sorted((e.offset, e.old_bytes) for e in edits)
    except NumberError as error:
        return [Finding("registry", f"the record's old bits are invalid: {error}", file.name)], False
    inside = regions is not None and file.name in regions.changes
    findings = _check_file_record(file, record, bool(edits) or inside)
    if file.digest is not None and not file.is_here and scan is None:
        progress.advance(file.size)
        findings += [] if file.size != record.size else _check_hub_digest(file, record)
        return findings, not findings
    hashed = record.sha256 is not None or record.base_sha256 is not None
    changes = regions.changes.get(file.name) if regions else None
    if not hashed and scan is None and not changes:
        return findings, not findings
    if regions is not None and changes:
        from swsurgery.verifying.regions import hash_with_regions

        try:
            look = scan.feed if scan else None
            here, restored, found = hash_with_regions(file, edits, regions, look, progress)
        except SwsurgeryError as error:
            return [*findings, Finding("registry", f"the regions cannot be restored: {error}", file.name)], False
        findings += found
        changed = replace(changed, changed=changed.changed or any(f.rule.endswith("-changed") for f in found))
    else:
        here, restored = _hash_twice(file, old, hashed, scan, progress)
    base = None if regions is not None and file.name in regions.needs_base else record.base_sha256
    wrong = record.sha256 is not None and here != record.sha256
    differs = base is not None and restored != base
    if wrong and file.size == record.size and not changed.explains(file, old, restored, base):
        findings.append(Finding("digest", f"the file's sha256 is {here}, not {record.sha256}", file.name))
    elif differs and not wrong:
        message = "even with the old bits of the declared scalars put back, the file differs from the base's"
        findings.append(Finding("undeclared-change", message, file.name))
    return findings, not (findings or wrong or differs)


def _hash_twice(
    file: BaseFile, old: list[tuple[int, bytes]], hashed: bool, scan: ShardScan | None, progress: Progress
) -> tuple[str, str]:
    """Read a file once and return two sha256 digests: of its bytes, and with the `old` (offset, bytes) put back.

    If `hashed` is False, the file is only read for `scan`, and the digests have no meaning.
    """
    here, restored = hashlib.sha256(), hashlib.sha256()
    remaining = collections.deque(old)
    for offset, chunk in read_chunks(file, [(at, len(b)) for at, b in old]):
        if scan:
            scan.feed(offset, chunk)
        if hashed:
            here.update(chunk)
        if hashed and old:
            while remaining and remaining[0][0] < offset + len(chunk):
                at, data = remaining.popleft()
                chunk[at - offset : at - offset + len(data)] = data
            restored.update(chunk)
        progress.advance(len(chunk))
    return here.hexdigest(), (restored if old else here).hexdigest()


def _check_hub_digest(file: BaseFile, record: FileRecord) -> list[Finding]:
    """Compare the record of a file that was not downloaded with the sha256 that the Hub lists for the file."""
    if record.sha256 in (None, file.digest):
        return []
    return [Finding("digest", f"the file's sha256 is {file.digest}, not {record.sha256}", file.name)]


def _check_file_record(file: BaseFile, record: FileRecord, edited: bool) -> list[Finding]:
    findings = []
    if file.size != record.size:
        findings.append(
            Finding("digest", f"the file has {file.size} bytes, but {record.size} according to the record", file.name)
        )
    if (record.sha256 is None) != (record.base_sha256 is None):
        findings.append(
            Finding("registry", "the record has only one of the file's two digests (sha256 and base_sha256)", file.name)
        )
    elif record.sha256 is None and edited:
        findings.append(
            Finding("registry", "the record declares edits of this file, but has no digest of it", file.name)
        )
    return findings

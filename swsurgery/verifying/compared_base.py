"""Compare a patched checkpoint and its record byte by byte with a given base.

A given directory that is not the recorded base is one finding, however much differs. Must not import the planner.
"""

from __future__ import annotations

from collections.abc import Sequence

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.compare import find_undeclared_changes
from swsurgery.checkpoint.record import Record
from swsurgery.checkpoint.record_entries import EditRecord
from swsurgery.errors import NumberError, list_some, pluralise
from swsurgery.progress import Progress
from swsurgery.storage.files import BaseFile, File, read_exactly
from swsurgery.storage.hashing import hash_file
from swsurgery.verifying.findings import Finding

MAX_NAMED_FILES = 3
"""Maximum number of files that the finding about a wrong base names."""


def compare_with_base(
    checkpoint: Checkpoint, base: Checkpoint, record: Record, known: Sequence[Finding], progress: Progress
) -> list[Finding]:
    """Compare a checkpoint with a base. Returns the findings `known`, and those of the comparison.

    If files of `base` do not have the sha256 that the record states for the base, the only finding of the comparison is
    that this is another base. A difference replaces a finding of `known` that states the same less exactly, such as a
    wrong digest of the file.
    """
    theirs = {file.name: file for file in base.files}
    differences = _find_differences(checkpoint, base, record, theirs, progress)
    suspects = sorted({finding.file for finding in differences if finding.file is not None})
    wrong = [name for name in suspects if _is_other_file(name, theirs, record)]
    if wrong:
        return [*known, _make_finding(wrong, len(record.files), next(f for f in differences if f.file in wrong))]
    exact = {(f.tensor, f.index) for f in known if f.rule == "protected-changed"}
    differences = [f for f in differences if f.index is None or (f.tensor, f.index) not in exact]
    located = {f.file for f in differences if f.rule == "undeclared-change"}
    less = ("digest", "undeclared-change")
    return [f for f in known if f.rule not in less or f.tensor is not None or f.file not in located] + differences


def _find_differences(
    checkpoint: Checkpoint, base: Checkpoint, record: Record, theirs: dict[str, BaseFile], progress: Progress
) -> list[Finding]:
    """Compare all recorded files byte by byte, and compute changed regions again from the base."""
    findings = [
        Finding("base", "the base does not have this file", name) for name in record.files if name not in theirs
    ]
    declared: dict[str, set[int]] = {}
    for edit in record.edits:
        declared.setdefault(edit.file, set()).update(range(edit.offset, edit.offset + len(edit.old_bits) // 2 - 1))
    rewritten = {change.file for change in record.changes}
    names = [f.name for f in checkpoint.files if f.name in record.files and f.name in theirs]
    if rewritten:
        from swsurgery.verifying.regions import compare_by_recomputing

        findings += compare_by_recomputing(record, checkpoint, base, progress)
        names = [name for name in names if name not in rewritten]
    changed = find_undeclared_changes(checkpoint, base, names, declared, progress)
    findings += [Finding.of_difference(difference) for difference in changed]
    return findings + _check_old_bytes(record, theirs)


def _check_old_bytes(record: Record, theirs: dict[str, BaseFile]) -> list[Finding]:
    """Compare the recorded old bytes of edited scalars with the base. Returns at most one finding for each file."""
    findings: dict[str, Finding] = {}
    edits: dict[str, list[EditRecord]] = {}
    for edit in record.edits:
        edits.setdefault(edit.file, []).append(edit)
    for name, mine in edits.items():
        file = theirs.get(name)
        if file is None or file.size != record.files[name].size:
            continue
        with file.source.open() as opened:
            for edit in mine:
                if name not in findings and not _has_old_bytes(opened, file.size, edit):
                    message = "the base does not have the recorded old bits"
                    findings[name] = Finding("base", message, name, edit.tensor, edit.index)
    return list(findings.values())


def _has_old_bytes(opened: File, size: int, edit: EditRecord) -> bool:
    """Return True if the open file has the recorded old bytes of an edit, or if the record of the edit is invalid."""
    try:
        old = edit.old_bytes
    except NumberError:
        return True
    inside = edit.offset + len(old) <= size
    return not inside or read_exactly(opened, len(old), edit.offset) == old


def _is_other_file(name: str, theirs: dict[str, BaseFile], record: Record) -> bool:
    """Return True if the base's file `name` does not have the sha256 that the record states for the base."""
    file, wanted = theirs.get(name), record.files[name].base_sha256 if name in record.files else None
    if file is None or wanted is None:
        return False
    digest = file.digest if file.digest is not None and not file.is_here else hash_file(file.source)
    return digest != wanted


def _make_finding(wrong: Sequence[str], count: int, first: Finding) -> Finding:
    """Report that `wrong` files of `count` are not those of the recorded base. `first` is one of the differences."""
    names = list_some(wrong, MAX_NAMED_FILES)
    has = "has" if len(wrong) == 1 else "have"
    place = f"; it differs in {first.tensor}{list(first.index)}" if first.index is not None else ""
    return Finding(
        "base",
        f"this is not the base of the checkpoint: {len(wrong)} of {pluralise(count, 'file')} {has} another sha256 than "
        f"the record states ({names}{place})",
    )

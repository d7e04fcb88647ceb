"""Verify a patched checkpoint against its record. Must not import the planner.

The proof: a patched shard is read once and hashed twice, unchanged and with the record's old bytes put back. If the
second hash equals the base's digest (which the Hub publishes), the shard is the base's with exactly the declared bytes
changed. The base itself is needed only for a byte-by-byte comparison with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.record import Patched, Record
from swsurgery.checkpoint.record_entries import EditRecord, ScalarRecord
from swsurgery.checkpoint.scalars import compare_scalar, find_repeated, list_protected
from swsurgery.errors import NumberError
from swsurgery.progress import Progress
from swsurgery.storage import dtypes
from swsurgery.storage.dtypes import DTYPES
from swsurgery.storage.files import BaseFile
from swsurgery.storage.names import CARD_NAME, FIGURE_NAME, GIT_NAME, SIGNATURE_NAME
from swsurgery.storage.result import Result
from swsurgery.storage.strict_json import read_small
from swsurgery.verifying.file_digests import Explanation, check_digests
from swsurgery.verifying.findings import Finding

if TYPE_CHECKING:  # these import numpy, which only regions and the search of values need
    from swsurgery.verifying.regions import RegionProof
    from swsurgery.verifying.value_search import ValueSearch

RULES_OF_RECORD = (
    "structure",
    "digest",
    "file-missing",
    "file-undeclared",
    "undeclared-change",
    "edit-changed",
    "protected-changed",
    "registry",
    "manifest",
    "duplicate-weights",
)
"""Names of the rules that every verification of a record checks."""


EXEMPT = (CARD_NAME, FIGURE_NAME, GIT_NAME, SIGNATURE_NAME)
"""Names of files that may be added to a patched checkpoint: they describe or sign it, and no loader reads them."""


@dataclass(frozen=True, repr=False)
class RecordProof(Result):
    """Result of verifying a patched checkpoint against its record.

    `files`, `edits` and `protected` are the numbers of files, edited scalars and protected scalars that were checked.
    `finite` is True if all stored floating-point values were searched for NaN and infinities.

    The other fields contain names of files.
    `proved`: with the old bytes put back, these files have the digests of the base's files.
    `unverified`: these files have the record's digests, but the base's files were not hashed when the record was made.
    `unhashed`: the record has no digest of these files, because an edit in place did not touch them. Only their sizes
    were checked.
    `unread`: edited files on the Hub that were not downloaded. Their digests are those that the Hub lists.
    `elsewhere`: unchanged files that are only in the base's repository.
    `needs_base`: edited files whose old bytes no undo file contains. Only the digests of the file and of its changed
    regions were compared with the record; the rest of the proof needs the base.

    `uncovered`: files that the record does not list and that may be added, such as README.md.

    `changes` and `protected_regions` are the numbers of changed and of protected regions.
    """

    findings: tuple[Finding, ...]
    files: int
    edits: int
    protected: int
    proved: tuple[str, ...]
    compared_with_base: bool
    unhashed: tuple[str, ...] = ()
    finite: bool = False
    unread: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()
    needs_base: tuple[str, ...] = ()
    uncovered: tuple[str, ...] = ()
    changes: int = 0
    protected_regions: int = 0
    rules: tuple[str, ...] = field(default=RULES_OF_RECORD)

    @property
    def ok(self) -> bool:
        """True if no finding is an error."""
        return not any(f.level == "error" for f in self.findings)

    def to_json(self) -> dict[str, Any]:
        regions = {
            "changes": self.changes,
            "protected_regions": self.protected_regions,
            "needs_base": list(self.needs_base),
        }
        return (regions if self.changes or self.protected_regions else {}) | {
            "ok": self.ok,
            "findings": [f.to_json() for f in self.findings],
            "files": self.files,
            "edits": self.edits,
            "protected": self.protected,
            "proved": list(self.proved),
            "unverified": list(self.unverified),
            "unhashed": list(self.unhashed),
            "unread": list(self.unread),
            "elsewhere": list(self.elsewhere),
            "uncovered": list(self.uncovered),
            "compared_with_base": self.compared_with_base,
            "finite": self.finite,
        }


def verify_patched(
    patched: Patched,
    checkpoint: Checkpoint,
    progress: Progress,
    base: Checkpoint | None = None,
    search: ValueSearch | None = None,
    of_manifest: Sequence[Finding] = (),
) -> RecordProof:
    """Verify an open checkpoint against its record, and against an open base if given.

    With `search`, all shards are also searched for NaN and infinities, and `search` keeps the figures of their tensors.
    `of_manifest` are findings about the manifest stored in the checkpoint. The caller makes them, because resolving a
    manifest needs code of the editing package.
    """
    record = patched.record
    names = {f.name: f for f in checkpoint.files}
    findings = check_structure(checkpoint) + _check_file_list(record, names) + _check_sums(patched, names)
    findings += of_manifest
    findings += check_scalars(record, checkpoint)
    regions = _read_regions(record, checkpoint, progress)
    findings += regions.findings if regions else ()
    present = [name for name in record.files if name in names]
    found, sound = _check_all_digests(record, checkpoint, present, search, progress, findings, regions)
    findings += found
    if search is not None:
        findings += scan_values(search, progress)
    if base is not None:
        from swsurgery.verifying.compared_base import compare_with_base

        findings = compare_with_base(checkpoint, base, record, findings, progress)
    proof = RecordProof(
        tuple(findings),
        files=len(present),
        edits=len(record.edits),
        protected=len(list_protected(record, checkpoint)),
        proved=(),
        compared_with_base=base is not None,
        finite=search is not None,
        changes=len(record.changes),
        protected_regions=len(record.list_protected_regions()) if regions else 0,
        rules=RULES_OF_RECORD + (("base",) if base else ()) + (("non-finite",) if search else ()),
    )
    return _group_files(proof, record, names, sound, regions)


def _group_files(
    proof: RecordProof,
    record: Record,
    names: Mapping[str, BaseFile],
    sound: Sequence[str],
    regions: RegionProof | None,
) -> RecordProof:
    """Add to a proof the names of files, grouped by what is proved about them. The digests of `sound` are correct."""
    changed = {change.file for change in record.changes}
    edited = {edit.file for edit in record.edits} | changed
    present = [name for name in record.files if name in names]
    unhashed = [name for name in present if record.files[name].sha256 is None]
    unread = [n for n in present if n in edited and not proof.finite and not names[n].is_here]
    needs_base = changed if regions is None else regions.needs_base
    proved = [name for name in sound if name not in {*unhashed, *unread, *needs_base}]
    return replace(
        proof,
        proved=tuple(name for name in proved if not record.files[name].unverified),
        unhashed=tuple(unhashed),
        unread=tuple(unread),
        elsewhere=tuple(n for n in record.elsewhere if n not in names),
        unverified=tuple(name for name in proved if record.files[name].unverified),
        needs_base=tuple(name for name in sound if name in needs_base and name not in unread),
        uncovered=tuple(name for name in EXEMPT if name in names and name not in record.files),
    )


def _read_regions(record: Record, checkpoint: Checkpoint, progress: Progress) -> RegionProof | None:
    """Match the regions of a record with the headers; None if it has none."""
    if not record.changes and not record.list_protected_regions():
        return None
    from swsurgery.verifying.regions import read_regions

    return read_regions(record, checkpoint, progress)


def _check_all_digests(
    record: Record,
    checkpoint: Checkpoint,
    names: Sequence[str],
    search: ValueSearch | None,
    progress: Progress,
    known: Sequence[Finding],
    regions: RegionProof | None = None,
) -> tuple[list[Finding], list[str]]:
    """Check the digests of the named files. The bytes that are read for this are also fed to `search`.

    Returns the findings, and the names of the files whose digests are correct. A wrong digest is no finding if the
    changed scalars among the findings `known` explain it.
    """
    files = {file.name: file for file in checkpoint.files}
    edited: dict[str, list[EditRecord]] = {}
    for edit in record.edits:
        edited.setdefault(edit.file, []).append(edit)
    findings: list[Finding] = []
    sound: list[str] = []
    size = sum(files[name].size for name in names if search or record.files[name].sha256 is not None)
    progress.start(size, "B", "verifying")
    try:
        for name in names:
            scan = search.follow(name) if search else None
            changed = Explanation.of(name, known, record, checkpoint)
            found, right = check_digests(
                files[name], record.files[name], edited.get(name, []), scan, progress, changed, regions
            )
            findings += found
            if right:
                sound.append(name)
    finally:
        progress.close()
    return findings, sound


def check_scalars(record: Record, checkpoint: Checkpoint) -> list[Finding]:
    """Compare every recorded scalar, including those that earlier steps protect, with the headers and stored bits."""
    findings: list[Finding] = []
    for entry in (*record.edits, *list_protected(record, checkpoint)):
        findings += _check_scalar(entry, checkpoint)
    twice = "the record lists this scalar twice"
    repeated = [_make_finding(entry, "registry", twice) for entry in find_repeated(record)]
    return findings + _check_operations(record) + repeated + _check_codes(record, checkpoint)


def _check_codes(record: Record, checkpoint: Checkpoint) -> list[Finding]:
    """Check the elements of quantised matrices that this step or an earlier one recorded, if there are any."""
    if not record.codes and not record.list_protected_codes():
        return []
    from swsurgery.verifying.coded_edits import check_codes, check_protected_codes  # imports numpy

    return [*check_codes(record, checkpoint), *check_protected_codes(record, checkpoint)]


def check_structure(checkpoint: Checkpoint) -> list[Finding]:
    """Check that the index agrees with the shards, and that there is no second copy of the weights."""
    findings = [
        Finding("structure", f"index and shards disagree: {why}", tensor=tensor)
        for tensor, why in checkpoint.disagreements.items()
    ]
    return findings + [
        Finding("duplicate-weights", "the file is another copy of the weights, which the edits did not change", name)
        for name in checkpoint.copies
    ]


def scan_values(search: ValueSearch, progress: Progress) -> list[Finding]:
    """Read the shards that `search` has not read yet. Returns a finding for each tensor with NaN or infinities."""
    from swsurgery.verifying.value_findings import list_not_finite

    search.read_rest(progress)
    return list_not_finite(search)


def _check_file_list(record: Record, names: dict[str, BaseFile]) -> list[Finding]:
    missing = [
        Finding("file-missing", "the record lists this file, but it is missing", name)
        for name in record.files
        if name not in names and name not in record.elsewhere
    ]
    listed = {*record.files, *record.own_names, *EXEMPT}
    extra = [
        Finding("file-undeclared", "this file exists, but the record does not list it", name)
        for name in names
        if name not in listed
    ]
    return missing + extra


def _check_sums(patched: Patched, names: dict[str, BaseFile]) -> list[Finding]:
    """Check that SHA256SUMS agrees with the record."""
    findings = []
    expected = patched.render_own_files()["SHA256SUMS"]
    if "SHA256SUMS" not in names:
        findings.append(Finding("file-missing", "this file belongs to the record, but is missing", "SHA256SUMS"))
    elif names["SHA256SUMS"].size != len(expected) or read_small(names["SHA256SUMS"].source, "SHA256SUMS") != expected:
        findings.append(Finding("digest", "this file lists other digests than the record", "SHA256SUMS"))
    return findings


def _make_finding(record: ScalarRecord, rule: str, message: str) -> Finding:
    return Finding(rule, message, record.file, record.tensor, record.index)


def _check_scalar(record: ScalarRecord, checkpoint: Checkpoint) -> list[Finding]:
    """Check that a recorded scalar has the recorded dtype, offset, values and bits in this checkpoint."""
    fault = compare_scalar(record, checkpoint)
    if fault is None:
        return []
    changed = "edit-changed" if isinstance(record, EditRecord) else "protected-changed"
    return [_make_finding(record, "registry" if fault.contradicts else changed, fault.message)]


def _check_operations(record: Record) -> list[Finding]:
    """Check that each edit's operation, applied to its old bits, gives its new bits."""
    findings = []
    for edit in record.edits:
        try:
            fault = _find_fault(edit)
        except NumberError as error:
            fault = f"the record's operation {edit.op} is invalid: {error}"
        if fault:
            findings.append(_make_finding(edit, "registry", fault))
    return findings


def _find_fault(edit: EditRecord) -> str | None:
    """Explain why an edit's operation does not give its new bits; None if it gives them. Raises NumberError."""
    new = _compute_new_bytes(edit)
    if (edit.op == "scale") != (edit.factor is not None):
        return f"in the record, the operation {edit.op} and the factor contradict each other"
    if new == edit.new_bytes:
        return None
    by = f" by {edit.factor}" if edit.op == "scale" else ""
    return f"{edit.op}{by} gives {dtypes.format_bits(new)} from {edit.old_bits}, not {edit.new_bits}"


def _compute_new_bytes(edit: EditRecord) -> bytes:
    """Apply a flip, zero or scale to the old bytes; otherwise return the recorded new bytes. Raises NumberError."""
    dtype = DTYPES[edit.dtype]
    if edit.op == "flip":
        return _flip_bits(edit)
    if edit.op == "zero":
        return dtypes.make_zero(dtype)
    if edit.op == "scale" and edit.factor is not None:
        return dtypes.scale_value(dtype, edit.old_bytes, edit.factor)
    return edit.new_bytes


def _flip_bits(edit: EditRecord) -> bytes:
    """Return the old bytes of a flip with its bits inverted. Raises NumberError for a bit outside the dtype."""
    old = edit.old_bytes
    if not edit.bit or max(edit.bit) >= 8 * len(old) or len(set(edit.bit)) < len(edit.bit):
        raise NumberError(f"{edit.dtype} has no such bits: {list(edit.bit or ())}")
    return (int.from_bytes(old, "little") ^ sum(1 << bit for bit in edit.bit)).to_bytes(len(old), "little")

"""Compare what a manifest requests with what a record contains.

This module repeats the arithmetic on the record's old bits. It must not import the planner, whose result it checks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from swsurgery.checkpoint.record import Record
from swsurgery.checkpoint.record_entries import ChangeRecord, CodeRecord, EditRecord, ScalarRecord
from swsurgery.editing.asked import Asked, AskedRegion
from swsurgery.errors import NumberError
from swsurgery.manifest.operations import Clip, PruneOutliers, Restore, Round, Scale, Set, explain_expectation
from swsurgery.manifest.schema import Manifest
from swsurgery.storage import dtypes
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.dtypes import DTYPES


def find_unlike_records(asked: Mapping[Coordinate, Asked], record: Record) -> Iterator[tuple[Coordinate, str]]:
    """Yield (coordinate, difference in words) for each scalar that the manifest and the record treat differently."""
    recorded = {r.coordinate: r for r in (*record.edits, *record.protected)}
    codes = {code.coordinate: code for code in record.codes}
    for coordinate, wish in asked.items():
        entry = recorded.get(coordinate)
        if coordinate in codes:
            message = _explain_unlike_code(wish, codes[coordinate])
        else:
            message = "the record does not list the scalar" if entry is None else _explain_unlike(wish, entry)
        if message:
            yield coordinate, f"{wish.edit.op} was requested: {message}"
    elements = {element.coordinate for code in record.codes for element in code.elements}
    for coordinate, entry in recorded.items():
        if coordinate not in asked and coordinate not in elements:
            yield coordinate, f"{_get_done(entry)}, but the manifest does not ask for it"
    for coordinate, code in codes.items():
        if coordinate not in asked:
            yield coordinate, f"the record has {code.op}, but the manifest does not ask for it"


def find_misnumbered_codes(asked: Mapping[Coordinate, Asked], record: Record) -> Iterator[tuple[Coordinate, str]]:
    """Yield (element, difference in words) for each element of a quantised matrix that has another edit's number."""
    for code in record.codes:
        wish = asked.get(code.coordinate)
        if wish is not None and wish.number != code.edit:
            yield code.coordinate, f"edits[{wish.number}] names this element, but the record says edits[{code.edit}]"


def find_unlike_regions(asked: Sequence[AskedRegion], record: Record) -> Iterator[tuple[int | None, str]]:
    """Yield (number of the edit or None, difference in words) for each region on which manifest and record disagree.

    Compares the operations, their options and the regions. The digests of the regions are not checked here.
    """
    changes = {(c.edit, c.region): c for c in record.changes}
    protected = {p.region for p in record.protected_regions}
    for one in asked:
        if not one.edit.writes:
            if one.region not in protected:
                yield one.number, f"protect was requested: the record does not protect {one.region}"
            protected.discard(one.region)
            continue
        change = changes.pop((one.number, one.region), None)
        if change is None:
            yield one.number, f"{one.edit.op} was requested: the record has no change of {one.region} by this edit"
        elif change.op != one.edit.op or not _has_same_options(one, change):
            done = f"{change.op} with the options {change.options}"
            yield one.number, f"{one.edit.op} with the options {one.edit.options} was requested: the record has {done}"
    for number, region in changes:
        yield None, f"the record changes {region} by edits[{number}], but the manifest does not ask for it"
    for region in sorted(protected):
        yield None, f"the record protects {region}, but the manifest does not ask for it"


def _has_same_options(one: AskedRegion, change: ChangeRecord) -> bool:
    """Return True if a change has the options of its edit. A value to set may be recorded as its bits."""
    if change.options == one.edit.options:
        return True
    if not isinstance(one.edit, Set) or set(change.options) != {"bits"}:
        return False
    return one.edit.compute_bytes(DTYPES[change.dtype], b"") == dtypes.parse_bits(
        DTYPES[change.dtype], str(change.options["bits"])
    )


def _get_done(record: ScalarRecord) -> str:
    return f"the record has {record.op}" if isinstance(record, EditRecord) else "the record protects the scalar"


def _explain_unlike_code(asked: Asked, code: CodeRecord) -> str | None:
    """Compare a recorded element of a quantised matrix with its edit. Describe the difference; None if they agree.

    Whether `new_code` is the code nearest to `wanted` is not checked here, because the layout is needed for that.
    """
    edit = asked.edit
    if code.op != edit.op:
        return f"the record has {code.op}"
    factor = edit.factor if isinstance(edit, Scale) else None
    if factor != code.factor:
        return f"the record has the factor {code.factor}, not {factor}"
    wanted = None
    if isinstance(edit, Set) and edit.value is not None:
        wanted = float(edit.value)
    elif isinstance(edit, Restore) and asked.value is not None:
        wanted = float(asked.value.value)
    if wanted is not None and wanted != code.wanted:
        return f"the record has the wanted value {code.wanted}, not {wanted}"
    limit = edit.max_error if isinstance(edit, Scale | Set | Restore) else None
    if limit is not None and abs(code.new - code.wanted) > limit:
        return f"the record has {code.new}, which differs from {code.wanted} by more than max_error {limit}"
    return None


def _explain_unlike(asked: Asked, record: ScalarRecord) -> str | None:
    """Compare a recorded scalar with the result of the edit on its old bits. Describe the difference; None if equal."""
    edit, dtype = asked.edit, DTYPES[record.dtype]
    done = record.op if isinstance(record, EditRecord) else "protect"
    if done != edit.op:
        return f"the record has {done}"
    try:
        if asked.expect is not None and (fault := explain_expectation(asked.expect, dtype, record.old_bytes)):
            return f"the base does not match: {fault}"
        if not isinstance(record, EditRecord):
            return None
        factor = edit.factor if isinstance(edit, Scale) else None
        if factor != record.factor:
            return f"the record has the factor {record.factor}, not {factor}"
        if isinstance(edit, Restore):
            if asked.value is None:
                return None  # the bytes come from another checkpoint, which is not read here
            new = dtypes.encode(dtype, asked.value.value)
        elif isinstance(edit, Clip | PruneOutliers | Round):
            return f"{edit.op} needs more than one scalar"
        else:
            new = edit.compute_bytes(dtype, record.old_bytes)
        return None if new == record.new_bytes else f"the record has {record.new_bits}, not {dtypes.format_bits(new)}"
    except NumberError as error:
        return str(error)


def explain_unlike_bases(manifest: Manifest, record: Record) -> Iterator[tuple[tuple[str, ...], str]]:
    """Compare the base that the manifest names with the base in the record.

    Yields (path of the node in the manifest, difference in words) for each difference.
    """
    base = manifest.base
    for name in ("repo_id", "revision", "weights", "variant"):
        said, found = getattr(base, name), getattr(record.base, name)
        if said is not None and found is not None and said != found:
            yield ("base", name), f"base.{name} is {said}, but the base was {found}"
    for name, digest in base.sha256.items():
        entry = record.files.get(name)
        found = entry.base_sha256 if entry else None
        if found != digest:
            what = f"the record has {found}" if found else "the record has no digest of the base"
            yield ("base", "sha256", name), f"base.sha256 of {name} is {digest}, but {what}"

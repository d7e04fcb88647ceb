"""Check manifests without a checkpoint and without a network connection.

A manifest that breaks the grammar or the schema gives findings, not an error. The other rules report what the planner
would refuse once it has the base, and what it would do without a warning. Only the manifests and the known super
weights are read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from swsurgery.editing.conflicts import find_conflicts
from swsurgery.editing.targets import Expected, read_target
from swsurgery.errors import LookupFailed, ManifestError, escape_control, pluralise
from swsurgery.known import KnownCoordinate, KnownEntry, KnownExpert, KnownModel, own
from swsurgery.manifest.load import IN_MEMORY, LoadedManifest, ManifestLike, load_manifest
from swsurgery.manifest.operations import Edit, Restore, Scale, Set, Zero
from swsurgery.manifest.targets import SCALAR_FORMS, MeasuredValue
from swsurgery.progress import Reporter, require_reporter
from swsurgery.storage import dtypes
from swsurgery.storage.arguments import is_path, require_type
from swsurgery.storage.dtypes import DTYPES
from swsurgery.storage.numbers import format_exact
from swsurgery.verifying.findings import Finding
from swsurgery.verifying.formats import FindingReport
from swsurgery.verifying.lint_ranges import find_range_faults

SCALE_TOLERANCE = 2.0**-7
"""Maximum relative difference between the value that an edit expects and the known value.

Either of them may be rounded to BF16, the coarsest dtype in which values are published.
"""

_READ_AS = {4: ("F16", "BF16"), 8: ("F32",), 16: ("F64",)}
"""Maps the number of hexadecimal digits of an `expect` to the dtypes of this width.

There is no row for two digits, because too many dtypes have eight bits.
"""


def lint(
    manifests: ManifestLike | Sequence[ManifestLike], *, strict: bool = False, reporter: Reporter | None = None
) -> FindingReport:
    """Find what is wrong with manifests, offline and without a checkpoint.

    `manifests` is one manifest, or a list of them: paths, texts as bytes, dicts, or a Manifest. A folder stands for all
    files in it and its subfolders that end in .yaml or .yml. The findings are in the order of the manifests and their
    lines. With `strict`, a warning makes the answer "no", as an error does.

    Raises TypeError; ManifestError, which names all unreadable files and all folders without manifests.
    """
    require_reporter(reporter)
    require_type("strict", strict, bool)
    several = isinstance(manifests, list | tuple)
    given = cast("Sequence[ManifestLike]", manifests if several else [manifests])
    findings: list[Finding] = []
    unreadable: list[str] = []
    paths: list[ManifestLike] = []
    for each in given:
        try:
            paths += _list_manifests(each)
        except ManifestError as error:
            unreadable += error.faults
    different = [each for number, each in enumerate(paths) if each not in paths[:number]]
    for each in different:
        try:
            findings += lint_manifest(each)
        except ManifestError as error:
            unreadable += error.faults
    if unreadable:
        raise ManifestError.of(unreadable)
    count = pluralise(len(different), "manifest")
    names = [str(_name(each)) for each in different]
    return FindingReport(
        subject=names[0] if len(names) == 1 else count,
        command="lint",
        findings=tuple(findings),
        details={"manifests": names},
        rules=("manifest-invalid", *LINTS),
        headline=f"{count}: {_count_levels(findings)}",
        strict=strict,
    )


def _list_manifests(manifest: ManifestLike) -> list[ManifestLike]:
    """Return the manifests that an argument stands for: itself, or the YAML files in a folder and its subfolders.

    Hidden folders are left out, and links to folders are not followed. Raises ManifestError for a folder without YAML
    files.
    """
    if not isinstance(manifest, str | Path) or not os.path.isdir(manifest):
        return [Path(manifest) if isinstance(manifest, str) else manifest]
    found: list[ManifestLike] = []
    for folder, folders, names in os.walk(manifest):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(folder, name) for name in sorted(names) if name.endswith((".yaml", ".yml"))]
    if not found:
        raise ManifestError(
            "no manifest in this folder", manifest, "in a folder, lint reads files ending in .yaml or .yml"
        )
    return found


def _count_levels(findings: Sequence[Finding]) -> str:
    """Return the numbers of errors and warnings as text, such as "no errors, 3 warnings"."""
    errors = sum(finding.level == "error" for finding in findings)
    warnings = len(findings) - errors
    words = [pluralise(n, word) if n else f"no {word}s" for n, word in ((errors, "error"), (warnings, "warning"))]
    return ", ".join(words)


def lint_manifest(manifest: ManifestLike) -> list[Finding]:
    """Check one manifest. The findings are in the order of its lines. Raises ManifestError if it cannot be read."""
    path = _name(manifest)
    try:
        loaded = load_manifest(manifest)
    except ManifestError as error:
        return list(_convert_faults(error, path))
    reading = _Reading.of(loaded)
    found = [
        Finding(rule, message, manifest=str(path), line=line, column=column)
        for rule, check in LINTS.items()
        for (line, column), message in check(reading)
    ]
    return sorted(found, key=lambda finding: (finding.line or 0, finding.column or 0))


def _name(manifest: ManifestLike) -> Path:
    """Return the path by which the messages of `load_manifest` name this manifest."""
    if isinstance(manifest, LoadedManifest):
        return manifest.path
    return Path(manifest) if is_path(manifest) else IN_MEMORY


def _convert_faults(error: ManifestError, path: Path) -> Iterator[Finding]:
    """Convert the faults of `load_manifest`, such as "m.yaml:3:5: unknown field", to findings.

    Raises `error` if no fault has a position, which means that the file could not be read.
    """
    name = re.escape(escape_control(str(path)))
    matches = [re.fullmatch(rf"{name}(?::(\d+):(\d+))?: (.*)", fault, re.DOTALL) for fault in error.faults]
    if not any(match and match[1] for match in matches):
        raise error
    for match in filter(None, matches):
        line, column = (int(n) if n else None for n in match.groups()[:2])
        yield Finding("manifest-invalid", match[3], manifest=str(path), line=line, column=column)


LinePlace = tuple[int, int]
"""Line and column of a position in a manifest, both from 1."""


@dataclass(frozen=True)
class _Reading:
    """A manifest, and the known super weights that it concerns.

    `model` is the known model of the base, or None. If `same_values` is False, the base may have other values than this
    model, for example after fine-tuning. `entries[i]` is the known coordinate that edit i names, or None. `names[i]` is
    a name of the scalar of edit i; two edits of one name conflict. It is None for `known: all`, and for an edit of a
    region such as a row, whose name is in `regions[i]`. `misses` are positions and messages about models and
    coordinates that are not known.
    """

    loaded: LoadedManifest
    model: KnownModel | None
    same_values: bool
    entries: tuple[KnownCoordinate | None, ...]
    names: tuple[str | None, ...]
    regions: tuple[str | None, ...]
    misses: tuple[tuple[LinePlace, str], ...]

    @property
    def edits(self) -> list[Edit]:
        """Edits in the order of the manifest."""
        return self.loaded.manifest.edits

    def list_regions(self) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
        """List number and region of the edits that change regions, and of those that protect regions."""
        named = [(number, name) for number, name in enumerate(self.regions) if name is not None]
        changed = [one for one in named if self.edits[one[0]].writes]
        return changed, [one for one in named if not self.edits[one[0]].writes]

    def locate(self, *path: str | int) -> LinePlace:
        """Return the position of a field. If the field is missing, return that of the edit or section it belongs to."""
        return self.loaded.find_position(*path)

    @classmethod
    def of(cls, loaded: LoadedManifest) -> _Reading:
        """Look up the model and the known coordinates that a manifest names."""
        base = loaded.manifest.base
        misses: list[tuple[LinePlace, str]] = []
        entries: list[KnownCoordinate | None] = []
        names: list[str | None] = []
        regions: list[str | None] = []
        published = model = None
        try:
            published = model = own.identify(None, (base.repo_id,))
            model = own.identify(base.model, ()) if base.model else published
        except LookupFailed as error:
            place = loaded.positions[("base", "model") if base.model else ("base",)]
            misses += [(place, fault) for fault in error.faults]
        same_model = published is not None and model is not None and published.hf_id == model.hf_id
        same_values = base.repo_id is None or same_model
        for number, edit in enumerate(loaded.manifest.edits):
            name: str | None = None
            entry: KnownCoordinate | None = None
            region = None if edit.form.name in SCALAR_FORMS else _name_region(edit)
            try:
                if region is None:
                    target = read_target(edit)
                    found = target.find_entry(model)
                    name = found.id if found else None if edit.known else str(target)
                    if found is not None and (region := _name_part(found)):
                        name = None
                    elif isinstance(found, KnownCoordinate):
                        entry = found
            except LookupFailed as error:
                if model is not None or not misses:  # a model that was not found is reported once
                    place = loaded.find_position("edits", number, "known")
                    misses += [(place, fault) for fault in error.faults]
            entries.append(entry)
            names.append(name)
            regions.append(region)
        return cls(loaded, model, same_values, tuple(entries), tuple(names), tuple(regions), tuple(misses))


def _name_region(edit: Edit) -> str:
    """Name the row, column, neuron, expert, slice or tensors of an edit. Equal texts name equal regions."""
    if edit.slice is not None:
        axes = (axis.replace(" ", "") for axis in edit.slice.split(","))
        return f"{edit.tensor}[{', '.join(axes)}]"
    fields = (*edit.form.fields, *edit.form.optional)
    return edit.tensors or _name_fields(**{field: getattr(edit, field) for field in fields})


def _name_part(entry: KnownEntry) -> str | None:
    """Name the row, column or expert of an entry as `_name_region` does; None for the entry of a single scalar."""
    if isinstance(entry, KnownExpert):
        return _name_fields(layer=entry.layer, expert=entry.expert)
    if isinstance(entry, KnownCoordinate):
        return _name_fields(layer=entry.layer, row=entry.row, expert=entry.expert) if entry.col is None else None
    return _name_fields(layer=entry.layer, col=entry.col, expert=entry.expert)


def _name_fields(**fields: int | str | None) -> str:
    return ", ".join(f"{field} {value}" for field, value in fields.items() if value is not None)


# One function for each rule. Each yields positions and messages -----------------------------------------------------


def _find_duplicates(reading: _Reading) -> Iterator[tuple[LinePlace, str]]:
    writers, protectors = reading.list_regions()
    scalars = [(n, name) for n, name in enumerate(reading.names) if name is not None]
    for named in (scalars, writers, protectors):
        for misfit in find_conflicts(named):
            yield reading.locate("edits", misfit.number), f"edits[{misfit.number}]: {misfit.explain()}"


def _check_ranges(reading: _Reading) -> Iterator[tuple[LinePlace, str]]:
    for number, edit in enumerate(reading.edits):
        for field, fault in find_range_faults(edit, reading.model):
            yield reading.locate("edits", number, field), f"edits[{number}].{field}: {fault}"


def _report_misses(reading: _Reading) -> Iterator[tuple[LinePlace, str]]:
    yield from reading.misses


def _find_contradictions(reading: _Reading) -> Iterator[tuple[LinePlace, str]]:
    if not reading.same_values:
        return
    for number, (edit, entry) in enumerate(zip(reading.edits, reading.entries, strict=True)):
        if entry is None or entry.value is None or edit.expect is None:
            continue
        readings = _interpret(edit.expect)
        if readings and all(abs(value - entry.value) > SCALE_TOLERANCE * abs(entry.value) for value in readings):
            expected = edit.expect if isinstance(edit.expect, str) else format_exact(readings[0])
            message = (
                f"expects {expected}, but the known value is {format_exact(entry.value)} ({entry.dtype}) at {entry.id}"
            )
            yield reading.locate("edits", number, "expect"), f"edits[{number}].expect: {message}"


def _interpret(expect: float | str | MeasuredValue) -> list[float]:
    """Return the values that an `expect` can mean: bits are decoded as each dtype of their width. May be empty."""
    if isinstance(expect, str):
        names = _READ_AS.get(len(expect) - 2, ())
        return [float(dtypes.decode(DTYPES[name], dtypes.parse_bits(DTYPES[name], expect))) for name in names]
    if isinstance(expect, MeasuredValue):
        return [] if expect.dtype.startswith("F8") else [float(expect.value)]
    return [float(expect)]


def _check_bounds(reading: _Reading) -> Iterator[tuple[LinePlace, str]]:
    bounds = reading.loaded.manifest.check
    least, most = bounds.min_perplexity_ratio, bounds.max_perplexity_ratio
    if least is not None and most is not None and least > most:
        yield reading.locate("check"), f"check: the minimum ratio ({least:g}) is larger than the maximum ({most:g})"


def _find_no_effect(reading: _Reading) -> Iterator[tuple[LinePlace, str]]:
    changed, protected = reading.list_regions()
    numbers = {name: number for number, name in protected}
    for number, name in changed:
        if name in numbers:
            yield reading.locate("edits", number), f"edits[{number}]: edits[{numbers[name]}] protects all of {name}"
    for number, edit in enumerate(reading.edits):
        if isinstance(edit, Scale) and edit.factor == 1:
            yield reading.locate("edits", number, "factor"), f"edits[{number}].factor: 1 changes nothing (use protect)"
        elif isinstance(edit, Set | Zero) and edit.expect is not None and _get_written(edit) == _get_expected(edit):
            yield reading.locate("edits", number), f"edits[{number}]: writes the value that it expects (use protect)"


def _get_written(edit: Set | Zero) -> Expected:
    if isinstance(edit, Set):
        return edit.value if edit.bits is None else edit.bits.lower()
    return f"0x{'0' * (len(edit.expect) - 2)}" if isinstance(edit.expect, str) else 0


def _get_expected(edit: Set | Zero) -> Expected:
    if isinstance(edit.expect, MeasuredValue):
        return edit.expect.value
    return edit.expect.lower() if isinstance(edit.expect, str) else edit.expect


def _find_unguarded(reading: _Reading) -> Iterator[tuple[LinePlace, str]]:
    if reading.loaded.manifest.base.sha256:
        return  # the digests pin the shards, and thus every value
    for number, (edit, entry) in enumerate(zip(reading.edits, reading.entries, strict=True)):
        if not edit.writes or edit.expect is not None or isinstance(edit, Restore) or reading.regions[number]:
            continue  # the stored value is not known before a restore, and a region has no single value
        brought = edit.known == "all" or edit.known is not None and entry is not None and entry.value is not None
        if not brought:
            yield reading.locate("edits", number), f"edits[{number}]: overwrites whatever value is stored (add expect)"


def _check_pin(reading: _Reading) -> Iterator[tuple[LinePlace, str]]:
    base = reading.loaded.manifest.base
    if base.revision is None and not base.sha256:
        remedy = "add sha256" if base.repo_id is None else "add revision or sha256"
        yield (
            reading.locate("base"),
            f"base: it is not pinned, so another model would be edited without an error ({remedy})",
        )


def _check_unbounded(reading: _Reading) -> Iterator[tuple[LinePlace, str]]:
    bounds = reading.loaded.manifest.check
    unbounded = bounds.max_perplexity_ratio is None and bounds.min_perplexity_ratio is None
    if unbounded and any(edit.writes for edit in reading.edits):
        remedy = "add max_perplexity_ratio or min_perplexity_ratio"
        yield reading.locate("check"), f"check: without a bound, a model that the edits broke would pass ({remedy})"


LINTS: dict[str, Callable[[_Reading], Iterator[tuple[LinePlace, str]]]] = {
    "edit-duplicate": _find_duplicates,
    "edit-range": _check_ranges,
    "known-missing": _report_misses,
    "expect-contradicts": _find_contradictions,
    "bounds-impossible": _check_bounds,
    "edit-no-effect": _find_no_effect,
    "expect-missing": _find_unguarded,
    "base-unpinned": _check_pin,
    "bounds-missing": _check_unbounded,
}
"""Maps each rule that needs no checkpoint to the function that checks it.

To add a rule, write its function, its row here, its row in findings.py, and its paragraph in docs/ci.md.
"""

"""Turn the figures of tensors into findings: values that no trained weight should have, and copies of matrices.

Each finding follows from the figures, except that two tensors are reported as identical only after both were hashed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.errors import pluralise
from swsurgery.progress import Progress
from swsurgery.storage import dtypes
from swsurgery.storage.files import CHUNK, fill
from swsurgery.storage.shard import TensorInfo
from swsurgery.verifying.figures import (
    FLOAT16_LARGEST,
    Figures,
    Place,
    decode_constant,
    decode_largest,
)
from swsurgery.verifying.findings import Finding
from swsurgery.verifying.value_search import ValueSearch
from swsurgery.verifying.weight_kinds import (
    explain_unexamined,
    is_layer_matrix,
    is_plain_weight,
    is_trained_matrix,
    may_be_shared,
)

MAX_REPORTED = 20
"""Maximum number of tensors reported individually for one rule in one file."""

SUBNORMAL_SHARE = 0.1
"""Share of subnormal values above which a tensor is reported. In float16, weights with a standard deviation of 0.02
have a share of 0.002. Weights with a standard deviation of 0.0005 have a share of 0.1."""

RULES_OF_VALUES = ("non-finite", "constant-weights", "identical-weights", "dtype-overflow", "subnormal-weights")
"""Names of the rules about stored values."""

_Tensor = tuple[str, TensorInfo, Figures]


@dataclass(frozen=True)
class ValueReport:
    """The figures of all tensors of a checkpoint.

    `tensors` maps (file, name) to the tensor and its figures. `unexamined` maps the name of each tensor whose elements
    were not examined as numbers to the reason. `largest` is the largest finite magnitude of a weight, and the name of
    its tensor; None if there is no floating-point weight.
    """

    tensors: dict[tuple[str, str], tuple[TensorInfo, Figures]]
    unexamined: dict[str, str]
    largest: tuple[float, str] | None

    def to_json(self) -> dict[str, Any]:
        """Return the figures of each tensor by name, and the tensors that were not examined with the reasons."""
        figures: dict[str, Any] = {}
        for (file, name), (info, counted) in self.tensors.items():
            if name not in self.unexamined:
                figures[name] = {"file": file, "dtype": info.dtype.name, **counted.to_json(info.dtype)}
        return {"tensors": figures, "not_examined": dict(self.unexamined)}

    def describe(self) -> str:
        """Describe in one line what was examined."""
        examined = [n for _, n in self.tensors if n not in self.unexamined]
        line = f"values    {pluralise(len(examined), 'tensor')} examined"
        if self.largest:
            line += f"; the largest magnitude of a weight is {self.largest[0]:g} in {self.largest[1]}"
        if self.unexamined:
            name, why = next(iter(self.unexamined.items()))
            line += f"; {pluralise(len(self.unexamined), 'tensor')} not examined, such as {name}: {why}"
        return line


def make_report(search: ValueSearch) -> ValueReport:
    """Collect the figures of a checkpoint whose shards were all read."""
    tensors = {(file, info.name): (info, figures) for file, info, figures in search.list_figures()}
    reasons = ((info.name, explain_unexamined(search.checkpoint, info)) for info, _ in tensors.values())
    weights = (t for t in tensors.values() if is_plain_weight(search.checkpoint, t[0]))
    magnitudes = ((decode_largest(info.dtype, figures), info.name) for info, figures in weights)
    largest = max(((value, name) for value, name in magnitudes if value is not None), default=None)
    return ValueReport(tensors, {name: why for name, why in reasons if why is not None}, largest)


def list_not_finite(search: ValueSearch) -> list[Finding]:
    """Return one finding for each tensor that contains NaN or infinities, with the first such value.

    Packed codes that a quantiser stores in floating-point elements are no numbers and are left out.
    """
    found = []
    for file, info, figures in search.list_figures():
        if figures.bad is None or explain_unexamined(search.checkpoint, info):
            continue
        data = figures.bad[1]
        value = "NaN or infinite" if info.dtype.kind == "opaque" else str(dtypes.decode(info.dtype, data))
        count = figures.not_finite
        more = f", and {count - 1} more values in this tensor are not finite" if count > 1 else ""
        message = f"the value is {value} ({dtypes.format_bits(data)}){more}"
        found.append(_make_finding("non-finite", message, file, info, figures.bad))
    return list(_limit(found, "contain NaN or infinite values"))


def list_findings(search: ValueSearch, edited: frozenset[str], progress: Progress) -> list[Finding]:
    """Return the findings of all rules about values except `non-finite`.

    `edited` names the tensors in which an edit changed regions on purpose. They may be constant. Tensors whose figures
    are the same are read once more, because only their bytes can prove that they are identical.
    """
    checkpoint = search.checkpoint
    examined = [t for t in search.list_figures() if explain_unexamined(checkpoint, t[1]) is None]
    matrices = [t for t in search.list_figures() if t[1].name not in edited]
    constant = list(_find_constant(checkpoint, matrices))
    names = {finding.tensor for finding in constant}
    varied = [t for t in matrices if t[1].name not in names]
    return [
        *_limit(constant, "are constant"),
        *_limit(_find_identical(checkpoint, varied, progress), "are copies of other tensors"),
        *_limit(_find_beyond_float16(checkpoint, examined), "exceed the range of float16"),
        *_limit(_find_subnormal(checkpoint, examined), "have many subnormal values"),
    ]


def _find_constant(checkpoint: Checkpoint, tensors: Iterable[_Tensor]) -> Iterator[Finding]:
    for file, info, figures in tensors:
        value = decode_constant(info.dtype, figures)
        if value is not None and is_trained_matrix(checkpoint, info):
            yield _make_finding("constant-weights", f"every value of this matrix is {value}", file, info)


def _find_beyond_float16(checkpoint: Checkpoint, tensors: Iterable[_Tensor]) -> Iterator[Finding]:
    for file, info, figures in tensors:
        if figures.beyond is None or not is_plain_weight(checkpoint, info):
            continue
        data, count = figures.beyond[1], figures.beyond_float16
        value = dtypes.format_bits(data) if info.dtype.kind == "opaque" else str(dtypes.decode(info.dtype, data))
        verb = "is" if count == 1 else "are"
        what = f"{pluralise(count, 'value')} {verb} outside float16's range (up to {FLOAT16_LARGEST:,.0f})"
        message = f"{what}; the first is {value}"
        yield _make_finding("dtype-overflow", message, file, info, figures.beyond)


def _find_subnormal(checkpoint: Checkpoint, tensors: Iterable[_Tensor]) -> Iterator[Finding]:
    for file, info, figures in tensors:
        share = figures.subnormal / figures.values
        if share > SUBNORMAL_SHARE and is_trained_matrix(checkpoint, info):
            message = f"{share:.1%} of the values are subnormal in {info.dtype.name}, so they have fewer digits"
            yield _make_finding("subnormal-weights", message, file, info)


def _find_identical(checkpoint: Checkpoint, tensors: Iterable[_Tensor], progress: Progress) -> Iterator[Finding]:
    """Yield a finding for each matrix of a layer whose bytes are those of an earlier one."""
    suspects: dict[object, list[_Tensor]] = {}
    for entry in tensors:
        _, info, figures = entry
        if is_layer_matrix(checkpoint, info):
            suspects.setdefault((info.dtype.name, info.shape, figures), []).append(entry)
    groups = [group for group in suspects.values() if len(group) > 1]
    if not groups:
        return
    progress.start(sum(info.size for group in groups for _, info, _ in group), "B", "comparing similar tensors")
    try:
        for group in groups:
            first: dict[object, str] = {}
            for file, info, _ in group:
                original = first.setdefault(_hash_tensor(checkpoint, file, info, progress), info.name)
                if original != info.name and not may_be_shared(checkpoint.config, info.name, original):
                    yield _make_finding("identical-weights", f"its bytes are those of {original}", file, info)
    finally:
        progress.close()


def _hash_tensor(checkpoint: Checkpoint, file: str, info: TensorInfo, progress: Progress) -> bytes:
    """Return the sha256 of the bytes of one tensor."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(CHUNK, info.size)))
    start = checkpoint.shards[file].data_start + info.data_offsets[0]
    with checkpoint.get_file(file).source.open() as opened:
        for at in range(0, info.size, CHUNK):
            view = buffer[: info.size - at]
            fill(opened, view, start + at)
            digest.update(view)
            progress.advance(len(view))
    return digest.digest()


def _make_finding(rule: str, message: str, file: str, info: TensorInfo, place: Place | None = None) -> Finding:
    index = None if place is None else info.unflatten(place[0])
    return Finding(rule, message, file, info.name, index)


def _limit(findings: Iterable[Finding], what: str) -> Iterator[Finding]:
    """Yield up to MAX_REPORTED findings for each file, then one for each file with more, which counts the others."""
    left_out: dict[str | None, tuple[str, int]] = {}
    seen: dict[str | None, int] = {}
    for finding in findings:
        seen[finding.file] = seen.get(finding.file, 0) + 1
        if seen[finding.file] <= MAX_REPORTED:
            yield finding
        else:
            left_out[finding.file] = (finding.rule, seen[finding.file] - MAX_REPORTED)
    for file, (rule, count) in left_out.items():
        yield Finding(rule, f"{count} more tensors of this file {what}", file)

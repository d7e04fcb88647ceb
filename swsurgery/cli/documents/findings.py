"""Describe the documents of `verify`, `preflight`, `lint` and `sign`."""

from __future__ import annotations

from typing import Literal

from swsurgery.cli.documents.document import ABSENT, Document, DocumentPart, PlainNumber


class FindingItem(DocumentPart):
    """One violation of a rule. `manifest`, `line` and `column` exist if it concerns a manifest."""

    rule: str
    level: Literal["error", "warning"]
    file: str | None
    tensor: str | None
    index: list[int] | None
    message: str
    manifest: str = ABSENT
    line: int | None = ABSENT
    column: int | None = ABSENT


class FindingDocument(Document):
    """Findings about `subject`. `ok` is true if no finding is an error and something could be compared (`decided`).

    `rules` are the names of the rules that were checked. `answer` is the answer in one line.
    """

    ok: bool
    decided: bool
    subject: str
    answer: str = ABSENT
    findings: list[FindingItem]
    rules: list[str]
    swsurgery_version: str


class LintDocument(FindingDocument):
    """Findings in manifests, and the names of the manifests."""

    manifests: list[str]


class OtherShape(DocumentPart):
    """A tensor whose stored shape is not the expected one."""

    name: str
    stored: list[int]
    expected: list[int]


class ExpectedNames(DocumentPart):
    """The names for which a checkpoint and the model of transformers disagree."""

    missing: list[str]
    unexpected: list[str]
    other_shapes: list[OtherShape]
    failure: str | None


class CompletenessItem(DocumentPart):
    """Whether all layers, experts and tensors are there. `undecided` is the reason why this is unknown."""

    complete: bool
    layers: int | None
    tensors: int
    shards: int
    bytes: int
    undecided: str | None
    not_examined: list[str]
    transformers: ExpectedNames | None


class PreflightDocument(FindingDocument):
    """The findings of a check of headers and index alone."""

    complete: CompletenessItem


class ManifestItem(DocumentPart):
    """The manifest of which the checkpoint was proved to be the result, and the base that was compared."""

    path: str
    base: str | None


class FoundItem(DocumentPart):
    """An element of the same matrix that has the value of a lost super weight."""

    index: list[int]
    value: float


class KeptItem(DocumentPart):
    """The state of one known super weight. `ratio` is stored / known. If `held` is false, the state decides nothing."""

    id: str
    status: str
    causal_alone: str
    state: Literal["kept", "close", "changed", "suspicious", "lost", "present", "declared", "unreadable"]
    held: bool
    tensor: str | None
    index: list[int] | None
    file: str | None
    known: float | None
    stored: PlainNumber | None
    dtype: str | None
    ratio: PlainNumber | None
    reason: str | None
    layout: str | None
    code: int | None
    step: PlainNumber | None
    high_precision: bool
    found: FoundItem | None


class SizesItem(DocumentPart):
    """The sizes of the model that config.json or the stored shapes state."""

    layers: int | None
    hidden: int | None
    intermediate: list[int]
    vocabulary: int | None


class IdentifiedItem(DocumentPart):
    """How the known model was identified. The numbers of values exist if they identified it."""

    by: Literal["name", "repository", "values"]
    text: str
    sizes: SizesItem
    fitting: int = ABSENT
    compared: int = ABSENT
    twins: list[str] = ABSENT


class SurvivalItem(DocumentPart):
    """The states of the known super weights. Of those in `rows` only the row is known, so they were not read."""

    model: str
    tolerance: float
    decided: bool
    coordinates: list[KeptItem]
    rows: list[str]
    identified: IdentifiedItem | None


class GuardedItem(DocumentPart):
    """A scalar that the manifest protects. `edit` is the number of the edit, from 0.

    Only a quantised weight has `layout`, `code` and `step`, the distance to the next value that it can have.
    """

    edit: int
    state: Literal["kept", "lost", "unreadable"]
    tensor: str | None
    index: list[int] | None
    file: str | None
    dtype: str | None
    layout: str | None
    code: int | None
    step: float | None
    origin: str | None
    message: str
    stored: PlainNumber | None
    expected: PlainNumber | None


class GuardedPart(DocumentPart):
    """A region that the manifest protects, and how many of its scalars were kept and lost."""

    edit: int
    target: str
    tensor: str | None
    bounds: list[tuple[int, int]] | None
    file: str | None
    scalars: int
    kept: int
    lost: int
    message: str | None


class GuardItem(DocumentPart):
    """The scalars and regions that a manifest protects."""

    manifest: str
    tolerance: float
    scalars: list[GuardedItem]
    regions: list[GuardedPart] = ABSENT


class TensorFigures(DocumentPart):
    """Counts of the values of a tensor, and its largest finite magnitude."""

    file: str
    dtype: str
    values: int
    nan: int
    infinite: int
    zeros: int
    subnormal: int
    beyond_float16: int
    largest_magnitude: float | None


class ValuesItem(DocumentPart):
    """The figures of every tensor, and the tensors that were not examined with the reasons."""

    tensors: dict[str, TensorFigures]
    not_examined: dict[str, str]


class VerifyDocument(FindingDocument):
    """What was proved about a checkpoint.

    The fields from `files` to `compared_with_base` exist if the checkpoint has a record: numbers of files, edited and
    protected scalars, and the names of the files that were proved, that have digests which were not computed for this
    record, that have no digest, that were not read, that are only in the base's repository, or that the record does not
    list. `changes`, `protected_regions` and `needs_base` exist if regions were edited. The other fields exist if they
    were asked for.
    """

    finite: bool
    notes: list[str]
    files: int = ABSENT
    edits: int = ABSENT
    protected: int = ABSENT
    proved: list[str] = ABSENT
    unverified: list[str] = ABSENT
    unhashed: list[str] = ABSENT
    unread: list[str] = ABSENT
    elsewhere: list[str] = ABSENT
    uncovered: list[str] = ABSENT
    compared_with_base: bool = ABSENT
    changes: int = ABSENT
    protected_regions: int = ABSENT
    needs_base: list[str] = ABSENT
    manifest: ManifestItem = ABSENT
    known: SurvivalItem = ABSENT
    protected_values: GuardItem = ABSENT
    values: ValuesItem = ABSENT
    complete: CompletenessItem = ABSENT


class SignedDocument(Document):
    """The checkpoint that was signed, and the file with its signature."""

    checkpoint: str
    signature: str

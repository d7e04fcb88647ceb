"""Describe the documents of `inspect`, `diff` and `revert`."""

from __future__ import annotations

from typing import Literal

from swsurgery.cli.documents.document import ABSENT, Document, DocumentPart, ExpertNumber, StoredNumber


class ListedFile(DocumentPart):
    """A file of a checkpoint. `size` is in bytes, and `shard` is true if it contains tensors that are read."""

    file: str
    size: int
    shard: bool


class ListedTensor(DocumentPart):
    """A stored tensor: its file, dtype, stored shape and size in bytes."""

    tensor: str
    file: str
    dtype: str
    shape: list[int]
    bytes: int


class ListedStep(DocumentPart):
    """One of the manifests that were applied, with each of its edits in one line."""

    number: int
    name: str | None
    edits: list[str]
    created: int | None
    swsurgery_version: str
    manifest_sha256: str
    manifest: str


class CountedLayout(DocumentPart):
    """A layout of quantised weights, and the number of weights that have it; null if it could not be decided."""

    layout: str | None
    weights: int
    reason: str | None


class QuantisedWeights(DocumentPart):
    """The layouts of the quantised weights, and the matrices in high precision by dtype. `text` says both in lines."""

    text: list[str]
    layouts: list[CountedLayout]
    high_precision: dict[str, list[str]]


class CheckpointDocument(Document):
    """A checkpoint: its files, tensors, further copies of the weights, and the manifests that were applied."""

    checkpoint: str
    model_type: str | None
    repo_id: str | None
    revision: str | None
    files: list[ListedFile]
    tensors: list[ListedTensor]
    copies: list[str]
    disagreements: dict[str, str]
    notes: list[str]
    quantised: QuantisedWeights | None
    steps: list[ListedStep]


class TensorDocument(Document):
    """One stored tensor. `note` is the reason why its numbers are not weights."""

    tensor: str
    file: str
    dtype: str
    shape: list[int]
    bytes: int
    data_offsets: list[int]
    note: str = ABSENT


class StoredPart(DocumentPart):
    """A tensor that stores a part of a quantised matrix."""

    tensor: str
    file: str
    dtype: str
    shape: list[int]


class MatrixDocument(Document):
    """A matrix that is stored as packed codes, and the tensors that store it."""

    tensor: str
    layout: str
    shape: list[int]
    stored: list[StoredPart]


class StoredElement(DocumentPart):
    """A stored number that contains a code. `bits` is null if it does not fill whole bytes."""

    tensor: str
    index: list[int]
    bits: str | None


class ScalarDocument(Document):
    """One scalar: where it is stored, its value and its bits.

    `layer`, `row`, `col` and `expert` exist for scalars of a down projection. `code`, `scale`, `step` and `layout`
    exist for elements of quantised matrices. `bits` exists for a scalar that fills bytes of its own, `weight` if its
    value is multiplied by a scale, and `stored` for an element that is packed with others.
    """

    tensor: str
    file: str
    dtype: str
    shape: list[int]
    index: list[int]
    offset: int | None
    value: StoredNumber
    bits: str = ABSENT
    note: str = ABSENT
    layer: int = ABSENT
    row: int = ABSENT
    col: int = ABSENT
    expert: ExpertNumber = ABSENT
    layout: str = ABSENT
    code: int | None = ABSENT
    scale: float | None = ABSENT
    step: float | None = ABSENT
    weight: StoredNumber = ABSENT
    stored: list[StoredElement] = ABSENT


class ChangedRun(DocumentPart):
    """Neighbouring changed scalars, with the values of the first one in A and B.

    `count` and `last`, the index of the last scalar, exist if there are several.
    """

    tensor: str
    index: list[int]
    old: StoredNumber
    new: StoredNumber
    count: int = ABSENT
    last: list[int] = ABSENT


class ChangedTensor(DocumentPart):
    """The number of changed scalars of a tensor, and of all its scalars."""

    changed: int
    of: int


class DifferenceDocument(Document):
    """The differences between two checkpoints. `truncated` is true if `changes` does not list every change."""

    changes: list[ChangedRun]
    tensors: dict[str, ChangedTensor]
    mismatched: dict[str, str]
    files: dict[str, Literal["same", "changed", "only in a", "only in b"]]
    truncated: bool
    notes: list[str]


class RevertedDocument(Document):
    """The directory in which the base was restored."""

    output: str
    notes: list[str]

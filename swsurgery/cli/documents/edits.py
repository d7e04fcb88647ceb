"""Describe the documents of `apply` and `check`."""

from __future__ import annotations

from typing import Any, Literal

from swsurgery.checkpoint.record_entries import (
    ChangeRecord,
    CodeRecord,
    EditRecord,
    RegionRecord,
    ScalarRecord,
    UndoRecord,
)
from swsurgery.cli.documents.document import ABSENT, Document, DocumentPart, Number, ProtocolItem
from swsurgery.cli.documents.tasks import TaskScores


class PeakItem(DocumentPart):
    """The hidden state of largest magnitude after any layer. `token` and `window` count from 0."""

    layer: int
    token: int
    channel: int
    value: Number
    window: int


class SideItem(DocumentPart):
    """The figures of one model. `finite` is true if every logit was finite.

    `largest_by_layer` contains the hidden state of largest magnitude after each layer, with its sign.
    `word_perplexity` exists if the protocol counts words.
    """

    perplexity: Number
    word_perplexity: Number = ABSENT
    finite: bool
    super_activation: PeakItem | None
    largest_by_layer: list[Number]


class StopwordMass(DocumentPart):
    """The mean probability of all stop words together, of both models."""

    base: Number
    patched: Number


class ContinuationsItem(DocumentPart):
    """The most likely next tokens of both models after a prompt, each with its probability."""

    prompt: str
    base: list[tuple[str, Number]]
    patched: list[tuple[str, Number]]


class MeasuredText(DocumentPart):
    """The text that was scored. Records of earlier versions have no protocol. `words` exists if they are counted."""

    sha256: str
    windows: int
    window_tokens: int
    scored_tokens: int
    protocol: ProtocolItem = ABSENT
    words: int = ABSENT


class BoundsItem(DocumentPart):
    """Limits on the perplexity ratio."""

    max_perplexity_ratio: Number
    min_perplexity_ratio: Number


class RoundedItem(DocumentPart):
    """The figures of one model with the inputs of its linear layers rounded."""

    side: Literal["base", "patched"]
    activations: str
    perplexity: Number
    ratio: Number
    kl: Number
    stopword_mass: Number
    finite: bool


class HeldItem(DocumentPart):
    """The mean product of a scalar and its input in the base: in first tokens of windows, and in all other tokens."""

    tensor: str
    index: list[int]
    first: Number
    others: Number


class ControlItem(DocumentPart):
    """The figures of the base with another change than the edit. Intervals are null if there are too few windows.

    `ratio` is the perplexity divided by that of the base. `edit_over_control` is the perplexity of the patched model
    divided by that of the control. `smallest_magnitude` exists for outliers and `held` for the mean.
    """

    control: Literal["mean", "outliers"]
    scalars: int
    perplexity: Number
    ratio: Number
    ratio_low: Number
    ratio_high: Number
    edit_over_control: Number
    edit_over_control_low: Number
    edit_over_control_high: Number
    kl: Number
    finite: bool
    meaning: str
    smallest_magnitude: Number = ABSENT
    held: list[HeldItem] = ABSENT


class GenerationItem(DocumentPart):
    """How both models continue a prompt, always by the most likely token. `base` is null without a base."""

    prompt: str
    base: str | None
    patched: str


class ForwardCheck(DocumentPart):
    """The figures of the forward check. `kl` is KL(base || patched) in nats per token. Without a base it is null.

    `ratio_low` and `ratio_high` are the ends of the 95% interval of `perplexity_ratio`. `controls`, `generations` and
    `tasks` exist if they were asked for, and `notes` if something limits the figures, such as a short text.
    """

    base: SideItem | None
    patched: SideItem
    perplexity_ratio: Number
    ratio_low: Number
    ratio_high: Number
    kl: Number
    stopword_mass: StopwordMass
    prompts: list[ContinuationsItem]
    text: MeasuredText
    bounds: BoundsItem
    failures: list[str]
    ok: bool
    method: str
    device: str
    dtype: str
    versions: dict[str, str]
    controls: list[ControlItem] = ABSENT
    rounded_activations: list[RoundedItem] = ABSENT
    generations: list[GenerationItem] = ABSENT
    tasks: TaskScores = ABSENT
    notes: list[str] = ABSENT
    compared: bool = ABSENT


class CheckDocument(ForwardCheck, Document):
    """A model and its base on the same text. If `compared` is false, there was no base."""

    compared: bool


class WeightCheck(DocumentPart):
    """The comparison of the stored bytes with the plan."""

    changed_scalars: int
    protected_scalars: int
    shards: list[str]


class ForwardRecord(ForwardCheck):
    """The result of the sanity check of `apply`, if the model was run."""

    kind: Literal["forward"]
    reason: None
    weights: WeightCheck


class WeightRecord(DocumentPart):
    """The result of the sanity check of `apply`, if the model was not run, with the reason."""

    kind: Literal["weights"]
    reason: str
    weights: WeightCheck


class NoCheck(DocumentPart):
    """The sanity check of `apply` was turned off."""

    kind: Literal["off"]
    reason: str


class AppliedFileItem(DocumentPart):
    """A file of the output, its digests before and after, and how it was written."""

    size: int
    base_sha256: str | None
    sha256: str | None
    how: str
    unverified: bool = ABSENT


class AppliedDocument(Document):
    """The result of an edit: the edited scalars (`splices`), protected scalars and regions, and every file.

    `changes`, `protected_regions` and `undo` exist if regions were edited, and `codes` if elements of quantised
    matrices were. `scalars` is the number of scalars that all tensors of the checkpoint store.
    """

    output: str
    splices: list[EditRecord]
    protected: list[ScalarRecord]
    omitted: list[str]
    notes: list[str]
    check: ForwardRecord | WeightRecord | NoCheck
    scalars: int | None
    files: dict[str, AppliedFileItem]
    changes: list[ChangeRecord] = ABSENT
    protected_regions: list[RegionRecord] = ABSENT
    undo: UndoRecord | None = ABSENT
    codes: list[CodeRecord] = ABSENT


class PlannedCode(CodeRecord):
    """An element of a quantised matrix to edit. `error` is the rounding error."""

    error: float


class PlannedRegion(DocumentPart):
    """A region to protect. `bounds` has the first index and the index after the last one of each axis."""

    target: str
    file: str
    tensor: str
    bounds: list[tuple[int, int]]
    dtype: str
    scalars: int
    bytes: int


class PlannedRewrite(PlannedRegion):
    """A region to change by an operation with options. `edit` is the number of the edit in the manifest, from 0."""

    edit: int
    op: str
    options: dict[str, Any]


class PlannedPins(DocumentPart):
    """The pinned files whose digests were checked, and those that were not."""

    checked: list[str]
    not_checked: list[str]


class PlanDocument(Document):
    """The plan of an edit (`apply --dry-run`)."""

    output: None
    splices: list[EditRecord]
    protected: list[ScalarRecord]
    omitted: list[str]
    notes: list[str]
    check: None
    scalars: int | None
    codes: list[PlannedCode] = ABSENT
    rewrites: list[PlannedRewrite] = ABSENT
    protected_regions: list[PlannedRegion] = ABSENT
    pins: PlannedPins = ABSENT


class PinnedDocument(Document):
    """A manifest with its pins: the whole text, the fields that were added, and the file that was written, or null."""

    manifest: str
    output: str | None
    added: list[str]
    text: str

"""Describe the documents of `scan`, `sweep` and `compare`."""

from __future__ import annotations

from typing import Any, Literal

from swsurgery.cli.documents.document import (
    ABSENT,
    Document,
    DocumentPart,
    ExpertNumber,
    Number,
    PlainNumber,
    ProtocolItem,
)
from swsurgery.cli.documents.tasks import TaskScores


class EffectItem(DocumentPart):
    """The effect of zeroing: the perplexity ratio with its 95% interval, and the mean KL in nats per token."""

    ratio: PlainNumber
    low: PlainNumber | None
    high: PlainNumber | None
    kl: PlainNumber


class ScalarItem(DocumentPart):
    """A candidate: one scalar of a down projection, and what the method measured of it.

    `role` is "creates" if the scalar makes an activation, "removes" if it makes one small again, and null if the method
    does not know. `verdict`, `alone`, `without` and `listed` exist after a causal test. `listed` is false for a scalar
    of the same column that the method did not list itself.
    """

    tensor: str
    index: list[int]
    layer: int
    row: int
    col: int
    expert: ExpertNumber
    value: PlainNumber
    score: PlainNumber
    rank: int
    z: PlainNumber | None
    input_spike: PlainNumber | None
    output_spike: PlainNumber | None
    share: PlainNumber | None
    prompts: int | None
    round: int | None
    role: Literal["creates", "removes"] | None
    verdict: str = ABSENT
    alone: EffectItem = ABSENT
    without: EffectItem | None = ABSENT
    listed: bool = ABSENT


class ExpertShareItem(DocumentPart):
    """The share of an MLP's output that one expert contributes."""

    expert: ExpertNumber
    share: PlainNumber


class CauseItem(DocumentPart):
    """What raises an activation in one layer: its kind, the value that the layer adds, and the cause's share of it.

    `shares` contains the shares of the scalars [row, col] of `cols` in the MLP's output. `half` is the number of
    scalars of the row that contribute half of it.
    """

    kind: Literal["scalar", "row", "neuron", "expert", "MLP", "attention", "layer", "embedding", "several layers"]
    layer: int
    added: PlainNumber
    share: PlainNumber
    expert: ExpertNumber
    row: int | None
    cols: list[int]
    shares: list[PlainNumber]
    half: int | None
    experts: list[ExpertShareItem]


class AppearanceItem(DocumentPart):
    """One time that an activation appears: the layers after which it is massive, and what makes and removes it.

    `before` contains the layers with full attention that receive it, in a hybrid model.
    """

    first: int
    last: int
    value: PlainNumber
    before: list[int]
    made_by: str | None
    removed_by: str | None


class ActivationItem(DocumentPart):
    """A residual channel that is massive after each layer from `first` through `last`, and what makes it.

    A recurring activation does not persist: it appears before layers with full attention, at the times in
    `appearances`. If `stream` is "shared MLP", it is in the output of an MLP that several layers share, and its
    appearances are the layers that use the MLP, which is stored in `layer`.

    `layer` is the layer that adds most, `made_by` describes what makes the activation there, and `ratio` is the
    magnitude of `value` in medians of its layer. `side` is true for a side effect of a larger activation.
    """

    layer: int
    last: int
    channel: int
    value: PlainNumber
    peak: int
    token: int
    prompt: int
    prompts: int
    first: int | None
    ratio: PlainNumber | None
    side: bool
    recurring: bool
    made_by: str | None
    causes: list[CauseItem]
    appearances: list[AppearanceItem]
    stream: Literal["residual", "shared MLP"]


class LargestItem(DocumentPart):
    """The hidden state of largest magnitude in one prompt, and the layers where it rises most and falls below half."""

    prompt: int
    bos: bool
    value: PlainNumber
    layer: int
    token: int
    channel: int
    ratio: PlainNumber
    up: int
    down: int | None


class PublishedMaximumItem(DocumentPart):
    """The largest activation that a publication states for the model."""

    model: str
    value: PlainNumber
    layer: int | None
    place: str
    source: str
    measured_on: str | None


class PassportItem(DocumentPart):
    """The largest activation of each prompt, with and without BOS, beside the published value."""

    largest: list[LargestItem]
    published: PublishedMaximumItem | None


class CoordinateItem(DocumentPart):
    """One scalar: a tensor and an index in its stored shape."""

    tensor: str
    index: list[int]


class ExpertItem(DocumentPart):
    """One expert of a layer."""

    layer: int
    expert: int | Literal["shared"]


class JointItem(DocumentPart):
    """Scalars or experts that matter together, and the effect of zeroing all of them."""

    coordinates: list[CoordinateItem] = ABSENT
    experts: list[ExpertItem] = ABSENT
    effect: EffectItem


class UnreadItem(DocumentPart):
    """A layer that was not read completely: the names of its unread matrices, and the numbers of its unread experts."""

    layer: int
    experts: list[int]
    tensors: list[str]


class ProfileItem(DocumentPart):
    """The largest values in each layer, over all prompts: inputs and outputs of the down projection, hidden states."""

    inputs: list[PlainNumber]
    outputs: list[PlainNumber]
    residuals: list[PlainNumber]


class ColumnNullItem(DocumentPart):
    """The perplexity ratios of other scalars of a column, zeroed alone, and in addition to all candidates."""

    layer: int
    expert: ExpertNumber
    col: int
    alone: list[PlainNumber]
    added: list[PlainNumber]


class DoseItem(EffectItem):
    """The effect of multiplying all candidates by `factor` at once."""

    factor: float


class RunConditions(DocumentPart):
    """The conditions of a measurement: the text on which the model was run, the dtype and the device."""

    windows: int
    window_tokens: int
    scored_tokens: int
    text_sha256: str
    protocol: ProtocolItem
    dtype: str
    device: str


class FamiliesItem(DocumentPart):
    """The numbers of effects that the scan tested, alone and jointly. Holm's method corrects for each number."""

    alone: int
    jointly: int


class ConfirmationItem(RunConditions):
    """The conditions of the causal test, the effect of zeroing all candidates, and the ratios of random ones.

    `column_nulls` and `doses` exist for scalars, and `joint_null_ratios` for experts.
    """

    together: EffectItem
    null_ratios: list[PlainNumber]
    column_nulls: list[ColumnNullItem] = ABSENT
    doses: list[DoseItem] = ABSENT
    joint_null_ratios: list[PlainNumber] = ABSENT
    part_nulls: list[PartNullItem] = ABSENT
    base_perplexity: PlainNumber
    families: FamiliesItem


class PartItem(DocumentPart):
    """A part of the model that creates persistent activations in `channels`, and the effect of zeroing it.

    `number` is the row, the neuron, or the channel of attention or of the embedding; it is null for an expert. `layer`
    is null for the embedding. `regions` contains the stored scalars of the part, and `added` the largest value that it
    adds to a channel. `verdict`, `alone` and `without` exist after a causal test.
    """

    kind: Literal["row", "neuron", "expert", "attention", "embedding"]
    layer: int | None
    expert: ExpertNumber
    number: int | None
    channels: list[int]
    added: PlainNumber
    regions: list[str]
    verdict: str = ABSENT
    alone: EffectItem = ABSENT
    without: EffectItem | None = ABSENT


class PartNullItem(DocumentPart):
    """The perplexity ratios of random parts of one kind and layer, each zeroed alone."""

    kind: Literal["row", "neuron", "expert", "attention", "embedding"]
    layer: int | None
    ratios: list[PlainNumber]


class ScanDocument(Document):
    """What a scan found. `profile`, `prompts` and `passport` exist if prompts were run.

    `answer` is "found" if `super_weights`, `found_parts` or, in a scan by experts, `super_experts` is not empty. These
    lists contain what the causal test found needed or could not judge; without a causal test, they contain everything
    that the scan lists in `candidates`, `parts` and `experts`.
    """

    method: Literal["activations", "weights", "experts"]
    model_type: str
    layers: int
    answer: Literal["found", "none", "undecided"]
    unread: list[UnreadItem]
    super_weights: list[ScalarItem]
    candidates: list[ScalarItem]
    removers: list[ScalarItem]
    parts: list[PartItem]
    found_parts: list[PartItem]
    super_activations: list[ActivationItem]
    joint_sets: list[JointItem]
    notes: list[str]
    settings: dict[str, Any]
    profile: ProfileItem = ABSENT
    prompts: list[str] = ABSENT
    passport: PassportItem = ABSENT
    part_confirmation: ConfirmationItem = ABSENT
    confirmation: ConfirmationItem = ABSENT


class ExpertCandidateItem(ExpertItem):
    """A candidate for a super expert, and the scalar `cause` with the largest share of its output."""

    output: PlainNumber
    row: int
    token: int
    prompt: int
    prompts: int
    state: PlainNumber
    cause: ScalarItem
    verdict: str = ABSENT
    alone: EffectItem = ABSENT
    without: EffectItem | None = ABSENT


class ExpertOutput(ExpertItem):
    """The output of largest magnitude of an expert."""

    output: PlainNumber


class ExpertScanDocument(ScanDocument):
    """What a scan for super experts found."""

    super_experts: list[ExpertCandidateItem]
    experts: list[ExpertCandidateItem]
    largest: list[ExpertOutput]


class PointItem(DocumentPart):
    """The figures of a model whose scalars are multiplied by `factor`, and the ends of two 95% intervals."""

    factor: float
    perplexity: PlainNumber
    ratio: PlainNumber
    kl: PlainNumber
    stopword_mass: PlainNumber
    finite: bool
    peak: PlainNumber
    ratio_low: PlainNumber | None
    ratio_high: PlainNumber | None
    kl_low: PlainNumber | None
    kl_high: PlainNumber | None
    word_perplexity: PlainNumber = ABSENT


class SweepDocument(Document, RunConditions):
    """The quality of a model as a function of the factor. `base` has the figures of the model as stored.

    `model` is its repository or directory, and `revision` its commit if that is known.
    """

    model: str
    revision: str | None
    manifest: str
    manifest_sha256: str
    swsurgery_version: str
    coordinates: list[CoordinateItem]
    regions: list[str] = ABSENT
    base: PointItem
    points: list[PointItem]
    method: str


class ComparedItem(DocumentPart):
    """The figures of the base (`manifest` null) or of the base with the edits of one manifest.

    With `control`, they are those of the base with a control of these edits, and `meaning` says what they mean. Its
    `changed_bytes`, `norm` and `relative_norm` are null.
    """

    manifest: str | None
    activations: str
    changed_scalars: int
    changed_bytes: int | None
    norm: Number
    relative_norm: Number
    perplexity: Number
    ratio: Number
    ratio_low: Number
    ratio_high: Number
    kl: Number
    kl_low: Number
    kl_high: Number
    stopword_mass: Number
    finite: bool
    word_perplexity: Number = ABSENT
    control: str = ABSENT
    meaning: str = ABSENT


class ComparisonDocument(Document, RunConditions):
    """The figures of a base and of several edits of it, on the same text."""

    version: Literal[1]
    base: str
    models: list[ComparedItem]
    method: str
    tasks: TaskScores = ABSENT

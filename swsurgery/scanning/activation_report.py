"""Define the results about massive activations: which ones persist, what creates them, and the largest of each prompt.

All results are frozen. This module must not import torch, and it reads no files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from swsurgery.checkpoint.architectures import ExpertChoice
from swsurgery.scanning.causal_report import convert_to_plain

CauseKind = Literal["scalar", "row", "neuron", "expert", "MLP", "attention", "layer", "embedding", "several layers"]
"""What creates a persistent activation. "row" stands for several scalars of one row, none of which makes the activation
alone. "neuron" stands for one column of a down projection that makes several channels massive. "MLP" stands for an MLP
whose output is not explained by its stored weights. "layer" stands for a layer whose MLP was not observed, so that
its part cannot be told from that of the attention."""

Stream = Literal["residual", "shared MLP"]
"""Where an activation is: in the residual stream, or in the output of an MLP that several layers share (Zamba)."""


@dataclass(frozen=True)
class ExpertShare:
    """The share of an MLP's output that one expert contributes, after the router's weight."""

    expert: ExpertChoice
    share: float

    def to_json(self) -> dict[str, Any]:
        return {"expert": self.expert, "share": convert_to_plain(self.share)}


@dataclass(frozen=True)
class Cause:
    """What raises a persistent activation in one layer.

    `added` is the value that the layer adds to the hidden state, and `share` the part of it that the cause contributes.
    `expert`, `row` and `cols` identify the scalars with the largest contributions, and `shares` contains their shares
    of the MLP's output. `half` is the number of scalars of the row that together contribute half of that output.
    `experts` contains the shares of the experts, the largest first. Fields that do not apply are None or empty.
    """

    kind: CauseKind
    layer: int
    added: float
    share: float
    expert: ExpertChoice = None
    row: int | None = None
    cols: tuple[int, ...] = ()
    shares: tuple[float, ...] = ()
    half: int | None = None
    experts: tuple[ExpertShare, ...] = ()

    def to_json(self) -> dict[str, Any]:
        plain = {key: convert_to_plain(value) for key, value in vars(self).items()}
        return plain | {"experts": [one.to_json() for one in self.experts]}

    def describe(self) -> str:
        """Describe the cause in a few words, such as "layer 11 [507, 1229] 0.73"."""
        where = f"layer {self.layer}"
        matrix = where if self.expert is None else f"{where} expert {self.expert}"
        if self.kind == "scalar":
            scalars = (f"[{self.row}, {c}] {s:.2f}" for c, s in zip(self.cols, self.shares, strict=True))
            return f"{matrix} {', '.join(scalars)}"
        if self.kind == "neuron":
            return f"{matrix} neuron {self.cols[0]}"
        if self.kind == "row":
            several = "1 scalar makes" if self.half == 1 else f"{self.half} scalars make"
            return f"{matrix} row {self.row} ({several} half)"
        if self.kind == "expert":
            shares = ", ".join(f"{one.expert} ({one.share:.2f})" for one in self.experts)
            return f"{where} expert{'s' if len(self.experts) > 1 else ''} {shares}"
        if self.kind in ("embedding", "several layers"):
            return self.kind
        return where if self.kind == "layer" else f"{where} {self.kind}"


@dataclass(frozen=True)
class Appearance:
    """One time that an activation appears: it is massive after each layer from `first` through `last`.

    `value` is its largest state, with its sign. `before` contains the layers with full attention that receive the
    massive state, if the model is a hybrid. `made_by` is what makes the state, and `removed_by` is what removes it in
    layer `last` + 1; None if it persists to the end or fades over several layers.
    """

    first: int
    last: int
    value: float
    before: tuple[int, ...] = ()
    made_by: Cause | None = None
    removed_by: Cause | None = None

    def to_json(self) -> dict[str, Any]:
        plain = {key: convert_to_plain(value) for key, value in vars(self).items()}
        causes = {"made_by": self.made_by, "removed_by": self.removed_by}
        return plain | {key: cause.describe() if cause else None for key, cause in causes.items()}


@dataclass(frozen=True)
class PersistentActivation:
    """A super activation: a residual channel that is massive after each layer from `layer` through `last`.

    If `recurring` is True, the activation does not persist. It appears before most layers with full attention of a
    hybrid model, and is removed again after each (arXiv:2608.12149). `appearances` contains each time; it contains one
    element for an activation that persists, and is empty if no single layer makes the activation.

    `layer` is the layer that adds most to it. `first` is the first layer after which the channel is massive; it is
    smaller than `layer` if the activation rises in several layers. `value` is the channel's hidden state with the
    largest magnitude, with its sign, and `ratio` its magnitude in medians of the layer. It was found after layer
    `peak`, at position `token` of prompt number `prompt`. `prompts` is the number of prompts in which the channel is
    massive. `causes` contains one cause for each layer that raises the activation, in the order of the layers. `side`
    is True for a side effect: the same MLP output makes a far larger activation.

    If `stream` is "shared MLP", the activation is in the output of an MLP that several layers share. It counts as
    recurring, and its appearances are the layers in which the output is massive. `layer` is the layer that stores the
    MLP, and `peak` the layer that uses it when the largest output occurs.
    """

    layer: int
    last: int
    channel: int
    value: float
    peak: int
    token: int
    prompt: int
    prompts: int
    first: int | None = None
    ratio: float | None = None
    side: bool = False
    causes: tuple[Cause, ...] = ()
    recurring: bool = False
    appearances: tuple[Appearance, ...] = ()
    stream: Stream = "residual"

    @property
    def removed_by(self) -> Cause | None:
        """What removes the activation after its last appearance; None if nothing does."""
        return self.appearances[-1].removed_by if self.appearances else None

    @property
    def cause(self) -> Cause | None:
        """The cause in `layer`, the layer that adds most; None if the causes are not known."""
        return next((cause for cause in self.causes if cause.layer == self.layer), None)

    def to_json(self) -> dict[str, Any]:
        fields = {key: convert_to_plain(value) for key, value in vars(self).items()}
        made_by = self.cause.describe() if self.cause else None
        return fields | {
            "made_by": made_by,
            "causes": [cause.to_json() for cause in self.causes],
            "appearances": [one.to_json() for one in self.appearances],
        }


@dataclass(frozen=True)
class LargestActivation:
    """The hidden state of largest magnitude in one prompt of the unedited model, with its sign.

    It occurs after `layer`, at position `token` in `channel`, and `ratio` is its magnitude in medians of the layer.
    `bos` is True if the prompt began with BOS. `up` is the layer that raises the state most. `down` is the first later
    layer after which less than half of it is left, or None if there is no such layer.
    """

    prompt: int
    bos: bool
    value: float
    layer: int
    token: int
    channel: int
    ratio: float
    up: int
    down: int | None

    def to_json(self) -> dict[str, Any]:
        return {key: convert_to_plain(value) for key, value in vars(self).items()}


@dataclass(frozen=True)
class PublishedActivation:
    """The largest activation that a publication states for the scanned model (docs/known.md).

    `place` is where it was measured, such as "hidden state", and `source` the publication. `measured_on` describes the
    text on which it was measured; None if the publication does not state it.
    """

    model: str
    value: float
    layer: int | None
    place: str
    source: str
    measured_on: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {key: convert_to_plain(value) for key, value in vars(self).items()}


@dataclass(frozen=True)
class Passport:
    """The largest activations of a model: one for each prompt, with and without BOS.

    If the tokenizer has no BOS token, there are only activations without BOS.
    """

    largest: tuple[LargestActivation, ...]
    published: PublishedActivation | None = None

    def find_extremes(self) -> list[LargestActivation]:
        """Return the largest activation with BOS and the largest one without, as far as they were measured."""
        groups = ([one for one in self.largest if one.bos is bos] for bos in (True, False))
        return [max(group, key=lambda one: abs(one.value)) for group in groups if group]

    def count_prompts(self, one: LargestActivation) -> tuple[int, int]:
        """Count the prompts whose largest activation has the token and channel of `one`, and all such prompts."""
        alike = [other for other in self.largest if other.bos is one.bos]
        return sum((other.token, other.channel) == (one.token, one.channel) for other in alike), len(alike)

    def to_json(self) -> dict[str, Any]:
        return {
            "largest": [one.to_json() for one in self.largest],
            "published": self.published.to_json() if self.published else None,
        }

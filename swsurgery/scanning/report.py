"""Define the results of scans and sweeps, from which tables, figures, manifests and JSON are made.

A detector lists super activations (`PersistentActivation`) and candidates (`Candidate`). The causal test, if it is run,
measures the effect of zeroing each candidate (`Trial`). A `Scan` contains both. All results are frozen. This module
must not import torch, and it reads no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from swsurgery._version import __version__
from swsurgery.checkpoint.architectures import ExpertChoice
from swsurgery.model.protocol import DEFAULT_PROTOCOL, Protocol
from swsurgery.scanning.activation_report import Passport, PersistentActivation
from swsurgery.scanning.causal_report import (
    EFFECT_COLUMNS,
    CausalTest,
    Effect,
    UnitTrial,
    convert_to_plain,
    make_row,
    merge_trial,
)
from swsurgery.scanning.part_report import ModelPart, PartConfirmation, PartName, PartTrial
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.result import TableResult

Method = Literal["activations", "weights", "experts"]
Answer = Literal["found", "none", "undecided"]
Role = Literal["creates", "removes"]


@dataclass(frozen=True)
class Candidate:
    """One scalar W[row, col] that a detector lists as a possible super weight.

    Each method defines `score` in its own way. `rank` is the rank of the scalar's magnitude in its matrix, 1 for the
    largest. Fields that the method does not measure are None.

    A scan by activations sets `role`: "creates" if the scalar makes a super activation, "removes" if it makes the
    activation small again. It sets `input_spike` = x[col], `output_spike` = y[row] and `share` = x[col] * W[row, col] /
    y[row]; these values are from the prompt with the largest score. `prompts` is the number of prompts in which the
    scalar was found, and `round` the number of the round that found it, counted from 1.

    A scan by weights sets `z`, the robust z-score of the logarithm of the score among the logarithms of the scores of
    all neurons in the layer.
    """

    coordinate: Coordinate
    layer: int
    row: int
    col: int
    expert: ExpertChoice
    value: float
    score: float
    rank: int
    z: float | None = None
    input_spike: float | None = None
    output_spike: float | None = None
    share: float | None = None
    prompts: int | None = None
    round: int | None = None
    role: Role | None = None

    @property
    def unit(self) -> Coordinate:
        return self.coordinate

    def to_json(self) -> dict[str, Any]:
        fields = {key: convert_to_plain(value) for key, value in vars(self).items() if key != "coordinate"}
        return {"tensor": self.coordinate.tensor, "index": list(self.coordinate.index), **fields}


@dataclass(frozen=True)
class Trial(UnitTrial[Candidate]):
    """The causal test of one scalar.

    `listed` is False for a companion: an outlier in the column of a candidate that the detector did not list itself.
    """

    listed: bool = True

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {"listed": self.listed}


@dataclass(frozen=True)
class JointSet:
    """Scalars that matter together: zeroing all of them has more effect than the product of the single effects."""

    coordinates: tuple[Coordinate, ...]
    effect: Effect

    @property
    def units(self) -> tuple[Coordinate, ...]:
        return self.coordinates

    def to_json(self) -> dict[str, Any]:
        return {
            "coordinates": [{"tensor": c.tensor, "index": list(c.index)} for c in self.coordinates],
            "effect": self.effect.to_json(),
        }


@dataclass(frozen=True)
class ColumnNull:
    """The effects of zeroing other large scalars of column `col`, with which the column's companions are compared.

    Both tuples contain one perplexity ratio per scalar. In `alone` the scalar is zeroed alone. A ratio in `added` is
    the perplexity after zeroing the scalar and all candidates, divided by the perplexity after zeroing the candidates.
    """

    layer: int
    expert: ExpertChoice
    col: int
    alone: tuple[float, ...]
    added: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        return {key: convert_to_plain(value) for key, value in vars(self).items()}


@dataclass(frozen=True)
class Dose:
    """The effect of multiplying all candidates of a scan by `factor` at once."""

    factor: float
    effect: Effect

    def to_json(self) -> dict[str, Any]:
        return {"factor": self.factor, **self.effect.to_json()}


@dataclass(frozen=True)
class Confirmation(CausalTest[Trial, JointSet]):
    """The causal test of scalars.

    `trials` contains the candidates and their companions. The scalars of `null` are in the same matrices and have
    similar magnitudes. `column_nulls` contains the scalars with which companions were compared. `doses` contains the
    effects of multiplying all candidates by factors from 0 (zeroing) to 1 (no effect).
    """

    column_nulls: tuple[ColumnNull, ...] = ()
    doses: tuple[Dose, ...] = ()

    def list_further_nulls(self) -> dict[str, Any]:
        return {"column_nulls": [column.to_json() for column in self.column_nulls]}

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {"doses": [dose.to_json() for dose in self.doses]}


@dataclass(frozen=True)
class Profile:
    """The largest values that the unedited model computes in each layer, over all prompts.

    Each tuple contains one value per layer: the value with the largest magnitude, with its sign. `inputs` and `outputs`
    are from the input and the output of the down projection, and `residuals` from the hidden states after the layer.
    NaN means that no value was observed.
    """

    inputs: tuple[float, ...]
    outputs: tuple[float, ...]
    residuals: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        return {key: [convert_to_plain(v) for v in values] for key, values in vars(self).items()}


@dataclass(frozen=True)
class UnreadLayer:
    """A layer in which the scan did not read all matrices that may belong to an MLP.

    `tensors` contains the names of the unread matrices, with * in place of the number of an expert. `experts` contains
    the numbers of the unread experts.
    """

    layer: int
    experts: tuple[int, ...]
    tensors: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"layer": self.layer, "experts": list(self.experts), "tensors": list(self.tensors)}


@dataclass(frozen=True, repr=False)
class Scan(TableResult):
    """The result of one scan.

    `candidates` and `activations` are what the detector lists. `parts` contains the rows, neurons, experts and channels
    of attention or of the embedding that create activations. `removers` contains the scalars that remove activations;
    they are super weights only if the causal test finds them critical. `confirmation` is the causal test of scalars and
    `part_confirmation` that of parts, or None if it was not run. `notes` contains lines for the user, such as the
    reason why nothing was found. `layers` is the number of layers of the model, and `unread` lists the layers that were
    not read completely. `passport` contains the largest activation of each prompt, if prompts were run.
    """

    method: Method
    model_type: str
    layers: int
    candidates: tuple[Candidate, ...]
    activations: tuple[PersistentActivation, ...] = ()
    parts: tuple[ModelPart, ...] = ()
    profile: Profile | None = None
    prompts: tuple[str, ...] = ()
    confirmation: Confirmation | None = None
    notes: tuple[str, ...] = ()
    unread: tuple[UnreadLayer, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)
    passport: Passport | None = None
    part_confirmation: PartConfirmation | None = None
    removers: tuple[Candidate, ...] = ()
    shown: ClassVar[tuple[str, ...]] = ("answer", "super_weights", "found_parts")

    @property
    def super_weights(self) -> tuple[Candidate, ...]:
        """The scalars that the causal test found critical and the candidates for which it allowed no verdict.

        If the causal test was not run, these are all candidates.
        """
        if self.confirmation is None:
            return self.candidates
        critical = ("needed alone", "needed jointly")
        return tuple(
            t.candidate
            for t in self.confirmation.trials
            if t.verdict in critical or (t.verdict == "untested" and t.listed and t.candidate.role != "removes")
        )

    @property
    def found_parts(self) -> tuple[ModelPart, ...]:
        """The parts that the causal test found needed and those for which it allowed no verdict.

        If the causal test was not run, these are all parts.
        """
        trials = self.part_trials
        return tuple(part for part in self.parts if part.name not in trials or trials[part.name].verdict != "inert")

    @property
    def part_trials(self) -> dict[PartName, PartTrial]:
        """The causal tests of the parts that were tested."""
        return {t.candidate.name: t for t in (self.part_confirmation.trials if self.part_confirmation else ())}

    @property
    def confirmed(self) -> bool:
        """True if the causal test was run and gave at least one verdict other than "untested"."""
        tests = (self.confirmation, self.part_confirmation)
        return any(test is not None and test.has_verdicts for test in tests)

    @property
    def answer(self) -> Answer:
        """The answer of the scan: "found" if there is a super weight or a part that creates an activation.

        Otherwise it is "none", or "undecided" if the scan did not read all layers.
        """
        if self.super_weights or self.found_parts:
            return "found"
        return "undecided" if self.unread else "none"

    def to_rows(self) -> list[dict[str, object]]:
        """Return one row per candidate: its place, value, score and verdict, and the effect of zeroing it alone."""
        return [make_row(self.list_columns(), entry) for entry in self.to_json()["candidates"]]

    def list_columns(self) -> tuple[str, ...]:
        """Return the keys of the rows."""
        return ("tensor", "index", "layer", "row", "col", "expert", "value", "score", "verdict", *EFFECT_COLUMNS)

    def to_json(self) -> dict[str, Any]:
        """Return the document that `scan --json` prints."""
        trials = {t.candidate.coordinate: t for t in (self.confirmation.trials if self.confirmation else ())}
        tested = [t.candidate for t in trials.values()] or [*self.candidates, *self.removers]
        listed = [merge_trial(c, trials.get(c.coordinate)) for c in tested]
        part_trials = self.part_trials
        document: dict[str, Any] = {
            "method": self.method,
            "model_type": self.model_type,
            "layers": self.layers,
            "answer": self.answer,
            "unread": [layer.to_json() for layer in self.unread],
            "super_weights": [merge_trial(c, trials.get(c.coordinate)) for c in self.super_weights],
            "candidates": [one for one in listed if one["role"] != "removes"],
            "removers": [one for one in listed if one["role"] == "removes"],
            "parts": [merge_trial(part, part_trials.get(part.name)) for part in self.parts],
            "found_parts": [merge_trial(part, part_trials.get(part.name)) for part in self.found_parts],
            "super_activations": [a.to_json() for a in self.activations],
            "joint_sets": [s.to_json() for s in (self.confirmation.joint_sets if self.confirmation else ())],
            "notes": list(self.notes),
            "settings": {key: convert_to_plain(value) for key, value in self.settings.items()},
        }
        if self.profile:
            document |= {"profile": self.profile.to_json(), "prompts": list(self.prompts)}
        if self.passport:
            document["passport"] = self.passport.to_json()
        if self.part_confirmation:
            document["part_confirmation"] = self.part_confirmation.to_json()
        if self.confirmation:
            document["confirmation"] = self.confirmation.to_json()
        return document


@dataclass(frozen=True)
class SweepPoint:
    """What was measured with the swept scalars at `factor` times their stored values.

    `ratio` is the perplexity divided by the perplexity of the base. `kl` is the mean KL(base || scaled) in nats per
    token. The ends of their 95% intervals are None if the text has fewer than eight windows. `peak` is the hidden state
    with the largest magnitude after any layer, with its sign; it is NaN if the model has no list of decoder layers.
    """

    factor: float
    perplexity: float
    ratio: float
    kl: float
    stopword_mass: float
    finite: bool
    peak: float
    ratio_low: float | None = None
    ratio_high: float | None = None
    kl_low: float | None = None
    kl_high: float | None = None
    word_perplexity: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON. The perplexity per word is absent if the protocol does not count words."""
        return {
            key: convert_to_plain(value)
            for key, value in vars(self).items()
            if key != "word_perplexity" or value is not None
        }


@dataclass(frozen=True, repr=False)
class Sweep(TableResult):
    """The quality of a model as a function of the factor that scales some of its scalars.

    `base` contains the measurements of the model as stored. `model` is its repository or directory, and `revision` its
    commit if that is known. `manifest` is the path of the manifest, and `manifest_sha256` the digest of its text.
    """

    coordinates: tuple[Coordinate, ...]
    base: SweepPoint
    points: tuple[SweepPoint, ...]
    windows: int
    window_tokens: int
    text_sha256: str
    dtype: str
    device: str
    method: str
    scored_tokens: int
    regions: tuple[str, ...] = ()
    """Regions that were scaled together with the coordinates, such as `lm_head.weight[3, 0:16]`."""
    model: str = ""
    revision: str | None = None
    manifest: str = ""
    manifest_sha256: str = ""
    protocol: Protocol = DEFAULT_PROTOCOL

    def to_rows(self) -> list[dict[str, object]]:
        """Return one row per factor, in the order in which the factors were given, with the fields of a SweepPoint."""
        return [point.to_json() for point in self.points]

    def to_json(self) -> dict[str, Any]:
        """Return the document that `sweep --json` prints."""
        return {
            "model": self.model,
            "revision": self.revision,
            "manifest": self.manifest,
            "manifest_sha256": self.manifest_sha256,
            "swsurgery_version": __version__,
            "coordinates": [{"tensor": c.tensor, "index": list(c.index)} for c in self.coordinates],
            **({"regions": list(self.regions)} if self.regions else {}),
            "base": self.base.to_json(),
            "points": [point.to_json() for point in self.points],
            **{
                key: getattr(self, key)
                for key in (
                    "windows",
                    "window_tokens",
                    "scored_tokens",
                    "text_sha256",
                    "dtype",
                    "device",
                    "method",
                )
            },
            "protocol": self.protocol.to_json(),
        }

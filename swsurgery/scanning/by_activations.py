"""Find super weights by their effect on the residual stream (`scan --method activations`).

The method follows section 3.1 of arXiv:2411.07191. A super activation is a residual channel that becomes massive in one
layer and stays massive over many layers. The scan finds the layer whose MLP makes the channel massive. The output
y[row] of the MLP's down projection is the sum over its neurons of x[col] * W[row, col]. Scalars whose products make up
a large share of this sum are candidates. One super activation may hide others, so the candidates are set to zero and
the model is run again. This is repeated until a round finds no new candidate.

    spikes.py       runs the model; records which MLP makes or removes which massive hidden state
    persistence.py  decides which massive hidden states persist over many layers
    this module     finds the scalars that make the persistent states, in several rounds

This module gives no verdicts; confirm.py measures the effect of each candidate. docs/detection.md explains when the
answer is "none", and on which models the thresholds are calibrated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.projections import DownProjection
from swsurgery.errors import ModelError, Unrunnable, list_some, pluralise
from swsurgery.model import Placement, load, measure, tokens
from swsurgery.model.check import PROMPTS as CONTINUED
from swsurgery.model.forward import LayeredModel
from swsurgery.progress import Progress
from swsurgery.scanning.matrices import StoredProjection, refuse_quantised, refuse_unweighted
from swsurgery.scanning.persistence import (
    KEPT,
    Spell,
    count_layers_to_last,
    find_ends,
    find_spells,
    find_untraced,
    merge_spells,
)
from swsurgery.scanning.report import Candidate, PersistentActivation, Scan
from swsurgery.scanning.spikes import MADE, MASSIVE, LayerSpikes, Move, Trace
from swsurgery.storage.coordinate import Coordinate

SCAN_PROMPTS = (*CONTINUED, "It rained all day; we stayed in.\nThen it stopped, and the children ran out.\n")
"""The default prompts of a scan. The last prompt contains punctuation and line breaks, because massive activations also
occur at such tokens (arXiv:2402.17762, figure 1)."""

SHARE = 0.25
"""Minimum share x[col] * W[row, col] / y[row] of a scalar that becomes a candidate. In SmolLM2 two neurons make the
activation of layer 11 (shares 0.73 and 0.26), and two others the activation of layer 2 (0.65 and 0.34). No other neuron
has a share above 0.02. A scalar whose share is too small at first may reach the minimum in a later round, after the
scalars with larger shares are set to zero."""

OUTLIER = 10.0
"""Minimum magnitude of x[col] and of y[row], each divided by the median magnitude of x or y for the same token. Only a
scalar for which both quotients reach the minimum becomes a candidate. In SmolLM2 they are over 1,000 for x and over 300
for y."""

MIN_COMPANION_SHARE = 0.25
"""Minimum magnitude of an output y[row], as a share of the MLP's largest output for the same token in the unedited
model. A smaller output is considered a side effect: the neuron that makes the largest output also feeds other channels.
The scan adds a note about a side effect, but does not search for its scalars. In SmolLM2 the largest share of a side
effect is 0.07. In Llama-2-7B two weights in one column matter together, and the share of the smaller output is 0.59
(0.92 / 1.56; docs/known.md)."""

EXPLAINED = 0.2
"""Maximum difference between an output y[row] and the sum of the products x[col] * W[row, col], divided by y[row]. A
larger difference shows that the model did not compute y[row] with the stored row W[row]."""


def scan_activations(
    checkpoint: Checkpoint,
    *,
    prompts: Sequence[str] | None = None,
    device: str = "auto",
    placement: Placement = "auto",
    max_rounds: int = 8,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Scan:
    """Find the super weights that `prompts` (None: `SCAN_PROMPTS`) reveal, in at most `max_rounds` rounds.

    The model runs on each prompt separately. A prompt begins with BOS if the tokenizer adds BOS, and is cut to the
    context length in config.json. `device` and `placement` are passed to `load.open_model`.

    Raises ModelError if a prompt has no token, if the tokenizer or the model cannot be loaded or run, or if the model's
    hidden states are not finite. Raises ArchitectureError if the model has no known down projection.
    """
    prompts = SCAN_PROMPTS if prompts is None else tuple(prompts)
    with load.hide_output():
        model, sequences, has_bos = open_with_prompts(checkpoint, prompts, device, placement, say)
        found = scan_sequences(model, sequences, max_rounds=max_rounds, progress=progress, say=say)
    return replace(found, prompts=tuple(prompts), settings={**found.settings, "bos": has_bos})


def open_with_prompts(
    checkpoint: Checkpoint,
    prompts: Sequence[str],
    device: str,
    placement: Placement,
    say: Callable[[str], None],
) -> tuple[LayeredModel, list[list[int]], bool]:
    """Load the model and the token ids of `prompts`, as `scan_activations` describes.

    The last element is True if the prompts begin with BOS.
    """
    tokenizer = load.load_tokenizer(checkpoint.directory)
    model = load.open_model(checkpoint, device=device, placement=placement, say=say)
    bos, longest = tokens.get_bos_prefix(tokenizer), load.get_context_length(model.model)
    sequences = [[*bos, *tokens.encode(tokenizer, prompt)][:longest] for prompt in prompts]
    measure.refuse_unknown_tokens(model.model, sequences)
    return model, sequences, bool(bos)


def scan_sequences(
    model: LayeredModel,
    sequences: Sequence[Sequence[int]],
    *,
    max_rounds: int = 8,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Scan:
    """Scan by activations like `scan_activations`, but on token ids; `prompts` of the result is empty.

    A candidate's `score` is the value that its scalar adds to the hidden state, divided by the median magnitude of the
    layer's hidden states. The fields `score`, `input_spike`, `output_spike` and `share` of a candidate come from the
    prompt with the largest score. Candidates are sorted by round, then by score, largest first.
    """
    if not sequences or not all(sequences):
        raise ModelError(
            "nothing to read: there is no prompt, or a prompt has no token",
            f"{len(sequences)} prompts",
            "give at least one prompt, and no empty prompt",
        )
    checkpoint, layers = model.checkpoint, len(model.layers)
    if not layers:
        raise Unrunnable("cannot find the list of decoder layers in the model", checkpoint.root)
    watch = LayerSpikes(model)
    search, least = _Search(checkpoint), count_layers_to_last(layers)
    unseen = sorted({*watch.unseen, *(layer.layer for layer in watch.unread)})
    notes = [f"{_format_numbers('layer', unseen)}: the down projection is not observed"] if unseen else []
    if layers <= least:
        notes.append(f"the model has {layers} layers: too few for an activation to persist through {least} more")
    profile = None
    rounds = 0
    while rounds < max_rounds:
        with load.convert_run_errors(model.device, model.weights is not None):
            traces = watch.run(sequences, tuple(search.candidates), progress)
        if watch.broken is not None and not search.candidates:
            raise ModelError(
                "hidden states are not finite",
                f"layer {watch.broken}",
                "check the weights: a weight or an activation is NaN or too large for the dtype",
            )
        if watch.broken is not None:
            notes.append(
                f"round {rounds + 1}: hidden states are not finite from layer {watch.broken} on; stopped there"
            )
            break
        rounds += 1
        profile = profile or watch.make_profile()
        fresh = search.look(traces, rounds)
        say(_describe_round(rounds, fresh, search))
        if not fresh:
            break
    else:
        notes.append(f"stopped after {max_rounds} rounds: more rounds may find more super weights")
    return Scan(
        method="activations",
        model_type=str(checkpoint.config.get("model_type", "not given")),
        layers=layers,
        candidates=tuple(sorted(search.candidates.values(), key=lambda c: (c.round, -c.score))),
        activations=tuple(search.activations),
        profile=profile,
        notes=(*notes, *search.notes),
        # An unread layer may contain a super weight only if a massive state of unknown cause begins there or later.
        unread=tuple(layer for layer in watch.unread if layer.layer <= max(search.untraced, default=-1)),
        settings={
            "rounds": rounds,
            "massive": MASSIVE,
            "made": MADE,
            "kept": KEPT,
            "layers_kept": least,
            "share": SHARE,
            "outlier": OUTLIER,
            "companion": MIN_COMPANION_SHARE,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": load.get_device_name(model.device),
            "placement": model.method,
        },
    )


class _Scalar(NamedTuple):
    """One scalar W[row, col] of a down projection, with its input `x` = x[col] for one token.

    `share` is x[col] * W[row, col] / y[row], the share of the output that this scalar makes. `outlier` is True if the
    magnitude of x[col] is at least `OUTLIER` times the median magnitude of the projection's inputs for that token.
    """

    projection: DownProjection
    row: int
    col: int
    x: float
    weight: float
    share: float
    outlier: bool

    @property
    def coordinate(self) -> Coordinate:
        return Coordinate(self.projection.tensor, self.projection.find_index(self.row, self.col))


class _Search:
    """Collects the candidates, super activations and notes of all rounds. In round 1 the model is unedited.

    `untraced` contains, for each persistent massive state that no observed MLP makes, the layer where it begins.
    """

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.candidates: dict[Coordinate, Candidate] = {}
        self.activations: list[PersistentActivation] = []
        self.notes: list[str] = []
        self.untraced: set[int] = set()
        # From round 1: the largest output of the MLP by (sequence, layer, token), and the places (sequence, layer,
        # token, channel) of the persistent states whose scalars are searched for.
        self._largest: dict[tuple[int, int, int], float] = {}
        self._main: set[tuple[int, int, int, int]] = set()
        self._rows: dict[tuple[DownProjection, int], Tensor] = {}

    def look(self, traces: Sequence[Trace], number: int) -> list[Coordinate]:
        """Add the candidates found in the traces of round `number` (counted from 1), and return their coordinates."""
        spells, companions = self._split(traces, number == 1)
        for new in merge_spells(traces, spells):
            if not any(old.channel == new.channel and old.layer <= new.layer <= old.last for old in self.activations):
                self.activations.append(new)
        if number == 1:
            self._note_the_rest(traces, spells, companions)
        found: dict[Coordinate, list[tuple[Spell, _Scalar]]] = defaultdict(list)
        unmade: dict[tuple[int, int], str] = {}  # by layer and channel
        for spell in spells:
            move = spell.move
            scalars, explained = self._decompose(move)
            outlier = abs(move.output) >= OUTLIER * move.record.typical
            makers = [s for s in scalars if explained and outlier and s.outlier and s.share >= SHARE]
            for scalar in makers:
                found[scalar.coordinate].append((spell, scalar))
            if not makers:
                unmade[move.layer, move.channel] = _explain_no_maker(scalars, explained, outlier)
        for coordinate, places in found.items():
            scalar = places[0][1]
            self.candidates[coordinate] = self._make_candidate(coordinate, places, number)
            self._rows[scalar.projection, scalar.row][scalar.col] = 0.0  # the next rounds run without this scalar
            unmade.pop((scalar.projection.layer, scalar.row), None)
        for (layer, channel), why in sorted(unmade.items()):
            self.notes.append(
                f"round {number}: channel {channel} persists from layer {layer} on, and no scalar explains it ({why})"
            )
        return list(found)

    def _split(self, traces: Sequence[Trace], unedited: bool) -> tuple[list[Spell], list[Spell]]:
        """Divide the persistent massive hidden states into main states and side effects.

        Only the scalars that make main states are searched for. A state is a main state if the MLP output that makes it
        is at least `MIN_COMPANION_SHARE` of the MLP's largest output for the same token in the unedited model, or if it
        was a main state in round 1. Returns (main states, side effects).
        """
        if unedited:
            for sequence, trace in enumerate(traces):
                for move in trace.moves.values():
                    self._largest[sequence, move.layer, move.token] = move.record.largest
        spells: list[Spell] = []
        companions: list[Spell] = []
        for spell in find_spells(traces):
            largest = self._largest.get(spell.place[:3], spell.move.record.largest)
            if spell.place in self._main or abs(spell.move.output) >= MIN_COMPANION_SHARE * largest:
                spells.append(spell)
            else:
                companions.append(spell)
        if unedited:
            self._main = {spell.place for spell in spells}
        return spells, companions

    def _decompose(self, move: Move) -> tuple[list[_Scalar], bool]:
        """Return the scalars that make the largest shares of the output y[row] of `move`, largest share first.

        The second value is True if the products of the whole stored row add up to the output (see `EXPLAINED`).
        """
        scalars: list[_Scalar] = []
        total = 0.0
        for part in move.record.multiplied:
            row = self._fetch_row(part.projection, move.channel)
            shares = part.share * part.x.double() * row / move.output
            typical = float(part.x.abs().median())
            total += float(shares.sum())
            for col in shares.topk(min(8, len(shares))).indices.tolist():
                x = float(part.x[col])
                scalars.append(
                    _Scalar(
                        part.projection,
                        move.channel,
                        col,
                        x,
                        float(row[col]),
                        float(shares[col]),
                        abs(x) >= OUTLIER * typical,
                    )
                )
        return sorted(scalars, key=lambda s: -s.share), bool(scalars) and abs(total - 1) <= EXPLAINED

    def _make_candidate(
        self, coordinate: Coordinate, places: Sequence[tuple[Spell, _Scalar]], number: int
    ) -> Candidate:
        def score(place: tuple[Spell, _Scalar]) -> float:
            spell, scalar = place
            return abs(spell.move.added) * scalar.share / spell.move.median

        spell, scalar = max(places, key=score)
        projection = scalar.projection
        return Candidate(
            coordinate,
            projection.layer,
            scalar.row,
            scalar.col,
            projection.expert,
            scalar.weight,
            score=score((spell, scalar)),
            rank=StoredProjection(self.checkpoint, projection).compute_rank(scalar.weight),
            input_spike=scalar.x,
            output_spike=spell.move.output,
            share=scalar.share,
            prompts=len({spell.sequence for spell, _ in places}),
            round=number,
        )

    def _note_the_rest(self, traces: Sequence[Trace], spells: Sequence[Spell], companions: Sequence[Spell]) -> None:
        """Add notes on observations in the unedited model that do not lead to a candidate.

        The notes are about channels that are massive only as a side effect (`companions`), scalars that make a massive
        channel small again, and persistent massive states that no observed MLP makes.
        """
        fed: dict[int, set[int]] = defaultdict(set)
        for spell in companions:
            fed[spell.move.layer].add(spell.move.channel)
        for layer, channels in sorted(fed.items()):
            self.notes.append(
                f"layer {layer} also makes {_format_numbers('channel', channels)} massive, as a side effect of a "
                "larger activation"
            )
        ends: dict[Coordinate, str] = {}
        for end in sorted(find_ends(traces, spells), key=lambda end: end.layer):
            scalars, explained = self._decompose(end)
            if explained and scalars[0].share >= SHARE:
                first = scalars[0]
                makes = f"{first.coordinate} = {first.weight:g} makes {first.share:.2f} of the change"
                ends.setdefault(first.coordinate, f"layer {end.layer} removes channel {end.channel} again: {makes}")
        self.notes += ends.values()
        for layer, channels in sorted(find_untraced(traces).items()):
            self.untraced.add(layer)
            names = _format_numbers("channel", channels)
            self.notes.append(
                f"{names} massive from layer {layer} on, but no observed MLP makes this state: "
                "not traced (the cause may be attention, the embedding, or several layers together)"
            )

    def _fetch_row(self, projection: DownProjection, row: int) -> Tensor:
        """Return one row of a down projection, (cols,) in float64, with the candidates of earlier rounds set to 0."""
        key = (projection, row)
        if key not in self._rows:
            self._rows[key] = _read_row(self.checkpoint, projection, row)
        return self._rows[key]


def _explain_no_maker(scalars: Sequence[_Scalar], explained: bool, outlier: bool) -> str:
    """Explain why none of the scalars became a candidate, by the first condition that is not met."""
    if not scalars:
        return "the down projection was not called"
    if not explained:
        return "the products of the stored row do not add up to the output"
    if not outlier:
        return f"the output is below {OUTLIER:g} times the median for its token"
    largest = f"the largest share is {scalars[0].share:.2f}"
    return largest if scalars[0].share < SHARE else f"{largest}, but its input is below {OUTLIER:g} times the median"


def _read_row(checkpoint: Checkpoint, projection: DownProjection, row: int) -> Tensor:
    """Read one row of a down projection: (cols,), float64.

    Raises ModelError if the elements of the projection are not weights, for example because it is quantised. Raises
    ShardError if the file cannot be read.
    """
    refuse_quantised(checkpoint, projection.tensor)
    refuse_unweighted(checkpoint, projection.tensor)
    return StoredProjection(checkpoint, projection).read_row(row)


def _describe_round(number: int, fresh: Sequence[Coordinate], search: _Search) -> str:
    """Return a line about the scalars that a round found. From round 2 on, those found before were set to zero."""
    before = len(search.candidates) - len(fresh)
    without = f", with {'it' if before == 1 else f'these {before}'} set to zero" if before else ""
    if not fresh:
        what = "no scalar causes" if number == 1 else "no further scalar causes"
        return f"round {number}{without}: {what} an activation that persists"
    layers = _format_numbers("layer", {search.candidates[each].layer for each in fresh})
    return f"round {number}{without}: found {pluralise(len(fresh), 'scalar')} in {layers}"


def _format_numbers(noun: str, numbers: Iterable[int]) -> str:
    """Format a noun and at most eight numbers in increasing order, as in "layers 3, 5"."""
    ordered = sorted(numbers)
    return f"{noun}{'s' if len(ordered) > 1 else ''} {list_some(ordered, 8)}"

"""`scan --method activations`: super weights by what they do to the residual stream while short prompts are read.

After section 3.1 of arXiv:2411.07191. A super activation is a residual channel that is massive and stays so over many
layers. It is traced to the layers whose MLP makes it; there the down projection's output y[row] is the sum over its
neurons of x[col] * W[row, col], and the scalars that make a good part of it are candidates. They are set to zero, the
model is run again, and so on until nothing that persists is left: what stands behind the first is found only then.

    spikes.py       the run: which MLP moved which massive state, and what its down projection multiplied
    persistence.py  which of these states persist
    this module     which scalars make them, and the rounds

This room passes no verdict: what a candidate is worth is measured by confirm.py. docs/detection.md says when the
answer is "none", and what the thresholds are calibrated on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.projections import DownProjection
from swsurgery.errors import ModelError, Unrunnable
from swsurgery.model import Placement, load, measure
from swsurgery.model.check import PROMPTS as CONTINUED
from swsurgery.model.forward import LayeredModel
from swsurgery.progress import Progress
from swsurgery.scanning.persistence import (
    KEPT,
    Spell,
    as_activations,
    find_ends,
    find_spells,
    find_untraced,
    layers_to_last,
)
from swsurgery.scanning.report import Candidate, PersistentActivation, Profile, ScanReport
from swsurgery.scanning.spikes import MADE, MASSIVE, LayerSpikes, Move, Trace
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.files import opened, read_exactly

PROMPTS = (*CONTINUED, "It rained all day; we stayed in.\nThen it stopped, and the children ran out.\n")
"""Read where the caller gives none. The last brings delimiters, on which massive activations sit too
(arXiv:2402.17762, figure 1)."""

SHARE = 0.25
"""A scalar makes an activation if x[col] * W[row, col] is at least this share of y[row]. In SmolLM2 two neurons each
make those of layer 11 (0.73, 0.26) and 2 (0.65, 0.34), and nothing else has more than 0.02 of them. What stays below
is found when the larger one is gone."""

OUTLIER = 10.0
"""x[col] and y[row] must have at least this many medians of the magnitudes of their token, so that neither side alone
is what is remarkable. SmolLM2's have over 1,000 on the input side and over 300 on the output side."""

COMPANION = 0.25
"""A neuron that makes an activation also feeds other channels. These count only from this share of the token's largest
output in the unedited model on. SmolLM2's next channel has 0.07. The two of Llama-2-7B that matter together weigh -0.92
and 1.56 in one column, so 0.59 (docs/known.md)."""

EXPLAINED = 0.2
"""Where the products add up to an output that is off by more than this share, the stored row is not what was used."""

PIECE = 1 << 24
"""Bytes of a matrix that are looked at in one go."""

_ELEMENTS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}


def scan_activations(
    checkpoint: Checkpoint,
    *,
    prompts: Sequence[str] | None = None,
    device: str = "auto",
    placement: Placement = "auto",
    max_rounds: int = 8,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> ScanReport:
    """The super weights that `prompts` (None: `PROMPTS`) bring to light, at most `max_rounds` rounds of them.

    Each prompt is read on its own, with BOS in front of it if and only if the tokenizer puts one there, and cut to the
    context length of the config. `device` and `placement` as for `load.open_model`. Raises ModelError where there is
    nothing to read, where tokenizer or model cannot be loaded or run, or where the model's hidden states are not
    finite; ArchitectureError where the model has no known down projection.
    """
    prompts = PROMPTS if prompts is None else tuple(prompts)
    with load.quiet():
        tokenizer = load.load_tokenizer(checkpoint.directory)
        model = load.open_model(checkpoint, device=device, placement=placement, say=say)
        bos, longest = measure.bos_prefix(tokenizer), load.context_length(model.model)
        sequences = [[*bos, *measure.encode(tokenizer, prompt)][:longest] for prompt in prompts]
        measure.refuse_unknown_tokens(model.model, sequences)
        found = scan_sequences(model, sequences, max_rounds=max_rounds, progress=progress, say=say)
    return replace(found, prompts=tuple(prompts))


def scan_sequences(
    model: LayeredModel,
    sequences: Sequence[Sequence[int]],
    *,
    max_rounds: int = 8,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> ScanReport:
    """`scan_activations` on token ids; `prompts` of the report is empty.

    A candidate's `score` is the part of the hidden state that its scalar adds, in medians of the layer's hidden states;
    that, both spikes and the share are those of the prompt where it is largest. Candidates come in the order of their
    rounds, within a round by score.
    """
    if not sequences or not all(sequences):
        raise ModelError("nothing to read", f"{len(sequences)} prompts", "give prompts of at least one token")
    checkpoint, layers = model.checkpoint, len(model.layers)
    if not layers:
        raise Unrunnable("no list of decoder layers in the model", checkpoint.root)
    watch = LayerSpikes(model)
    search, least = _Search(checkpoint), layers_to_last(layers)
    unseen = sorted({*watch.unseen, *(layer.layer for layer in watch.unread)})
    notes = [f"{_listed('layer', unseen)}: the down projection is not looked at"] if unseen else []
    if layers <= least:
        notes.append(f"the model has {layers} layers: too few for anything to persist through {least} more")
    profile = None
    rounds = 0
    while rounds < max_rounds:
        with load.running(model.device, model.weights is not None):
            traces = watch.run(sequences, tuple(search.candidates), progress)
        if watch.broken is not None and not search.candidates:
            raise ModelError(
                "hidden states are not finite",
                f"layer {watch.broken}",
                "a weight or an activation is too large for the dtype, or not a number",
            )
        if watch.broken is not None:
            notes.append(
                f"round {rounds + 1}: hidden states are not finite from layer {watch.broken} on; stopped there"
            )
            break
        rounds += 1
        profile = profile or Profile(tuple(watch.inputs), tuple(watch.outputs), tuple(watch.residuals))
        fresh = search.look(traces, rounds)
        say(f"round {rounds}: {', '.join(map(str, fresh)) or 'nothing more that persists'}")
        if not fresh:
            break
    else:
        notes.append(f"stopped after {max_rounds} rounds: more may stand behind what was found")
    return ScanReport(
        method="activations",
        model_type=str(checkpoint.config.get("model_type", "not given")),
        layers=layers,
        candidates=tuple(sorted(search.candidates.values(), key=lambda c: (c.round, -c.score))),
        activations=tuple(search.activations),
        profile=profile,
        notes=(*notes, *search.notes),
        # An unread layer matters only if something massive that was not traced begins there or later.
        unread=tuple(layer for layer in watch.unread if layer.layer <= max(search.untraced, default=-1)),
        settings={
            "rounds": rounds,
            "massive": MASSIVE,
            "made": MADE,
            "kept": KEPT,
            "layers_kept": least,
            "share": SHARE,
            "outlier": OUTLIER,
            "companion": COMPANION,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": load.device_name(model.device),
            "placement": model.method,
        },
    )


class _Scalar(NamedTuple):
    """One product of a decomposed output. `outlier`: is x[col] one among the neurons of its token?"""

    projection: DownProjection
    row: int
    col: int
    x: float
    weight: float
    share: float
    outlier: bool

    @property
    def coordinate(self) -> Coordinate:
        return Coordinate(self.projection.tensor, self.projection.index(self.row, self.col))


class _Search:
    """What was found so far. `look` takes in the traces of one round, the first those of the unedited model."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.candidates: dict[Coordinate, Candidate] = {}
        self.activations: list[PersistentActivation] = []
        self.notes: list[str] = []
        self.untraced: set[int] = set()
        # Of the unedited model: the largest output of a token, and the outputs that are comparable with it.
        self._largest: dict[tuple[int, int, int], float] = {}
        self._main: set[tuple[int, int, int, int]] = set()
        self._rows: dict[tuple[DownProjection, int], Tensor] = {}

    def look(self, traces: Sequence[Trace], number: int) -> list[Coordinate]:
        """The candidates that round `number`, 1 the first, adds."""
        spells, companions = self._split(traces, number == 1)
        for new in as_activations(traces, spells):
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
                unmade[move.layer, move.channel] = _why_no_maker(scalars, explained, outlier)
        for coordinate, places in found.items():
            scalar = places[0][1]
            self.candidates[coordinate] = self._candidate(coordinate, places, number)
            self._rows[scalar.projection, scalar.row][scalar.col] = 0.0  # from the next round on it is taken out
            unmade.pop((scalar.projection.layer, scalar.row), None)
        for (layer, channel), why in sorted(unmade.items()):
            self.notes.append(
                f"round {number}: channel {channel} persists from layer {layer} on, and no scalar counts as its maker "
                f"({why})"
            )
        return list(found)

    def _split(self, traces: Sequence[Trace], unedited: bool) -> tuple[list[Spell], list[Spell]]:
        """What persists, and apart from it the companions of something larger."""
        if unedited:
            for sequence, trace in enumerate(traces):
                for move in trace.moves.values():
                    self._largest[sequence, move.layer, move.token] = move.record.largest
        spells: list[Spell] = []
        companions: list[Spell] = []
        for spell in find_spells(traces):
            largest = self._largest.get(spell.place[:3], spell.move.record.largest)
            if spell.place in self._main or abs(spell.move.output) >= COMPANION * largest:
                spells.append(spell)
            else:
                companions.append(spell)
        if unedited:
            self._main = {spell.place for spell in spells}
        return spells, companions

    def _decompose(self, move: Move) -> tuple[list[_Scalar], bool]:
        """The scalars with the largest shares in an output, in order, and whether all products add up to it."""
        scalars: list[_Scalar] = []
        total = 0.0
        for part in move.record.multiplied:
            row = self._row(part.projection, move.channel)
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

    def _candidate(self, coordinate: Coordinate, places: Sequence[tuple[Spell, _Scalar]], number: int) -> Candidate:
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
            rank=_rank(self.checkpoint, projection, scalar.weight),
            input_spike=scalar.x,
            output_spike=spell.move.output,
            share=scalar.share,
            prompts=len({spell.sequence for spell, _ in places}),
            round=number,
        )

    def _note_the_rest(self, traces: Sequence[Trace], spells: Sequence[Spell], companions: Sequence[Spell]) -> None:
        """What the unedited model shows beside the candidates: companions, what takes an activation away again, and
        what is massive though no MLP makes it."""
        fed: dict[int, set[int]] = defaultdict(set)
        for spell in companions:
            fed[spell.move.layer].add(spell.move.channel)
        for layer, channels in sorted(fed.items()):
            self.notes.append(f"layer {layer} also makes {_listed('channel', channels)} massive, beside a larger one")
        ends: dict[Coordinate, str] = {}
        for end in sorted(find_ends(traces, spells), key=lambda end: end.layer):
            scalars, explained = self._decompose(end)
            if explained and scalars[0].share >= SHARE:
                first = scalars[0]
                makes = f"{first.coordinate} = {first.weight:g} makes {first.share:.2f} of that"
                ends.setdefault(first.coordinate, f"layer {end.layer} takes channel {end.channel} back: {makes}")
        self.notes += ends.values()
        for layer, channels in sorted(find_untraced(traces).items()):
            self.untraced.add(layer)
            self.notes.append(
                f"{_listed('channel', channels)} massive from layer {layer} on, and no MLP that was looked at makes "
                "it: not traced (attention, the embedding, or several layers together)"
            )

    def _row(self, projection: DownProjection, row: int) -> Tensor:
        """One stored row (cols,), float64, less the scalars that were taken out in earlier rounds."""
        key = (projection, row)
        if key not in self._rows:
            self._rows[key] = _read_row(self.checkpoint, projection, row)
        return self._rows[key]


def _why_no_maker(scalars: Sequence[_Scalar], explained: bool, outlier: bool) -> str:
    """The condition that failed: of the output as a whole, else of the scalar with the largest share."""
    if not scalars:
        return "nothing was multiplied"
    if not explained:
        return "the stored row does not add up to it"
    if not outlier:
        return f"the output is below {OUTLIER:g} medians of its token"
    largest = f"the largest share is {scalars[0].share:.2f}"
    return largest if scalars[0].share < SHARE else f"{largest}, but its input is below {OUTLIER:g} medians"


def _read_row(checkpoint: Checkpoint, projection: DownProjection, row: int) -> Tensor:
    """One row of a stored down projection (cols,), float64: contiguous in its shard, or one element of each of its
    columns where it is stored transposed."""
    if why := checkpoint.quantisation.refusal(projection.tensor):
        raise ModelError(why, projection.tensor, "scan an unquantised copy")
    info, shard = checkpoint.info(projection.tensor), checkpoint.shards[checkpoint.weight_map[projection.tensor]]
    first = shard.offset(projection.tensor, projection.index(row, 0))
    size, count, step = info.dtype.size, projection.cols, projection.rows if projection.transposed else 1
    with opened(shard.path) as fd:
        if step == 1:
            data = read_exactly(fd, count * size, first, shard.path)
        else:
            data = b"".join(read_exactly(fd, size, first + i * step * size, shard.path) for i in range(count))
    return _elements(data, info.dtype.name, projection).double()


def _rank(checkpoint: Checkpoint, projection: DownProjection, value: float) -> int:
    """The place of |value| among the magnitudes of its matrix, 1 the largest."""
    info, shard = checkpoint.info(projection.tensor), checkpoint.shards[checkpoint.weight_map[projection.tensor]]
    begin = shard.offset(projection.tensor, projection.index(0, 0))
    end = begin + projection.rows * projection.cols * info.dtype.size
    larger = 0
    with opened(shard.path) as fd:
        for at in range(begin, end, PIECE):
            data = read_exactly(fd, min(PIECE, end - at), at, shard.path)
            larger += int((_elements(data, info.dtype.name, projection).double().abs() > abs(value)).sum())
    return 1 + larger


def _elements(data: bytes, dtype: str, projection: DownProjection) -> Tensor:
    if dtype not in _ELEMENTS:
        raise ModelError(f"{dtype} holds no single weights", projection.tensor)
    return torch.frombuffer(bytearray(data), dtype=_ELEMENTS[dtype])


def _listed(noun: str, numbers: Iterable[int]) -> str:
    """The noun and at most eight of the numbers, in order."""
    ordered = sorted(numbers)
    more = f" and {len(ordered) - 8} more" if len(ordered) > 8 else ""
    return f"{noun}{'s' if len(ordered) > 1 else ''} {', '.join(map(str, ordered[:8]))}{more}"

"""Find super weights by their effect on the residual stream (`scan --method activations`).

The method follows section 3.1 of arXiv:2411.07191. A super activation is a residual channel that becomes massive in one
layer and stays massive over many layers. The scan finds the layer whose MLP makes the channel massive. The output
y[row] of the MLP's down projection is the sum over its neurons of x[col] * W[row, col]. Scalars whose products make up
a large share of this sum are candidates. One super activation may hide others, so the candidates are set to zero and
the model is run again. This is repeated until a round finds no new candidate. In hybrid models, a state that appears
before most layers with full attention counts too, although it does not persist (arXiv:2608.12149).

    spikes.py       runs the model; records which MLP makes or removes which massive hidden state
    persistence.py  decides which massive hidden states persist over many layers
    recurring.py    decides which massive hidden states recur before layers with full attention
    this module     finds the scalars that make the persistent states, in several rounds

This module gives no verdicts; confirm.py measures the effect of each candidate. docs/detection.md explains when the
answer is "none", and on which models the thresholds are calibrated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from swsurgery.checkpoint.attention_layers import explain_unknown_layers, find_attention_layers
from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.errors import ModelError, Unrunnable, list_some, pluralise
from swsurgery.model import Placement, load, measure, tokens
from swsurgery.model.check import PROMPTS as CONTINUED
from swsurgery.model.forward import LayeredModel
from swsurgery.progress import Progress
from swsurgery.scanning.activation_report import Passport, PersistentActivation
from swsurgery.scanning.causes import (
    OUTLIER,
    SHARE,
    Decomposer,
    RowTerm,
    find_cause,
    name_neurons,
)
from swsurgery.scanning.matrices import StoredProjection
from swsurgery.scanning.parts import list_parts
from swsurgery.scanning.passport import find_largest_activations
from swsurgery.scanning.persistence import (
    KEPT,
    PROMINENT,
    Rise,
    compute_prominence,
    compute_remainder,
    count_layers_to_last,
    find_drifts,
    find_ends,
    find_rises,
    merge_drifts,
    merge_rises,
)
from swsurgery.scanning.recurring import Recurrence, describe_appearance, find_recurrences, merge_recurrences
from swsurgery.scanning.report import Candidate, Role, Scan
from swsurgery.scanning.shared_mlps import (
    SharedRecurrence,
    find_shared_mlps,
    find_shared_recurrences,
    merge_shared,
)
from swsurgery.scanning.spikes import LEAST_MAXIMUM, MADE, OUTSTANDING, LayerSpikes, Move, Trace
from swsurgery.storage.coordinate import Coordinate

SCAN_PROMPTS = (*CONTINUED, "It rained all day; we stayed in.\nThen it stopped, and the children ran out.\n")
"""The default prompts of a scan. The last prompt contains punctuation and line breaks, because massive activations also
occur at such tokens (arXiv:2402.17762, figure 1)."""

MIN_COMPANION_SHARE = 0.25
"""Minimum magnitude of an output y[row], as a share of the MLP's largest output for the same token in the unedited
model. A smaller output is considered a side effect: the neuron that makes the largest output also feeds other channels.
The scan adds a note about a side effect, but does not search for its scalars. In SmolLM2 the largest share of a side
effect is 0.07. In Llama-2-7B two weights in one column matter together, and the share of the smaller output is 0.59
(0.92 / 1.56; docs/known.md)."""


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
        model, sequences, has_bos, others = open_with_prompts(checkpoint, prompts, device, placement, say)
        found = scan_sequences(
            model, sequences, others=others, has_bos=has_bos, max_rounds=max_rounds, progress=progress, say=say
        )
    return replace(found, prompts=tuple(prompts), settings={**found.settings, "bos": has_bos})


def open_with_prompts(
    checkpoint: Checkpoint,
    prompts: Sequence[str],
    device: str,
    placement: Placement,
    say: Callable[[str], None],
) -> tuple[LayeredModel, list[list[int]], bool, list[list[int]]]:
    """Load the model and the token ids of `prompts`, as `scan_activations` describes.

    The third element is True if the prompts begin with BOS. The last element contains the prompts without BOS then, and
    otherwise with BOS. It is empty if the tokenizer has no BOS token.
    """
    tokenizer = load.load_tokenizer(checkpoint.directory)
    model = load.open_model(checkpoint, device=device, placement=placement, say=say)
    bos, longest = tokens.get_bos_prefix(tokenizer), load.get_context_length(model.model)
    encoded = [tokens.encode(tokenizer, prompt) for prompt in prompts]
    sequences = [[*bos, *ids][:longest] for ids in encoded]
    other = [] if bos or tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    others = [[*other, *ids][:longest] for ids in encoded] if bos or other else []
    others = others if all(others) else []
    measure.refuse_unknown_tokens(model.model, sequences)
    known = all(token < measure.get_vocabulary_size(model.model) for token in other)
    return model, sequences, bool(bos), others if known else []


def scan_sequences(
    model: LayeredModel,
    sequences: Sequence[Sequence[int]],
    *,
    others: Sequence[Sequence[int]] = (),
    has_bos: bool = False,
    max_rounds: int = 8,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Scan:
    """Scan by activations like `scan_activations`, but on token ids; `prompts` of the result is empty.

    A candidate's `score` is the value that its scalar adds to the hidden state, divided by the median magnitude of the
    layer's hidden states. The fields `score`, `input_spike`, `output_spike` and `share` of a candidate come from the
    prompt with the largest score. Candidates are sorted by round, then by score, largest first.

    `others` contains the same prompts without BOS if `has_bos` is True, and otherwise with BOS. They run beside the
    prompts in the first round, and only their largest activations are reported.
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
    shared = find_shared_mlps(model)
    watch = LayerSpikes(model, shared)
    attention = find_attention_layers(checkpoint.config, layers)
    uses = {layer: sources[0].projection.layer for layer, sources in enumerate(shared) if sources}
    unseen = sorted({*watch.unseen, *(layer.layer for layer in watch.unread)})
    search, least = _Search(checkpoint, unseen, attention, uses), count_layers_to_last(layers)
    notes = [f"{_format_numbers('layer', unseen)}: the down projection is not observed"] if unseen else []
    if layers <= least:
        has = f"the model has {pluralise(layers, 'layer')}"
        notes.append(f"{has}: too few for an activation to persist through {least} more")
    if unknown := explain_unknown_layers(checkpoint.config, checkpoint.shapes, layers):
        notes.append(unknown)
    profile = passport = None
    rounds = 0
    while rounds < max_rounds:
        with load.convert_run_errors(model.device, model.weights is not None):
            run = [*sequences, *(others if passport is None else ())]
            traces = watch.run(run, tuple(search.candidates), progress, len(sequences))
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
        if passport is None:
            largest = find_largest_activations(traces[: len(sequences)], has_bos)
            passport = Passport((*largest, *find_largest_activations(traces[len(sequences) :], not has_bos)))
        fresh = search.look(traces[: len(sequences)], rounds)
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
        parts=tuple(list_parts(checkpoint, search.activations)[0]),
        passport=passport,
        removers=tuple(search.removers.values()),
        notes=(*notes, *search.notes),
        # An unread layer may contain a super weight only if a massive state of unknown cause begins there or later.
        unread=tuple(layer for layer in watch.unread if layer.layer <= max(search.untraced, default=-1)),
        settings={
            "rounds": rounds,
            "outstanding": OUTSTANDING,
            "least_maximum": LEAST_MAXIMUM,
            "made": MADE,
            "kept": KEPT,
            "prominent": PROMINENT,
            "layers_kept": least,
            **({"full_attention": len(attention)} if attention else {}),
            "share": SHARE,
            "outlier": OUTLIER,
            "companion": MIN_COMPANION_SHARE,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": load.get_device_name(model.device),
            "placement": model.method,
        },
    )


class _Search:
    """Collects the candidates, super activations and notes of all rounds. In round 1 the model is unedited.

    `unseen` contains the layers whose MLP is not observed. `attention` contains the layers with full attention of a
    hybrid model, and is empty for any other model. `uses` maps each layer that uses an MLP of several layers to the
    layer that stores it. `removers` contains the scalars that remove states of the unedited model. `untraced` contains,
    for each persistent massive state that no observed MLP makes, the layer where it begins.
    """

    def __init__(
        self, checkpoint: Checkpoint, unseen: Sequence[int], attention: Sequence[int], uses: Mapping[int, int]
    ):
        self.checkpoint, self.attention, self.uses = checkpoint, attention, uses
        self.candidates: dict[Coordinate, Candidate] = {}
        self.removers: dict[Coordinate, Candidate] = {}
        self.activations: list[PersistentActivation] = []
        self.notes: list[str] = []
        self.untraced: set[int] = set()
        self._decomposer = Decomposer(checkpoint, unseen)
        # From round 1: the traces, the largest output of the MLP by (sequence, layer, token), that of a shared MLP by
        # (sequence, layer that stores it), and the places (sequence, layer, token, channel) of the persistent states
        # whose scalars are searched for.
        self._unedited: Sequence[Trace] = ()
        self._largest: dict[tuple[int, int, int], float] = {}
        self._largest_shared: dict[tuple[int, int], float] = {}
        self._main: set[tuple[int, int, int, int]] = set()

    def look(self, traces: Sequence[Trace], number: int) -> list[Coordinate]:
        """Add the candidates found in the traces of round `number` (counted from 1), and return their coordinates."""
        recurrences = list(find_recurrences(traces, self.attention))
        rises, companions = self._split(traces, recurrences, number == 1)
        shared = list(find_shared_recurrences(traces, rises, self.uses))
        self._add_activations(traces, rises, companions, recurrences, shared)
        if number == 1:
            self._find_removers(traces, rises)
        found: dict[Coordinate, list[tuple[int, Move, RowTerm]]] = defaultdict(list)
        unmade: dict[tuple[int, int], str] = {}  # by layer and channel
        searched = {(rise.main.move.layer, rise.main.move.channel) for rise in rises}
        for spell in (spell for rise in rises for spell in rise.spells):
            if not spell.move.made_by_mlp or (spell.move.layer, spell.move.channel) not in searched:
                continue
            terms = self._decomposer.decompose(spell.move)
            for scalar in terms.makers:
                found[scalar.coordinate].append((spell.sequence, spell.move, scalar))
            if not terms.makers:
                unmade[spell.move.layer, spell.move.channel] = terms.explain_no_maker()
        for one in shared:
            for move in one.moves if self._is_main(one) else ():
                terms = self._decomposer.decompose(move)
                for scalar in terms.makers:
                    found[scalar.coordinate].append((one.sequence, move, scalar))
        for coordinate, places in found.items():
            scalar = places[0][2]
            self.candidates[coordinate] = self._make_candidate(places, number, "creates")
            self._decomposer.remove(scalar)  # the next rounds run without this scalar
            unmade.pop((scalar.projection.layer, scalar.row), None)
        for (layer, channel), why in sorted(unmade.items()):
            self.notes.append(
                f"round {number}: channel {channel} persists from layer {layer} on, and no scalar explains it ({why})"
            )
        return list(found)

    def _split(
        self, traces: Sequence[Trace], recurrences: Sequence[Recurrence], unedited: bool
    ) -> tuple[list[Rise], list[Rise]]:
        """Divide the massive hidden states that persist or recur into main states and side effects.

        Only the scalars that make main states are searched for. A state is a main state if the MLP output that makes it
        is at least `MIN_COMPANION_SHARE` of the MLP's largest output for the same token in the unedited model, or if it
        was a main state in round 1. A state that began before the layer that a scalar was removed from is what is left
        of a state: it is searched only if at least `KEPT` of the state is left. Returns (main states, side effects).
        """
        if unedited:
            self._unedited = traces
            for sequence, trace in enumerate(traces):
                for move in trace.moves.values():
                    self._largest[sequence, move.layer, move.token] = move.record.largest
                for move in trace.shared.values():
                    key = sequence, self.uses[move.layer]
                    self._largest_shared[key] = max(move.record.largest, self._largest_shared.get(key, 0.0))
        rises: list[Rise] = []
        companions: list[Rise] = []
        for rise in (*find_rises(traces), *(rise for one in recurrences for rise in one.rises)):
            spell = rise.main
            before = self._unedited[spell.sequence]
            left = compute_remainder(before, traces[spell.sequence], rise)
            prominent = compute_prominence(before, traces, rise) >= PROMINENT
            largest = self._largest.get(spell.place[:3], spell.move.record.largest)
            large = abs(spell.move.output) >= MIN_COMPANION_SHARE * largest or not spell.move.made_by_mlp
            main = spell.place in self._main or (left >= KEPT and large and prominent)
            (rises if main else companions).append(rise)
        if unedited:
            self._main = {rise.main.place for rise in rises}
        return rises, companions

    def _is_main(self, one: SharedRecurrence) -> bool:
        """Return False if the recurring output of a shared MLP is a side effect.

        A side effect is less than `MIN_COMPANION_SHARE` of the MLP's largest output in the unedited model.
        """
        largest = self._largest_shared.get((one.sequence, one.stored), one.main.record.largest)
        return abs(one.main.after) >= MIN_COMPANION_SHARE * largest

    def _add_activations(
        self,
        traces: Sequence[Trace],
        rises: Sequence[Rise],
        companions: Sequence[Rise],
        recurrences: Sequence[Recurrence],
        shared: Sequence[SharedRecurrence],
    ) -> None:
        """Add the activations that are new, with their causes. Side effects are added in round 1 only."""
        unedited = traces is self._unedited
        fresh: list[PersistentActivation] = []
        brief = {rise for one in recurrences for rise in one.rises}
        for group, side in ((rises, False), (companions if unedited else (), True)):
            for rise, new in merge_rises(traces, [rise for rise in group if rise not in brief]):
                if self._is_new(new, fresh):
                    causes = tuple(find_cause(spell.move, self._decomposer) for spell in rise.spells)
                    seen = describe_appearance(traces, rise, self.attention, self._decomposer)
                    fresh.append(replace(new, side=side, causes=causes, appearances=(seen,)))
                    if not rise.main.move.made_by_mlp:
                        self.untraced.add(new.layer)
        for one, new in merge_recurrences(traces, recurrences, self.attention, self._decomposer):
            side = one.main not in rises
            if self._is_new(new, fresh) and (unedited or not side):
                fresh.append(replace(new, side=side))
                self.untraced.update(rise.main.move.layer for rise in one.rises if not rise.main.move.made_by_mlp)
        for side in (False, True) if unedited else (False,):
            for new in merge_shared((one for one in shared if self._is_main(one) is not side), self._decomposer):
                if self._is_new(new, fresh):
                    fresh.append(replace(new, side=side))
        for new in merge_drifts(traces, find_drifts(traces)) if unedited else ():
            self.untraced.add(new.layer)
            if not any(old.channel == new.channel and old.stream == new.stream for old in fresh):
                fresh.append(new)
        self.activations += name_neurons(fresh)

    def _is_new(self, new: PersistentActivation, fresh: Sequence[PersistentActivation]) -> bool:
        """Return True if no activation of the same channel exists in the layer of `new`."""
        return not any(
            (old.channel, old.stream) == (new.channel, new.stream) and old.layer <= new.layer <= old.last
            for old in [*self.activations, *fresh]
        )

    def _make_candidate(self, places: Sequence[tuple[int, Move, RowTerm]], number: int, role: Role) -> Candidate:
        """Describe a scalar that round `number` found. A place is a sequence, a move and the scalar's part of it."""

        def score(place: tuple[int, Move, RowTerm]) -> float:
            _, move, scalar = place
            return abs(move.added) * scalar.share / move.median

        _, move, scalar = max(places, key=score)
        projection = scalar.projection
        return Candidate(
            scalar.coordinate,
            projection.layer,
            scalar.row,
            scalar.col,
            projection.expert,
            scalar.weight,
            score=max(map(score, places)),
            rank=StoredProjection(self.checkpoint, projection).compute_rank(scalar.weight),
            input_spike=scalar.x,
            output_spike=move.output,
            share=scalar.share,
            prompts=len({sequence for sequence, _, _ in places}),
            round=number,
            role=role,
        )

    def _find_removers(self, traces: Sequence[Trace], rises: Sequence[Rise]) -> None:
        """Find the scalars that make the massive channels of the unedited model small again."""
        found: dict[Coordinate, list[tuple[int, Move, RowTerm]]] = defaultdict(list)
        for sequence, end in sorted(find_ends(traces, rises), key=lambda one: one[1].layer):
            terms = self._decomposer.decompose(end)
            for scalar in terms.scalars if terms.explained else ():
                if scalar.share >= SHARE:
                    found[scalar.coordinate].append((sequence, end, scalar))
        for coordinate, places in found.items():
            self.removers[coordinate] = self._make_candidate(places, 1, "removes")


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

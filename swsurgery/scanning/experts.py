"""Find the super experts of a mixture of experts (`scan --method experts`).

The criterion is that of arXiv:2507.23279 (section 3.2, equation 8). Let a be the largest |output| of an expert's down
projection over all tokens. The expert is a super expert if a is above the 99.5th percentile of all experts and above a
tenth of the largest a of the model, and if its layer is one in which massive activations form.

The first two conditions compare experts with each other, so the largest expert of any model fulfils them. The third one
decides whether there are super experts at all. It is tested in two ways. The layer must be in the first three quarters
of the model, since later spikes serve the logits. And the hidden state that the expert's output goes to must be
massive, after this layer or a later one, by the measure of the scan by activations.

    spikes.py         observes the experts while the model runs
    this module       keeps the largest output of each expert, and applies the criterion
    confirm_experts.py  measures the effect of zeroing the experts found

This module gives no verdicts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, cast

from torch import Tensor

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.projections import DownProjection, list_down_projections
from swsurgery.errors import ArchitectureError, ModelError, Unrunnable
from swsurgery.model import Placement, load
from swsurgery.model.forward import LayeredModel
from swsurgery.progress import Progress
from swsurgery.scanning.by_activations import SCAN_PROMPTS, open_with_prompts
from swsurgery.scanning.coverage import list_unread_layers
from swsurgery.scanning.expert_report import ExpertCandidate, ExpertMaximum, ExpertName, ExpertScan
from swsurgery.scanning.matrices import StoredProjection, refuse_quantised, refuse_unweighted
from swsurgery.scanning.report import Candidate
from swsurgery.scanning.sources import ExpertCall, SourceWatch, find_sources, list_unread, set_largest
from swsurgery.scanning.spikes import OUTSTANDING, TINY, compute_bar

PERCENTILE = 99.5
"""The percentile of all experts' largest outputs that a super expert exceeds (arXiv:2507.23279, equation 8)."""

SHARE_OF_LARGEST = 0.1
"""The share of the model's largest output that a super expert exceeds (arXiv:2507.23279, equation 8)."""

DEPTH = 0.75
"""The share of the layers, counted from the first, that may contain super experts. The published ones are in layers 1
to 3 (arXiv:2507.23279, table 2)."""

LARGEST = 10
"""Number of experts with the largest outputs that a report lists."""


def refuse_unscannable(checkpoint: Checkpoint) -> None:
    """Raise an error if the experts of a checkpoint cannot be scanned. The scan calls this before it loads the model.

    Raises ArchitectureError if no layer has experts. Raises ModelError if the elements of a down projection of an
    expert are not weights, because the checkpoint is quantised.
    """
    projections = list(list_down_projections(checkpoint.config, checkpoint.shapes))
    unread = list_unread_layers(checkpoint.config, checkpoint.shapes, projections)
    if all(p.expert is None for p in projections) and not any(layer.experts for layer in unread):
        raise ArchitectureError("the model has no experts", checkpoint.root, "use --method activations")
    for tensor in dict.fromkeys(p.tensor for p in projections if p.expert is not None):
        refuse_quantised(checkpoint, tensor)
        refuse_unweighted(checkpoint, tensor)


def scan_experts(
    checkpoint: Checkpoint,
    *,
    prompts: Sequence[str] | None = None,
    device: str = "auto",
    placement: Placement = "auto",
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> ExpertScan:
    """Find the super experts that `prompts` (None: `SCAN_PROMPTS`) reveal.

    The arguments and errors are those of `scan_activations`, and the errors also those of `refuse_unscannable`.
    """
    refuse_unscannable(checkpoint)
    prompts = SCAN_PROMPTS if prompts is None else tuple(prompts)
    with load.hide_output():
        model, sequences, has_bos, _ = open_with_prompts(checkpoint, prompts, device, placement, say)
        found = scan_expert_sequences(model, sequences, progress=progress)
    return replace(found, prompts=tuple(prompts), settings={**found.settings, "bos": has_bos})


def scan_expert_sequences(
    model: LayeredModel, sequences: Sequence[Sequence[int]], *, progress: Progress | None = None
) -> ExpertScan:
    """Find super experts on token ids; `prompts` of the result is empty. The model runs once on each sequence."""
    if not sequences or not all(sequences):
        raise ModelError("nothing to read: no prompts, or one without tokens", f"{len(sequences)} prompts")
    checkpoint, layers = model.checkpoint, len(model.layers)
    if not layers:
        raise Unrunnable("the model has no list of decoder layers", checkpoint.root)
    watch = ExpertOutputs(model)
    watch.run(sequences, progress)
    if watch.broken is not None:
        raise ModelError(
            "hidden states are not finite",
            f"layer {watch.broken}",
            "a weight or an activation is too large for the dtype, or not a number",
        )
    bars = compute_bars([abs(watch.get_output(p)) for p in watch.projections])
    above = [peak for peak in watch.peaks.values() if bars.are_below(peak.output)]
    above.sort(key=lambda peak: -abs(peak.output))
    found = [p for p in above if p.projection.layer < DEPTH * layers and watch.is_massive(p)]
    reached = sorted(watch.peaks.values(), key=lambda peak: -abs(peak.output))
    return ExpertScan(
        method="experts",
        model_type=str(checkpoint.config.get("model_type", "not given")),
        layers=layers,
        candidates=(),
        profile=watch.make_profile(),
        notes=tuple(_write_notes(watch, [peak for peak in above if peak not in found], layers)),
        unread=watch.unread,
        settings={
            "percentile": PERCENTILE,
            "percentile_bar": bars.percentile,
            "share_of_largest": SHARE_OF_LARGEST,
            "largest_bar": bars.largest,
            "depth": DEPTH,
            "outstanding": OUTSTANDING,
            "experts": len(watch.projections),
            "experts_reached": len(watch.peaks),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": load.get_device_name(model.device),
            "placement": model.method,
        },
        experts=tuple(_make_candidate(watch, peak, bars) for peak in found),
        largest=tuple(ExpertMaximum(*_get_name(p.projection), p.output) for p in reached[:LARGEST]),
    )


class Bars(NamedTuple):
    """The two magnitudes that the largest output of a super expert exceeds."""

    percentile: float
    largest: float

    def are_below(self, output: float) -> bool:
        return abs(output) > max(self)


def compute_bars(magnitudes: Sequence[float]) -> Bars:
    """Compute the bars from the largest |output| of every expert; 0 for an expert that no token was routed to.

    The percentile is interpolated linearly between the two nearest values.
    """
    if not magnitudes:
        return Bars(math.inf, math.inf)
    ordered = sorted(magnitudes)
    place = PERCENTILE / 100 * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return Bars(low + (high - low) * (place % 1), SHARE_OF_LARGEST * ordered[-1])


class ExpertPeak(NamedTuple):
    """The output of largest magnitude of one expert's down projection: output y[row] for one token of one sequence.

    `col` is the neuron whose product x[col] * W[row, col] has the largest magnitude, and `share` is this product
    divided by y[row].
    """

    projection: DownProjection
    sequence: int
    token: int
    row: int
    output: float
    col: int
    x: float
    share: float


class ExpertOutputs(SourceWatch):
    """Runs a model and keeps the largest output of every expert. It is a Watch of forward.py.

    `projections` contains the down projections of all observed experts, and `unread` the layers with an MLP that is not
    observed. `peaks` maps the experts that received a token to their peaks. `inputs`, `outputs` and `residuals` are
    those of a `Profile`.
    """

    method = "experts"

    def __init__(self, model: LayeredModel):
        sources, unseen = find_sources(model)
        super().__init__(model, [[source for source in layer if source.experts] for layer in sources])
        self.projections = [p for layer in self.sources for source in layer for p in source.experts]
        self.unread = list_unread(model, unseen)
        self.peaks: dict[ExpertName, ExpertPeak] = {}
        self._sizes: dict[ExpertName, dict[int, float]] = defaultdict(dict)
        self._states: dict[int, list[Tensor]] = defaultdict(list)

    def run(self, sequences: Sequence[Sequence[int]], progress: Progress | None = None) -> None:
        """Run all sequences."""
        with load.convert_run_errors(self.model.device, self.model.weights is not None):
            for _ in self.model.run(sequences, watch=self, progress=progress):
                pass  # the logits are not needed

    def get_output(self, projection: DownProjection) -> float:
        """Return the largest output of an expert; 0 if it received no token."""
        peak = self.peaks.get(_get_name(projection))
        return 0.0 if peak is None else peak.output

    def count_prompts(self, projection: DownProjection, bars: Bars) -> int:
        """Count the sequences in which an expert has an output above the bars."""
        return sum(bars.are_below(size) for size in self._sizes[_get_name(projection)].values())

    def compute_state(self, peak: ExpertPeak) -> float:
        """Return the largest |hidden state| at the token and channel of a peak, in medians of its layer.

        The layer of the expert and all later layers are searched.
        """
        return max(
            float(hidden[peak.token, peak.row].abs()) / max(float(hidden.abs().median()), TINY)
            for hidden in self._states[peak.sequence][peak.projection.layer :]
        )

    def is_massive(self, peak: ExpertPeak) -> bool:
        """Return True if the hidden state at the token and channel of a peak is massive after its layer or later."""
        for hidden in self._states[peak.sequence][peak.projection.layer :]:
            magnitudes = hidden.abs()
            if magnitudes[peak.token, peak.row] >= compute_bar(magnitudes, max(float(magnitudes.median()), TINY)):
                return True
        return False

    # The Watch of forward.py ----------------------------------------------------------------------------------------

    def after(self, number: int, rows: Sequence[tuple[int, int]], hidden: Tensor) -> None:
        self.refuse_streams(hidden)
        self.keep_residuals(number, hidden)
        for row, (sequence, _) in enumerate(rows):
            self._states[sequence].append(hidden[row].float().cpu())
        for source in self.sources[number]:
            if source.called:
                for call in source.list_expert_calls():
                    set_largest(self.inputs, number, call.x)
                    set_largest(self.outputs, number, call.y)
                    self._keep(call, [sequence for sequence, _ in rows], hidden.shape[1])
            source.forget()

    def _keep(self, call: ExpertCall, sequences: Sequence[int], length: int) -> None:
        """Keep the largest output of one expert in each sequence. Each sequence of the batch has `length` tokens."""
        name = _get_name(call.projection)
        tokens = call.tokens.cpu()
        largest = call.y.abs().max(dim=1)
        sizes, channels = largest.values.float().cpu(), largest.indices.cpu()
        for number, sequence in enumerate(sequences):
            here = (tokens // length == number).nonzero().flatten()
            if not len(here):
                continue
            best = int(here[sizes[here].argmax()])
            self._sizes[name][sequence] = float(sizes[best])
            if name in self.peaks and float(sizes[best]) <= abs(self.peaks[name].output):
                continue
            row = int(channels[best])
            products = call.x[best].double() * call.weight[row].double()
            col, output = int(products.abs().argmax()), float(call.y[best, row])
            share = float(products[col]) / output if output else math.nan
            self.peaks[name] = ExpertPeak(
                call.projection,
                sequence,
                int(tokens[best]) % length,
                row,
                output,
                col,
                float(call.x[best, col]),
                share,
            )


def _get_name(projection: DownProjection) -> ExpertName:
    return projection.layer, cast("int | Literal['shared']", projection.expert)


def _make_candidate(watch: ExpertOutputs, peak: ExpertPeak, bars: Bars) -> ExpertCandidate:
    checkpoint, projection = watch.model.checkpoint, peak.projection
    stored = StoredProjection(checkpoint, projection)
    value = float(stored.read_row(peak.row)[peak.col])
    prompts = watch.count_prompts(projection, bars)
    cause = Candidate(
        stored.make_coordinate(peak.row, peak.col),
        projection.layer,
        peak.row,
        peak.col,
        projection.expert,
        value,
        score=abs(peak.x * value),
        rank=stored.compute_rank(value),
        input_spike=peak.x,
        output_spike=peak.output,
        share=peak.share,
        prompts=prompts,
    )
    return ExpertCandidate(
        *_get_name(projection),
        output=peak.output,
        row=peak.row,
        token=peak.token,
        prompt=peak.sequence,
        prompts=prompts,
        state=watch.compute_state(peak),
        cause=cause,
    )


def _write_notes(watch: ExpertOutputs, others: Sequence[ExpertPeak], layers: int) -> Iterator[str]:
    """Yield a note on experts that no token reached, and on experts above the bars that are not candidates."""
    if missing := len(watch.projections) - len(watch.peaks):
        yield f"{missing:,} of {len(watch.projections):,} experts received no token; more prompts reach more experts"
    for peak in others[:LARGEST]:
        layer, expert = _get_name(peak.projection)
        state = watch.compute_state(peak)
        late = f"its layer is in the last quarter of the {layers} layers"
        small = f"no massive activation follows: the largest state is {state:.0f} medians"
        why = late if watch.is_massive(peak) else small
        where = f"layer {layer} expert {expert}"
        yield f"not listed: {where}, although its output {peak.output:.4g} is above both bars ({why})"
    if len(others) > LARGEST:
        yield f"{len(others) - LARGEST} more experts above both bars are not listed for one of these reasons"

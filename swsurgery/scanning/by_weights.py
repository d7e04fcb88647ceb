"""Find super weights from the weights alone, by reading the MLPs once (`scan --method weights`).

Neuron i of a gated MLP computes silu(g_i . x) * (u_i . x), where g_i and u_i are rows of the gate and up matrices. The
column W_down[:, i] multiplies this value, and the product is added to the residual stream. For large positive arguments
silu is nearly the identity, so the value is about (g_i . x) * (u_i . x). Over unit vectors x its maximum is
(|g_i||u_i| + g_i . u_i) / 2, which is large if both rows are long and point in the same direction. The term g_i . u_i
alone ranks super weights best. The score of a scalar is therefore |W_down[k, i]| * |sum_d gain_d^2 g_id u_id|. The gain
is squared, because the gain of the norm before the MLP multiplies both rows. In an MLP without a gate, the row fc_i of
its only input matrix replaces both g_i and u_i. docs/detection.md compares variants of the score.

A norm after the MLP (Gemma 2 and 3, OLMo 2 and 3, GLM-4) divides the whole output by its root mean square and
multiplies channel k by gain_k, so the score is multiplied by |gain_k| too. The score does not include the division,
because the root mean square depends on the input.

This module finds the matrices of each MLP and decides which scores are outliers; scores.py computes the scores. Neither
module runs a forward pass or imports torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.family import InputProjections
from swsurgery.checkpoint.model_config import list_sections
from swsurgery.checkpoint.projections import (
    DownProjection,
    list_down_projections,
    list_input_projections,
    list_templates,
)
from swsurgery.checkpoint.structures import name_sibling
from swsurgery.errors import ArchitectureError
from swsurgery.progress import Progress, Silent
from swsurgery.scanning.blocks import READ_THREADS, BlockReader, Matrix
from swsurgery.scanning.coverage import format_layer_name, list_stored_layers, list_unread_layers
from swsurgery.scanning.report import Candidate, Scan
from swsurgery.scanning.scores import (
    Mlp,
    NeuronScores,
    ScoreSide,
    convert_patterns,
    count_ranks,
    read_columns,
    score_neurons,
)
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.dtypes import decode
from swsurgery.storage.files import read_exactly

MIN_Z = 5.0
"""Minimum robust z-score of a candidate (see `scan_weights`). Six scalars of SmolLM2-135M-Instruct reach it, with 5.2
to 6.9. Zeroing any one of five of them raises perplexity, and zeroing the sixth erases the super activation. In random
weights every z-score is below 3."""

MIN_PEAK = 2.0
"""Minimum magnitude of a candidate, as a multiple of its layer's usual column maximum: the median of the largest
magnitudes of all columns. It is 6.9 to 8.7 for the six scalars of SmolLM2 that `MIN_Z` mentions, and below 2 for random
weights. Without this limit, if a column's large scalar was set to 0, its second largest scalar would be listed."""

LEAST_SPREAD = math.log(2)
"""Minimum spread of the natural logarithms of a layer's scores; it corresponds to a factor of two. Without a minimum,
small differences would count as outliers in a layer whose scores are almost equal."""

MIN_ROW_SHARE = 0.5
"""Minimum magnitude of the second and third scalar listed from a column, as a share of its largest magnitude."""

MAX_ROWS_PER_COLUMN = 3
"""Maximum number of scalars that are listed from one column."""


PRE_NORMS = (
    *("pre_feedforward_layernorm", "pre_mlp_layernorm", "pre_ff_layernorm", "ffn_norm"),
    *("channel_pre_norm", "mlp_norm"),  # RecurrentGemma, ModernBERT
    *("shared_transf.pre_ff_layernorm", "shared_transformer.pre_ff_layernorm"),  # Zamba
)
"""Names of norms that are before the MLP in every model that has them."""

NORMS = (
    *PRE_NORMS,
    *("ln_mlp", "ln_2", "norm_2", "post_attention_layernorm", "post_attention_layernorm.0", "final_layer_norm"),
    *("input_layernorm", "ln_1", "norm"),
)
"""Possible names of the norm before the MLP. The first name that the layer contains is used. `input_layernorm` and
`ln_1` belong to models in which the MLP and attention run in parallel and share one norm, `norm` to models whose layers
have one block each (Nemotron-H)."""

NO_PRE_NORM = "post_feedforward_layernorm"
"""The name of a norm after the MLP. A layer that has it, but no norm in `PRE_NORMS`, has no norm before its MLP (OLMo 2
and 3, EXAONE 4)."""

POST_NORM = re.compile(r"post_(feed_?forward|mlp|ffn|ff|moe)_(layer|rms)?norm")
"""Matches the name of a norm that is applied to the MLP's output before the residual addition."""

ARCTIC_RESIDUAL = ".residual_mlp."
"""Part of the names of the MLP that runs beside the experts of Arctic, and that has a norm of its own."""

NO_GAIN = "no gain of a norm before the MLP is stored, so the score uses a gain of 1"

NORM_BEHIND = (
    "a norm follows the MLP ({}): the score includes its gain, but not its division by the size of the whole output, "
    "which depends on the input; a low score is weaker evidence than in other models (scan by activations too)"
)

NORM_OF_THE_SUM = (
    "a norm follows each residual addition (do_layer_norm_before: false) and is not in the score: a low score is "
    "weaker evidence than in other models (scan by activations too)"
)

ONE_PLUS = (
    *("gemma", "gemma2", "gemma3", "gemma3_text", "vaultgemma", "nemotron", "recurrent_gemma"),
    *("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
    *("minimax_m3_vl", "minimax_m3_vl_text", "muse_glimmer", "muse_glimmer_text", "step3p7", "step3p5"),
)
"""The model types whose norms multiply by 1 + weight."""


class _Scored(NamedTuple):
    """One MLP, with one scalar per neuron: the largest in the neuron's column of the down projection.

    `scores`: (neurons,) float32, the scores of these scalars. `peaks`: (neurons,) float32, their magnitudes. If a norm
    follows the MLP, the magnitudes are multiplied by its gain.
    """

    projection: DownProjection
    mlp: Mlp
    scores: NDArray[np.float32]
    peaks: NDArray[np.float32]

    @classmethod
    def of(cls, projection: DownProjection, found: NeuronScores) -> _Scored:
        with np.errstate(over="ignore", invalid="ignore"):
            return cls(projection, found.mlp, found.peaks * np.abs(found.dots), found.peaks)


def scan_weights(
    checkpoint: Checkpoint,
    *,
    threads: int | None = None,
    top: int = 10,
    min_z: float = MIN_Z,
    progress: Progress | None = None,
) -> Scan:
    """Find at most `top` scalars whose score has a robust z-score of at least `min_z` in its layer, best first.

    The z-score is computed from the logarithms of scores: the scalar's logarithm minus the layer's median, divided by
    the layer's spread. The spread is 1.4826 times the median absolute deviation, but at least `LEAST_SPREAD`. The
    statistics of a layer use one scalar per neuron, the one with the highest score, and include the neurons of all
    experts. A candidate must also be at least `MIN_PEAK` times as large as the layer's median column maximum. The
    result does not depend on `threads`, the number of threads (None: `READ_THREADS`).

    Raises ArchitectureError if the model's MLPs are unknown, packed, or scaled by other tensors; ShardError if a file
    ends early; and ValueError if `top`, `min_z` or `threads` is not positive.
    """
    if top < 1 or not min_z > 0 or (threads is not None and threads < 1):
        raise ValueError(f"top, min_z and threads must be positive, but are {top}, {min_z} and {threads}")
    config = checkpoint.config
    names = _Names(checkpoint, checkpoint.shapes)
    projections = [p for p in list_down_projections(config, names.shapes) if p.rows and p.cols]
    if not projections:
        raise ArchitectureError("every down projection is empty", checkpoint.root)
    mlps = [names.mlp(projection) for projection in projections]
    notes = names.notes
    progress = progress or Silent()
    progress.start(sum(mlp.size for mlp in mlps), "B", "scanning weights")
    try:
        with BlockReader(threads or READ_THREADS) as reader:
            scored = [
                _Scored.of(projection, found)
                for projection, found in zip(projections, score_neurons(reader, mlps, progress.advance), strict=True)
            ]
            usual = _Usual.of(scored)
            candidates = _find_candidates(checkpoint, reader, scored, usual, top, min_z)
    finally:
        progress.close()
    if usual.silent:
        notes.append(f"{usual.silent} neurons have no finite score above 0 and were left out")
    unread = list_unread_layers(config, names.shapes, projections)
    if not candidates:
        why = _explain_none(scored, usual, min_z)
        notes.append(why.replace("no super weight", "no super weight in what was read", 1) if unread else why)
    return Scan(
        method="weights",
        model_type=next((str(s["model_type"]) for s in list_sections(config) if s.get("model_type")), "unknown"),
        layers=len(list_stored_layers(config, names.shapes, projections)),
        candidates=tuple(candidates),
        notes=tuple(notes),
        unread=unread,
        settings={
            "top": top,
            "min_z": min_z,
            "min_peak": MIN_PEAK,
            "neurons": sum(p.cols for p in projections),
            "scalars": sum(p.rows * p.cols for p in projections),
        },
    )


# Which matrices belong together -------------------------------------------------------------------------------------


class _Names:
    """Finds the matrices and norms of each MLP by their stored names. `notes` collects lines for the user."""

    def __init__(self, checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]):
        self.checkpoint, self.shapes = checkpoint, shapes
        self.notes: list[str] = []
        # The squared gain of the norm before the MLP and the gain of the norm after it, by layer and by the number of
        # rows: experts share norms. True: the residual MLP of Arctic, which has a norm of its own.
        self._gains: dict[tuple[int, int, bool], tuple[NDArray[np.float64], NDArray[np.float32] | None]] = {}
        self._norms_behind: dict[str, str] = {}
        for name in shapes:
            layer, _, norm = name.removesuffix(".weight").rpartition(".")
            if POST_NORM.fullmatch(norm) and name.endswith(".weight"):
                self._norms_behind[layer] = name

    def mlp(self, projection: DownProjection) -> Mlp:
        """Find the matrices and the gains of the MLP that contains a down projection.

        Raises ArchitectureError if an input matrix is missing, or if its shape does not fit the down projection.
        """
        stacked = projection.expert_axis is not None
        expert = projection.expert if stacked and isinstance(projection.expert, int) else None
        inputs, names = self._find_inputs(projection)
        gate, up = (Matrix.of(self.checkpoint, name, expert) for name in (names[0], names[-1]))
        neurons = projection.cols
        axes = (neurons * (1 if inputs.fusion == "apart" else 2), projection.rows)
        for matrix in (gate, up):
            wanted = axes[::-1] if projection.transposed else axes
            if (matrix.rows, matrix.cols) != wanted:
                stored = f"shape [{matrix.rows}, {matrix.cols}]"
                raise ArchitectureError(f"{stored} is not {list(wanted)}, which {projection.tensor} needs", matrix.name)
        if inputs.fusion == "alternating":
            sides = ScoreSide(gate, 0, 2), ScoreSide(up, 1, 2)
        else:
            sides = ScoreSide(gate), ScoreSide(up, neurons if inputs.fusion == "halves" else 0)
        down = Matrix.of(self.checkpoint, projection.tensor, expert)
        key = (projection.layer, projection.rows, ARCTIC_RESIDUAL in projection.tensor)
        if key not in self._gains:
            self._gains[key] = self._read_gain_before(projection) ** 2, self._read_gain_behind(projection)
        return Mlp(neurons, 1 if projection.transposed else 0, *sides, down, *self._gains[key])

    def _find_inputs(self, projection: DownProjection) -> tuple[InputProjections, list[str]]:
        """Find how the input matrices of an MLP are stored, and the names of their tensors."""
        sought = []
        for inputs in list_input_projections(self.checkpoint.config, projection):
            names = [name_sibling(projection, name) for name in inputs.names]
            if all(name in self.shapes for name in names):
                return inputs, names
            sought.append(" and ".join(names))
        raise ArchitectureError(
            "the matrices before the down projection are not stored under a known name",
            projection.tensor,
            f"looked for {' or '.join(sought) or 'none'}; scan by activations",
        )

    def _read_gain_before(self, projection: DownProjection) -> NDArray[np.float64]:
        """Read the gain of the norm before the MLP: (channels,). If no gain is stored, return ones and add a note."""
        layer = format_layer_name(projection)
        # OPT-350m normalises after each block, so the input of its MLP is the output of the attention's norm.
        norms: tuple[str, ...] = NORMS
        if self.checkpoint.config.get("do_layer_norm_before") is False:
            norms = ("self_attn_layer_norm",)
            self._note(NORM_OF_THE_SUM)
        if ARCTIC_RESIDUAL in projection.tensor:
            norms = ("residual_layernorm",)
        stored = [name for name in norms if f"{layer}.{name}.weight" in self.shapes]
        latent = any(template.rows_key for template in list_templates(self.checkpoint.config, projection))
        if latent and stored and self.shapes[f"{layer}.{stored[0]}.weight"] != (projection.rows,):
            stored = []  # a matrix between the norm and the experts changes the channels
        if not stored or (f"{layer}.{NO_PRE_NORM}.weight" in self.shapes and stored[0] not in PRE_NORMS):
            self._note(NO_GAIN)
            return np.ones(projection.rows)
        return self._read_gain(f"{layer}.{stored[0]}.weight", projection.rows)

    def _read_gain_behind(self, projection: DownProjection) -> NDArray[np.float32] | None:
        """Read the magnitudes of the gain of the norm after the MLP: (channels,). Returns None if no norm follows."""
        name = self._norms_behind.get(format_layer_name(projection))
        if name is None:
            return None
        self._note(NORM_BEHIND.format(name.removesuffix(".weight").rpartition(".")[2]))
        with np.errstate(over="ignore"):
            return np.abs(self._read_gain(name, projection.rows)).astype(np.float32)

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def _read_gain(self, name: str, channels: int) -> NDArray[np.float64]:
        """Read the factor by which one norm multiplies each channel: (channels,), float64.

        Raises ArchitectureError if the tensor is quantised, or if it is not a float vector of `channels` elements.
        """
        info, shard = self.checkpoint.get_info(name), self.checkpoint.shards[self.checkpoint.weight_map[name]]
        if info.shape != (channels,) or info.dtype.kind != "float":
            what = f"{info.dtype.name} {list(info.shape)} is not the gain of {channels} channels"
            raise ArchitectureError(what, name)
        if why := self.checkpoint.quantisation.explain_refusal(name):
            raise ArchitectureError(why, name, "scan an unquantised copy, or by activations")
        raw = read_exactly(shard.file, info.size, shard.data_start + info.data_offsets[0])
        gain = convert_patterns(np.frombuffer(raw, f"<u{info.dtype.size}"), info.dtype).astype(np.float64)
        return gain + 1.0 if _has_type(self.checkpoint.config, ONE_PLUS) else gain


def _has_type(config: Mapping[str, Any], model_types: Sequence[str]) -> bool:
    return any(section.get("model_type") in model_types for section in list_sections(config))


# Which scores are outliers -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Usual:
    """The statistics of the scores of each layer.

    `layers` maps each layer to the median of the logarithms of its scores, their spread, and the median of its column
    maxima. `silent` is the number of neurons whose score is 0 or not finite; the statistics exclude these neurons.
    """

    layers: dict[int, tuple[float, float, float]]
    silent: int

    @classmethod
    def of(cls, scored: Sequence[_Scored]) -> _Usual:
        layers, silent = {}, 0
        for layer in dict.fromkeys(one.projection.layer for one in scored):
            here = [one for one in scored if one.projection.layer == layer]
            scores, peaks = (np.concatenate([getattr(one, what) for one in here]) for what in ("scores", "peaks"))
            alive = np.isfinite(scores) & (scores > 0)
            silent += int(np.count_nonzero(~alive))
            if alive.any():
                logarithms = np.log(scores[alive])
                median = float(np.median(logarithms))
                spread = 1.4826 * float(np.median(np.abs(logarithms - median)))
                layers[layer] = median, max(spread, LEAST_SPREAD), float(np.median(peaks[alive]))
        return cls(layers, silent)

    def peak(self, layer: int) -> float:
        return self.layers[layer][2] if layer in self.layers else math.inf

    def z(self, layer: int, scores: NDArray[np.floating]) -> NDArray[np.float64]:
        """Compute the robust z-score of each score: minus infinity if the score is 0 or not finite."""
        alive = np.isfinite(scores) & (scores > 0)
        median, spread, _ = self.layers.get(layer, (0.0, 1.0, 0.0))
        logarithms = np.log(np.where(alive, scores, 1.0).astype(np.float64))
        return np.where(alive, (logarithms - median) / spread, -math.inf)

    def remarkable(
        self, layer: int, scores: NDArray[np.floating], magnitudes: NDArray[np.floating], min_z: float
    ) -> NDArray[np.bool_]:
        return (self.z(layer, scores) >= min_z) & (magnitudes >= MIN_PEAK * self.peak(layer))


def _find_candidates(
    checkpoint: Checkpoint, reader: BlockReader, scored: Sequence[_Scored], usual: _Usual, top: int, min_z: float
) -> list[Candidate]:
    """Find the candidates in the columns of the `top` neurons with the highest z-scores.

    So far only the largest magnitude of each column is known, so the down projections are read again to find the row
    and the rank of each candidate.
    """
    neurons = []
    for number, one in enumerate(scored):
        z = usual.z(one.projection.layer, one.scores)
        fit = usual.remarkable(one.projection.layer, one.scores, one.peaks, min_z)
        neurons += [(-float(z[col]), number, int(col)) for col in np.flatnonzero(fit)]
    chosen: dict[int, list[int]] = {}
    for _, number, col in sorted(neurons)[:top]:
        chosen.setdefault(number, []).append(col)
    found = [
        candidate
        for number, cols in chosen.items()
        for candidate in _find_scalars(checkpoint, reader, scored[number], cols, usual, min_z)
    ]
    return sorted(found, key=lambda c: (-(c.z or 0.0), c.coordinate))[:top]


def _find_scalars(
    checkpoint: Checkpoint, reader: BlockReader, one: _Scored, cols: Sequence[int], usual: _Usual, min_z: float
) -> list[Candidate]:
    """Find the candidates in each of the columns `cols`, at most MAX_ROWS_PER_COLUMN per column.

    The candidates of a column are its largest scalar, and further scalars with at least `MIN_ROW_SHARE` of its
    magnitude. Each must also meet the conditions of `scan_weights`.
    """
    projection = one.projection
    columns = read_columns(reader, one.mlp, cols)
    picked: list[tuple[int, int, float, float]] = []
    behind = np.float32(1) if one.mlp.behind is None else one.mlp.behind
    for col, magnitudes in zip(cols, columns.T, strict=True):
        weighted = magnitudes * behind
        scores = weighted / one.peaks[col] * one.scores[col]
        close = usual.remarkable(projection.layer, scores, weighted, min_z)
        close &= weighted >= MIN_ROW_SHARE * one.peaks[col]
        rows = np.argsort(-weighted, kind="stable")[:MAX_ROWS_PER_COLUMN]
        picked += [(int(row), col, float(magnitudes[row]), float(scores[row])) for row in rows if close[row]]
    ranks = count_ranks(reader, one.mlp.down, [magnitude for _, _, magnitude, _ in picked])
    candidates = []
    for (row, col, _, score), rank in zip(picked, ranks, strict=True):
        coordinate = Coordinate(projection.tensor, projection.find_index(row, col))
        shard = checkpoint.shards[checkpoint.weight_map[projection.tensor]]
        value = float(decode(one.mlp.down.dtype, shard.read_scalar(*coordinate)))
        z = float(usual.z(projection.layer, np.array([score]))[0])
        candidates.append(Candidate(coordinate, projection.layer, row, col, projection.expert, value, score, rank, z=z))
    return candidates


def _explain_none(scored: Sequence[_Scored], usual: _Usual, min_z: float) -> str:
    """Explain in one line why the neuron with the highest z-score gives no candidate."""
    best = max(
        ((float(z.max()), one, int(z.argmax())) for one in scored for z in [usual.z(one.projection.layer, one.scores)]),
        key=lambda entry: entry[0],
    )
    z, one, col = best
    layer = one.projection.layer
    if not math.isfinite(z):
        return "no super weight: no neuron has a finite score above 0"
    place = f"layer {layer}" + ("" if one.projection.expert is None else f", expert {one.projection.expert}")
    if z < min_z:
        return f"no super weight: the highest z of all neurons is {z:.1f} ({place}, col {col}), but {min_z:g} is needed"
    share = float(one.peaks[col]) / usual.peak(layer)
    return (
        f"no super weight: the neuron with the highest z, {z:.1f} ({place}, col {col}), has no large scalar: "
        f"{share:.1f} times the usual column maximum, but {MIN_PEAK:g} times is needed"
    )

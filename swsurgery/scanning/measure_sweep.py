"""Measure a model's quality with some scalars multiplied by each of several factors.

One run of the model measures several factors at once (`model/forward.py`). The measurements are those of the sanity
check (`model/measure.py`). `factors.py` computes the scaled values. This module collects the measurements, and gives no
verdicts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.model import Placement, load, measure, tokens
from swsurgery.model.cutting import Window
from swsurgery.model.forward import LayeredModel
from swsurgery.model.protocol import DEFAULT_PROTOCOL, Protocol
from swsurgery.model.variant import Scalars, Variant
from swsurgery.model.windows import count_variants_at_once, cut_text_windows
from swsurgery.progress import Progress
from swsurgery.scanning.factors import compute_scaled_values
from swsurgery.scanning.report import Sweep, SweepPoint
from swsurgery.storage.coordinate import Coordinate


@dataclass(frozen=True)
class Regions:
    """Regions to scale: their names, and a function that returns the variant whose tensors contain them scaled.

    The tensors of the variant contain the scaled scalars too.
    """

    names: Sequence[str]
    scale: Callable[[float], Variant]


def sweep_checkpoint(
    checkpoint: Checkpoint,
    coordinates: Sequence[Coordinate],
    factors: Sequence[float],
    *,
    regions: Regions | None = None,
    text: str | None = None,
    device: str = "auto",
    placement: Placement = "auto",
    protocol: Protocol = DEFAULT_PROTOCOL,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Sweep:
    """Measure the model's quality with all of `coordinates` multiplied by each of `factors`.

    The model runs on `text` (None: the protocol's text), cut and scored by `protocol` as by `check.run_checks`.
    `device` and `placement` mean the same as in `load.open_model`. `sweep_windows` describes the method. Raises
    NumberError for an impossible factor, before the model is loaded, and ModelError if the tokenizer or the model
    cannot be loaded or run.
    """
    compute_scaled_values(checkpoint, coordinates, factors, bool(regions))
    with load.hide_output():
        tokenizer = load.load_tokenizer(checkpoint.directory)
        model = load.open_model(checkpoint, device=device, placement=placement, say=say)
        cut = cut_text_windows(model.model, tokenizer, text, protocol)
        embeddings = cast("nn.Embedding", model.model.get_input_embeddings())
        stop_tokens = tokens.stop_word_tokens(tokenizer, embeddings.num_embeddings)
        report = sweep_windows(
            model, coordinates, factors, cut.windows, stop_tokens, cut.words, regions=regions, progress=progress
        )
    return dataclasses.replace(report, window_tokens=cut.window_tokens, text_sha256=cut.sha256, protocol=cut.protocol)


def sweep_windows(
    model: LayeredModel,
    coordinates: Sequence[Coordinate],
    factors: Sequence[float],
    windows: Sequence[Sequence[int]],
    stop_tokens: Sequence[int] = (),
    words: int | None = None,
    *,
    regions: Regions | None = None,
    progress: Progress | None = None,
) -> Sweep:
    """Sweep on windows of token ids. The model runs on each window separately. The points have the order of `factors`.

    A scaled value is the exact product of stored value and factor, rounded once to the stored dtype. At factor 0 all
    bits of the value are zero. If a factor changes no scalar, such as factor 1, its point equals that of the base. To
    limit memory, many factors are run in several groups, and the base is run with each group. `words` is the number of
    words of the text, or None if they are not counted.
    """
    variants = _make_variants(model.checkpoint, coordinates, factors, regions)
    keys = [None if one.is_stored else at for at, one in enumerate(variants)]
    for at, one in enumerate(variants):  # factors that change no tensor and give the same scalars share a point
        same = next((n for n in range(at) if not one.tensors and variants[n] == one), None)
        keys[at] = keys[at] if same is None else keys[same]
    wanted = [key for key in dict.fromkeys(keys) if key is not None]
    figures: dict[int | None, SweepPoint] = {}
    with load.convert_run_errors(model.device, model.weights is not None):
        at_once = count_variants_at_once(model, windows)
        for begin in range(0, max(1, len(wanted)), at_once):
            group: list[int | None] = [None, *wanted[begin : begin + at_once]]
            totals = measure.Totals(stop_tokens, len(group), words=words)
            running = [Variant() if key is None else variants[key] for key in group]
            for outcomes in model.run(windows, running, progress=progress):
                totals.add_window(windows[outcomes.sequence], outcomes)
            for number, key in enumerate(group):
                figures.setdefault(key, _make_point(totals, number))
    return Sweep(
        coordinates=tuple(coordinates),
        regions=tuple(regions.names) if regions else (),
        base=figures[None],
        points=tuple(
            dataclasses.replace(figures[key], factor=factor) for key, factor in zip(keys, factors, strict=True)
        ),
        windows=len(windows),
        window_tokens=max(map(len, windows)),
        text_sha256="",
        dtype=str(model.dtype).removeprefix("torch."),
        device=load.get_device_name(model.device),
        method=model.method,
        scored_tokens=sum(len(Window.of(window).targets) for window in windows),
    )


def _make_variants(
    checkpoint: Checkpoint, coordinates: Sequence[Coordinate], factors: Sequence[float], regions: Regions | None
) -> list[Variant]:
    """Return the variant of each factor: the scaled scalars, and the tensors with scaled regions."""
    scaled = compute_scaled_values(checkpoint, coordinates, factors, bool(regions))
    variants: list[Variant] = []
    for factor, values in zip(factors, scaled, strict=True):
        other = regions.scale(factor) if regions and factor != 1 else Variant()
        scalars: Scalars = {place: value for place, value in values.items() if place.tensor not in other.tensors}
        variants.append(dataclasses.replace(other, scalars=scalars))
    return variants


def _make_point(totals: measure.Totals, number: int) -> SweepPoint:
    side = totals.summarise_side(number)
    ratio, kl = totals.compute_ratio_interval(number), totals.compute_kl_interval(number)
    return SweepPoint(
        factor=1.0,
        perplexity=side.perplexity,
        ratio=totals.compute_perplexity_ratio(number),
        kl=totals.compute_mean_kl(number),
        stopword_mass=side.stopword_mass,
        finite=side.finite,
        peak=math.nan if side.super_activation is None else side.super_activation.value,
        ratio_low=ratio.low,
        ratio_high=ratio.high,
        kl_low=kl.low,
        kl_high=kl.high,
        word_perplexity=side.word_perplexity,
    )

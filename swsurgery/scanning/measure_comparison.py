"""Run a base and several planned edits of it on one text, and compute their figures."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.editing.control_checks import list_plan_excluded
from swsurgery.editing.overlay import overlay_checkpoint
from swsurgery.editing.plan import Plan
from swsurgery.model import Placement, load, measure, tokens
from swsurgery.model.control_run import PlannedControl, plan_controls, run_variants
from swsurgery.model.controls import Control
from swsurgery.model.protocol import Protocol
from swsurgery.model.tasks.load import LoadedTasks
from swsurgery.model.torch_dtypes import TORCH_DTYPES
from swsurgery.model.variant import Rounding, Scalars, Variant, describe_rounding
from swsurgery.model.windows import count_variants_at_once, cut_text_windows
from swsurgery.progress import Progress
from swsurgery.scanning.comparison import ComparedModel, Comparison
from swsurgery.storage.dtypes import decode
from swsurgery.storage.files import File, fill

NORM_CHUNK = 1 << 22
"""Bytes of a tensor that are compared at a time."""


def compare_plans(
    checkpoint: Checkpoint,
    plans: Sequence[Plan],
    roundings: Sequence[Rounding],
    *,
    tasks: LoadedTasks | None = None,
    controls: Sequence[Control] = (),
    text: str | None,
    protocol: Protocol,
    device: str,
    placement: Placement,
    progress: Progress,
    say: Callable[[str], None],
) -> Comparison:
    """Measure the base `checkpoint` and the checkpoint that each plan would write.

    Every model runs as it is and with each of `roundings`. Variants share one reading of the weights, or a few if their
    hidden states need too much memory. With `tasks`, every model also answers their requests. With `controls`, the base
    also runs with the controls of each edit, which answer no tasks.
    """
    overlays = [overlay_checkpoint(plan, progress) for plan in plans]
    edits = [_Edit(None, Variant(), 0, 0, 0.0, 0.0)]
    edits += [_measure_edit(plan, overlay) for plan, overlay in zip(plans, overlays, strict=True)]
    cases = [_Case(edit, rounding) for edit in edits[:1] for rounding in (None, *roundings)]
    for plan, edit in zip(plans, edits[1:], strict=True):
        cases += [_Case(edit, rounding) for rounding in (None, *roundings)]
        edited, excluded = [splice.coordinate for splice in plan.splices], list_plan_excluded(plan)
        cases += [_Case(edit, None, one) for one in plan_controls(controls, checkpoint, {}, edited, excluded, say)]
    with load.hide_output():
        tokenizer = load.load_tokenizer(checkpoint.directory)
        model = load.open_model(checkpoint, device=device, placement=placement, say=say)
        cut = cut_text_windows(model.model, tokenizer, text, protocol)
        pieces = cut.windows
        stop_tokens = tokens.stop_word_tokens(tokenizer, measure.get_vocabulary_size(model.model))
        models: list[ComparedModel] = []
        patched: list[Tensor] = []
        with load.convert_run_errors(model.device, model.weights is not None):
            at_once = count_variants_at_once(model, pieces)
            for begin in range(1, max(2, len(cases)), at_once):
                group = [0, *range(begin, min(begin + at_once, len(cases)))]
                totals = measure.Totals(stop_tokens, len(group), words=cut.words)
                for outcomes in run_variants(model, pieces, [cases[number].variant for number in group], progress):
                    totals.add_window(pieces[outcomes.sequence], outcomes)
                first = 0 if begin == 1 else 1
                for at in range(first, len(group)):
                    if cases[group[at]].is_edit:
                        patched = totals.token_nll[at]
                    models.append(_make_model(totals, at, cases[group[at]], patched))
            scores = None
            if tasks is not None:
                from swsurgery.model.tasks.measure_tasks import measure_tasks  # imports lm-eval

                names = [one.name for one in models if one.control is None]
                variants = [case.variant for case in cases if case.control is None]
                run = functools.partial(model.run, variants=variants, progress=progress)
                scores = measure_tasks(tasks, checkpoint.directory, model, names, run)
    return Comparison(
        base=str(checkpoint.repo_id or checkpoint.root),
        models=tuple(models),
        windows=len(pieces),
        window_tokens=cut.window_tokens,
        scored_tokens=sum(len(piece.targets) for piece in pieces),
        text_sha256=cut.sha256,
        protocol=cut.protocol,
        dtype=str(model.dtype).removeprefix("torch."),
        device=load.get_device_name(model.device),
        method=model.method,
        tasks=scores,
    )


class _Edit:
    """One manifest: the variant of the base, and how much it changes."""

    def __init__(self, name: Path | None, variant: Variant, scalars: int, size: int, norm: float, relative: float):
        self.name, self.variant = name, variant
        self.scalars, self.size, self.norm, self.relative = scalars, size, norm, relative


@dataclass(frozen=True)
class _Case:
    """One measured model: an edit as computed or with rounded activations, or a control of the edit."""

    edit: _Edit
    rounding: Rounding | None
    control: PlannedControl | None = None

    @property
    def variant(self) -> Variant:
        """The variant of the base that is run."""
        return replace(self.edit.variant, rounding=self.rounding) if self.control is None else self.control.variant

    @property
    def is_edit(self) -> bool:
        """True for an edit as computed, with which its controls are compared."""
        return self.rounding is None and self.control is None


def _measure_edit(plan: Plan, patched: Checkpoint) -> _Edit:
    """Compare each changed tensor with the base, and make the variant."""
    rewritten = frozenset(rewrite.region.tensor for rewrite in plan.rewrites)
    splices = {splice.coordinate: float(decode(splice.dtype, splice.new)) for splice in plan.splices}
    scalars: Scalars = {
        coordinate: value for coordinate, value in splices.items() if coordinate.tensor not in rewritten
    }
    count, size, squares, total = 0, 0, 0.0, 0.0
    for tensor in sorted(rewritten | {coordinate.tensor for coordinate in splices}):
        for old, new in _read_pairs(plan.checkpoint, patched, tensor):
            differs = int(_view_bits(old).ne(_view_bits(new)).sum())
            count += differs
            size += differs * old.element_size()
            wide = torch.float32 if old.element_size() < 4 else torch.float64  # exact for bfloat16 and float16
            before, after = old.to(wide), new.to(wide)
            squares += float(torch.linalg.vector_norm(after.sub_(before), dtype=torch.float64)) ** 2
            total += float(torch.linalg.vector_norm(before, dtype=torch.float64)) ** 2
    relative = math.sqrt(squares / total) if total else 0.0
    variant = Variant(scalars, rewritten, patched if rewritten else None)
    return _Edit(plan.loaded.path, variant, count, size, math.sqrt(squares), relative)


def _read_pairs(base: Checkpoint, patched: Checkpoint, tensor: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield flat pieces of a tensor in the base and in the patched checkpoint."""
    info, name = base.get_info(tensor), base.weight_map[tensor]
    begin = base.shards[name].data_start + info.data_offsets[0]
    with base.shards[name].file.open() as ours, patched.shards[name].file.open() as theirs:
        for at in range(0, info.size, NORM_CHUNK):
            size = min(NORM_CHUNK, info.size - at)
            yield (
                _read(ours, begin + at, size, TORCH_DTYPES[info.dtype.name]),
                _read(theirs, begin + at, size, TORCH_DTYPES[info.dtype.name]),
            )


def _read(file: File, offset: int, size: int, dtype: torch.dtype) -> Tensor:
    data = bytearray(size)
    fill(file, data, offset)
    return torch.frombuffer(data, dtype=dtype)


def _view_bits(values: Tensor) -> Tensor:
    """Return the bit patterns of scalars as integers of the same width."""
    widths = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.view(widths[values.element_size()])


def _make_model(totals: measure.Totals, number: int, case: _Case, patched: Sequence[Tensor]) -> ComparedModel:
    """Compute the figures of variant `number`. `patched` contains the losses of the edit, for its controls."""
    side, edit = totals.summarise_side(number), case.edit
    ratio, kl = totals.compute_ratio_interval(number), totals.compute_kl_interval(number)
    found = ComparedModel(
        manifest=None if edit.name is None else str(edit.name),
        activations=describe_rounding(case.rounding),
        changed_scalars=edit.scalars,
        changed_bytes=edit.size,
        norm=edit.norm,
        relative_norm=edit.relative,
        perplexity=side.perplexity,
        ratio=totals.compute_perplexity_ratio(number),
        ratio_low=ratio.low,
        ratio_high=ratio.high,
        kl=totals.compute_mean_kl(number),
        kl_low=kl.low,
        kl_high=kl.high,
        stopword_mass=side.stopword_mass,
        finite=side.finite,
        word_perplexity=side.word_perplexity,
    )
    if case.control is None:
        return found
    result = case.control.make_result(totals, number, patched, ())
    return replace(
        found,
        changed_scalars=result.scalars,
        changed_bytes=None,
        norm=None,
        relative_norm=None,
        control=result.name,
        meaning=result.meaning,
    )

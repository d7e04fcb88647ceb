"""Convert the result of a scan to an entry for the known super weights, and to a manifest.

This module runs no model and writes no files.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from swsurgery._version import __version__
from swsurgery.checkpoint.architectures import ExpertChoice
from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.projections import has_residual_rows, list_down_projections
from swsurgery.errors import ManifestError, pluralise
from swsurgery.known import schema
from swsurgery.known.table import LARGE_RATIO, UNDECIDED_NOTE, describe
from swsurgery.manifest.load import parse_manifest
from swsurgery.manifest.writer import Operation, is_gentle, list_edit_fields, refuse_unfit, write_manifest
from swsurgery.model.text import describe_measured_text
from swsurgery.scanning.causal_report import Effect, Verdict, find_largest_ratio
from swsurgery.scanning.coverage import list_stored_layers
from swsurgery.scanning.part_manifest import choose_parts, list_part_edits
from swsurgery.scanning.part_report import ModelPart, PartTrial
from swsurgery.scanning.report import Candidate, Confirmation, Scan, Trial
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.numbers import format_number, format_ratio, round_number

_REPOSITORY = re.compile(r"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+")

_EXACT: dict[str, Literal["F16", "BF16", "F32"]] = {"F16": "F16", "BF16": "BF16", "F32": "F32"}
"""The stored dtypes for which an entry has an exact numeric `value`. Values of other dtypes become text in
`value_printed`, such as "0.5 F8_E4M3"."""


def make_known_entry(
    report: Scan, checkpoint: Checkpoint, *, hf_id: str, revision: str | None = None, command: str
) -> schema.KnownModel:
    """Make the entry of known super weights for a scanned checkpoint.

    The entry contains the super weights and the members of joint sets, each with its stored value and the measured
    effects of zeroing it. If the scan found nothing, the entry has a note instead of coordinates. `hf_id` is the name
    of a repository, such as "org/model", or any other name; with any other name, the entry also contains the
    checkpoint's path. `revision` is the scanned commit. The entry cites `command`, the command line of the scan. Raises
    ArchitectureError if the checkpoint has no known down projection.
    """
    source = _make_source(report, revision, command)
    trials = {t.candidate.coordinate: t for t in (report.confirmation.trials if report.confirmation else ())}
    chosen = _choose_scalars(report)
    ids = {c.coordinate: _make_id(c) for c in chosen}
    shape = _read_shape(checkpoint)
    joint_sets, effects = _list_joint(report.confirmation, ids, source) if report.confirmation else ((), ())
    return schema.KnownModel(
        hf_id=hf_id,
        aliases=(hf_id,),
        family=report.model_type,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_experts=shape.num_experts,
        tensor=shape.tensor,
        transposed=shape.transposed,
        num_layers=read_sizes(checkpoint)[0],
        sizes_from="config.json and the stored tensors of the scanned checkpoint",
        revision_measured=revision,
        path=None if _REPOSITORY.fullmatch(hf_id) else str(checkpoint.root),
        notes=tuple(_write_notes(report, bool(chosen), source)),
        scans=(source,),
        coordinates=tuple(_make_coordinate(c, trials.get(c.coordinate), report, checkpoint, source) for c in chosen),
        joint_sets=joint_sets,
        effects=effects,
    )


def scan_manifest(report: Scan, *, base: Mapping[str, str | None], op: Operation, factor: float | None = None) -> str:
    """Return the YAML text of a manifest that applies `op` to the super weights and the found parts of a scan.

    Each edit of a scalar states the stored value as its `expect`. `choose_parts` chooses the parts. `base` contains the
    fields of the manifest's base: `path` (absolute, or relative to the manifest), or `repo_id` and `revision`. If `op`
    is "zero" and zeroing multiplied the perplexity by at least `LARGE_RATIO` in a causal test, the manifest's sanity
    check requires that perplexity rises. Raises ManifestError if the scan found nothing, if `factor` does not fit `op`,
    or if `base` is not valid in a manifest.
    """
    refuse_unfit(op, factor)
    found, parts = report.super_weights, choose_parts(report)
    if not found and not parts:
        tested = f"all {len(report.candidates)} candidates are inert" if report.candidates else "there is no candidate"
        if report.unread:
            tested += f", and {len(report.unread)} layers were not read"
        raise ManifestError(f"nothing to {op}: the scan found no super weight", remedy=tested)
    trials = {t.candidate.coordinate: t for t in (report.confirmation.trials if report.confirmation else ())}
    edits = [
        (
            f"{_make_id(c)}: {_describe_trial(c, trials.get(c.coordinate), report)}",
            list_edit_fields(c, op, factor, _guard(c)),
        )
        for c in found
    ]
    counted = ((len(found), "super weight"), (len(parts), "part"))
    tests = [*(trials.get(c.coordinate) for c in found), *(report.part_trials.get(part.name) for part in parts)]
    return write_found(
        report,
        [*edits, *list_part_edits(parts, report.part_trials, op, factor)],
        base,
        op,
        factor,
        prefix="scan",
        verdicts=[trial.verdict if trial else None for trial in tests],
        what=" and ".join(pluralise(count, noun) for count, noun in counted if count),
        ratio=max(
            find_largest_ratio(report.confirmation, {c.coordinate for c in found}),
            find_largest_ratio(report.part_confirmation, {part.name for part in parts}),
        ),
    )


def write_found(
    report: Scan,
    edits: Sequence[tuple[str, Mapping[str, object]]],
    base: Mapping[str, str | None],
    op: Operation,
    factor: float | None,
    *,
    prefix: str,
    what: str,
    verdicts: Sequence[Verdict | None],
    ratio: float,
) -> str:
    """Write the YAML text of a manifest with one edit for each part of the model that a scan found.

    An edit is its comment and its fields. The name of the manifest begins with `prefix`. Its description calls what was
    found `what`, such as "2 super weights". `verdicts` contains the verdict on each, or None without a test. `ratio` is
    the largest perplexity ratio measured for zeroing them. Raises ManifestError if `base` is not valid in a manifest.
    """
    needed = sum(verdict in ("needed alone", "needed jointly") for verdict in verdicts)
    how = "found and confirmed" if needed == len(verdicts) else f"found, {needed or 'not'} confirmed"
    what = f"{what} that a scan by {report.method} {how}"
    text = write_manifest(
        head=[f"written by swsurgery scan, version {__version__}", *_describe_largest(report)],
        name=f"{prefix}-{op}" + (f"-{factor:g}" if factor is not None else ""),
        description=f"{op.capitalize()} {what}" + (f" by {factor!r}" if factor is not None else ""),
        base=base,
        edits=edits,
        damaging=op == "zero" and ratio >= LARGE_RATIO,
        gentle=is_gentle(op, factor),
    )
    parse_manifest(text.encode(), Path("the scan's manifest"))  # `base` comes from the caller and may be invalid
    return text


def _describe_largest(report: Scan) -> list[str]:
    """Describe the largest activation with and without BOS, if the scan ran prompts."""
    return [
        f"largest activation {'with' if one.bos else 'without'} BOS: {format_number(one.value)} after layer "
        f"{one.layer}, token {one.token}, channel {one.channel}"
        for one in (report.passport.find_extremes() if report.passport else ())
    ]


def _write_notes(report: Scan, found: bool, source: schema.Citation) -> Iterator[str]:
    """Yield the notes of an entry: the layers that were not read, whether nothing was found, and which parts were."""
    unread = ", ".join(str(layer.layer) for layer in report.unread)
    if unread and found:
        yield f"The scan did not read all of layers {unread}, so there may be further super weights: {source}."
    elif unread:
        yield f"{UNDECIDED_NOTE} It found nothing in what it read, but did not read all of layers {unread}: {source}."
    elif not found:
        yield f"A scan found no super weight: {source}."
    if report.found_parts:
        trials = report.part_trials
        parts = [_describe_part(part, trials.get(part.name)) for part in report.found_parts]
        yield f"Parts of the model that create an activation in a scan: {'; '.join(parts)}: {source}."


def _describe_part(part: ModelPart, trial: PartTrial | None) -> str:
    """Describe a part of a model and its verdict in a note."""
    if trial is None or trial.verdict == "untested":
        return f"{part.name} (not confirmed)"
    return f"{part.name} ({trial.verdict}, perplexity x{format_ratio(trial.alone.ratio)} without it)"


def _choose_scalars(report: Scan) -> tuple[Candidate, ...]:
    """Choose the scalars that an entry lists: the super weights, and all members of joint sets with any verdict."""
    if report.confirmation is None:
        return report.super_weights
    joint = {c for s in report.confirmation.joint_sets for c in s.coordinates}
    return tuple(
        t.candidate
        for t in report.confirmation.trials
        if t.candidate in report.super_weights or t.candidate.coordinate in joint
    )


def _make_coordinate(
    candidate: Candidate, trial: Trial | None, report: Scan, checkpoint: Checkpoint, source: schema.Citation
) -> schema.KnownCoordinate:
    dtype = checkpoint.get_info(candidate.coordinate.tensor).dtype.name
    exact = _EXACT.get(dtype) if math.isfinite(candidate.value) else None
    effects: list[schema.KnownEffect] = []
    if trial and report.confirmation:
        effects.append(_make_effect("zero", trial.alone, report.confirmation, source))
        if trial.without:
            effects.append(_make_effect("zero all others of the scan", trial.without, report.confirmation, source))
    return schema.KnownCoordinate(
        id=_make_id(candidate),
        layer=candidate.layer,
        row=candidate.row,
        col=candidate.col,
        expert=candidate.expert,
        tensor=candidate.coordinate.tensor,
        value=candidate.value if exact else None,
        dtype=exact,
        value_printed=None if exact else f"{candidate.value!r} {dtype}",
        status="measured" if trial and trial.verdict != "untested" else "candidate",
        causal_alone=schema.classify_ratio(trial.alone.ratio) if trial and trial.verdict != "untested" else "untested",
        role=trial.verdict if trial else "not confirmed",
        located_by=(f"swsurgery scan --method {report.method}",),
        independent=schema.Independent(location=1, value=1),
        note=", ".join(_list_traits(candidate, trial)),
        effects=tuple(effects),
        sources=(source,),
    )


def _list_joint(
    confirmation: Confirmation, ids: Mapping[Coordinate, str], source: schema.Citation
) -> tuple[tuple[schema.KnownJointSet, ...], tuple[schema.KnownEffect, ...]]:
    """List the joint sets of an entry, and the measured effects that belong to no joint set.

    `ids` maps the coordinates in the entry to their ids. If the entry contains all candidates of the detector, they
    become one more joint set with the effect of zeroing all of them. Otherwise this effect belongs to no joint set. It
    is left out if there is only one candidate, or if the candidates are a joint set already.
    """
    sets = {
        frozenset(s.coordinates): schema.KnownJointSet(
            coordinates=tuple(ids[c] for c in s.coordinates),
            effects=(_make_effect("zero jointly", s.effect, confirmation, source),),
        )
        for s in confirmation.joint_sets
    }
    # Only listed candidates, because `together` is the effect of zeroing them without companions and removers.
    tested = [t.candidate.coordinate for t in confirmation.trials if t.listed and t.candidate.role != "removes"]
    if len(tested) < 2 or frozenset(tested) in sets:
        return tuple(sets.values()), ()
    if set(tested) <= set(ids):
        everything = schema.KnownJointSet(
            name="all candidates of the detector",
            coordinates=tuple(ids[c] for c in tested),
            effects=(_make_effect("zero jointly", confirmation.together, confirmation, source),),
        )
        return (*sets.values(), everything), ()
    protocol = f"zero all {len(tested)} candidates of the scan"
    return tuple(sets.values()), (_make_effect(protocol, confirmation.together, confirmation, source),)


def _make_effect(
    protocol: str, effect: Effect, confirmation: Confirmation, source: schema.Citation
) -> schema.KnownEffect:
    """Convert a measured effect to the form in which an entry states it.

    Numbers are rounded to 6 significant digits. A perplexity ratio of NaN becomes "not finite".
    """
    before, ratio = confirmation.base_perplexity, effect.ratio
    interval = tuple(round_number(end) for end in (effect.low, effect.high) if end is not None)
    return schema.KnownEffect(
        protocol=protocol,
        metric="ppl",
        before=round_number(before),
        after="not finite" if math.isnan(ratio) else round_number(before * ratio),
        ratio="not finite" if math.isnan(ratio) else round_number(ratio),
        ci95=interval if len(interval) == 2 and all(map(math.isfinite, interval)) else None,
        kl=round_number(effect.kl) if math.isfinite(effect.kl) else None,
        conditions=schema.Conditions(
            text_sha256=confirmation.text_sha256,
            windows=confirmation.windows,
            window_tokens=confirmation.window_tokens,
            scored_tokens=confirmation.scored_tokens,
            protocol=confirmation.protocol.describe(),
            dtype=confirmation.dtype,
            device=confirmation.device,
        ),
        source=source,
    )


def _make_source(report: Scan, revision: str | None, command: str) -> schema.Citation:
    remarks = [f"revision {revision}"] if revision else []
    if c := report.confirmation:
        remarks.append(f"{describe_measured_text(c)} of the text with sha256 {c.text_sha256}")
        remarks.append(f"protocol {c.protocol.describe()}")
        remarks.append(f"{c.dtype} on {c.device}")
        if c.null:
            low, high = min(c.null), max(c.null)
            remarks.append(
                f"{len(c.null)} random scalars of like size: ppl x{format_number(low)} to x{format_number(high)}"
            )
    cite, note = f"measured with `{command}`, swsurgery {__version__}", "; ".join(remarks) or None
    key = hashlib.sha256(f"{cite}\n{note}".encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return schema.Citation(key=f"scan-{key}", kind="own scan", cite=cite, note=note)


class _Shape(NamedTuple):
    """The sizes of a model, and where its down projections are stored.

    `tensor` is a template for their names (see `_make_template`). `transposed` is True if they are stored [col, row].
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int | None
    tensor: str
    transposed: bool


def _read_shape(checkpoint: Checkpoint) -> _Shape:
    """Read a model's sizes from its stored tensors. The template and axis order are from the first down projection."""
    projections = list(list_down_projections(checkpoint.config, checkpoint.shapes))
    first = projections[0]
    experts = {p.expert for p in projections if isinstance(p.expert, int)}
    return _Shape(
        hidden_size=next((p for p in projections if has_residual_rows(checkpoint.config, p)), first).rows,
        intermediate_size=max(p.cols for p in projections),
        num_experts=len(experts) or None,
        tensor=_make_template(first.tensor, first.layer, first.expert),
        transposed=first.transposed,
    )


def read_sizes(checkpoint: Checkpoint) -> tuple[int, int, int]:
    """Read the number of layers, the hidden size and the intermediate size from the stored tensors.

    Raises ArchitectureError if no known down projection is stored.
    """
    projections = list(list_down_projections(checkpoint.config, checkpoint.shapes))
    shape = _read_shape(checkpoint)
    layers = list_stored_layers(checkpoint.config, checkpoint.shapes, projections)
    return 1 + max(layers), shape.hidden_size, shape.intermediate_size


def _make_template(tensor: str, layer: int, expert: ExpertChoice) -> str:
    """Replace the numbers of the layer and the expert in a tensor's name by placeholders.

    For example, "model.layers.3.mlp.down_proj.weight" becomes "model.layers.{layer}.mlp.down_proj.weight".
    """
    name = re.sub(rf"(?<=\.){layer}(?=\.)", "{layer}", tensor, count=1)
    return name if expert is None else re.sub(rf"(?<=\.){expert}(?=\.)", "{expert}", name, count=1)


def _guard(candidate: Candidate) -> float | None:
    return candidate.value if math.isfinite(candidate.value) else None


def _make_id(candidate: Candidate) -> str:
    return schema.format_coordinate_id(candidate.layer, candidate.expert, candidate.row, candidate.col)


def _list_traits(candidate: Candidate, trial: Trial | None) -> Iterator[str]:
    yield f"rank {candidate.rank} of its matrix by magnitude"
    if candidate.input_spike is not None:
        yield f"input {format_number(candidate.input_spike)}"
    if candidate.output_spike is not None:
        yield f"output {format_number(candidate.output_spike)}"
    if candidate.share is not None:
        yield f"{candidate.share:.0%} of that output"
    if candidate.prompts is not None:
        yield f"in {candidate.prompts} prompts"
    if candidate.z is not None:
        yield f"robust z-score {format_number(candidate.z)}"
    if trial and not trial.listed:
        yield "no detector listed it, but it is in the column of a scalar that one listed"


def _describe_trial(candidate: Candidate, trial: Trial | None, report: Scan) -> str:
    if trial is None or report.confirmation is None:
        return f"not confirmed, score {format_number(candidate.score)}"
    return f"{trial.verdict}; zeroed alone {describe(_make_effect('zero', trial.alone, report.confirmation, _nobody))}"


_nobody = schema.Citation(key="scan", kind="own scan", cite="this scan")

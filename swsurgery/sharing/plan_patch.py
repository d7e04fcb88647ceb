"""Plan the publication of edits without weights, in a repository that contains only a patch.

    patch.safetensors      the sparse format, which `apply` reads
    manifest.yaml          the same edits as text
    SHA256SUMS             the digests of these two files
    README.md              the card: the edits, their base, and how to apply them
    swsurgery-figure.svg   the figure in the card, if the check ran the model

The record is not published, because it describes files that are not in the repository. `apply` writes a new record.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from swsurgery.checkpoint.opening import held, read_checkpoint
from swsurgery.checkpoint.record import MANIFEST_NAME, SUMS_NAME, Patched, Record, read_record
from swsurgery.checkpoint.record_entries import ChangeRecord, EditRecord
from swsurgery.errors import HubError
from swsurgery.hub.cards import read as read_card
from swsurgery.hub.cards import render as render_card
from swsurgery.hub.commit import Branch
from swsurgery.manifest import patch as patch_module
from swsurgery.manifest.patch import Patch
from swsurgery.progress import Progress
from swsurgery.sharing import edit_source
from swsurgery.sharing.card import render_patch_body
from swsurgery.sharing.card_fields import FIELDS, LICENCE, list_omitted_fields, make_patch_fields
from swsurgery.sharing.commit_text import summarise_edits
from swsurgery.sharing.edit_source import group_regions, is_inside
from swsurgery.sharing.page import draw_record
from swsurgery.sharing.plan_checkpoint import (
    FilePlanner,
    assemble,
    find_short_forms,
    find_target,
    list_base,
    list_card_notes,
    read_base_card,
)
from swsurgery.sharing.publication import Publication, Wish
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.names import CARD_NAME, FIGURE_NAME, OWN_FILES
from swsurgery.verifying.findings import Finding

PATCH_NAME = "patch.safetensors"
"""Name of the file with the patch in a repository."""

WEIGHTS = (".safetensors", ".bin", ".gguf", ".index.json")
"""Endings of the names of weight files. A repository that contains other weights must not contain a patch."""


def make_patch_publication(
    root: Path, wish: Wish, findings: Sequence[Finding], progress: Progress, *, offline: bool = False
) -> Publication:
    """Plan the publication of a patched checkpoint's edits. `findings` are the accepted findings.

    With `offline`, the Hub is not asked. If the checkpoint was patched several times, the patch contains all edits
    since the first base.

    Raises HubError, CheckpointError if the directory is not a patched checkpoint, and PlanError if nothing is changed.
    """
    with held(root) as entered:
        patched = read_record(entered)
        source = edit_source.read_edits(entered)
        checkpoint = read_checkpoint(entered, patched.record.base, elsewhere=patched.record.elsewhere)
    record = _merge_steps(patched, source.patch)
    base, target = (None, None) if offline else (list_base(record), find_target(wish))
    if target:
        _refuse_weights(target, wish.repo_id)
    notes = [*source.notes]
    if base is None and not offline:
        named = record.base.repo_id or "the base, which the record does not name,"
        notes.append(f"{named} is not visible on this Hub, so whoever applies the patch needs a local copy of it")
    elif base and base.private and not (target.head.private if target else wish.private):
        notes.append(f"{base.repo_id} is private, but the patch reveals names and single values of its weights")
    raw = patch_module.render(source.patch)
    once = not patched.record.history
    manifest = patched.manifest_raw if once else patch_module.render_manifest(raw, Path(PATCH_NAME))
    planner = FilePlanner(checkpoint, patched.record, base, target, {f.file for f in findings}, False, progress)
    base_fields, _ = read_card(read_base_card(planner, patched.record, base), FIELDS)
    notes += list_card_notes(list_omitted_fields(base_fields, LICENCE))
    figure = draw_record(record)
    body = render_patch_body(
        record,
        wish.repo_id,
        manifest,
        PATCH_NAME,
        len(raw),
        findings,
        find_short_forms(checkpoint, record),
        len(source.patch.scalars),
        figure is not None,
    )
    made = {PATCH_NAME: raw, MANIFEST_NAME: manifest}
    made[SUMS_NAME] = "".join(f"{hashlib.sha256(made[n]).hexdigest()}  {n}\n" for n in sorted(made)).encode()
    made[CARD_NAME] = render_card(make_patch_fields(record, base_fields), body)
    made |= {FIGURE_NAME: figure} if figure else {}
    items = [planner.plan_own(name, data) for name, data in made.items()]
    message = wish.message or f"a patch: {summarise_edits(record, len(source.patch.scalars))}"
    plan = assemble(root, wish, record, items, {}, notes, findings, base, target, message)
    return replace(plan, offline=offline)


def _merge_steps(patched: Patched, patch: Patch) -> Record:
    """Return a record that contains all edits of a checkpoint since its first base, and lists no files.

    The changed regions are those of all steps. A scalar inside one of them is not listed again.
    """
    steps = edit_source.list_steps(patched)
    changes: list[ChangeRecord] = []
    for record in steps:
        begin = changes[-1].edit + 1 if changes else 0  # edits of two steps are never taken for one edit
        changes += [change.model_copy(update={"edit": begin + change.edit}) for change in record.changes]
    regions = group_regions(change.region for change in changes)
    first: dict[Coordinate, EditRecord] = {}
    last: dict[Coordinate, EditRecord] = {}
    for record in steps:
        for edit in record.edits:
            first.setdefault(edit.coordinate, edit)
            last[edit.coordinate] = edit
    edits = []
    for scalar in patch.scalars:
        if scalar.coordinate not in first or is_inside(scalar.coordinate, regions):
            continue
        old = first[scalar.coordinate]
        fields = {"old": old.old, "old_bits": old.old_bits, "op": scalar.op, "factor": scalar.factor}
        edits.append(last[scalar.coordinate].model_copy(update=fields))
    empty: dict[str, object] = {"files": {}, "omitted": [], "elsewhere": [], "protected": [], "protected_regions": []}
    return patched.record.model_copy(update={"base": steps[0].base, "edits": edits, "changes": changes, **empty})


def _refuse_weights(target: Branch, repo_id: str) -> None:
    """Raise HubError if the repository contains weights: the patch's card would replace the card of the weights."""
    ours = {PATCH_NAME, *OWN_FILES[1:]}
    if held := sorted(name for name in target.head.files if name.endswith(WEIGHTS) and name not in ours):
        what = f"the repository contains weights ({held[0]})"
        raise HubError(what, repo_id, "publish the patch to a repository without weights")

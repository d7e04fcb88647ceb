"""Decide whether an edit can have controls, and list the scalars that no control changes (`model/controls.py`).

This module runs no model.
"""

from __future__ import annotations

from pathlib import Path

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.record import Record
from swsurgery.editing.check_base import find_coded
from swsurgery.editing.plan import Plan, locate_known
from swsurgery.errors import PlanError
from swsurgery.known import own
from swsurgery.model.controls import refuse_uncontrolled
from swsurgery.storage.coordinate import Coordinate


def refuse_controls(plan: Plan) -> None:
    """Raise ModelError if the plan changes no single scalar, or changes rows, tensors or quantised weights."""
    refuse_uncontrolled(plan.splices, list_whole_tensors(plan))


def refuse_without_record(root: Path, record: Record | None, base: str | Path | None) -> None:
    """Raise PlanError if no record says which scalars of the base were edited."""
    if base is not None:
        raise PlanError("a control needs the base of the record", "--base", "leave out --base or --control")
    if record is None:
        what = "a control needs the list of the edited scalars, but there is no record"
        raise PlanError(what, root, "check the directory that apply wrote, or leave out --control")


def list_whole_tensors(plan: Plan) -> frozenset[str]:
    """List the changed tensors that a model must load as a whole: those with regions, and quantised ones."""
    tensors = frozenset(rewrite.region.tensor for rewrite in plan.rewrites)
    return tensors | find_coded((splice.coordinate.tensor for splice in plan.splices), plan.checkpoint)


def list_plan_excluded(plan: Plan) -> frozenset[Coordinate]:
    """List the scalars that no control zeroes: those that a plan protects, and known super weights of the model."""
    return frozenset(plan.facts) | {scalar.coordinate for scalar in plan.protected}


def list_excluded(checkpoint: Checkpoint, record: Record) -> frozenset[Coordinate]:
    """List the scalars that no control zeroes: those that a record protects, and known super weights of the model.

    Raises LookupFailed if the user's own entry of the model is damaged.
    """
    names = (record.base.repo_id, checkpoint.repo_id, (record.known or {}).get("hf_id"))
    known = locate_known(own.identify(None, names), checkpoint)
    return frozenset(known) | {each.coordinate for each in record.protected}

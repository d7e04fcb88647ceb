"""Bugs planted into the product on purpose, and which technique sees each: a sweep is worth what it catches here."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults import disks, races, sweeps, transfers
from faults.cases import case, prepare
from faults.disks import Disk, Kind

TECHNIQUES = ("SIGKILL", "power cut ext4", "power cut xfs", "error code", "short transfers", "race")


@dataclass(frozen=True)
class Caught:
    """How many violations each technique found of one bug, and in how many cases."""

    bug: str
    found: dict[str, tuple[int, int]]

    @property
    def caught(self) -> bool:
        return any(violations for violations, _ in self.found.values())

    def to_json(self) -> dict[str, Any]:
        return {"bug": self.bug, "found": {t: {"violations": v, "cases": n} for t, (v, n) in self.found.items()}}


def run(
    bug: str, package: Path, pristine: Path, folder: Path, shim: Path, workers: int, places: Sequence[Kind]
) -> Caught:
    """Every technique on a sample of the points of a copy and of an edit in place."""
    found = dict.fromkeys(TECHNIQUES, (0, 0))

    def add(technique: str, attempt: Callable[[Path], sweeps.Result]) -> None:
        here = folder / "here"
        try:
            result = attempt(here)
            violations, cases = len(result.violations), result.cases
        except AssertionError:  # even an undisturbed run does not go as it should
            violations, cases = 1, 1
        shutil.rmtree(here, ignore_errors=True)
        before = found[technique]
        found[technique] = (before[0] + violations, before[1] + cases)

    for name in ("copy", "edit in place"):
        prepared = prepare(case(name), folder / "prepare", package, pristine)
        add("SIGKILL", lambda here, p=prepared: sweeps.kill(p, here, workers, "", sample=True))
        add("error code", lambda here, p=prepared: sweeps.errors(p, here, workers, "", sample=True))
        add("short transfers", lambda here, p=prepared: transfers.short(p, here, shim, "")[0])
        add("race", lambda here, p=prepared: races.targets(p, here, shim, rounds=2))
        for kind in places:
            with drives(kind, folder / "drives", workers) as mounted:
                add(f"power cut {kind}", lambda here, p=prepared, m=mounted: sweeps.power(p, m, sample=True))
    return Caught(bug, {t: found[t] for t in TECHNIQUES if found[t][1]})


@contextlib.contextmanager
def drives(kind: Kind, folder: Path, number: int) -> Iterator[list[Disk]]:
    """Several disks of one kind."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(disks.disk(kind, folder / str(n))) for n in range(number)]

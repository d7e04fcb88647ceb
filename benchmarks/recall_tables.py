"""Make the tables of docs/detection.md about planted scalars, from the counts that benchmarks/recall.py measures.

A run is what one call of recall.py measured. Runs of several machines or families can be kept as JSON files, and the
tables made from all of them. This module needs neither torch nor transformers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

PAGE = Path(__file__).parents[1] / "docs" / "detection.md"
BEGIN, END = "<!-- recall -->\n", "<!-- end of recall -->\n"
TRAINED_COLUMNS = (
    "trained model",
    "layers",
    "activations",
    "recurring",
    "scalars that create",
    "that remove",
    "known one",
)
TRAINED_HEAD = f"| {' | '.join(TRAINED_COLUMNS)} |"


class Case(NamedTuple):
    """One model to scan. `size` is the size of the spike in medians, or None for a model without a planted scalar."""

    family: str
    depth: int
    size: int | None
    seed: int


class Count(NamedTuple):
    """How many scalars were planted, found, and found with the role "removes", and how many others were listed.

    `turned` is the number of planted scalars that remove an activation but are listed as creating one. `wrong` is 1 if
    the scan lists a scalar that was not planted, or any activation of a model without a planted scalar.
    """

    planted: int = 0
    found: int = 0
    removers: int = 0
    turned: int = 0
    others: int = 0
    models: int = 0
    wrong: int = 0

    def __add__(self, other: object) -> Count:
        assert isinstance(other, Count)
        return Count(*(a + b for a, b in zip(self, other, strict=True)))


class Trained(NamedTuple):
    """The findings of a scan of one trained model. `known` says whether its known super weight is one of them."""

    name: str
    layers: int
    activations: int
    recurring: int
    creators: int
    removers: int
    known: str


@dataclass(frozen=True)
class Run:
    """The counts of one call of recall.py, which ran `jobs` processes for `seconds` on `machine`, a description."""

    machine: str
    jobs: int
    seconds: float
    counts: dict[Case, Count]
    trained: tuple[Trained, ...] = ()
    missing: tuple[str, ...] = ()
    """Families whose models could not be built, each with the reason."""

    @property
    def families(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(case.family for case in self.counts))

    def write(self, path: Path) -> None:
        counts = [case._asdict() | count._asdict() for case, count in self.counts.items()]
        trained = [one._asdict() for one in self.trained]
        path.write_text(json.dumps(asdict(self) | {"counts": counts, "trained": trained}, indent=0) + "\n")

    @classmethod
    def read(cls, path: Path) -> Run:
        fields: dict[str, Any] = json.loads(path.read_text())
        counts = {
            Case(*(row[key] for key in Case._fields)): Count(*(row[key] for key in Count._fields))
            for row in fields["counts"]
        }
        trained = tuple(Trained(**row) for row in fields["trained"])
        return cls(**fields | {"counts": counts, "trained": trained, "missing": tuple(fields["missing"])})

    def describe(self) -> str:
        names = ", ".join(self.families)
        return f"{names}: {self.seconds:,.0f} seconds with {self.jobs} processes. {self.machine}"


def compute_wilson(hits: int, total: int) -> tuple[float, float]:
    """Compute the 95% interval of a share by Wilson's score method (E. B. Wilson, J. Am. Stat. Assoc. 22, 1927)."""
    if not total:
        return 0.0, 1.0
    z = 1.959964
    share = hits / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    reach = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def format_share(hits: int, total: int) -> str:
    if not total:
        return "-"
    low, high = compute_wilson(hits, total)
    digits = 2 if total < 200 else 3
    return f"{hits:,}/{total:,} ({low:.{digits}f} to {high:.{digits}f})"


def make_tables(counts: dict[Case, Count], hybrids: Sequence[str]) -> Iterator[str]:
    """Make the lines of one table: recall by family, depth and size, and models without a plant.

    The last rows state what else was listed. `hybrids` contains the families with scalars that remove an activation.
    """

    def add(families: Sequence[str] | None = None, **wanted: object) -> Count:
        rows = (
            count
            for case, count in counts.items()
            if (families is None or case.family in families)
            and all(getattr(case, key) == value for key, value in wanted.items())
        )
        return sum(rows, Count())

    def make_row(name: str, depth: object, shares: Sequence[tuple[int, int]]) -> str:
        return f"| {name} | {depth} | {' | '.join(format_share(*share) for share in shares)} |"

    sizes = sorted({case.size for case in counts if case.size is not None})
    yield f"| family | layers | {' | '.join(f'{size} medians' for size in sizes)} | no plant: models with a finding |"
    yield f"|---|---:|{'---|' * (len(sizes) + 1)}"
    for family, depth in dict.fromkeys((case.family, case.depth) for case in counts):
        cells = [add(family=family, depth=depth, size=size) for size in sizes]
        free = add(family=family, depth=depth, size=None)
        yield make_row(family, depth, [*((c.found, c.planted) for c in cells), (free.wrong, free.models)])
    cells, free = [add(size=size) for size in sizes], add(size=None)
    yield make_row("all", "", [*((c.found, c.planted) for c in cells), (free.wrong, free.models)])
    brief = [add(hybrids, size=size) for size in sizes]
    yield make_row("hybrids: scalars that remove", "", [(c.removers, c.planted) for c in brief]) + " |"
    yield make_row("hybrids: these listed as creating", "", [(c.turned, c.planted) for c in brief]) + " |"
    yield make_row("models with a scalar that was not planted", "", [(c.wrong, c.models) for c in cells]) + " |"


def list_lines(runs: Sequence[Run], hybrids: Sequence[str]) -> Iterator[str]:
    """List the lines of all tables. If a case was measured in several runs, the last run counts.

    The table of trained models is left out if no run has any.
    """
    counts = {case: count for run in runs for case, count in run.counts.items()}
    seeds = len({case.seed for case in counts})
    yield f"{seeds} seed{'s' if seeds > 1 else ''} for each cell, 95% intervals by Wilson's method. Measured:"
    yield ""
    yield from (f"- {run.describe()}" for run in runs if run.counts)
    measured = {case.family for case in counts}
    reasons = {reason for run in runs for reason in run.missing if reason.partition(":")[0] not in measured}
    yield from (f"- not measured: {reason}" for reason in sorted(reasons))
    yield ""
    yield from make_tables(counts, hybrids)
    trained = {one.name: one for run in runs for one in run.trained}
    if trained:
        yield from ("", TRAINED_HEAD, "|---|---:|---:|---:|---:|---:|---|")
        yield from (f"| {' | '.join(map(str, one))} |" for one in trained.values())


def write_page(lines: Sequence[str], page: Path) -> None:
    """Put the tables into the page. If there is no trained model among them, the page keeps its table of those."""
    before, _, rest = page.read_text().partition(BEGIN)
    old, _, after = rest.partition(END)
    kept = old[old.find(TRAINED_HEAD) :].strip() if TRAINED_HEAD in old and TRAINED_HEAD not in lines else ""
    text = "\n".join(lines) + (f"\n\n{kept}" if kept else "")
    page.write_text(f"{before}{BEGIN}\n{text}\n\n{END}{after}")

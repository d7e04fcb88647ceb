"""Measure how many planted scalars `scan --method activations` finds, and how many others it lists.

    python benchmarks/recall.py [FOLDER...] [--seeds 20] [--quick] [--write]

One neuron of a tiny random model is made to write a large value to one channel. Its scalar in the down projection is
the planted one. Models differ in family, depth, size of the spike and seed. In hybrid models, a pair of scalars for
each layer with full attention creates and removes an activation. Models without a planted scalar are scanned too.
Each FOLDER contains a trained checkpoint with a tokenizer. Its super weights are not known, so that only what is
found is listed. `--write` puts the tables into docs/detection.md.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests" / "support"))

import hybrids  # noqa: E402
import planted  # noqa: E402
from page import describe_machine  # noqa: E402

from swsurgery.checkpoint.opening import open_checkpoint  # noqa: E402
from swsurgery.model import load  # noqa: E402
from swsurgery.scanning.by_activations import scan_activations, scan_sequences  # noqa: E402
from swsurgery.scanning.report import Candidate, Scan  # noqa: E402

PAGE, BEGIN, END = ROOT / "docs" / "detection.md", "<!-- recall -->\n", "<!-- end of recall -->\n"
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}
PERSISTENT: dict[str, dict[str, Any]] = {
    "llama": WIDE,
    "qwen3": WIDE,
    "gpt_neox": WIDE,
    "mixtral": WIDE | {"num_experts_per_tok": 2},
}
RECURRING = ("qwen3_5_text", "jamba", "lfm2", "nemotron_h")
DEPTHS, SIZES, SEEDS = (6, 12, 24), (30, 100, 300, 1000), 20
SPREADS = (0.02, 0.3, 1.0)
KNOWN = (11, 507, 1229)
"""Layer, row and col of the super weight of SmolLM2-135M-Instruct that docs/known.md lists."""


class Case(NamedTuple):
    """One model to scan. `size` is the size of the spike in medians, or None for a model without a planted scalar."""

    family: str
    depth: int
    size: int | None
    seed: int


class Count(NamedTuple):
    """How many scalars were planted, found, and found with the role "removes", and how many others were listed.

    `wrong` is 1 if the scan lists a scalar or an activation that was not planted.
    """

    planted: int = 0
    found: int = 0
    removers: int = 0
    others: int = 0
    models: int = 0
    wrong: int = 0

    def __add__(self, other: object) -> Count:
        assert isinstance(other, Count)
        return Count(*(a + b for a, b in zip(self, other, strict=True)))


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
    return f"{hits}/{total} ({low:.2f} to {high:.2f})"


def measure(case: Case) -> Count:
    """Build the model of one case, scan it, and compare what is listed with what was planted."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, load.hide_output():
        if case.family in RECURRING:
            return _measure_recurring(case, Path(folder))
        return _measure_persistent(case, Path(folder))


def _measure_persistent(case: Case, folder: Path) -> Count:
    dice = random.Random(f"{case.family} {case.depth} {case.seed}")
    model = planted.build(case.family, case.seed, case.depth, **PERSISTENT[case.family])
    if case.size is None:
        return _measure_random(case, model, planted.SEQUENCES, folder)
    expert = dice.randrange(4) if case.family == "mixtral" else None
    place = planted.Place(dice.randrange(case.depth // 3), dice.randrange(64), dice.randrange(96), expert)
    planted.plant(model, place)
    set_size(model, place, case.size)
    report = scan_sequences(planted.opened(model, folder), planted.SEQUENCES)
    return _compare(report, {tuple(place)}, set())


def _measure_recurring(case: Case, folder: Path) -> Count:
    periods = case.depth // 4 if case.family == "nemotron_h" else case.depth // 3
    model = hybrids.build(case.family, case.seed, max(2, periods))
    if case.size is None:
        return _measure_random(case, model, hybrids.SEQUENCES, folder)
    made = hybrids.plant_recurring(model, case.family, case.size)
    report = scan_sequences(planted.opened(model, folder), hybrids.SEQUENCES)
    return _compare(report, {tuple(place) for place in made.creators}, {tuple(place) for place in made.removers})


def _measure_random(
    case: Case, model: transformers.PreTrainedModel, sequences: Sequence[Sequence[int]], folder: Path
) -> Count:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(SPREADS[case.seed % len(SPREADS)] / 0.3)
    return _compare(scan_sequences(planted.opened(model, folder), sequences), set(), set())


def _compare(report: Scan, creators: set[tuple[Any, ...]], removers: set[tuple[Any, ...]]) -> Count:
    listed, removing = ({_get_place(one) for one in group} for group in (report.candidates, report.removers))
    # A planted remover that takes away too much makes a state of its own, and is then listed as a candidate.
    others = len(listed - creators - removers) + len(removing - removers)
    wrong = others > 0 or (not creators and len(report.activations) > 0)
    return Count(len(creators), len(listed & creators), len(removing & removers), others, 1, int(wrong))


def _get_place(one: Candidate) -> tuple[Any, ...]:
    return one.layer, one.row, one.col, one.expert


@torch.no_grad()
def set_size(model: transformers.PreTrainedModel, place: planted.Place, medians: float) -> None:
    """Scale the planted scalar until the largest state of its channel after its layer has `medians` medians."""
    down = planted.weights_of(model, place)[2]
    for _ in range(3):
        ratios = []
        for ids in planted.SEQUENCES:
            states = model(input_ids=torch.tensor([list(ids)]), output_hidden_states=True).hidden_states
            after = states[place.layer + 1][0].abs()
            ratios.append(float(after[:, place.row].max() / after.median()))
        down *= medians / max(ratios)


def list_cases(seeds: int, depths: Sequence[int], families: Sequence[str]) -> list[Case]:
    sizes = (*SIZES, None)
    return [
        Case(family, depth, size, seed)
        for family in families
        for depth in depths
        for size in sizes
        for seed in range(seeds)
    ]


def run_cases(cases: Sequence[Case], jobs: int) -> dict[Case, Count]:
    if jobs == 1:
        return {case: measure(case) for case in cases}
    with ProcessPoolExecutor(jobs) as pool:
        return dict(zip(cases, pool.map(measure, cases, chunksize=4), strict=True))


def make_tables(counts: dict[Case, Count]) -> Iterator[str]:
    """Make the tables: recall by family, depth and size; what was listed beside; and models without a plant."""

    def add(**wanted: object) -> Count:
        rows = [
            count for case, count in counts.items() if all(getattr(case, key) == value for key, value in wanted.items())
        ]
        return sum(rows, Count())

    yield f"| family | layers | {' | '.join(f'{size} medians' for size in SIZES)} | no plant: models with a finding |"
    yield f"|---|---:|{'---|' * (len(SIZES) + 1)}"
    pairs = dict.fromkeys((case.family, case.depth) for case in counts)
    for family, depth in pairs:
        cells = [add(family=family, depth=depth, size=size) for size in SIZES]
        free = add(family=family, depth=depth, size=None)
        found = [format_share(cell.found, cell.planted) for cell in cells]
        yield f"| {family} | {depth} | {' | '.join(found)} | {format_share(free.wrong, free.models)} |"
    cells, free = [add(size=size) for size in SIZES], add(size=None)
    found = [format_share(cell.found, cell.planted) for cell in cells]
    yield f"| all | | {' | '.join(found)} | {format_share(free.wrong, free.models)} |"
    hybrid = [sum((add(size=size, family=family) for family in RECURRING), Count()) for size in SIZES]
    found = [format_share(cell.removers, cell.planted) for cell in hybrid]
    yield f"| scalars that remove, hybrids | | {' | '.join(found)} | |"
    found = [format_share(cell.wrong, cell.models) for cell in cells]
    yield f"| models with a scalar that was not planted | | {' | '.join(found)} | |"


def scan_trained(folders: Sequence[Path]) -> Iterator[str]:
    """Scan trained models, whose super weights are not known except for SmolLM2's."""
    yield "| trained model | layers | activations | recurring | scalars that create | that remove | known one found |"
    yield "|---|---:|---:|---:|---:|---:|---|"
    for folder in folders:
        report = scan_activations(open_checkpoint(folder), device="cpu")
        main = [one for one in report.activations if not one.side]
        known = "-"
        if "smollm2" in folder.name.lower():
            known = "yes" if KNOWN in {_get_place(one)[:3] for one in report.candidates} else "no"
        numbers = (report.layers, len(main), sum(one.recurring for one in main))
        scalars = (len(report.candidates), len(report.removers))
        yield f"| {folder.name} | {' | '.join(map(str, (*numbers, *scalars)))} | {known} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="models of each family, depth and size")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument("--quick", action="store_true", help="one seed, two families and six layers only")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/detection.md")
    options = parser.parse_args(arguments)
    seeds, depths, families = options.seeds, DEPTHS, (*PERSISTENT, *RECURRING)
    if options.quick:
        seeds, depths, families = 1, DEPTHS[:1], ("llama", "lfm2")
    counts = run_cases(list_cases(seeds, depths, families), options.jobs)
    lines = [f"{seeds} seeds for each cell, 95% intervals by Wilson's method. {describe_machine()}", ""]
    lines += make_tables(counts)
    if options.folders:
        lines += ["", *scan_trained(options.folders)]
    print("\n".join(lines))
    if options.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()

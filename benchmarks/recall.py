"""Measure how many planted scalars `scan --method activations` finds, and how many others it lists.

    python benchmarks/recall.py [FOLDER...] [--seeds 20] [--jobs N] [--quick] [--json FILE] [--write]
    python benchmarks/recall.py --read FILE [FILE...] --write

One neuron of a tiny random model is made to write a large value to one channel. Its scalar in the down projection is
the planted one. Models differ in family, depth, size of the spike and seed. In hybrid models, a pair of scalars for
each layer with full attention creates and removes an activation. Models without a planted scalar are scanned too.
Each FOLDER contains a trained checkpoint with a tokenizer. Its super weights are not known, so that only what is
found is listed. `--write` puts the tables into docs/detection.md. `--json` keeps the counts in a file, and `--read`
makes the tables from such files, which may come from several machines, without measuring.

Each process uses one thread of torch. The counts do not depend on the number of processes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support"), str(ROOT / "benchmarks")]

import hybrids  # noqa: E402
import planted  # noqa: E402
from page import describe_machine  # noqa: E402
from recall_tables import PAGE, Case, Count, Run, Trained, list_lines, write_page  # noqa: E402

from swsurgery.checkpoint.opening import open_checkpoint  # noqa: E402
from swsurgery.model import load  # noqa: E402
from swsurgery.scanning.by_activations import scan_activations, scan_sequences  # noqa: E402
from swsurgery.scanning.report import Candidate, Scan  # noqa: E402

WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}
PERSISTENT: dict[str, dict[str, Any]] = {
    "llama": WIDE,
    "qwen3": WIDE,
    "gpt_neox": WIDE,
    "mixtral": WIDE | {"num_experts_per_tok": 2},
}
RECURRING = ("qwen3_5_text", "qwen3_next", "jamba", "bamba", "lfm2", "nemotron_h", "falcon_h1", "kimi_linear")
FAMILIES = (*PERSISTENT, *RECURRING, *hybrids.SHARED)
DEPTHS, SIZES, SEEDS = (6, 12, 24), (30, 100, 300, 1000), 20
SPREADS = (0.02, 0.3, 1.0)
TRIES = 10
"""Number of places that are tried until a neuron is one that some token turns on."""

KNOWN = (11, 507, 1229)
"""Layer, row and col of the super weight of SmolLM2-135M-Instruct that docs/known.md lists."""


def measure(family: str, depth: int, seed: int) -> dict[Case, Count]:
    """Measure the models of one family, depth and seed: without a planted scalar, and with one of each size."""
    torch.set_num_threads(1)
    counts = {}
    with tempfile.TemporaryDirectory() as folder, load.hide_output(), torch.no_grad():
        counts[Case(family, depth, None, seed)] = _measure_random(family, depth, seed, Path(folder))
        measures = {**dict.fromkeys(RECURRING, _measure_recurring), **dict.fromkeys(hybrids.SHARED, _measure_shared)}
        found = measures.get(family, _measure_persistent)(family, depth, seed, Path(folder))
        counts |= {Case(family, depth, size, seed): count for size, count in found}
    return counts


def build(family: str, depth: int, seed: int) -> transformers.PreTrainedModel:
    """Build a random model with about `depth` layers. Hybrids have at least two layers with full attention."""
    if family in (*RECURRING, *hybrids.SHARED):
        return hybrids.build(family, seed, hybrids.count_periods(family, depth))
    return planted.build(family, seed, depth, **PERSISTENT[family])


def _measure_random(family: str, depth: int, seed: int, folder: Path) -> Count:
    model = build(family, depth, seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(SPREADS[seed % len(SPREADS)] / 0.3)
    sequences = planted.SEQUENCES if family in PERSISTENT else hybrids.SEQUENCES
    return compare(scan_sequences(planted.opened(model, folder), sequences), set(), set())


def _measure_persistent(family: str, depth: int, seed: int, folder: Path) -> Iterator[tuple[int, Count]]:
    """Plant one scalar, and scan the model with each size of its spike."""
    model = build(family, depth, seed)
    place = plant(model, random.Random(f"{family} {depth} {seed}"))
    for size in SIZES:
        set_size(model, place, size)
        report = scan_sequences(planted.opened(model, folder), planted.SEQUENCES)
        yield size, compare(report, {tuple(place)}, set())


def plant(model: transformers.PreTrainedModel, dice: random.Random) -> planted.Place:
    """Plant a scalar at a random place of the first third of the layers."""
    experts, depth = getattr(model.config, "num_local_experts", None), model.config.num_hidden_layers
    for _ in range(TRIES):
        expert = dice.randrange(experts) if experts else None
        place = planted.Place(dice.randrange(depth // 3), dice.randrange(64), dice.randrange(96), expert)
        kept = [weight.clone() for weight in planted.weights_of(model, place)]
        try:
            planted.plant(model, place)
            return place
        except AssertionError:  # no token turns this neuron on
            for weight, old in zip(planted.weights_of(model, place), kept, strict=True):
                weight.copy_(old)
    raise AssertionError(f"no token turns on any of {TRIES} neurons")


def _measure_recurring(family: str, depth: int, seed: int, folder: Path) -> Iterator[tuple[int, Count]]:
    """Plant a pair of scalars for each layer with full attention, and scan the model with each size of the spikes."""
    model = build(family, depth, seed)
    stored = {name: value.clone() for name, value in model.state_dict().items()}
    for size in SIZES:
        model.load_state_dict(stored)
        made = hybrids.plant_recurring(model, family, size)
        report = scan_sequences(planted.opened(model, folder), hybrids.SEQUENCES)
        yield size, compare(report, {tuple(place) for place in made.creators}, {tuple(p) for p in made.removers})


def _measure_shared(family: str, depth: int, seed: int, folder: Path) -> Iterator[tuple[int, Count]]:
    """Plant one scalar in an MLP that several layers share, and scan the model with each size of its output."""
    model = build(family, depth, seed)
    stored = {name: value.clone() for name, value in model.state_dict().items()}
    for size in SIZES:
        model.load_state_dict(stored)
        place, _ = hybrids.plant_shared(model, size)
        report = scan_sequences(planted.opened(model, folder), hybrids.SEQUENCES)
        yield size, compare(report, {tuple(place)}, set())


def compare(report: Scan, creators: set[tuple[Any, ...]], removers: set[tuple[Any, ...]]) -> Count:
    """Count the planted scalars (layer, row, col, expert) that a scan lists, and the others that it lists."""
    listed, removing = ({_get_place(one) for one in group} for group in (report.candidates, report.removers))
    # A planted remover that takes away too much makes a state of its own, and is then listed as a candidate.
    others = len(listed - creators - removers) + len(removing - removers)
    wrong = others > 0 or (not creators and len(report.activations) > 0)
    turned = len(listed & removers)
    return Count(len(creators), len(listed & creators), len(removing & removers), turned, others, 1, int(wrong))


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


def measure_all(groups: Sequence[tuple[str, int, int]], jobs: int) -> dict[Case, Count]:
    """Measure all models of each (family, depth, seed), with `jobs` processes. The deepest models come first."""
    order = sorted(groups, key=lambda group: -group[1])
    if jobs == 1:
        found = {group: measure(*group) for group in order}
    else:
        # The server imports the heavy packages once, and each worker begins as a copy of it.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "transformers", "swsurgery.scanning.by_activations"])
        with ProcessPoolExecutor(jobs, mp_context=context) as pool:
            found = dict(zip(order, pool.map(measure, *zip(*order, strict=True)), strict=True))
    return {case: count for group in groups for case, count in found[group].items()}


def scan_trained(folder: Path) -> Trained:
    """Scan a trained model, whose super weights are not known except for SmolLM2's."""
    report = scan_activations(open_checkpoint(folder), device="cpu")
    main = [one for one in report.activations if not one.side]
    known = "-"
    if "smollm2" in folder.name.lower():
        known = "yes" if KNOWN in {_get_place(one)[:3] for one in report.candidates} else "no"
    scalars = (len(report.candidates), len(report.removers))
    return Trained(folder.name, report.layers, len(main), sum(one.recurring for one in main), *scalars, known)


def explain_missing(family: str) -> str | None:
    """Explain why the models of a family cannot be built; None if they can."""
    try:
        with load.hide_output():
            build(family, DEPTHS[0], 0)
    except (AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        return f"{family}: {type(error).__name__} in transformers {transformers.__version__}"
    return None


def run(families: Sequence[str], depths: Sequence[int], seeds: int, jobs: int, folders: Sequence[Path]) -> Run:
    """Measure everything, and describe how."""
    began = time.monotonic()
    reasons = {family: explain_missing(family) for family in families}
    present = [family for family, reason in reasons.items() if reason is None]
    groups = [(family, depth, seed) for family in present for depth in depths for seed in range(seeds)]
    print(f"measuring {len(groups) * (len(SIZES) + 1):,} models with {jobs} processes", file=sys.stderr)
    counts = measure_all(groups, jobs) if groups else {}
    seconds = round(time.monotonic() - began, 1)
    trained = tuple(scan_trained(folder) for folder in folders)
    machine = f"{describe_machine()[:-1]}, torch {torch.__version__}, transformers {transformers.__version__}"
    return Run(machine, jobs, seconds, counts, trained, tuple(filter(None, reasons.values())))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="trained models")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="models of each family, depth and size")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument(
        "--families", nargs="*", default=[*PERSISTENT, *RECURRING, *hybrids.SHARED], help="none: trained models only"
    )
    parser.add_argument("--quick", action="store_true", help="one seed, two families and six layers only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts into this file")
    parser.add_argument("--read", nargs="+", type=Path, metavar="FILE", help="measure nothing, read these files")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/detection.md")
    options = parser.parse_intermixed_args(arguments)  # folders may come before and after the options
    if options.read:
        runs = [Run.read(path) for path in options.read]
    elif options.quick:
        runs = [run(("llama", "lfm2"), DEPTHS[:1], 1, options.jobs, options.folders)]
    else:
        runs = [run(options.families, DEPTHS, options.seeds, options.jobs, options.folders)]
    if options.json:
        runs[-1].write(options.json)
    lines = list(list_lines(runs, RECURRING))
    print("\n".join(lines))
    if options.write:
        write_page(lines, PAGE)


if __name__ == "__main__":
    main()

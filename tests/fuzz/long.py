"""The long fuzz run: `make fuzz`. Writes docs/reliability/fuzz.json; exit 1 where a promise did not hold.

Inputs come in blocks of their own seed, so that a run is repeatable whatever the number of processes, and a bad input
is found again from its block alone. A run of some targets leaves the other rows of the file as they are.
"""

from __future__ import annotations

import argparse
import base64
import json
import logging
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from fuzz import hostile  # noqa: E402 - found through the line above
from fuzz.headers import HeaderTarget  # noqa: E402
from fuzz.readers import READERS  # noqa: E402

TARGETS = {target.name: target for target in (HeaderTarget, *READERS)}
"""Each reads one kind of input; to add one, add its class in readers.py."""

BLOCK = 10_000
BAD = ("lax", "different", "traceback")


def run_block(job: tuple[str, int, int, int]) -> tuple[Counter[str], list[dict[str, Any]]]:
    """Verdicts of one block, and the inputs that break a promise (base64)."""
    name, seed, block, count = job
    random, verdicts, bad = Random(f"{seed}/{name}/{block}"), Counter(), []
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="swsurgery-fuzz-", dir=memory) as folder:
        target = TARGETS[name](Path(folder))
        for _ in range(count):
            content = target.make(random)
            try:
                verdict = target.verdict(content)
            except Exception as error:  # noqa: BLE001 - what the run is there to find
                verdict = f"traceback: {type(error).__name__}: {error}"[:200]
            verdicts[verdict] += 1
            if verdict.startswith(BAD):
                bad.append({"block": block, "verdict": verdict, "input": base64.b64encode(content).decode()})
        target.close()
    return verdicts, bad[:5]


def run_target(name: str, seed: int, inputs: int, processes: int) -> dict[str, Any]:
    """One row of the file."""
    jobs = [(name, seed, block, min(BLOCK, inputs - block * BLOCK)) for block in range(-(-inputs // BLOCK))]
    verdicts: Counter[str] = Counter()
    bad: list[dict[str, Any]] = []
    start = time.monotonic()
    with multiprocessing.Pool(processes) as pool:
        for number, (found, broken) in enumerate(pool.imap_unordered(run_block, jobs), 1):
            verdicts += found
            bad += broken
            if number % 50 == 0 or number == len(jobs):
                seconds = time.monotonic() - start
                print(f"{name}: {sum(verdicts.values()):,} inputs, {seconds:.0f} s, {len(bad)} bad", file=sys.stderr)
    stricter = {k.removeprefix("stricter: "): n for k, n in verdicts.items() if k.startswith("stricter: ")}
    return {
        "target": name,
        "inputs": inputs,
        "accepted": verdicts["accepted"],
        "refused": verdicts["refused"],
        "stricter": sum(stricter.values()),
        "stricter_because": dict(sorted(stricter.items(), key=lambda item: -item[1])),
        "lax": verdicts["lax"],
        "different": verdicts["different"],
        "tracebacks": sum(n for k, n in verdicts.items() if k.startswith("traceback")),
        "seconds": round(time.monotonic() - start, 1),
        "bad": bad[:20],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}, bounds; else all of them")
    parser.add_argument("--inputs", type=int, help="for each target; else 10 million headers and 300,000 of the others")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "reliability" / "fuzz.json")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # each journal that is undone says so
    names = options.targets or [*TARGETS, "bounds"]
    if unknown := set(names) - {*TARGETS, "bounds"}:
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    try:
        before = json.loads(options.out.read_text())
    except FileNotFoundError:
        before = {"rows": [], "bounds": []}
    rows = {row["target"]: row for row in before["rows"]}
    for name in names:
        if name != "bounds":
            inputs = options.inputs or (10_000_000 if name == "header" else 300_000)
            rows[name] = run_target(name, options.seed, inputs, options.processes)
    bounds = hostile.measure_all() if "bounds" in names else before["bounds"]
    document = {
        "what": "fuzz",
        "commit": subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "safetensors": version("safetensors"),
        "seed": options.seed,
        "processes": options.processes,
        "rows": [rows[name] for name in TARGETS if name in rows],
        "bounds": bounds,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=2) + "\n")
    broken = sum(row["lax"] + row["different"] + row["tracebacks"] for row in document["rows"])
    beyond = [row["input"] for row in bounds if not row["held"]]
    print(f"{sum(row['inputs'] for row in document['rows']):,} inputs, {broken} broke a promise; beyond the bounds: "
          f"{', '.join(beyond) or 'none'}; written to {options.out}")  # fmt: skip
    return 1 if broken or beyond else 0


if __name__ == "__main__":
    sys.exit(main())

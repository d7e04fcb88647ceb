"""docs/reliability.md from docs/reliability/*.json: `python -m faults.report` with tests/ on the path.

Every figure comes out of those files; here are only the words.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
FIGURES, PAGE = DOCS / "reliability", DOCS / "reliability.md"

Figures = Mapping[str, Mapping[str, Any]]
"""Technique -> the document that its run wrote."""

SWEEPS = ("kill", "errors", "power", "crash", "short", "large", "races", "space")


@dataclass(frozen=True)
class Promise:
    """One promise; `sweeps`, the runs that put it to the test, and `tests`, files of the test suite that do."""

    words: str
    sweeps: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    fuzz: tuple[str, ...] = ()


PROMISES = (
    Promise("The base is never written: its bytes, inodes, mtimes and links stay, unless it is edited in place.",
            ("kill", "errors", "power", "crash", "races", "space"), ("test_apply.py",)),
    Promise("The output is there whole or not at all.", ("kill", "errors", "power", "crash", "races", "space"),
            ("test_apply_faults.py",)),
    Promise("Exit 0 means durable: a power cut afterwards loses nothing.", ("power", "crash")),
    Promise("After any fault the same command finishes, with identical bytes and no litter.",
            ("kill", "errors", "power", "crash", "races", "space")),
    Promise("Every error of the system is reported: exit 2, one line, no traceback; a failed fsync is final.",
            ("errors", "space")),
    Promise("Short transfers and shards over 2 GiB come out right.", ("short", "large")),
    Promise("An edit in place is undone or done, whenever it is cut off, and can be reverted.",
            ("kill", "errors", "power", "crash", "races", "space"), ("test_in_place.py", "test_journal.py")),
    Promise("Only the named scalars change.", (), ("test_apply.py", "test_diff.py", "test_verify.py")),
    Promise("Arithmetic is exact and rounded once; what a dtype cannot hold is refused.", (), ("test_dtypes.py",)),
    Promise("What the official parser refuses is refused, and what is accepted is read the same way.", (),
            ("test_shard_header.py",), ("header",)),
    Promise("No path leaves the model's directory, no code is run, no socket opened.", (),
            ("test_hostile_names.py", "test_no_pickle.py", "test_syscalls.py")),
    Promise("Hostile input costs bounded time and memory.", (), (), ("bounds",)),
    Promise("The same inputs give the same bytes.", (), ("test_determinism.py",)),
    Promise("A base that is another one, or changes meanwhile, is refused.", (),
            ("test_apply_faults.py", "test_manifest_proof.py")),
    Promise("No token comes into any output.", (), ("test_secrets.py",)),
    Promise("Runs at the same time do not mix: one wins, the others say so.", ("races",)),
)  # fmt: skip
"""In the order in which they are numbered."""

TITLES = {
    "kill": "SIGKILL at every mutating call",
    "errors": "Every call failing once with every error code",
    "power": "Power cut at every mutating call, and after exit 0",
    "crash": "A crash after every operation, on a file system in memory that forgets what was not synced",
    "short": "Every transfer cut in half",
    "large": "A shard of 5 GiB, its last scalar edited",
    "races": "Runs at the same time",
    "space": "Clones, full and read-only file systems",
}

METHOD = """\
Each case runs the real command in a process of its own, on a checkpoint of three shards. A run is traced first and its
system calls are counted; then it is run again once for each of them, with the fault at that call. Afterwards the base
must have the same bytes, inodes, mtimes and links; the target must be the old or the new one, byte for byte (an edit in
place after the next command, by turns `verify`, `inspect`, the same `apply` and `revert`); and the same command again
must end well with the right bytes and nothing left over. What is right comes from struct and json, not from the
product. For a power cut the process dies at a call and the file system is shut down at once: what its journal does not
hold is gone; then also with the journal written back by chance, and with the data of the weight files.\
"""

LIMITS = """\
- The power cut is the shutdown ioctl of ext4 and xfs: sectors torn in half, disks that lie about a flush and file
  systems over a network are not covered, nor are macOS and Windows.
- Calls are counted in a run with one thread (`SWSURGERY_THREADS=1`). With several threads the same calls are made in
  other orders.
- One fault at a time, except in the cases that begin with a run already killed. A call that fails for ever is not
  tried, only a file system that stays full.
- An error of a `close` may pass unreported, since everything is synced before; so may one of the user's cache of
  digests, which saves time and proves nothing. Runs in which that happened are counted as excused.
- The kernel's memory running out is not covered.\
"""


def load(folder: Path = FIGURES) -> dict[str, dict[str, Any]]:
    """Every document that a run wrote."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def render(figures: Figures) -> str:
    """The whole page."""
    parts = ["# Reliability\n\nMade from what `make faults` and `make fuzz` measured, in `docs/reliability/`."]
    parts.append("## Sixteen promises\n\n" + _promises(figures))
    parts.append("## Faults\n\n" + METHOD)
    parts += [f"### {TITLES[name]}\n\n{_sweep(figures[name])}" for name in SWEEPS if name in figures]
    if "planted" in figures:
        parts.append("## Bugs planted on purpose\n\n" + _planted(figures["planted"]))
    if "incumbents" in figures:
        parts.append("## Other writers under the same faults\n\n" + _incumbents(figures["incumbents"]))
    if "fuzz" in figures:
        parts.append("## Fuzzing\n\n" + _fuzz(figures["fuzz"]))
    parts.append("## What is not covered\n\n" + LIMITS)
    parts.append("## Where it was measured\n\n" + _circumstances(figures))
    return "\n\n".join(parts) + "\n"


def _promises(figures: Figures) -> str:
    rows = []
    for number, promise in enumerate(PROMISES, 1):
        cases, broken, by = 0, 0, []
        for name in (n for n in promise.sweeps if n in figures):
            found = figures[name]["rows"]
            cases += sum(row["cases"] for row in found)
            broken += sum(len(row["violations"]) for row in found)
            by.append(TITLES[name][0].lower() + TITLES[name][1:] if name != "kill" else TITLES[name])
        for row in figures.get("tests", {"rows": []})["rows"]:
            if row["file"] in promise.tests:
                cases += row["passed"] + row["failed"]
                broken += row["failed"]
                by.append(f"`tests/{row['file']}`")
        for row in figures.get("fuzz", {"rows": []})["rows"]:
            if row["target"] in promise.fuzz:
                cases += row["inputs"]
                broken += row["lax"] + row["different"] + row["tracebacks"]
                by.append(f"fuzzing ({row['target']})")
        if "bounds" in promise.fuzz:
            bounds = figures.get("fuzz", {"bounds": []})["bounds"]
            cases, broken = cases + len(bounds), broken + sum(not row["held"] for row in bounds)
            by += ["hostile inputs, measured"] if bounds else []
        result = f"{broken:,} of {cases:,} broke it" if cases else "not measured"
        rows.append((number, promise.words, "; ".join(by), result))
    return _table(("", "promise", "put to the test by", "result"), rows)


def _sweep(document: Mapping[str, Any]) -> str:
    rows = [
        (row.get("subject") or row["operation"], row.get("place") or row.get("mode") or "memory",
         f"{row['cases']:,}", len(row["violations"]), sum(row.get("excused", {}).values()) or "")
        for row in document["rows"]
    ]  # fmt: skip
    total = sum(row["cases"] for row in document["rows"])
    broken = sum(len(row["violations"]) for row in document["rows"])
    text = _table(("what ran", "where", "cases", "violations", "excused"), rows)
    return f"{broken} violations in {total:,} cases.\n\n{text}"


def _planted(document: Mapping[str, Any]) -> str:
    techniques = list(dict.fromkeys(t for row in document["rows"] for t in row["found"]))
    rows = []
    for row in document["rows"]:
        cells = [f"{c['violations']} / {c['cases']}" if (c := row["found"].get(t)) else "" for t in techniques]
        rows.append((row["bug"], *cells))
    caught = sum(any(c["violations"] for c in row["found"].values()) for row in document["rows"])
    return (
        f"Each bug was put into a copy of the product, and a sample of the same sweeps run over it: {caught} of "
        f"{len(rows)} were caught. Violations / cases:\n\n" + _table(("bug", *techniques), rows)
    )


def _incumbents(document: Mapping[str, Any]) -> str:
    rows = [
        (f"{row['writer']} {row['version']}", row["over"], row["fault"], row["place"] or "memory", row["cases"],
         *row["states"].values())
        for row in document["rows"]
    ]  # fmt: skip
    lost: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row in document["rows"]:
        if row["fault"] == "power cut after success":
            lost[f"{row['writer']} {row['version']}"][0] += row["cases"] - row["states"]["new"]
            lost[f"{row['writer']} {row['version']}"][1] += row["cases"]
    said = "\n".join(f"- {name}: {bad} of {cases}" for name, (bad, cases) in lost.items())
    head = ("writer", "over", "fault", "on", "cases", *document["rows"][0]["states"])
    return (
        "What lies under the final name after a fault: what was before (or nothing), the new files, or something else; "
        "the last column is the worst, for the official reader loads it without an error.\n\n"
        f"Results lost by a power cut after the writer had reported success:\n\n{said}\n\n{_table(head, rows)}"
    )


def _fuzz(document: Mapping[str, Any]) -> str:
    rows = [
        (row["target"], f"{row['inputs']:,}", f"{row['accepted']:,}", f"{row['stricter']:,}", row["lax"],
         row["different"], row["tracebacks"])
        for row in document["rows"]
    ]  # fmt: skip
    text = _table(("reader", "inputs", "accepted", "stricter", "lax", "read differently", "tracebacks"), rows)
    bounds = [(row["input"], row["seconds"], row["peak_mb"], row["outcome"]) for row in document["bounds"]]
    text = f'Against safetensors {document["safetensors"]}: "lax" is accepted here and refused there.\n\n{text}'
    if bounds:
        text += "\n\nHostile inputs, each in a process of its own:\n\n"
        text += _table(("input", "seconds", "peak MB", "outcome"), bounds)
    return text


def _circumstances(figures: Figures) -> str:
    rows = [
        (f"{name}.json", d["commit"], d["kernel"].split("-")[0], d["python"]) for name, d in sorted(figures.items())
    ]
    return _table(("figures", "commit", "kernel", "Python"), rows)


def _table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(render(load()))

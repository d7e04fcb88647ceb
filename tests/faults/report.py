"""Write docs/reliability.md from docs/reliability/*.json: `python -m faults.report` with tests/ on the path.

Every figure comes from those files; this module contains only the words.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
FIGURES, PAGE = DOCS / "reliability", DOCS / "reliability.md"

Row = Mapping[str, Any]
Figures = Mapping[str, Row]
"""The document that each technique's run wrote, by the name of the technique."""

NAMES = {
    "kill": "SIGKILL", "errors": "error codes", "power": "power cuts", "crash": "crash images",
    "short": "short transfers", "large": "a shard of 5 GiB", "races": "races", "space": "full and read-only disks",
}  # fmt: skip
"""The sweeps, in the order of the page."""

SHOWN = 20
"""Maximum number of violations shown for one kind of sweep; the others are in the file."""


TOLD = re.compile(r": (exit \d$|a traceback|stderr holds)")
"""Matches a violation in how a run reported its error."""


@dataclass(frozen=True)
class Promise:
    """One promise.

    `sweeps` names the runs that test it, each with a pattern of the rows that count. `tests` names files of the test
    suite, `fuzz` targets of the fuzzer. `telling` is true if the promise is about how a run reports its errors, and
    false if it is about the files that the run leaves.
    """

    words: str
    sweeps: Mapping[str, str]
    tests: tuple[str, ...] = ()
    fuzz: tuple[str, ...] = ()
    telling: bool = False


_ALL = dict.fromkeys(("kill", "errors", "power", "crash", "races", "space"), "")
_POINTS, _CRASH, _RACES = "faults/test_points.py", "faults/test_crash_cases.py", "faults/test_races.py"

PROMISES = (
    Promise("The base is never written: its bytes, inodes, mtimes and links stay, unless it is edited in place.",
            _ALL, (_POINTS, _CRASH, "editing/test_apply.py")),
    Promise("The output is complete or absent.", _ALL, (_POINTS, _CRASH, "editing/test_apply_faults.py")),
    Promise("Exit 0 means durable: a power cut afterwards loses nothing.", {"power": "", "crash": "crash"},
            (_CRASH, "faults/test_crash_planted.py")),
    Promise("After any fault the same command completes, with identical bytes and no leftover files.",
            _ALL, (_POINTS, _CRASH, "editing/test_resume.py")),
    Promise("Every error of the system is reported: exit 2, one line, no traceback; a failed fsync is final.",
            {"errors": "", "crash": "EIO|EMFILE|ENOSPC|fsync fails", "space": ""}, (_POINTS, _CRASH), (), True),
    Promise("Short transfers and shards over 2 GiB give the right bytes.",
            {"short": "", "large": "", "crash": "short transfers"}, ("faults/test_transfers.py",)),
    Promise("An interrupted edit in place is undone or complete, and can be reverted.",
            dict.fromkeys(_ALL, "in place|killed edit"),
            (_POINTS, _CRASH, "editing/test_in_place.py", "checkpoint/test_journal.py")),
    Promise("Only the named scalars change.", {},
            ("editing/test_apply.py", "checkpoint/test_diff.py", "verifying/test_verify.py")),
    Promise("Arithmetic is exact and rounded once; values that a dtype cannot represent are refused.", {},
            ("storage/test_dtypes.py",)),
    Promise("Whatever the official parser refuses is refused; whatever is accepted is read in the same way.", {},
            ("storage/test_shard_header.py", "storage/test_fuzz_header.py"), ("header",)),
    Promise("No path leaves the model's directory, no code is run, no socket opened.", {},
            ("checkpoint/test_hostile_names.py", "storage/test_hostile_paths.py", "editing/test_no_pickle.py",
             "storage/test_syscalls.py")),
    Promise("Hostile input costs bounded time and memory.", {}, ("checkpoint/test_hostile_bounds.py",), ("bounds",)),
    Promise("The same inputs give the same bytes.", {}, ("storage/test_determinism.py",)),
    Promise("Another base, or one that changes during the run, is refused.", {},
            ("editing/test_apply_faults.py", "verifying/test_manifest_proof.py")),
    Promise("No token appears in any output.", {}, ("sharing/test_secrets.py",)),
    Promise("Simultaneous runs do not mix: one wins, the others report it.", {"races": "", "crash": "a second run"},
            (_RACES, _CRASH)),
)  # fmt: skip
"""The promises, in the order of their numbers."""

INTRODUCTION = """\
This page lists what swsurgery promises about files, how each promise was tested, how often, and with what result.
`make faults` (SIGKILL, errors, power cuts; about an hour, as root) and `make fuzz` write all figures into
`docs/reliability/`, and this page is generated from them. Every `make test` includes a sample of the same faults.\
"""

METHOD = """\
Each case runs the real command in its own process, on a checkpoint of three shards. First a run is traced and its
system calls are counted. Then the run is repeated once for each system call, with the fault at that call. Afterwards
these conditions must hold:

- The base has the same bytes, inodes, mtimes and links.
- The target is the old one or the new one, byte for byte. After an edit in place this is checked after the next
  command, which is `verify`, `inspect`, the same `apply` and `revert` in turn.
- The same command, run again, succeeds, with the right bytes and nothing left over.

The expected bytes are computed with struct and json, not with the product. In a power cut, the process is killed at a
call and the file system is shut down at once, in four ways: everything that was not synced is lost; the file system's
journal happened to be written; the weights happened to be written; or the journal and the first page of the weights.\
"""

CRASH = """\
This test runs in one process, on a simulated disk in memory that tracks what was synced. After each operation of a
run, the states that a crash could leave are written to a real file system: what was not synced is missing, kept, torn
in sectors, or zero. The next command must recover from each state. The same disk can also make calls fail once or
permanently, deliver signals, and start other runs.\
"""

LIMITS = """\
- A power cut is the shutdown ioctl of ext4 and xfs, or an image of the disk in memory. Disks that report a flush
  without doing it, network file systems, macOS and Windows are not covered.
- Calls are counted in a run with one thread (`SWSURGERY_THREADS=1`). With several threads the same calls are made in
  other orders. Runs that are killed or made to fail are forks of a process that has already loaded the product's
  modules, because loading takes most of the time of a run. Runs that race or have short transfers start from the
  beginning.
- Each case has one fault, once or permanent, except the cases that begin with a run that was already killed.
- An error of a `close` may go unreported, because everything was synced before. So may an error of the user's cache of
  digests, which saves time and proves nothing. Such runs are counted as excused.
- If a completed `revert` in place is run again, it reports that there is nothing to revert. If a copy was killed after
  its last rename, the next run reports that the output already exists. In both cases the exit code is 2 and the work is
  done.
- Running out of the kernel's memory is not covered.\
"""


def load(folder: Path = FIGURES) -> dict[str, dict[str, Any]]:
    """Read every document that a run wrote."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def render(figures: Figures) -> str:
    """Return the text of the page."""
    parts = ["# Reliability\n\n" + INTRODUCTION, "## Sixteen promises\n\n" + _promises(figures)]
    sections: tuple[tuple[tuple[str, ...], str, Callable[[Figures], str]], ...] = (
        (("kill", "errors", "power", "short"), "## A fault at every system call", _calls),
        (("large", "races", "space"), "## Races, full and read-only disks, clones, a large shard", _others),
        (("crash",), "## A disk in memory", _crash),
        (("planted",), "## Bugs planted on purpose", _planted),
        (("incumbents",), "## Other writers under the same faults", _incumbents),
        (("fuzz",), "## Fuzzing", _fuzz),
    )
    parts += [f"{title}\n\n{write(figures)}" for names, title, write in sections if any(n in figures for n in names)]
    parts.append("## What is not covered\n\n" + LIMITS)
    parts.append("## Where it was measured\n\n" + _circumstances(figures))
    return "\n\n".join(parts) + "\n"


def _promises(figures: Figures) -> str:
    rows = []
    for number, promise in enumerate(PROMISES, 1):
        cases, broken, by = 0, 0, []
        for name, pattern in promise.sweeps.items():
            found = [row for row in _rows(figures, name) if re.search(pattern, _what(row))]
            cases += sum(row["cases"] for row in found)
            broken += sum(_broken(row, promise.telling) for row in found)
            by += [NAMES[name]] if found else []
        for row in _rows(figures, "fuzz"):
            if row["target"] in promise.fuzz:
                cases += row["inputs"]
                broken += row["lax"] + row["different"] + row["tracebacks"]
                by.append("fuzzing")
        if "bounds" in promise.fuzz and "fuzz" in figures:
            bounds = figures["fuzz"]["bounds"]
            cases, broken = cases + len(bounds), broken + sum(not row["held"] for row in bounds)
            by.append("hostile inputs")
        tests = [row for row in _rows(figures, "tests") if row["file"] in promise.tests]
        passed, failed = (sum(row[what] for row in tests) for what in ("passed", "failed"))
        rows.append(
            (number, promise.words, ", ".join(by), f"{broken:,} of {cases:,}" if cases else "",
             ", ".join(f"`{Path(file).name}`" for file in promise.tests),
             f"{passed} passed" + (f", {failed} failed" if failed else "") if tests else "not counted")
        )  # fmt: skip
    return _table(("", "promise", "faults", "violations", "tests", ""), rows)


def _calls(figures: Figures) -> str:
    columns = dict.fromkeys(
        (NAMES[name], row["place"]) for name in ("kill", "errors", "power", "short") for row in _rows(figures, name)
    )
    cells: dict[str, dict[tuple[str, str], str]] = {}
    for name in ("kill", "errors", "power", "short"):
        for row in _rows(figures, name):
            star = "*" if "in turn" in row["extent"] or "one of" in row["extent"] else ""
            text = f"{_broken(row)} of {row['cases']:,}{star}"
            cells.setdefault(row["subject"], {})[NAMES[name], row["place"]] = text
    table = _table(
        ("what ran", *(f"{name} {place}".strip() for name, place in columns)),
        [(subject, *(found.get(column, "") for column in columns)) for subject, found in cells.items()],
    )
    rows = [row for name in ("kill", "errors", "power", "short") for row in _rows(figures, name)]
    told = f"{METHOD}\n\nViolations and cases"
    if any("*" in cell for found in cells.values() for cell in found.values()):
        told += ". In cells with *, each call had only one of its possible faults, in turn"
    return f"{told}:\n\n{table}{_remarks(rows)}"


def _others(figures: Figures) -> str:
    rows = [(name, row) for name in ("races", "space", "large") for row in _rows(figures, name)]
    table = _table(
        ("", "what ran", "where", "how far", "violations"),
        [(row["technique"], row["subject"], row["place"] or "memory" if name != "large" else "", row["extent"],
          f"{_broken(row)} of {row['cases']}") for name, row in rows],
    )  # fmt: skip
    return table + _remarks([row for _, row in rows])


def _crash(figures: Figures) -> str:
    rows = figures["crash"]["rows"]
    found = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        of = [row for row in rows if row["mode"] == mode]
        found.append((mode, f"{sum(map(_broken, of))} of {sum(r['cases'] for r in of):,}"))
    ran = "; ".join(dict.fromkeys(row["operation"] for row in rows))
    table = _table(("event", "violations"), found)
    return f"{CRASH}\n\n{_filled(f'These operations were tested: {ran}.')}\n\n{table}{_remarks(rows)}"


def _remarks(rows: Sequence[Row]) -> str:
    """List the excused runs and the first violations."""
    excused: Counter[str] = Counter()
    for row in rows:
        excused.update(row.get("excused", {}))
    lines = [f"- excused in {number:,} runs: {why}" for why, number in sorted(excused.items())]
    broken = [f"- **broken** ({_what(row)}): {v.splitlines()[0]}" for row in rows for v in row["violations"]]
    lines += broken[:SHOWN] + ([f"- and {len(broken) - SHOWN} more"] if len(broken) > SHOWN else [])
    return "\n\n" + "\n".join(lines) if lines else ""


def _planted(figures: Figures) -> str:
    found = figures["planted"]["rows"]
    techniques = list(dict.fromkeys(t for row in found for t in row["found"]))
    rows = []
    for row in found:
        cells = [f"{c['violations']} in {c['cases']}" if (c := row["found"].get(t)) else "" for t in techniques]
        rows.append((row["bug"], *(f"**{cell}**" if cell and not cell.startswith("0 ") else cell for cell in cells)))
    caught = sum(any(c["violations"] for c in row["found"].values()) for row in found)
    most = max(sum(bool(row["found"].get(t, {}).get("violations")) for row in found) for t in techniques)
    told = _filled(
        f"Each bug was planted in a copy of the product, and a sample of the same sweeps was run on it. {caught} of "
        f"{len(rows)} were caught; no single technique caught more than {most}. The table shows violations and cases "
        "(one case can have several violations):"
    )
    return f"{told}\n\n{_table(('bug', *techniques), rows)}"


def _incumbents(figures: Figures) -> str:
    found = figures["incumbents"]["rows"]
    rows = []
    for name in dict.fromkeys(f"{row['writer']} {row['version']}" for row in found):
        mine = [row for row in found if f"{row['writer']} {row['version']}" == name]
        cells = []
        for fault in ("SIGKILL", "power cut"):
            some = [row for row in mine if row["fault"] == fault]
            cells.append(f"{_count(some, 'partial', 'partial, loads')} of {sum(row['cases'] for row in some)}")
        after = [row for row in mine if row["fault"] == "power cut after success"]
        number = sum(row["cases"] for row in after)
        rows.append((name, *cells, f"{_count(after, 'old', 'partial', 'partial, loads')} of {number}",
                     _count(mine, "partial, loads")))  # fmt: skip
    places = sorted({row["place"] for row in found if row["place"]})
    head = ("writer", "killed: a mixture", "power cut: a mixture", "power cut after success: lost", "loads")
    told = (
        f"Each writer was killed, and the power was cut on {' and '.join(places)}, at each call that changes its "
        "directory and after it had reported success. It wrote into a new directory, and over an older one, which "
        "swsurgery refuses. A mixture has some new files or some new bytes under their final names. The last column "
        "counts mixtures that the official reader loads without an error although the weights are neither the old nor "
        "the new."
    )
    return f"{_filled(told)}\n\n{_table(head, rows)}"


def _count(rows: Iterable[Row], *states: str) -> int:
    return sum(row["states"][state] for row in rows for state in states)


def _fuzz(figures: Figures) -> str:
    document = figures["fuzz"]
    rows = [
        (row["target"], f"{row['inputs']:,}", f"{row['accepted']:,}", f"{row['stricter']:,}", row["lax"],
         row["different"], row["tracebacks"])
        for row in document["rows"]
    ]  # fmt: skip
    text = _table(("reader", "inputs", "accepted", "stricter", "lax", "read differently", "tracebacks"), rows)
    told = _filled(
        f"Headers are compared with safetensors {document['safetensors']}. Stricter means refused here and accepted "
        "there; lax means the opposite. In the other readers the test looks for tracebacks."
    )
    text = f"{told}\n\n{text}"
    if bounds := document["bounds"]:
        held = sum(row["held"] for row in bounds)
        slow, large = (max(bounds, key=lambda row: row[what]) for what in ("seconds", "peak_mb"))
        text += "\n\n" + _filled(
            f"{held} of {len(bounds)} hostile inputs, each read by its own process, were handled or refused "
            f"within 2 s and 256 MB. The slowest took {slow['seconds']} s ({slow['input']}), the largest "
            f"{large['peak_mb']} MB ({large['input']})."
        )
    return text


def _circumstances(figures: Figures) -> str:
    rows = [
        (f"[{name}.json](reliability/{name}.json)", d["commit"], d["kernel"].split("-")[0], d["python"])
        for name, d in sorted(figures.items())
    ]  # fmt: skip
    return _table(("figures", "commit", "kernel", "Python"), rows)


def _broken(row: Row, telling: bool | None = None) -> int:
    """Count the cases of a row with a violation; one case may have several.

    If the row can tell them apart, `telling` selects the cases that reported an error badly (True) or the others
    (False).
    """
    found = row["violations"]
    if telling is not None and row.get("technique") in ("error code", "full disk", "read-only file system"):
        found = [violation for violation in found if bool(TOLD.search(violation)) == telling]
    return len({violation.split(": ")[0] for violation in found})


def _filled(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _rows(figures: Figures, name: str) -> Sequence[Row]:
    return figures[name]["rows"] if name in figures else ()


def _what(row: Row) -> str:
    """Describe the subject of a row."""
    return f"{row.get('subject') or row['operation']}, {row.get('mode') or row.get('technique')}"


def _table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(render(load()))

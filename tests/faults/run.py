"""All faults at length, and docs/reliability.md from what came of them. `make faults`; exit 1 where a promise broke.

usage: python -m faults.run [TECHNIQUE ...]   with tests/ on the path; root for whatever mounts a file system

Each technique writes docs/reliability/TECHNIQUE.json, so that one can be run again by itself. The package under test
is copied first: nobody edits it meanwhile, and planted bugs need a copy anyway.
"""

from __future__ import annotations

import argparse
import compileall
import itertools
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from faults import (
    copy_swaps,
    crash_cases,
    disks,
    forks,
    incumbents,
    matrix,
    races,
    report,
    space,
    sweeps,
    tracing,
    transfers,
)
from faults.cases import CASES, Case, Prepared, case, prepare

ROOT = Path(__file__).parents[2]
POWER: tuple[disks.Kind, ...] = ("ext4", "xfs")
CLONING: tuple[disks.Kind, ...] = ("xfs", "btrfs")
ROOMY: tuple[disks.Kind, ...] = ("ext4", "xfs", "btrfs", "tmpfs")
SHORT = ("copy", "copy of a base hashed before", "edit in place", "revert in place")
BOTH = ("copy", "edit in place")


@dataclass(frozen=True)
class Run:
    """Where things are, and how much is to be done."""

    folder: Path
    package: Path
    shim: Path
    workers: int
    rounds: int
    brief: bool
    mergekit: str | None
    cases: tuple[Case, ...]
    power: tuple[disks.Kind, ...]
    bugs: tuple[str, ...]

    def prepared(self, case: Case) -> Prepared:
        return prepare(case, self.folder / "prepare", self.package, self.package)

    def room(self) -> Path:
        """An empty folder."""
        room = self.folder / "room"
        shutil.rmtree(room, ignore_errors=True)
        room.mkdir()
        return room


def kill(run: Run) -> Iterator[Any]:
    for one in run.cases:
        yield sweeps.kill(run.prepared(one), run.room(), run.workers, "")


def errors(run: Run) -> Iterator[Any]:
    for one in run.cases:
        yield sweeps.errors(run.prepared(one), run.room(), run.workers, "", in_turn=run.brief)


def power(run: Run) -> Iterator[Any]:
    for kind in _there(run.power, disks.no_power_cut):
        for one in run.cases:
            with matrix.drives(kind, run.room(), run.workers) as drives:
                yield sweeps.power(run.prepared(one), drives, in_turn=run.brief)


def short(run: Run) -> Iterator[Any]:
    for name in SHORT:
        result, counts = transfers.short(run.prepared(case(name)), run.room(), run.shim, "")
        yield result.to_json() | {"shortened": sum(counts.values())}


def large(run: Run) -> Iterator[Any]:
    """Beside the repository's own temporary files: five GiB need not fit into memory."""
    for in_place in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            yield transfers.large(Path(folder) / "large", run.package, in_place)


def race(run: Run) -> Iterator[Any]:
    for name, killed in itertools.product((one for one in BOTH if case(one) in run.cases), (False, True)):
        yield races.targets(run.prepared(case(name)), run.room(), run.shim, run.rounds, killed)
    yield races.mixed(run.prepared(case("edit in place")), run.room(), run.shim, run.rounds)


def room(run: Run) -> Iterator[Any]:
    """Clones, full and read-only file systems."""
    for kind in _there(ROOMY, disks.missing):
        tries: list[tuple[str, Callable]] = [(name, space.full) for name in BOTH]
        tries += [(name, space.read_only) for name in BOTH]
        tries += [("copy", space.clones)] if kind in CLONING else []
        for name, attempt in tries:
            with disks.disk(kind, run.room()) as disk:
                yield attempt(run.prepared(case(name)), disk)


def crash(run: Run) -> Iterator[Any]:
    """On the disk in memory, of the package that this process has loaded."""
    return crash_cases.rows()


def others(run: Run) -> Iterator[Any]:
    """Other writers, and ours by the same measure."""
    writers = [*incumbents.WRITERS, *([incumbents.mergekit(run.mergekit)] if run.mergekit else [])]
    for writer, over in itertools.product(writers, (False, True)):
        if over and not writer.replaces:
            continue
        number, most = _version_of(writer), 40 if run.brief else 200
        bench = incumbents.Bench(writer, run.room() / "bench", over, run.package)
        yield incumbents.killed(bench, number, "", most)
        for kind in _there(POWER, disks.no_power_cut):
            with matrix.drives(kind, run.room(), run.workers) as drives:
                benches = [incumbents.Bench(writer, d.mount / "bench", over, run.package) for d in drives]
                yield from incumbents.power(benches, number, drives, most)


def planted(run: Run) -> Iterator[Any]:
    from faults import planted as bugs

    kinds = list(_there(POWER, disks.no_power_cut))
    wanted = [bug for bug in bugs.BUGS if bug.name in run.bugs or not run.bugs]
    for number, bug in enumerate(wanted):  # a folder for each: what runs in it stays loaded
        package = bugs.copy_with(bug.name, run.folder / f"planted{number}")
        compileall.compile_dir(package, quiet=1)
        yield matrix.run(bug.name, package, run.package, run.folder / "matrix", run.shim, run.workers, kinds)
        forks.close()
    races_of = {"copy_swaps": bugs.COPY_RACES, "swaps": bugs.IN_PLACE_RACES}
    for module, bug in ((m, bug) for m, those in races_of.items() for bug in those):
        if bug.name in run.bugs or not run.bugs:
            package = bugs.copy_with(bug.name, run.folder / f"planted {bug.name}")
            faults = copy_swaps.played(bug.name, package, module)
            yield matrix.Caught(bug.name, {"another program": (len(faults), 1)})


def tests(run: Run) -> Iterator[Any]:
    """The tests behind each promise that need no faults, counted."""
    files = sorted({file for promise in report.PROMISES for file in promise.tests})
    log = run.folder / "tests.xml"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", str(run.workers), "-p", "no:cacheprovider", f"--junit-xml={log}",
         *(f"tests/{file}" for file in files)],
        cwd=ROOT, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    counts = {file: {"file": file, "passed": 0, "failed": 0, "skipped": 0} for file in files}
    for test in ET.parse(log).iter("testcase"):
        kinds = {child.tag for child in test}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        name = test.get("classname", "").removeprefix("tests.").replace(".", "/") + ".py"
        counts[name][outcome] += 1
    yield from counts.values()


TECHNIQUES: dict[str, Callable[[Run], Iterator[Any]]] = {
    "kill": kill, "errors": errors, "power": power, "crash": crash, "short": short, "large": large, "races": race,
    "space": room, "incumbents": others, "planted": planted, "tests": tests,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("techniques", nargs="*", help=f"of {', '.join(TECHNIQUES)}; else all")
    parser.add_argument("--workers", type=int, default=2, help="faults at the same time")
    parser.add_argument("--rounds", type=int, default=100, help="of each race")
    parser.add_argument("--brief", action="store_true", help="one kind of fault at each call, in turn, not all of them")
    parser.add_argument("--case", action="append", choices=[one.name for one in CASES], help="of the sweeps and races")
    parser.add_argument("--disk", action="append", choices=POWER, help="for power")
    parser.add_argument("--bug", action="append", help="for planted")
    parser.add_argument("--mergekit", help="an interpreter that has mergekit")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm") if Path("/dev/shm").is_dir() else None)
    parser.add_argument("--out", type=Path, default=report.FIGURES)
    options = parser.parse_args(argv)
    if unknown := set(options.techniques) - set(TECHNIQUES):
        parser.error(f"no such technique: {', '.join(sorted(unknown))}")
    if reason := tracing.missing() or transfers.missing():
        parser.error(reason)
    bad = 0
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="faults-") as name:
        folder = Path(name)
        package = folder / "package"
        shutil.copytree(ROOT / "swsurgery", package / "swsurgery", ignore=shutil.ignore_patterns("__pycache__"))
        compileall.compile_dir(package, quiet=1)
        shim, o = transfers.build_shim(folder), options
        cases = tuple(case(name) for name in o.case or (one.name for one in CASES))
        of = (cases, tuple(o.disk or POWER), tuple(o.bug or ()))
        run = Run(folder, package, shim, o.workers, o.rounds, o.brief, o.mergekit, *of)
        for technique in options.techniques or TECHNIQUES:
            document = {"what": technique, **_circumstances(), "rows": []}
            for made in TECHNIQUES[technique](run):
                row = made if isinstance(made, dict) else made.to_json()
                document["rows"].append(json.loads(json.dumps(row).replace(name, "")))
                bad += _tell(technique, made, document["rows"][-1])
                options.out.mkdir(parents=True, exist_ok=True)
                (options.out / f"{technique}.json").write_text(json.dumps(document, indent=1) + "\n")
    if options.out == report.FIGURES:
        report.PAGE.write_text(report.render(report.load()))
    return 1 if bad else 0


def _tell(technique: str, made: Any, row: dict[str, Any]) -> bool:
    """Say how one row came out, and whether it broke a promise."""
    if isinstance(made, matrix.Caught):
        print(f"{technique}: {made.bug}: {made.found if made.caught else 'CAUGHT BY NOTHING'}", flush=True)
        return not made.caught
    if "file" in row:
        return bool(row["failed"])
    if "states" in row:
        print(f"{technique}: {row}", flush=True)
        return False
    what = f"{row['operation']}, {row['mode']}" if "mode" in row else f"{row['subject']} {row['place']}"
    print(f"{technique}: {what}: {len(row['violations'])} violations of {row['cases']} cases")
    for violation in row["violations"]:
        print(f"    {violation}", flush=True)
    return bool(row["violations"])


def _circumstances() -> dict[str, str]:
    """The commit is that of the product, which may differ from it while a change is tried."""
    commit = _git("rev-parse", "--short", "HEAD") + ("-dirty" if _git("status", "--porcelain", "swsurgery") else "")
    return {
        "commit": commit,
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
    }


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def _there(kinds: Sequence[disks.Kind], missing: Callable[[disks.Kind], str]) -> Iterator[disks.Kind]:
    for kind in kinds:
        if reason := missing(kind):
            print(f"{kind} is left out: {reason}", file=sys.stderr)
        else:
            yield kind


def _version_of(writer: incumbents.Writer) -> str:
    if writer.python:
        words = f"from importlib.metadata import version; print(version({writer.library!r}))"
        return subprocess.run([writer.python, "-c", words], capture_output=True, text=True, check=True).stdout.strip()
    return version(writer.library)


if __name__ == "__main__":
    sys.exit(main())

"""A fault at every call of a case: the process killed there, the call failing there, the power cut there.

Each sweep plays one case at many points and names every promise that did not hold. The points come from a run that
was counted just before, so nothing here knows how the product goes about its work.
"""

from __future__ import annotations

import queue
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults import tracing
from faults.cases import OWN, Prepared, Stage, misreported
from faults.disks import CUTS, Cut, Disk
from faults.tracing import Point

CODES = {
    "open": ("EIO", "ENOSPC", "EDQUOT", "EACCES", "EMFILE", "EROFS"),
    "name": ("EIO", "ENOSPC", "EDQUOT", "EACCES", "EROFS"),
    "write": ("EIO", "ENOSPC", "EDQUOT", "EFBIG"),
    "sync": ("EIO", "ENOSPC", "EDQUOT"),
    "read": ("EIO",),
    "look": ("EIO", "EACCES"),
}
"""What each kind of call may fail with."""

KINDS = {
    "openat": "open", "openat2": "open", "open": "open", "creat": "open",
    "mkdir": "name", "mkdirat": "name", "rename": "name",
    "renameat": "name", "renameat2": "name", "link": "name", "linkat": "name", "unlink": "name", "unlinkat": "name",
    "rmdir": "name", "chmod": "name", "fchmod": "name", "utimensat": "name", "write": "write", "pwrite64": "write",
    "writev": "write", "pwritev": "write", "copy_file_range": "write", "ioctl": "write", "fallocate": "write",
    "ftruncate": "write", "fsync": "sync", "fdatasync": "sync", "syncfs": "sync", "sync_file_range": "sync",
    "close": "sync", "flock": "read", "fcntl": "read", "read": "read", "pread64": "read", "preadv": "read",
    "preadv2": "read", "getdents64": "read", "newfstatat": "look", "fstat": "look",
}  # fmt: skip

EXCUSED = (
    ("close", "", "the data had already been synced"),
    ("", "^cache/", "the cache of digests may be lost: it saves time and proves nothing"),
    ("fcntl", "", "it only requests writes that bypass the page cache"),
    ("fallocate", "", "the C library then allocates the space by writing"),
    ("newfstatat", "", "a check whether a file exists: the operation itself reports a missing file"),
    ("flock", "(base|earlier|model)$", "a reader that cannot lock reads anyway"),
    ("ioctl", r"\.json$", "it only asks whether the file is a terminal"),
    ("preadv2", r"\.partial/", "the files of a killed run are read to resume it, or written again"),
    ("mkdir", r"\.partial/", "a killed run had created the folder"),
)
"""(call, file, why a run may end well although this failed); the result must be whole all the same."""


FIRSTS = "the first call of each name on each kind of file"

SHIFTS = (0, 1, -1, 2, -2)
"""How many calls of the same name may have come or gone since they were counted: the C library opens files of its own
where threads begin. A fault that hits none of these counts as a violation."""


@dataclass
class Result:
    """What came of one technique on one subject at one place; `extent` says how much of it was tried."""

    technique: str
    subject: str
    place: str
    extent: str = ""
    cases: int = 0
    violations: list[str] = field(default_factory=list)
    excused: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        return {
            "technique": self.technique, "subject": self.subject, "place": self.place, "extent": self.extent,
            "cases": self.cases, "violations": self.violations, "excused": dict(sorted(self.excused.items())),
        }  # fmt: skip


def kill(prepared: Prepared, folder: Path, workers: int, place: str, sample: bool = False) -> Result:
    """SIGKILL at every mutating call, or with `sample` at the first call of each kind on each kind of file."""

    def one(stage: Stage, point: Point, result: Result) -> list[str]:
        stage.kill(point)
        return stage.broken() + stage.unfinished()

    extent = FIRSTS if sample else "every call"
    return _sweep(
        Result("SIGKILL", prepared.case.name, place, extent), prepared, folder, workers, one,
        lambda stage: chosen(stage.points(), sample),
    )  # fmt: skip


def errors(
    prepared: Prepared, folder: Path, workers: int, place: str, sample: bool = False, in_turn: bool = False
) -> Result:
    """Each call failing once: every call with every code that it may have, or `in_turn` with one of them; the sample
    with EIO and ENOSPC in turn."""

    def jobs(stage: Stage) -> list[tuple[Point, str]]:
        points = chosen(stage.points(others=not sample), sample)
        if sample:
            return [(p, ("EIO", "ENOSPC")[i % 2]) for i, p in enumerate(points)]
        if in_turn:
            return [(p, codes[i % len(codes)]) for i, p in enumerate(points) for codes in [CODES[KINDS[p.call]]]]
        return [(p, c) for p in points for c in CODES[KINDS[p.call]]]

    def one(stage: Stage, job: tuple[Point, str], result: Result) -> list[str]:
        point, code = job
        done = stage.fail(point, code)
        faults = []
        if done.code == 0:
            excuse = next((why for call, file, why in EXCUSED
                           if call in ("", point.call) and re.search(file, point.file)), "")  # fmt: skip
            result.excused.update([excuse] if excuse else [])
            faults += [] if excuse else ["exit 0"]
            faults += [] if stage.complete else ["exit 0, and the target is not whole"]
        else:
            faults += misreported(done)
        return faults + stage.broken() + stage.unfinished()

    extent = FIRSTS if sample else "every call, one code in turn" if in_turn else "every call, every code"
    result = Result("error code", prepared.case.name, place, extent)
    return _sweep(result, prepared, folder, workers, one, jobs)


def power(prepared: Prepared, disks: Sequence[Disk], sample: bool = False, in_turn: bool = False) -> Result:
    """The power cut at every mutating call in each of the ways of CUTS, or `in_turn` in one of them, the sample in the
    first; and after exit 0, when the target must be there, in each."""
    extent = FIRSTS if sample else f"every call, {'one' if in_turn else 'each'} of {len(CUTS)} ways to lose"
    result = Result("power cut", prepared.case.name, disks[0].kind, extent)
    stages = [Stage(prepared, disk.mount / "shop") for disk in disks]
    of = dict(zip((id(s) for s in stages), disks, strict=True))
    points = chosen(stages[0].points(), sample)
    cuts: Sequence[Cut] = CUTS[:1] if sample else CUTS
    jobs: list[tuple[Point | None, Cut]] = [(p, how) for p in points for how in cuts]
    if in_turn:
        jobs = [(p, cuts[i % len(cuts)]) for i, p in enumerate(points)]
    jobs += [(None, how) for how in CUTS]

    def one(stage: Stage, job: tuple[Point | None, Cut]) -> list[str]:
        (point, how), disk = job, of[id(stage)]
        disk.sync()
        if point:
            stage.kill(point)
            disk.cut(how)
            return stage.broken() + stage.unfinished()
        stage.shop.must(*stage.case.arguments)
        disk.cut(how)
        return ([] if stage.complete else ["exit 0 was not durable"]) + stage.others_changed()

    return _play(result, stages, jobs, one)


def chosen(points: list[Point], sample: bool) -> list[Point]:
    """All points, or the first of each call on each kind of file."""
    first: dict[tuple[str, str], Point] = {}
    for point in points:
        folder, _, name = point.file.rpartition("/")
        kind = "shard" if name.endswith(".safetensors") else "own" if name in OWN else name
        kind = "file" if name.endswith((".json", ".txt")) and kind == name else kind
        kind = "digests" if folder.startswith("cache") else kind
        call = point.call if kind != "digests" else ""  # one will do: the cache proves nothing
        first.setdefault((call, f"{folder}/{kind}" if call else kind), point)
    return list(first.values()) if sample else points


def _sweep(
    result: Result,
    prepared: Prepared,
    folder: Path,
    workers: int,
    one: Callable[[Stage, Any, Result], list[str]],
    jobs: Callable[[Stage], Iterable[Any]],
) -> Result:
    stages = [Stage(prepared, folder / f"stage{n}") for n in range(workers)]
    return _play(result, stages, jobs(stages[0]), lambda stage, job: one(stage, job, result))


def _play(result: Result, stages: list[Stage], jobs: Iterable[Any], one: Callable[[Stage, Any], list[str]]) -> Result:
    """Every job on whichever stage is free."""
    free: queue.SimpleQueue[Stage] = queue.SimpleQueue()
    for stage in stages:
        free.put(stage)

    def play(job: Any) -> None:
        stage = free.get()
        try:
            faults = _attempt(stage, job, one)
        finally:
            free.put(stage)
        if faults is None:
            return
        name = " ".join(map(str, job)) if isinstance(job, tuple) else str(job)
        result.cases += 1
        result.violations += [f"{name}: {fault}" for fault in faults]

    with ThreadPoolExecutor(len(stages)) as pool:
        for _ in pool.map(play, jobs):
            pass
    return result


def _attempt(stage: Stage, job: Any, one: Callable[[Stage, Any], list[str]]) -> list[str] | None:
    """None where there was no such call this time: on a slow machine some files are old enough that their digests are
    remembered too, so that how often the cache is written may differ."""
    missed = ""
    for stage.shift in SHIFTS:
        try:
            stage.reset()
            return one(stage, job)
        except tracing.Shifted as fault:
            missed = str(fault)
    point = job[0] if isinstance(job, tuple) else job
    return None if point.file.startswith("cache/") else [f"the fault did not hit: {missed}"]

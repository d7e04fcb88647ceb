"""Sweeps inside this process: a crash after any call, an error, a signal, a short transfer or another run at any call.

`rows` plays all of them on every task, for docs/reliability/crash.json.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from errno import EIO, EMFILE, ENOSPC, errorcode
from pathlib import Path
from random import Random
from typing import Any

from faults.crash_calls import Call, Trouble, Watch, watching
from faults.crash_fs import MODES, Disk, Image, Mode
from faults.crash_room import TASKS, TURNS, Room, Task, look, opened_room
from swsurgery.errors import Interrupted, SwsurgeryError

ROUNDS = 2
"""Crashes that chance picks after each call, beside the extremes."""


Found = Iterator[tuple[str, list[str] | None]]
"""Case by case: where the fault struck, and what is wrong then; None for files that were judged before."""


@dataclass
class Figures:
    """What came of one technique on one task: how many calls its undisturbed run makes, how many cases were played, and
    each promise that did not hold. Where two crashes leave the same files, both count and one is judged."""

    operation: str
    mode: str
    operations: int
    cases: int = 0
    judged: int = 0
    violations: list[str] = field(default_factory=list)


def sweep(room: Room, task: Task, technique: str, every: int = 1, until_found: bool = False) -> Figures:
    """One technique at each call of a task, or at each `every`-th; with `until_found` no further than that."""
    figures = Figures(task.name, technique, len(room.record(task).calls))
    for where, faults in TECHNIQUES[technique](room, task, every):
        figures.cases += 1
        figures.judged += faults is not None
        figures.violations += [f"{task.name}, {technique}, {where}: {fault}" for fault in faults or ()]
        if until_found and figures.violations:
            break
    return figures


def crashes(room: Room, task: Task, every: int, mode: Mode) -> Found:
    """The power cut, or the process killed, after each call that changes something, and after exit 0."""
    recording = room.record(task)
    random, disk = Random(f"{task.name}, {mode}"), Disk(recording.start, mode)
    judged: set[tuple[bytes, bool]] = set()
    for n, step in enumerate([None, *recording.steps]):
        if step:
            disk.play(step)
        done = n == len(recording.steps)
        for image in disk.images(random, ROUNDS) if done or n % every == 0 else ():
            key = (image.fingerprint, done)
            where = f"after step {n} of {len(recording.steps)} ({step.kind if step else 'none'})"
            for turn in range(TURNS) if task.in_place and every == 1 else [len(judged)]:
                yield where, None if key in judged else _judged(room, task, image, done, turn)
            judged.add(key)


def errors(room: Room, task: Task, every: int, code: int, lasting: bool = False) -> Found:
    """Each call fails, alone or with all after it; then the same command again, without the fault."""
    for n in range(0, len(room.record(task).calls), every):
        watch, error, faults = _disturbed(room, task, failing(n, code, lasting))
        if not error and not faults:
            faults += room.differs(task, (task.new,))
            call = watch.calls[n]
            if call.name == "fsync" and "/cache/" not in call.path:
                faults.append("it ends well although an fsync failed")
        elif not task.in_place:
            faults += room.differs(task, ("absent", task.new))
        yield _where(watch, n), faults + room.judge(task, turn=n)


def failed_syncs(room: Room, task: Task, every: int) -> Found:
    """An fsync fails, or each from there on, as Linux has it: what was written is not on the disk and will not be, but
    is still seen. Then the next command runs without the fault, and the power is cut before it or after it."""
    syncs = [n for n, name in enumerate(room.record(task).calls) if name == "fsync"][::every]
    commands = [task.run, look] if task.in_place and task.run is not look else [task.run]
    for n, lasting, following in itertools.product(syncs, (False, True), commands):
        watch, _, faults = _disturbed(room, task, failing(n, EIO, lasting, "fsync"))
        before, watch.trouble = watch.disk().nothing(), None
        with watching(watch):
            error, bugs = room.attempt(following)
        finished = following is task.run and not error
        faults += bugs + room.differs(task, (task.new,) if finished else (task.old, task.new))
        after = watch.disk().nothing()
        faults += [f"a crash then: {fault}" for fault in _judged(room, task, before, False, turn=n)]
        faults += [f"a crash after the next command: {f}" for f in _judged(room, task, after, finished, turn=0)]
        yield f"{_where(watch, n)}{', lasting' if lasting else ''}", faults


def signals(room: Room, task: Task, every: int) -> Found:
    """SIGINT just before and just after each call."""
    for n, done in itertools.product(range(0, len(room.record(task).calls), every), (False, True)):

        def trouble(call: Call, n: int = n, done: bool = done) -> None:
            if (call.index, call.done) == (n, done):
                raise Interrupted("SIGINT")

        watch, error, faults = _disturbed(room, task, trouble)
        if not isinstance(error, Interrupted):
            faults.append(f"it is not interrupted, but says: {error}")
        elif task.in_place:
            states = (task.old,) if "old bytes were put back" in str(error) else (task.old, task.new)
            faults += [] if task.torn else room.differs(task, states)
        else:
            faults += room.differs(task, ("absent", task.new))
            if "nothing was left" in str(error) and task.start in ("blank", "known"):
                # An empty folder may stay, if the signal struck before it was locked: it could be another run's.
                left = [p.name for p in room.image.rglob(".*") if p.is_file() or any(p.iterdir())]
                faults += [f"it says that it left nothing, and leaves {', '.join(left)}"] if left else []
        yield f"{_where(watch, n)}, {'after' if done else 'before'}", faults + room.judge(task, turn=n)


def short_transfers(room: Room, task: Task, every: int) -> Found:
    """Every write takes half of what it is given."""
    watch = room.watch(task)
    watch.half = True
    with watching(watch):
        error, faults = room.attempt(task.run)
    faults += [f"it says: {error}"] if error else []
    yield "at every call", faults + room.differs(task, (task.new,)) + room.base_changed(task)


def second_runs(room: Room, task: Task, every: int) -> Found:
    """The same command once more, from beginning to end, at each call of the first."""
    for n in range(0, len(room.record(task).calls), every):
        watch, second = room.watch(task), []

        def trouble(call: Call, n: int = n, watch: Watch = watch, second: list = second) -> None:
            if call.index == n and not call.done:
                watch.asleep = True
                other, faults = room.attempt(task.run)
                watch.asleep = False
                wrong = [] if other or faults else room.differs(task, (task.new,))
                second[:] = [other, faults + [f"the second ended well: {fault}" for fault in wrong]]

        watch.trouble = trouble
        with watching(watch):
            error, faults = room.attempt(task.run)
        other, more = second
        if not error or not other:
            more = more + [f"one of two ended well: {fault}" for fault in room.differs(task, (task.new,))]
        yield _where(watch, n), faults + more + room.judge(task, turn=n)


TECHNIQUES: dict[str, Callable[[Room, Task, int], Found]] = {
    **{f"crash, {mode}": functools.partial(crashes, mode=mode) for mode in MODES},
    "EIO": functools.partial(errors, code=EIO),
    "EMFILE, lasting": functools.partial(errors, code=EMFILE, lasting=True),
    "ENOSPC, lasting": functools.partial(errors, code=ENOSPC, lasting=True),
    "fsync fails, then a crash": failed_syncs,
    "SIGINT": signals,
    "short transfers": short_transfers,
    "a second run": second_runs,
}
"""Each is played at every `every`-th call of a task."""


def failing(n: int, code: int, lasting: bool, only: str = "") -> Trouble:
    """The n-th call fails; with `lasting` all calls after it too, or all of the name `only`."""

    def trouble(call: Call) -> None:
        if not call.done and (call.index == n or lasting and call.index > n and only in ("", call.name)):
            raise OSError(code, errorcode[code])

    return trouble


def _disturbed(room: Room, task: Task, trouble: Trouble) -> tuple[Watch, SwsurgeryError | None, list[str]]:
    watch = room.watch(task)
    watch.trouble = trouble
    with watching(watch):
        error, faults = room.attempt(task.run)
    return watch, error, faults


def _judged(room: Room, task: Task, image: Image, done: bool, turn: int) -> list[str]:
    image.write(room.image)
    return room.judge(task, done, turn)


def _where(watch: Watch, n: int) -> str:
    call = watch.calls[n]
    return f"call {n} ({call.name} {Path(call.path).name})"


def rows() -> Iterator[dict[str, Any]]:
    """Every technique on every task, played on the package that this process has loaded."""
    with opened_room() as room:
        for task, technique in itertools.product(TASKS, TECHNIQUES):
            yield dataclasses.asdict(sweep(room, task, technique))

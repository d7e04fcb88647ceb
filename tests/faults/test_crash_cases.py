"""The power cut, an error, a signal, a short transfer, another run: at the calls of every way of writing."""

from __future__ import annotations

import pytest

from faults.crash_cases import TECHNIQUES, sweep
from faults.crash_fs import MODES
from faults.crash_room import TASKS, opened_room

EVERY = {
    "crash, no order": 3,
    "crash, journal": 7,
    "EIO": 7,
    "EMFILE, lasting": 23,
    "ENOSPC, lasting": 11,
    "fsync fails, then a crash": 4,
    "SIGINT": 13,
    "short transfers": 1,
    "a second run": 13,
}
"""At which calls; `make faults` takes each of them."""

LEAST = {"crash, no order": 500, "crash, journal": 200, "EIO": 90, "SIGINT": 80, "a second run": 50}
"""Cases without which a sweep would have seen nothing."""


@pytest.fixture(scope="module")
def room():
    with opened_room() as room:
        yield room


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_every_promise_holds(room, technique):
    figures = [sweep(room, task, technique, EVERY[technique]) for task in TASKS]
    assert [violation for f in figures for violation in f.violations] == []
    assert all(f.judged for f in figures)
    assert sum(f.cases for f in figures) >= LEAST.get(technique, len(TASKS))


def test_a_copy_makes_all_calls_that_change_a_disk(room):
    """The sweeps see what the product does: every kind of step is there, and the runs differ."""
    kinds = {step.kind for task in TASKS for step in room.record(task).steps}
    assert kinds == {"make", "move", "remove", "write", "grow", "sync"}
    assert len({tuple(room.record(task).calls) for task in TASKS}) == len(TASKS)
    assert set(MODES) == {"no order", "journal"}

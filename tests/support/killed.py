"""Runs of the command that are interrupted or killed at a chosen moment. No test lives here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

_MAIN = "\nimport sys\nfrom swsurgery.cli import main\nsys.exit(main(sys.argv[1:]))\n"

_SIGNAL = """
import os
from swsurgery.{package} import {room}
real = {room}.{name}
calls = []
def patched(*arguments, **more):
    calls.append(arguments)
    if len(calls) != {number}:
        return real(*arguments, **more)
    if {after}:
        real(*arguments, **more)
    os.kill(os.getpid(), {signal})
    return None if {after} else real(*arguments, **more)
{room}.{name} = patched
"""


def run(*arguments: object, before: str = "") -> subprocess.CompletedProcess[str]:
    """The command in a process of its own; `before` is Python that is run in it first."""
    return subprocess.run(
        [sys.executable, "-c", before + _MAIN, *map(str, arguments)],
        capture_output=True, text=True, timeout=300, env=os.environ | {"SWSURGERY_THREADS": "1"},
    )  # fmt: skip


def signalled(
    signal: int, at: str, *arguments: object, number: int = 1, after: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run the command, which gets a signal at the `number`th call of `at` ("package.module.name"), or `after` it."""
    package, room, name = at.split(".", 2)
    return run(
        *arguments,
        before=_SIGNAL.format(signal=int(signal), package=package, room=room, name=name, number=number, after=after),
    )


def killed(at: str, *arguments: object, number: int = 1, after: bool = False) -> None:
    """The same, with the signal that leaves no time for anything."""
    done = signalled(signal.SIGKILL, at, *arguments, number=number, after=after)
    assert done.returncode == -signal.SIGKILL, (done.returncode, done.stderr)


def names(folder: Path) -> set[str]:
    """Every entry of a folder, hidden ones too."""
    return set(os.listdir(folder))

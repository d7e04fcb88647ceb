"""One command under strace: which calls it makes on which files, and the same run with one of them killed or failed.

This room knows processes and system calls, and nothing of checkpoints. A call is named by how many of its name came
before it, which only a run in one thread repeats; that the right one was hit is read back from the log every time.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MUTATING = (
    "mkdir", "mkdirat", "open", "openat", "openat2", "creat", "write", "pwrite64", "writev", "pwritev", "pwritev2",
    "copy_file_range", "sendfile", "ioctl", "fallocate", "ftruncate", "truncate", "fsync", "fdatasync", "syncfs",
    "sync_file_range", "rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat", "unlink",
    "unlinkat", "rmdir", "chmod", "fchmod", "fchmodat", "utimensat", "setxattr", "fsetxattr",
)  # fmt: skip
"""Calls that change a file system. An open counts where its flags say so, an ioctl where it clones."""

OTHERS = ("close", "flock", "fcntl", "read", "pread64", "preadv", "preadv2", "getdents64", "newfstatat", "fstat")
"""Calls that change nothing, but may fail."""

_LINE = re.compile(r"^(\d+) +(\w+)\((.*)$")
_RESUMED = re.compile(r"^(\d+) +<\.\.\. \w+ resumed>(.*)$")
_PATHS = re.compile(r'(?:\d+|AT_FDCWD)<([^>]*)>(?:, "([^"]+)")?|"([^"]+)"')
_CHANGES = re.compile(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC|FICLONE")
_PASSING = re.compile(r"(?<=\.)\d+$|(?<=\.tmp)\w{6}$")
"""The part of a temporary file's name that is another in every run."""


def missing() -> str:
    """Why nothing can be traced here; empty where it can."""
    return "" if shutil.which("strace") else "strace is not installed"


@dataclass(frozen=True)
class Point:
    """The `nth` call of a name in a run, and the file that it works on, relative to the folder watched."""

    call: str
    nth: int
    file: str

    def __str__(self) -> str:
        return f"{self.call} #{self.nth} on {self.file or '.'}"


@dataclass(frozen=True)
class Done:
    """A command that ended. `code` is negative where a signal ended it."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.err.splitlines()


class Shifted(Exception):
    """The fault hit another call than the one meant: the run did not repeat the run that was counted."""


TIMEOUT = 120
"""Seconds after which a run is given up."""

Start = Callable[[Sequence[str]], Done]
"""Runs a command, under strace with the options given or, without any, by itself."""


def run(command: Sequence[str], env: Mapping[str, str], cwd: Path) -> Done:
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, timeout=TIMEOUT, stdin=subprocess.DEVNULL)
    return Done(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


def executed(command: Sequence[str], env: Mapping[str, str], cwd: Path) -> Start:
    """The command in a new process."""

    def start(options: Sequence[str]) -> Done:
        # With the filter, strace 6.1 would deliver a signal too late.
        fast = [] if any("signal=KILL" in option for option in options) else ["--seccomp-bpf"]
        return run(["strace", *fast, *options, *command] if options else command, env, cwd)

    return start


def count(start: Start, cwd: Path, watched: Path, others: bool = False) -> tuple[list[Point], Done]:
    """The points of one run below `watched`, in order: the mutating ones, or with `others` all that may fail."""
    calls = MUTATING + OTHERS if others else MUTATING
    done, log = _traced(start, calls)
    points = [p for p, text in _points(log, cwd, watched) if others or _mutates(p.call, text)]
    return points, done


def kill(start: Start, cwd: Path, watched: Path, point: Point) -> Done:
    """Run until `point`, where the process dies before the call is made. Raises Shifted."""
    _aimed(point)
    done, log = _traced(start, [point.call], f"signal=KILL:when={point.nth}")
    reached = [p for p, _ in _points(log, cwd, watched)]
    if done.code != -9 or not reached or reached[-1] != point:
        raise Shifted(f"{point} was to be killed, {reached[-1] if reached else 'nothing'} was (exit {done.code})")
    return done


def fail(start: Start, cwd: Path, watched: Path, point: Point, code: str) -> Done:
    """Run with the call at `point` failing with the error `code`, such as EIO, once. Raises Shifted."""
    _aimed(point)
    done, log = _traced(start, [point.call], f"error={code}:when={point.nth}")
    hit = [p for p, text in _points(log, cwd, watched) if "(INJECTED)" in text]
    if hit != [point]:
        raise Shifted(f"{point} was to fail, {hit} did (exit {done.code})")
    return done


def _aimed(point: Point) -> None:
    if point.nth < 1:
        raise Shifted(f"there is no {point}")


def _traced(start: Start, calls: Iterable[str], inject: str = "") -> tuple[Done, list[str]]:
    wanted = ",".join(f"?{call}" for call in calls)  # the question mark: not every machine has every call
    with tempfile.NamedTemporaryFile("r", suffix=".strace", errors="replace") as log:
        options = ["-f", "-y", "-s", "0", "-o", log.name, "-e", f"trace={wanted}", "-e", "signal=none"]
        done = start([*options, *(["-e", f"inject={wanted}:{inject}"] if inject else [])])
        return done, log.read().splitlines()


def _points(log: Iterable[str], cwd: Path, watched: Path) -> list[tuple[Point, str]]:
    """Each call below `watched` with what the log says of it."""
    counted: Counter[tuple[str, str]] = Counter()
    found: list[tuple[Point, str]] = []
    unfinished: dict[str, int] = {}
    for line in log:
        if match := _RESUMED.match(line):  # another process came between the call and its end
            process, text = match.groups()
            if (at := unfinished.pop(process, None)) is not None:
                found[at] = (found[at][0], found[at][1] + text)
            continue
        if not (match := _LINE.match(line)):
            continue
        process, call, text = match.groups()
        counted[process, call] += 1
        unfinished.pop(process, None)
        for path in _paths(text, cwd):
            if path == str(watched) or path.startswith(f"{watched}/"):
                file = _PASSING.sub("*", path[len(str(watched)) + 1 :])
                if text.endswith("<unfinished ...>"):
                    unfinished[process] = len(found)
                found.append((Point(call, counted[process, call], file), text))
                break
    return found


def _paths(text: str, cwd: Path) -> list[str]:
    paths = []
    for folder, inside, bare in _PATHS.findall(text.split(" = ")[0]):
        paths.append(os.path.normpath(os.path.join(folder or cwd, inside or bare)))
    return paths


def _mutates(call: str, text: str) -> bool:
    """A call that failed of itself changed nothing: a file to be removed that is not there, a clone that cannot be."""
    return " = -1 " not in text and (call not in ("open", "openat", "openat2", "ioctl") or bool(_CHANGES.search(text)))

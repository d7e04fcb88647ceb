"""Runs of a program as forks of a process that has its modules loaded: most of a run's time is loading.

Each run is a process of its own all the same, traced from its first own call on, and killed and failed like any other.
Here are the processes that fork, kept for the next run; forked.py is what runs in them.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from faults.tracing import TIMEOUT, Done, Start

REHEARSAL = """
import json, os, sys
kept, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
os.dup2(null, 1), os.dup2(null, 2)
for arguments in json.loads(sys.argv[2]):
    program, sys.argv = sys.argv[1], ["-c", *arguments]
    try:
        exec(program, {"__name__": "__main__"})
    except SystemExit:
        pass
    sys.argv = ["-c", program]
sys.stdout.flush()
specs = {name: getattr(module, "__spec__", None) for name, module in sys.modules.items()}
os.write(kept, "\\n".join(name for name, spec in specs.items() if spec and spec.name == name).encode())
"""
"""Runs a program with each of several arguments, and prints what modules are loaded then."""


@dataclass(frozen=True)
class Program:
    """The text of a program, the interpreter that runs it, and a folder of packages that it sees first."""

    source: str
    package: Path | None = None
    python: str = sys.executable

    def started(self, arguments: Sequence[str], env: Mapping[str, str], cwd: Path, modules: Modules) -> Start:
        """How to start it by a fork of a process that has the modules loaded."""

        def start(options: Sequence[str]) -> Done:
            try:
                server = _idle[self].pop()
            except IndexError:
                server = _Server(self, modules(self))
            done = server.run(arguments, env, cwd, options)
            _idle[self].append(server)
            return done

        return start

    def rehearsed(self, arguments: Sequence[Sequence[str]], env: Mapping[str, str], cwd: Path) -> tuple[str, ...]:
        """The modules that it loads when it runs with each of these arguments."""
        words = [self.python, "-c", REHEARSAL, self.source, json.dumps(arguments)]
        return tuple(subprocess.run(words, env=env, cwd=cwd, capture_output=True, text=True, check=True).stdout.split())


Modules = Callable[[Program], Sequence[str]]


class _Server:
    """One process that forks."""

    def __init__(self, program: Program, modules: Sequence[str]):
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        env |= {"PYTHONPATH": str(program.package)} if program.package else {}
        env |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        words = [program.python, "-P", str(Path(__file__).with_name("forked.py")), program.source, *modules]
        self.process = subprocess.Popen(
            words, env=env, cwd="/", text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def ask(self, request: object) -> int:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def run(self, arguments: Sequence[str], env: Mapping[str, str], cwd: Path, options: Sequence[str]) -> Done:
        with tempfile.NamedTemporaryFile("rb") as out, tempfile.NamedTemporaryFile("rb") as err:
            request = {"arguments": arguments, "env": dict(env), "cwd": str(cwd), "out": out.name, "err": err.name}
            process = self.ask(request)
            try:
                tracer = _attach(process, options) if options else None
            except OSError:
                os.kill(process, signal.SIGKILL)
                raise
            late = threading.Timer(TIMEOUT, os.kill, (process, signal.SIGKILL))
            late.start()
            code = self.ask("go")
            late.cancel()
            if tracer:
                tracer.communicate()
            return Done(code, out.read().decode(errors="replace"), err.read().decode(errors="replace"))

    def close(self) -> None:
        self.process.communicate()


_idle: dict[Program, list[_Server]] = defaultdict(list)


@atexit.register
def close() -> None:
    """End every process that is kept."""
    for servers in _idle.values():
        while servers:
            servers.pop().close()


def _attach(process: int, options: Sequence[str]) -> subprocess.Popen[str]:
    tracer = subprocess.Popen(["strace", *options, "-p", str(process)], stderr=subprocess.PIPE, text=True)
    assert tracer.stderr
    said = tracer.stderr.readline()
    if "attached" not in said:
        raise OSError(f"strace cannot attach: {said.strip()}")
    return tracer

"""Run by itself as `python -P forked.py SOURCE MODULE...`: it loads the modules, and then forks one process for each
line of its input, in which SOURCE runs as `python -c` would run it. See forks.py for the other side.

A line is {"arguments", "env", "cwd", "out", "err"}; the answer is the number of the process, which waits; after one
more line it goes, and its exit code is answered, negative where a signal ended it. It is a program, not a module: it
imports nothing of the tests.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import sys
from typing import Any

_SET_PTRACER, _ANYONE = 0x59616D61, -1


def serve(source: str) -> None:
    """Answer until the input ends."""
    gc.freeze()
    program = compile(source, "<string>", "exec")
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        waiting, go = os.pipe()
        is_ready, ready = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(go)
            _become(request)
            os.write(ready, b"!")  # nothing up to here is to be counted, so nobody attaches before
            select.select([waiting], [], [])  # a call that nobody counts
            os.close(waiting)
            exec(program, {"__name__": "__main__"})
            sys.exit()
        os.close(waiting)
        os.close(ready)
        os.read(is_ready, 1)
        os.close(is_ready)
        print(process, flush=True)
        sys.stdin.readline()
        os.close(go)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _become(request: dict[str, Any]) -> None:
    """Have the arguments, environment, folder and files that were asked for."""
    for fd, path, flags in (
        (0, os.devnull, os.O_RDONLY), (1, request["out"], os.O_WRONLY), (2, request["err"], os.O_WRONLY),
    ):  # fmt: skip
        os.dup2(os.open(path, flags), fd)
    sys.argv = ["-c", *request["arguments"]]
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    ctypes.CDLL(None).prctl(_SET_PTRACER, _ANYONE)  # some systems let only a parent trace a process


if __name__ == "__main__":
    for module in sys.argv[2:]:
        with contextlib.suppress(ImportError):  # what some libraries put into the table of modules is no module
            importlib.import_module(module)
    serve(sys.argv[1])

"""Run a checkpoint's tokenizer in a separate process, limited to 2 GB of memory and 60 seconds.

The limits are needed because a tokenizer from an untrusted source may contain regular expressions, replacements and
tables of any size. The process (`tokenizer_child.py`) loads the tokenizer with transformers and answers the requests of
class `Tokenizer`. This module imports neither torch nor transformers, so that the process can start while its parent
imports them.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

from swsurgery.errors import Unrunnable
from swsurgery.model.refusals import make_tokenizer_error

MEMORY = 2 << 30
"""Maximum address space of a tokenizer's process, in bytes. Loading SmolLM2's tokenizer takes 220 MB."""

SECONDS = 60
"""Maximum processor time of a tokenizer's process in seconds, and maximum time for which its parent waits for all of
its answers together."""

MAX_ANSWER = 128 << 20
"""Maximum size of an answer in bytes. The decoded vocabulary of Gemma 3, the largest one known, takes 5 MB."""

MAX_IDLE_SECONDS = 90
"""Maximum time in seconds for which a process may be idle and still be used. A process that is idle for longer soon
ends itself (see IDLE_SECONDS in `tokenizer_child.py`)."""

_idle: list[_Process] = []
"""The process that waits for the next tokenizer. The list has at most one element."""


_ENVIRONMENT = {
    "PYTHONDONTWRITEBYTECODE": "1",
    "USE_TORCH": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_ARENA_MAX": "2",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "OMP_NUM_THREADS": "1",
}
"""Environment variables of the process, which keep it small, offline and without torch."""


class _Process:
    """A process that serves one tokenizer after another."""

    def __init__(self) -> None:
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = os.environ | _ENVIRONMENT | {"PYTHONPATH": paths}
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            environment.pop(name, None)
        program = [sys.executable, "-P", str(Path(__file__).with_name("tokenizer_child.py"))]
        self._child = subprocess.Popen(
            program,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            bufsize=0,
            start_new_session=True,
        )
        self.end = weakref.finalize(self, _end_process, self._child)
        assert self._child.stdin is not None and self._child.stdout is not None
        self._requests, self._answers = self._child.stdin.fileno(), self._child.stdout.fileno()
        os.set_blocking(self._requests, False)
        self._left, self.idle_since = 0.0, time.monotonic()

    def alive(self) -> bool:
        """Return True if the process is running and became idle less than MAX_IDLE_SECONDS ago."""
        return self.end.alive and self._child.poll() is None and time.monotonic() - self.idle_since < MAX_IDLE_SECONDS

    def allow(self, seconds: float) -> None:
        """Set the time in seconds that all following requests together may take."""
        self._left = seconds

    def ask(self, request: dict[str, object]) -> dict[str, object]:
        """Send one request and return its answer. Raises _Failed if the process ends, fails or exceeds a limit."""
        self._send(request)
        return self._receive()

    def _send(self, request: dict[str, object]) -> None:
        """Send one request as a line of JSON. Raises _Failed if the time is used up."""
        data = memoryview(json.dumps(request).encode() + b"\n")
        try:
            while data:
                self._wait(self._requests, select.POLLOUT)
                data = data[os.write(self._requests, data[: 1 << 16]) :]
        except BrokenPipeError:
            pass  # the process has ended, and _receive reads its last answer

    def _receive(self) -> dict[str, object]:
        """Read one answer. Raises _Failed if it is missing, incomplete, too large or an error."""
        data = bytearray()
        while not data.endswith(b"\n"):
            self._wait(self._answers, select.POLLIN)
            piece = os.read(self._answers, 1 << 20)
            data += piece
            if not piece:
                raise _Failed("its process ended")
            if len(data) > MAX_ANSWER:
                raise _Failed(f"it gives more than {MAX_ANSWER >> 20} MB of text")
        try:
            document = json.loads(data)
        except ValueError:
            raise _Failed("its process ended within an answer") from None
        assert isinstance(document, dict)
        if "error" in document:
            raise _Failed(str(document["error"]))
        return document

    def _wait(self, descriptor: int, event: int) -> None:
        """Wait until `descriptor` is ready. Raises _Failed if the time that `allow` set is used up."""
        poll = select.poll()
        poll.register(descriptor, event)
        begin = time.monotonic()
        ready = poll.poll(max(0, self._left) * 1000)
        self._left -= time.monotonic() - begin
        if not ready:
            raise _Failed(f"it takes more than {SECONDS} seconds")


class _Failed(Exception):
    """Raised if the process fails or exceeds a limit. Its message is a short clause, such as "its process ended"."""


def _end_process(child: subprocess.Popen[bytes]) -> None:
    """End a process and the workers that it has forked, and close its streams."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def start() -> None:
    """Start a process for the next `Tokenizer` in advance, unless one is idle already."""
    with contextlib.suppress(OSError):
        if not any(process.alive() for process in _idle):
            _idle.append(_Process())


def _read_token(value: object) -> int | None:
    assert value is None or isinstance(value, int)
    return value


def _take(directory: Path) -> _Process:
    """Return the idle process, or start one. Raises Unrunnable, naming `directory`, if no process can be started."""
    while _idle:
        process = _idle.pop()
        if process.alive():
            return process
        process.end()
    try:
        return _Process()
    except OSError as error:
        what = f"no process can be started for the tokenizer ({os.strerror(error.errno or 0)})"
        raise Unrunnable(what, directory) from error


def _release(process: _Process) -> None:
    """Keep a process for the next tokenizer if it unloads the present one within a second; else end it.

    The process is also ended if another process is idle already.
    """
    if not process.alive() or _idle:
        process.end()
        return
    process.allow(1.0)
    try:
        process.ask({"end": True})
    except _Failed:
        process.end()
    else:
        process.idle_since = time.monotonic()
        _idle.append(process)


class Tokenizer:
    """The tokenizer in `directory`, with those methods of transformers' tokenizers that this package uses.

    The constructor and all methods raise Unrunnable if the tokenizer is missing, fails or exceeds a limit.
    """

    def __init__(self, directory: Path):
        self._directory, self._verb = directory, "loaded"
        self._process = _take(directory)
        self._released = weakref.finalize(self, _release, self._process)
        self._released.atexit = False  # the process is killed at exit instead
        self._process.allow(SECONDS)
        answer = self._ask({"load": str(directory), "memory": MEMORY, "seconds": SECONDS})
        size, files = answer["size"], answer["files"]
        assert isinstance(size, int) and isinstance(files, list)
        self._size = size
        self.bos_token_id, self.eos_token_id = (_read_token(answer[name]) for name in ("bos", "eos"))
        # For some model types, transformers invents an almost empty tokenizer if the directory has no tokenizer file.
        names = {"tokenizer.json", "tokenizer.model", "tekken.json", *map(str, files)}
        if not any((directory / name).is_file() for name in names):
            raise make_tokenizer_error(directory)
        self._verb = "run"

    def __len__(self) -> int:
        """Return the number of tokens in the vocabulary."""
        return self._size

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """Return {"input_ids": the token ids of `text`}, like a tokenizer of transformers."""
        ids = self._ask({"text": text, "special": add_special_tokens})["ids"]
        assert isinstance(ids, list)
        return {"input_ids": ids}

    def batch_decode(self, sequences: Sequence[Sequence[int]], clean_up_tokenization_spaces: bool = False) -> list[str]:
        """Return the text of each sequence of token ids. Spaces are not cleaned up."""
        assert not clean_up_tokenization_spaces
        texts = self._ask({"ids": [list(ids) for ids in sequences]})["texts"]
        assert isinstance(texts, list)
        return texts

    def _ask(self, request: dict[str, object]) -> dict[str, object]:
        """Send one request and return its answer. If that fails, end the process and raise Unrunnable."""
        try:
            return self._process.ask(request)
        except BaseException as error:  # also an interrupt: the answer may still arrive
            self._released.detach()
            self._process.end()
            if not isinstance(error, _Failed):
                raise
            what = f"the tokenizer cannot be {self._verb}: {error}"
            raise Unrunnable(what, self._directory, "repair its tokenizer files") from None

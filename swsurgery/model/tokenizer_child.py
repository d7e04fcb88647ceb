"""Serve a checkpoint's tokenizer: the program that `tokenizer.py` starts by its path in a separate process.

It imports transformers once, without torch, and then forks a worker for each requested tokenizer. Requests and answers
are lines of JSON on stdin and stdout. The worker has limits on memory, processor time and written files. If it dies,
this program answers instead.
"""

import ctypes
import json
import os
import resource
import select
import signal
import sys
from logging import CRITICAL

IDLE_SECONDS = 120
"""Time in seconds without a request after which this program ends."""

MAX_TOKENS = 4_000_000
"""Maximum number of tokens in an encoded text."""

PR_SET_PDEATHSIG = 1
"""Number of the prctl(2) option of this name."""


def end_with_parent() -> None:
    """Make Linux end this process when its parent ends. Other systems end it when its stdin is closed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def set_limits(memory: int, seconds: int) -> None:
    """Limit this process to `memory` bytes of address space and `seconds` of processor time, and to writing no file."""
    for which, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, hard))  # the soft limit on time sends SIGXCPU, which identifies the cause


def read_request() -> dict[str, object] | None:
    """Read one line of JSON from descriptor 0; None at the end of the stream."""
    pieces = []
    while True:
        piece = os.read(0, 1 << 20)  # the other side sends no more before it has the answer
        pieces.append(piece)
        if not piece:
            return None
        if piece.endswith(b"\n"):
            request = json.loads(b"".join(pieces))
            assert isinstance(request, dict)
            return request


def write_answer(document: dict[str, object]) -> None:
    """Write one line of JSON to descriptor 1."""
    data = memoryview(json.dumps(document).encode() + b"\n")
    while data:
        data = data[os.write(1, data) :]


def serve(directory: str) -> None:
    """Load the tokenizer in `directory` and answer requests about it until one contains "end"."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    bos = tokenizer.bos_token_id
    files = [str(name) for name in tokenizer.vocab_files_names.values()]
    write_answer({"size": len(tokenizer), "bos": bos if isinstance(bos, int) else None, "files": files})
    while (request := read_request()) is not None:
        if "end" in request:
            write_answer({})
            return
        if "text" in request:
            ids = tokenizer(request["text"], add_special_tokens=request["special"])["input_ids"]
            if len(ids) > MAX_TOKENS:
                raise ValueError(f"a text of {len(ids)} tokens")
            write_answer({"ids": [int(i) for i in ids]})
        else:
            sequences = request["ids"]
            assert isinstance(sequences, list)
            write_answer({"texts": tokenizer.batch_decode(sequences, clean_up_tokenization_spaces=False)})


def get_first_line(error: BaseException) -> str:
    """Return the first line of the message of `error`, joined with the second if it ends in a colon, or its type."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    message = " ".join(lines[: 2 if lines[0].endswith(":") else 1]) if lines else type(error).__name__
    return message[:160]


def work(request: dict[str, object]) -> None:
    """Serve one tokenizer as the worker, answer with an error if that fails, and end the process."""
    code = 1
    try:
        end_with_parent()
        set_limits(int(str(request["memory"])), int(str(request["seconds"])))
        serve(str(request["load"]))
        code = 0
    except MemoryError:
        pass
    except BaseException as error:  # noqa: BLE001 (the libraries raise any exception for a bad tokenizer)
        write_answer({"error": get_first_line(error)})
        code = 0
    finally:
        os._exit(code)


def main() -> None:
    """Import transformers, then serve one tokenizer after the other until stdin ends or no request comes in time."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends this process
    end_with_parent()
    sys.modules["torch"] = None  # type: ignore[assignment]  # no tokenizer needs it, and it takes seconds
    try:
        import tokenizers  # noqa: F401 (imported before the fork)
        from transformers import AutoTokenizer  # noqa: F401
        from transformers.utils import logging
    except Exception as error:  # noqa: BLE001 (a broken installation raises any exception)
        if read_request() is not None:
            write_answer({"error": f"transformers cannot be imported: {get_first_line(error)}"})
        return
    logging.set_verbosity(CRITICAL)
    while select.select([0], [], [], IDLE_SECONDS)[0]:
        request = read_request()
        if request is None:
            return
        worker = os.fork()
        if worker == 0:
            work(request)
        status = os.waitpid(worker, 0)[1]
        if status:
            memory = os.WIFEXITED(status) or os.WTERMSIG(status) in (signal.SIGABRT, signal.SIGSEGV, signal.SIGKILL)
            write_answer(
                {"error": "it needs more memory than it may use" if memory else "it needs more time than it may use"}
            )


if __name__ == "__main__":
    main()

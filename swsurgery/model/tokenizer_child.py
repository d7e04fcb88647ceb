"""Serve a checkpoint's tokenizer. `tokenizer.py` runs this file as a program in a separate process.

The program imports transformers once, without torch, and then forks a worker for each requested tokenizer. Requests and
answers are lines of JSON on stdin and stdout. The worker has limits on memory, processor time and written files. If the
worker dies, the program answers in its place with an error.
"""

import ctypes
import gc
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
"""Maximum number of tokens in a text that is encoded."""

PR_SET_PDEATHSIG = 1
"""The option of prctl(2) that sets the signal which a process receives when its parent ends."""


def end_with_parent() -> None:
    """Make Linux end this process when its parent ends.

    On other systems, the process ends when its stdin is closed.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def set_limits(memory: int, seconds: int) -> None:
    """Limit this process to `memory` bytes of address space and `seconds` of processor time.

    The process is also forbidden to write files.
    """
    for which, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, hard))  # past the soft limit on time, SIGXCPU identifies the cause


def read_request() -> dict[str, object] | None:
    """Read one request, which is a line of JSON, from stdin. Returns None at the end of stdin."""
    pieces = []
    while True:
        piece = os.read(0, 1 << 20)  # the parent sends no further request before it has the answer
        pieces.append(piece)
        if not piece:
            return None
        if piece.endswith(b"\n"):
            request = json.loads(b"".join(pieces))
            assert isinstance(request, dict)
            return request


def write_answer(document: dict[str, object]) -> None:
    """Write one answer, which is a line of JSON, to stdout."""
    data = memoryview(json.dumps(document).encode() + b"\n")
    while data:
        data = data[os.write(1, data) :]


def serve(directory: str) -> None:
    """Load the tokenizer in `directory` and answer requests about it until a request contains the key "end"."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    special = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    special = {name: token if isinstance(token, int) else None for name, token in special.items()}
    files = [str(name) for name in tokenizer.vocab_files_names.values()]
    write_answer({"size": len(tokenizer), **special, "files": files})
    while (request := read_request()) is not None:
        if "end" in request:
            write_answer({})
            return
        if "text" in request:
            ids = tokenizer(request["text"], add_special_tokens=request["special"])["input_ids"]
            if len(ids) > MAX_TOKENS:
                raise ValueError(f"the text has {len(ids)} tokens, more than the {MAX_TOKENS} accepted")
            write_answer({"ids": [int(i) for i in ids]})
        else:
            sequences = request["ids"]
            assert isinstance(sequences, list)
            write_answer({"texts": tokenizer.batch_decode(sequences, clean_up_tokenization_spaces=False)})


def get_first_line(error: BaseException) -> str:
    """Return the first line of the message of `error`, and the second too if the first ends in a colon.

    If the message is empty, return the name of the error's type.
    """
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    message = " ".join(lines[: 2 if lines[0].endswith(":") else 1]) if lines else type(error).__name__
    return message[:160]


def work(request: dict[str, object]) -> None:
    """Serve the tokenizer that `request` names, then end this process, which is a worker.

    If an exception is raised, its message is the answer. If memory runs out, the worker ends with code 1 and no answer.
    """
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
    """Import transformers, then serve one tokenizer after another.

    The program ends when stdin ends, or when no request arrives for IDLE_SECONDS.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends this process
    end_with_parent()
    sys.modules["torch"] = None  # type: ignore[assignment]  # no tokenizer needs torch
    gc.disable()  # looking for garbage during the imports takes time and finds none
    try:
        import tokenizers  # noqa: F401 (imported before the fork)
        from transformers import AutoTokenizer  # noqa: F401
        from transformers.utils import logging
    except Exception as error:  # noqa: BLE001 (a broken installation raises any exception)
        if read_request() is not None:
            write_answer({"error": f"transformers cannot be imported: {get_first_line(error)}"})
        return
    logging.set_verbosity(CRITICAL)
    gc.freeze()
    gc.enable()
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

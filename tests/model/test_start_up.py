"""model/start_up.py: everything that running a model needs is started, and mistakes are reported as before."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny_checkpoint import Pair, write_pair

from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.errors import ModelError, Unrunnable
from swsurgery.model.start_up import start_up, start_up_and_tokenize
from swsurgery.progress import LOADING, Silent


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return write_pair(tmp_path)


class Recording(Silent):
    """A progress that records the labels of its tasks."""

    def __init__(self) -> None:
        self.labels: list[str] = []

    def start(self, total: int, unit: str, label: str) -> None:
        self.labels.append(label)


def test_the_text_is_tokenized_on_another_thread(pair: Pair) -> None:
    progress = Recording()
    found = start_up_and_tokenize(open_checkpoint(pair.base), "cpu", "auto", progress, threading.get_ident)
    assert found != threading.get_ident() and progress.labels == [LOADING]
    assert {"torch", "transformers"} <= set(sys.modules)


def test_an_error_of_the_tokenizer_is_raised(pair: Pair) -> None:
    def fail() -> None:
        raise Unrunnable("the tokenizer cannot be loaded: it is broken", pair.base)

    with pytest.raises(Unrunnable, match="it is broken"):
        start_up_and_tokenize(open_checkpoint(pair.base), "cpu", "auto", Silent(), fail)


def test_a_missing_tokenizer_is_named(pair: Pair) -> None:
    checkpoint = open_checkpoint(pair.base)
    for file in pair.base.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        start_up(checkpoint, "cpu", "auto", Silent())


def test_a_broken_torch_is_one_line(pair: Pair, tmp_path: Path) -> None:
    """The thread that imports torch fails silently, and the main thread reports the same error once."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libtorch.so: cannot open shared object file')\n")
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + SCRIPT, str(pair.base)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (run.returncode, run.stdout) == (2, "")
    (line,) = run.stderr.splitlines()[-1:]
    assert "torch or transformers cannot be imported: OSError: libtorch.so" in line and "Traceback" not in run.stderr


SCRIPT = """
from swsurgery.cli import main
sys.exit(main(["check", sys.argv[1], "--device", "cpu"]))
"""


def test_a_signal_during_the_imports_ends_the_command_at_once(pair: Pair, tmp_path: Path) -> None:
    """The import of torch sends the signal and continues for ten minutes, but nothing waits for it."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(600)\n"
    )
    begin = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-c", ENTRY.format(folder=str(tmp_path)), "check", str(pair.base), "--device", "cpu"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (run.returncode, run.stdout) == (130, "") and time.monotonic() - begin < 300
    assert run.stderr.splitlines()[-1] == "swsurgery: interrupted: SIGINT (nothing was left behind)"
    assert "Traceback" not in run.stderr


ENTRY = """
import sys
sys.path.insert(0, {folder!r})
from swsurgery.cli import entry
entry()
"""


def test_an_error_of_torch_is_reported_instead_of_the_errors_that_it_causes(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise MemoryError\n")
    run = subprocess.run(
        [sys.executable, "-c", ENTRY.format(folder=str(tmp_path)), "check", str(pair.base), "--device", "cpu"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (run.returncode, run.stdout) == (2, "") and "Traceback" not in run.stderr
    assert "swsurgery: not enough memory: torch cannot be loaded (raise the limit on memory" in run.stderr


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            "not enough memory to load the model: m (free memory",
        ),
        (RuntimeError("can't start new thread"), "cannot start a thread to load the model: m (raise the limit"),
    ],
    ids=["memory", "threads"],
)
def test_a_shortage_is_no_fault_of_the_config(error: Exception, line: str) -> None:
    from swsurgery.model.load_errors import make_load_error

    assert str(make_load_error(error, Path("m"))).startswith(line)

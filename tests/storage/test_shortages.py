"""What the system may lack is no bug: memory, threads, a standard stream, an encoding. The command says so in one line
with exit code 2, or does without and gives the same result."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from checkpoints import HIDDEN, INNER, VOCABULARY, down, tensor, write_llama, write_manifest, write_single
from hub import fixture
from listening import Listener
from publishing import BASE, EDIT, digests
from publishing import write_base as write_hub_base

import swsurgery
from swsurgery.checkpoint import inspect
from swsurgery.cli import main, output
from swsurgery.editing.check_options import CheckOptions
from swsurgery.errors import Unrunnable
from swsurgery.threads import Pool

any_hub, hub = fixture.any_hub, fixture.hub

NAME = "model.caf\u00e9.\u6a21\u578b.\U0001f600.weight"
ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4000000000000 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.fixture
def base(tmp_path) -> Path:
    return write_llama(tmp_path / "base", extra={NAME: tensor("BF16", 2, 2, seed=9)})


@pytest.fixture
def edit(base, tmp_path) -> Path:
    edits = {"op": "zero", "tensor": NAME, "index": [0, 1]}, {"op": "zero", "tensor": down(1), "index": [1, 2]}
    return write_manifest(tmp_path / "edit.json", base, *edits)


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    return os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONUTF8": "0"} | more


def numpy_error() -> Exception:
    with pytest.raises(MemoryError) as caught:
        np.zeros(1 << 50)
    return caught.value


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "not enough memory"),
        (numpy_error(), "not enough memory"),
        (RuntimeError(ALLOCATOR), "not enough memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"), "not enough memory"),
        (RuntimeError("std::bad_alloc"), "not enough memory"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "not enough memory"),
        (OSError(12, "Cannot allocate memory"), "not enough memory"),
        (BlockingIOError(11, "Resource temporarily unavailable"), "the system reported an error"),
        (RuntimeError("can't start new thread"), "cannot start a thread"),
    ],
)
def test_a_shortage_is_one_line(base, capsys, monkeypatch, error, line):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(inspect, "open_checkpoint", fail)
    assert main(["inspect", str(base)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"swsurgery: {line}") and err.count("\n") == 1


@pytest.mark.parametrize(
    "error", [RuntimeError("memory of an elephant"), ValueError("can't start new thread"), ImportError("x")]
)
def test_another_error_is_still_a_bug(base, capsys, monkeypatch, error):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(inspect, "open_checkpoint", fail)
    assert main(["inspect", str(base)]) == 3
    assert "this is a bug" in capsys.readouterr().err


LIMITED = """
import resource, sys
import swsurgery.cli, swsurgery.checkpoint.inspect, numpy
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[1]),) * 2)
sys.argv[:2] = ["swsurgery"]
swsurgery.cli.entry()
"""


def test_a_limit_on_memory_is_one_line(tmp_path):
    folder = write_single(tmp_path / "big", {"w": tensor("BF16", 64, 8, seed=1)})
    header = {f"t{n:050}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in range(20_000)}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    command = [sys.executable, "-c", LIMITED]

    def run(limit: int) -> subprocess.CompletedProcess:
        words = [*command, str(limit), "inspect", str(folder)]
        return subprocess.run(words, capture_output=True, text=True, env=environment(tmp_path), timeout=100)

    enough, little = run(4 << 30), run(8 << 20)
    assert enough.returncode == 0, enough.stderr
    assert little.returncode == 2 and little.stdout == ""
    assert little.stderr.startswith("swsurgery: ") and little.stderr.count("\n") == 1 and "emory" in little.stderr


NEEDS_NUMPY = ["scan base --method weights", "diff base base", "diff base other", "verify out --finite"]


def run_limited(tmp_path: Path, limit: str, words: str) -> subprocess.CompletedProcess:
    command = ["sh", "-c", f'ulimit {limit} && exec "$@"', "sh", sys.executable, "-m", "swsurgery", *words.split()]
    return subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=100)


@pytest.fixture
def compared(base, edit, tmp_path) -> Path:
    """A directory with a base, its patched copy `out`, and `other`, which differs from the base."""
    write_llama(tmp_path / "other", extra={NAME: tensor("BF16", 2, 2, seed=8)})
    swsurgery.apply(edit, output=tmp_path / "out", check=CheckOptions("off"))
    return tmp_path


@pytest.mark.parametrize("limit", ["-v 100000", "-d 50000"])
@pytest.mark.parametrize("words", NEEDS_NUMPY)
def test_a_limit_that_numpy_does_not_fit_into_is_no_answer(compared, limit, words):
    """OpenBLAS calls exit(1) if it gets no memory, and 1 means that the two differ."""
    done = run_limited(compared, limit, words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("swsurgery: not enough memory (") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("words", "code"), [("diff base base", 0), ("diff base other", 1), ("verify out --finite", 0)])
def test_a_limit_that_is_ample_changes_no_answer(compared, words, code):
    """The twin."""
    done = run_limited(compared, "-v 400000", words)
    assert (done.returncode, done.stderr) == (code, "")


def test_a_forward_check_without_memory_for_numpy_is_not_made(base, edit, tmp_path, monkeypatch):
    def fail() -> None:
        raise MemoryError

    monkeypatch.setattr("swsurgery.model.start_up.load_numpy", fail)
    said: list[str] = []
    swsurgery.apply(edit, output=tmp_path / "out", reporter=Listener(said.append))
    reason = "not enough memory: torch cannot be loaded (raise the limit on memory)"
    assert said[-1] == f"only the weights were checked: {reason}"
    with pytest.raises(Unrunnable, match="not enough memory"):
        swsurgery.apply(edit, output=tmp_path / "new", check=CheckOptions("forward"))


@pytest.mark.parametrize("before", [None, "7"])
def test_numpy_gets_one_thread_and_the_setting_of_the_user_stays(tmp_path, before):
    code = (
        "import os, threading; from swsurgery.storage.numeric import load_numpy; load_numpy(); import numpy; "
        "print(os.environ.get('OPENBLAS_NUM_THREADS'), len(os.listdir('/proc/self/task')))"
    )
    env = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    env |= {"OPENBLAS_NUM_THREADS": before} if before else {}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == f"{before} 1\n"


NO_THREADS = """
import sys, threading
left = int(sys.argv.pop(1))
start = threading.Thread.start
def limited(self):
    global left
    if left <= 0:
        raise RuntimeError("can't start new thread")
    left -= 1
    start(self)
threading.Thread.start = limited
from swsurgery.cli import entry
sys.argv[0] = "swsurgery"
entry()
"""


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize(
    "words", [["apply", "edit.json", "-o", "out", "--check", "weights"], ["scan", "base", "--method", "weights"]]
)
def test_fewer_threads_give_the_same_result(base, edit, tmp_path, count, words):
    def run(program: str, *more: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", program, *more, *words, "--json"]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env=environment(tmp_path), timeout=100
        )

    wanted = run(NO_THREADS, "1000")
    first = digests(tmp_path / "out") if words[0] == "apply" else {}
    if first:
        (tmp_path / "out").rename(tmp_path / "first")
    done = run(NO_THREADS, str(count))
    assert "Traceback" not in done.stderr and (done.returncode, done.stdout) == (wanted.returncode, wanted.stdout)
    assert done.returncode == (0 if words[0] == "apply" else 2)  # the model is too small to scan
    assert not first or digests(tmp_path / "out") == first


def test_a_pool_keeps_order_and_passes_errors_on(monkeypatch):
    def square(n: int) -> int:
        if n == 7:
            raise ValueError("seven")
        return n * n

    start = threading.Thread.start
    for allowed in (4, 1, 0):
        left = [allowed]

        def limited(thread: threading.Thread, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", limited)
        before = threading.active_count()
        with Pool(4) as pool:
            assert threading.active_count() - before == allowed
            assert list(pool.map(square, range(7))) == [0, 1, 4, 9, 16, 25, 36]
            with pytest.raises(ValueError, match="seven"):
                pool.submit(square, 7).result()
        assert threading.active_count() == before


def test_a_pool_drops_what_has_not_begun():
    begun, go = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        go.wait(10)

    pool, later = Pool(2), []
    futures: list[Future[None]] = [pool.submit(wait), pool.submit(wait)]
    begun.wait(10)
    futures += [pool.submit(later.append, n) for n in range(5)]
    threading.Timer(0.05, go.set).start()
    pool.shutdown(cancel=True)
    assert later == [] and all(f.done() for f in futures[:2])


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_closed_stream_does_not_undo_the_work(base, edit, tmp_path, closed, more):
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-m", "swsurgery"]
    run = {"cwd": tmp_path, "env": environment(tmp_path), "capture_output": True, "timeout": 100}
    done = subprocess.run([*command, "apply", "edit.json", "-o", "out", "--check", "weights", *more], **run)
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert bool(done.stdout) == (">&-" not in closed.split())
    assert subprocess.run([*command, "verify", "out", *more], **run).returncode == 0
    assert subprocess.run([*command, "inspect", "absent", *more], **run).returncode == 2


def test_a_stream_that_python_code_closed(base, capsys, monkeypatch):
    closed = io.StringIO()
    closed.close()
    for stream in (closed, None):
        for name in ("stdout", "stderr"):
            with monkeypatch.context() as patch:
                patch.setattr(sys, name, stream)
                assert main(["inspect", str(base)]) == 0
                assert main(["inspect", str(base / "absent")]) == 2


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "ascii:strict", "utf-16"])
def test_a_name_that_the_terminal_lacks_is_escaped(base, edit, tmp_path, encoding):
    def run(*words: str) -> str:
        command = [sys.executable, "-m", "swsurgery", *words]
        env = environment(tmp_path, PYTHONIOENCODING=encoding)
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, timeout=100)
        assert done.returncode == 0, done.stderr
        return done.stdout.decode(encoding.split(":")[0])

    codec = encoding.split(":")[0]
    shown = NAME.encode(codec, "backslashreplace").decode(codec)
    assert shown in run("apply", "edit.json", "-o", "out", "--check", "weights")
    assert shown in run("inspect", "base")
    listed = json.loads(run("inspect", "base", "--json"))
    assert NAME in [t["tensor"] for t in listed["tensors"]]
    assert run("verify", "out") and run("diff", "base", "base")


def test_in_a_process_with_such_a_stream(base, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", errors="strict"))
    output.print_text(NAME)
    assert raw.getvalue() == NAME.encode("ascii", "backslashreplace") + b"\n"


@pytest.mark.parametrize("bits", [0x7FC0, 0x7F80, 0xFF80])
def test_an_edit_that_repairs_a_value_that_is_not_finite_is_exported_or_refused(tmp_path, capsys, bits):
    dtype, shape, data = tensor("BF16", HIDDEN, INNER, seed=2)
    broken = {"model.layers.0.mlp.down_proj.weight": (dtype, shape, data[:2] + bits.to_bytes(2, "little") + data[4:])}
    broken["model.embed_tokens.weight"] = tensor("BF16", VOCABULARY, HIDDEN, seed=1)
    base = write_single(tmp_path / "base", broken)
    edit = {"op": "zero", "tensor": "model.layers.0.mlp.down_proj.weight", "index": [0, 1]}
    manifest = write_manifest(tmp_path / "edit.json", base, edit)
    for source in (manifest, tmp_path / "out"):
        if source != manifest:
            assert main(["apply", str(manifest), "-o", str(source), "--check", "weights"]) == 0
        capsys.readouterr()
        assert main(["export", str(source), "--format", "peft", "-o", str(tmp_path / "peft")]) == 2
        err = capsys.readouterr().err
        value = {0x7FC0: "nan", 0x7F80: "inf", 0xFF80: "-inf"}[bits]
        assert err.count("\n") == 1 and f"[0, 1] is {value} in the base" in err and "(use --format sparse)" in err
        assert not (tmp_path / "peft").exists()
        for form in ("vllm", "sparse"):  # they hold the new value itself
            assert main(["export", str(source), "--format", form, "-o", str(tmp_path / f"{form}-{source.name}")]) == 0
    raw = (tmp_path / "vllm-out" / "patches.safetensors").read_bytes()
    assert np.frombuffer(raw[-10:], "<u2")[4] == 0 or raw.endswith(b"\0\0")


@pytest.mark.parametrize("name", ["SHA256SUMS", "manifest.yaml", "SHA256SUMS/x"])
def test_a_base_on_the_hub_with_a_file_of_our_name(hub, tmp_path, capsys, name):
    folder = write_hub_base(tmp_path / "base")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("theirs\n")
    commit = hub.add_repo(BASE, folder)
    manifest = tmp_path / "edit.yaml"
    manifest.write_text(f"version: 1\nbase: {{repo_id: {BASE}}}\nedits: [{EDIT}]\n")
    for words in (["--dry-run"], ["-o", str(tmp_path / "out")]):
        assert main(["apply", str(manifest), *words]) == 2
        ours = name.split("/")[0]
        err = capsys.readouterr().err
        assert f"/{ours}: the base already has a file with this name, which swsurgery writes (rename it)" in err
        assert words != ["--dry-run"] or f"hf://{BASE}@{commit}/{ours}" in err


def test_a_base_on_the_hub_whose_record_contradicts_a_pin(hub, tmp_path, capsys):
    folder = write_hub_base(tmp_path / "base")
    first = tmp_path / "first.yaml"
    first.write_text(f"version: 1\nbase: {{path: {folder}}}\nedits: [{EDIT}]\n")
    assert main(["apply", str(first), "-o", str(tmp_path / "patched"), "--check", "off"]) == 0
    record = json.loads((tmp_path / "patched" / "swsurgery.json").read_text())
    for entry in record["files"].values():
        entry["sha256"] = "0" * 64  # files of git itself have no digest at the Hub, so nothing else contradicts it
    (tmp_path / "patched" / "swsurgery.json").write_text(json.dumps(record))
    hub.add_repo(BASE, tmp_path / "patched")
    manifest = tmp_path / "second.yaml"
    manifest.write_text(
        f'version: 1\nbase: {{repo_id: {BASE}, sha256: {{config.json: "{"1" * 64}"}}}}\n'
        f"edits: [{EDIT.replace('[2, 3]', '[2, 4]')}]\n"
    )
    capsys.readouterr()
    for words in (
        ["export", str(manifest), "--format", "sparse", "-o", str(tmp_path / "patch")],
        ["apply", str(manifest), "--dry-run"],
    ):
        code = main(words)
        err = capsys.readouterr().err
        assert code in (0, 2) and "Traceback" not in err
        if words[0] == "export":
            assert code == 2 and f"the base's record has sha256 {'0' * 64}, but the manifest has {'1' * 64}" in err
            assert "/config.json (give the right base)" in err


def test_a_sweep_over_a_base_on_the_hub_runs_on_a_copy(hub, tmp_path, capsys):
    hub.add_repo(BASE, write_hub_base(tmp_path / "base"))
    manifest = tmp_path / "edit.yaml"
    manifest.write_text(f"version: 1\nbase: {{repo_id: {BASE}}}\nedits: [{EDIT}]\n")
    assert main(["sweep", str(manifest), "--factors", "0,1", "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and "tokenizer" in err

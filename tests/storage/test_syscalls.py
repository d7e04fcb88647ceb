"""What the commands ask of the kernel: no socket, no program, nothing written or read outside the places they name.

The commands run under strace. What it saw is held against an allow-list, and so is what a program that does each
forbidden thing was seen to do.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from checkpoints import FIRST, INDEX, down, write_llama, write_manifest

import swsurgery

NETWORK = {
    "socket", "socketpair", "connect", "bind", "listen", "accept", "accept4", "sendto", "sendmsg", "sendmmsg",
    "recvfrom", "recvmsg", "recvmmsg", "getsockname", "getpeername", "setsockopt", "getsockopt", "shutdown",
}  # fmt: skip
PROGRAMS = {"execve", "execveat", "fork", "vfork", "clone", "clone3"}
CHANGES = {
    "mkdir", "mkdirat", "mknod", "mknodat", "rename", "renameat", "renameat2", "link", "linkat", "symlink",
    "symlinkat", "unlink", "unlinkat", "rmdir", "truncate", "chmod", "fchmodat", "chown", "lchown", "fchownat",
    "utime", "utimes", "utimensat", "futimesat", "creat", "mount", "chroot", "setxattr", "lsetxattr", "removexattr",
}  # fmt: skip
SYSTEM = (
    "/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/locale.alias", "/etc/localtime", "/etc/ssl/openssl.cnf",
    "/proc/self", "/proc/mounts", "/proc/sys/vm/overcommit_memory", "/sys/devices/system/cpu", "/sys/fs/cgroup",
    "/dev/null", "/dev/urandom",
)  # fmt: skip
"""What the interpreter and its libraries read of the system when they start."""

CALL = re.compile(r"(?P<name>\w+)\((?P<arguments>.*)\)\s+= (?P<result>-?\d+|\?)(?:<(?P<opened>[^>]*)>)?")
ARGUMENT = re.compile(r'(?:(?:AT_FDCWD|\d+)<(?P<folder>[^>]*)>, )?"(?P<path>(?:[^"\\]|\\.)*)"')


RUN = """
import json, sys
from swsurgery.cli import main
print(json.dumps([main(arguments) for arguments in json.loads(sys.argv[1])]))
"""
"""Runs several commands in one process, which saves starting the interpreter for each."""


@dataclass
class Seen:
    """What one process did; `codes` are the exit codes of the commands that it ran.

    Paths are absolute; those opened are the files that the kernel really gave.
    """

    code: int
    codes: list[int] = field(default_factory=list)
    network: list[str] = field(default_factory=list)
    programs: list[str] = field(default_factory=list)
    written: set[str] = field(default_factory=set)
    read: set[str] = field(default_factory=set)
    calls: int = 0

    def outside(self, paths: set[str], *allowed: Path | str) -> list[str]:
        return sorted(p for p in paths if not any(Path(p).is_relative_to(a) for a in allowed))


def traced(directory: Path, *command: str) -> Seen:
    """Run a command of the interpreter's under strace, in `directory`, and return what it did."""
    logs = directory / "strace"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir()
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(directory / "home"), "PYTHONDONTWRITEBYTECODE": "1",
        "XDG_CACHE_HOME": str(directory / "cache"), "XDG_DATA_HOME": str(directory / "data"), "HF_TOKEN": "hf_canary",
        **{k: v for k, v in os.environ.items() if k in ("PYTHONPATH", "OMP_NUM_THREADS")},
    }  # fmt: skip
    done = subprocess.run(
        ["strace", "-ff", "-qq", "-y", "--seccomp-bpf", "-e", f"trace=%network,%file,{','.join(sorted(PROGRAMS))}",
         "-e", "signal=none", "-o", str(logs / "t"), sys.executable, *command],
        cwd=directory, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    seen = Seen(done.returncode)
    if RUN in command:
        seen.codes = json.loads(done.stdout.splitlines()[-1])
    for log in sorted(logs.iterdir()):
        for line in log.read_text().splitlines():
            note(seen, line, directory)
    assert seen.programs and "execve(" in seen.programs[0], "strace saw the interpreter start"
    del seen.programs[0]
    return seen


def note(seen: Seen, line: str, directory: Path) -> None:
    call = CALL.match(line)
    if call is None:
        assert line.startswith(("+++", "---")), f"cannot read what strace says: {line}"
        return
    seen.calls += 1
    name, arguments, ok = call["name"], call["arguments"], not call["result"].startswith("-")
    if name in NETWORK:
        seen.network.append(line)
    elif name in PROGRAMS and "CLONE_THREAD" not in arguments:
        seen.programs.append(line)
    elif name in CHANGES and ok:
        paths = [m for m in ARGUMENT.finditer(arguments)]
        seen.written |= {os.path.normpath(Path(m["folder"] or directory, m["path"])) for m in paths}
    elif name in ("open", "openat", "openat2") and ok:
        to_write = re.search(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC", arguments)
        opened = re.sub(r"^/proc/\d+/", "/proc/self/", call["opened"].removesuffix(" (deleted)"))
        (seen.written if to_write else seen.read).add(opened)


def registered() -> set[str]:
    from swsurgery.cli import COMMANDS

    return set(COMMANDS)


def program_files() -> list[str]:
    """Where the interpreter, its libraries and this package lie."""
    places = [sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), Path(swsurgery.__file__).parents[1]]
    return sorted({os.path.realpath(p) for p in places} | {str(p) for p in places})


@pytest.fixture(scope="session", autouse=True)
def strace():
    if shutil.which("strace") is None:
        pytest.skip("strace is not there")
    if subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True).returncode:
        pytest.skip("strace may not trace here")


@pytest.fixture
def directory(tmp_path) -> Path:
    """`base` and `manifest.yaml`; a home with a token in it; and a secret that no command has any business with."""
    home = tmp_path / "home"
    (home / ".cache" / "huggingface").mkdir(parents=True)
    (home / ".cache" / "huggingface" / "token").write_text("hf_canary")
    (home / ".netrc").write_text("machine localhost login x password hf_canary\n")
    (tmp_path / "secret.safetensors").write_text("secret")
    write_llama(tmp_path / "base")
    edit = {"op": "zero", "tensor": down(1), "index": [1, 2]}
    write_manifest(
        tmp_path / "manifest.yaml", Path("base"), edit, {"op": "protect", "tensor": down(0), "index": [0, 1]}
    )
    return tmp_path


def clean(seen: Seen, directory: Path, reads: tuple[str, ...], writes: tuple[str, ...] = ()) -> None:
    """The three promises, for a command that may read and write these entries of the directory and the cache."""
    cache = directory / "cache"
    assert seen.network == []
    assert seen.programs == []
    assert seen.outside(seen.written, cache, *(directory / w for w in writes)) == []
    mine = [directory / name for name in (*reads, *writes)]
    # Listing and syncing the folder in which the output appears reads its entries' names, not what is in them.
    assert seen.outside(seen.read - {str(directory)}, *SYSTEM, *program_files(), cache, *mine) == []


OUT = ("out", ".out.partial", ".out.committing")
APPLY = [("apply", "manifest.yaml", "-o", "out", "--check", check) for check in ("off", "weights")]
ON_PATCHED = [
    (("verify", "patched"), ("patched",), ()),
    (("verify", "patched", "--base", "base"), ("patched", "base"), ()),
    (("diff", "base", "patched"), ("base", "patched"), ()),
    (("revert", "patched", "-o", "out"), ("patched",), OUT),
    (("apply", "in-place.yaml", "--in-place", "--check", "weights"), ("in-place.yaml",), ("patched",)),
]
"""Command, what it may read, what it may write."""


@pytest.mark.parametrize("command", APPLY, ids=" ".join)
def test_apply_does_only_what_it_says(directory, command):
    seen = traced(directory, "-m", "swsurgery", *command)
    assert seen.code == 0 and seen.calls > 100
    clean(seen, directory, ("base", "manifest.yaml"), OUT)
    assert str(directory / "out") in seen.written, "the trace sees what is written"


def test_commands_that_only_read_write_nothing(directory):
    lint = [["lint", "manifest.yaml"]] if "lint" in registered() else []
    commands = [["apply", "manifest.yaml", "--dry-run"], ["inspect", "base"], ["lookup", "llama-7b"], ["schema"], *lint]
    seen = traced(directory, "-c", RUN, json.dumps(commands))
    assert set(seen.codes) == {0} and seen.calls > 100
    clean(seen, directory, ("base", "manifest.yaml"))
    assert seen.outside(seen.written) == [], "not even the cache"


@pytest.fixture
def patched(directory) -> Path:
    from swsurgery.editing.check_options import CheckOptions

    swsurgery.apply(directory / "manifest.yaml", output=directory / "patched", check=CheckOptions("off"))
    edit = {"op": "zero", "tensor": down(2), "index": [3, 4]}
    write_manifest(directory / "in-place.yaml", Path("patched"), edit)
    return directory


@pytest.mark.parametrize(("command", "reads", "writes"), ON_PATCHED, ids=lambda c: " ".join(c) or "-")
def test_a_command_on_a_patched_checkpoint_does_only_what_it_says(patched, command, reads, writes):
    seen = traced(patched, "-m", "swsurgery", *command)
    assert seen.code == (1 if command[0] == "diff" else 0) and seen.calls > 100
    clean(seen, patched, reads, writes)


PROBE = re.compile(r'socket\(AF_INET6, SOCK_STREAM\|SOCK_CLOEXEC, IPPROTO_IP\)|bind\(.*"::1"')
"""urllib3, which the library for signatures loads, asks once at its import whether this machine knows IPv6."""


def test_signing_and_checking_open_no_connection(patched):
    pytest.importorskip("model_signing")
    from keys import write_keys

    write_keys(patched)
    sign = ["sign", "patched", "--key", "key.pem"]
    check = ["verify", "patched", "--signature", "patched/model.sig", "--public-key", "key.pub"]
    seen = traced(patched, "-c", RUN, json.dumps([sign, check]))
    assert seen.codes == [0, 0]
    assert [call for call in seen.network if not PROBE.match(call)] == []
    seen.network.clear()
    seen.written = {p for p in seen.written if not p.startswith("/memfd:swsurgery")}
    seen.read = {p for p in seen.read if not p.startswith("/memfd:swsurgery")}
    clean(seen, patched, ("patched", "key.pem", "key.pub"), ("patched/model.sig", "patched/.model.sig.partial"))


def escape_by_index(root: Path) -> None:
    document = json.loads((root / INDEX).read_text())
    document["weight_map"][down(0)] = "../secret.safetensors"
    (root / INDEX).write_text(json.dumps(document))


def escape_by_absolute_index(root: Path) -> None:
    document = json.loads((root / INDEX).read_text())
    document["weight_map"][down(0)] = str(root.parent / "secret.safetensors")
    (root / INDEX).write_text(json.dumps(document))


def escape_by_link(root: Path) -> None:
    (root / FIRST).unlink()
    (root / FIRST).symlink_to("../secret.safetensors")


def escape_by_link_beside_the_weights(root: Path) -> None:
    (root / "merges.txt").symlink_to("../secret.safetensors")


def escape_by_folder(root: Path) -> None:
    (root / "more").symlink_to("..")


def escape_by_pipe(root: Path) -> None:
    (root / FIRST).unlink()
    os.mkfifo(root / FIRST)


def escape_by_config(root: Path) -> None:
    (root / "config.json").unlink()
    (root / "config.json").symlink_to("../secret.safetensors")


def escape_by_cache(root: Path) -> None:
    """A snapshot whose link leaves its repository's blobs."""
    repo = root.parent / "models--o--n"
    (repo / "blobs").mkdir(parents=True)
    (repo / "snapshots").mkdir()
    shutil.copytree(root, repo / "snapshots" / "r")
    shutil.rmtree(root)
    root.symlink_to(repo / "snapshots" / "r")
    escape_by_link(repo / "snapshots" / "r")


ESCAPES = [escape_by_index, escape_by_absolute_index, escape_by_link, escape_by_link_beside_the_weights,
           escape_by_folder, escape_by_pipe, escape_by_config, escape_by_cache]  # fmt: skip


def test_a_base_that_points_outside_is_refused_and_nothing_outside_is_opened(directory):
    commands, reads, writes = [], [], []
    for number, escape in enumerate(ESCAPES):
        place = directory / str(number)
        shutil.copytree(directory / "base", place / "base")
        shutil.copy(directory / "manifest.yaml", place)
        (place / "secret.safetensors").write_text("secret")
        escape(place / "base")
        commands.append(["apply", f"{number}/manifest.yaml", "-o", f"{number}/out", "--check", "off"])
        reads += [f"{number}/{name}" for name in ("base", "manifest.yaml", "models--o--n")]
        writes += [f"{number}/{name}" for name in OUT]
    seen = traced(directory, "-c", RUN, json.dumps(commands))
    assert seen.codes == [2] * len(ESCAPES)
    seen.read -= {str(directory / str(number)) for number in range(len(ESCAPES))}  # where the outputs would appear
    clean(seen, directory, tuple(reads), tuple(writes))
    assert not [place for place in directory.glob("*/out")]


def test_a_record_that_names_files_outside_opens_none(patched):
    path = patched / "patched" / "swsurgery.json"
    record = json.loads(path.read_text())
    entry = record["files"]["tokenizer.json"]
    record["files"] |= {"../secret.safetensors": entry, str(patched / "home/.netrc"): entry}
    for edit in record["edits"]:
        edit["file"] = "../secret.safetensors"
    path.write_text(json.dumps(record))
    commands = [
        ["verify", "patched"],
        ["revert", "patched", "-o", "out"],
        ["revert", "patched"],
        ["lookup", "./patched"],
    ]
    seen = traced(patched, "-c", RUN, json.dumps(commands))
    assert seen.codes == [1, 2, 2, 0]
    clean(seen, patched, ("patched",), OUT)
    assert (patched / "secret.safetensors").read_text() == "secret"


CONTROL = {
    "socket": "import socket; socket.socket(socket.AF_UNIX).close()",
    "lookup": "import socket\ntry: socket.getaddrinfo('swsurgery.invalid', 80)\nexcept OSError: pass",
    "program": "import subprocess; subprocess.run(['true'])",
    "fork": "import os\nif not os.fork(): os._exit(0)\nos.wait()",
    "write": "open('elsewhere', 'w')",
    "read": "open('secret.safetensors')",
    "link": "import os; os.symlink('../secret.safetensors', 'base/link'); open('base/link')",
    "home": "import os; open(os.path.expanduser('~/.netrc'))",
    "remove": "import os; os.unlink('secret.safetensors')",
    "mode": "import os; os.chmod('base/config.json', 0o600)",
    "thread": "import threading; t = threading.Thread(target=open, args=('secret.safetensors',)); t.start(); t.join()",
}


@pytest.mark.parametrize("name", CONTROL)
def test_what_is_forbidden_would_be_seen(directory, name):
    seen = traced(directory, "-c", CONTROL[name])
    assert seen.code == 0
    with pytest.raises(AssertionError):
        clean(seen, directory, ("base", "manifest.yaml"))


def test_a_program_that_does_nothing_is_clean(directory):
    """The twin of the test above."""
    clean(traced(directory, "-c", "open('base/config.json').read()"), directory, ("base",))

"""The same inputs give the same bytes of every file, whatever surrounds the command; other inputs do not.

Each variation changes one thing around `apply` and must give the digests of the plain run.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from checkpoints import SECOND, down, tree, write_llama, write_manifest

EDITS = (
    {"op": "zero", "tensor": down(0), "index": [1, 2]},
    {"op": "scale", "tensor": down(1), "index": [3, 4], "factor": 1.5},
    {"op": "set", "tensor": down(2), "index": [5, 9], "value": 0.25},
    {"op": "protect", "tensor": down(1), "index": [0, 0]},
)
APPLY = ("apply", "manifest.yaml", "-o", "out", "--quiet", "--check", "weights")


@dataclass
class Run:
    """One way to run the command: in a place of its own, with base and manifest there."""

    place: Path
    arguments: tuple[str, ...] = APPLY
    environment: dict[str, str] = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    prefix: tuple[str, ...] = ()
    program: tuple[str, ...] = ("-m", "swsurgery")
    output: Path | None = None
    litter: Path | None = None

    def digests(self) -> dict[str, str]:
        """sha256 of every file of the output, by relative name."""
        environment = {
            **{k: v for k, v in os.environ.items() if k != "SOURCE_DATE_EPOCH"},
            "XDG_CACHE_HOME": str(self.place / "cache"), "PYTHONDONTWRITEBYTECODE": "1", **self.environment,
        }  # fmt: skip
        options = {"cwd": self.place, "env": environment, **self.options}
        command = [*self.prefix, sys.executable, *self.program, *self.arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
        assert done.returncode == 0, done.stderr
        return digests_of(self.output or self.place / "out")


def digests_of(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in tree(folder).items()}


def write_inputs(place: Path, edits: tuple[dict, ...] = EDITS) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    write_llama(place / "base")
    write_manifest(place / "manifest.yaml", Path("base"), *edits)
    return place


def plain(run: Run) -> None:
    pass


def environment(**variables: str) -> Callable[[Run], None]:
    return lambda run: run.environment.update(variables)


def options(**values: object) -> Callable[[Run], None]:
    return lambda run: run.options.update(values)


def arguments(*words: str) -> Callable[[Run], None]:
    def vary(run: Run) -> None:
        run.arguments = (*run.arguments, *words)

    return vary


def absolute_paths(run: Run) -> None:
    """From another working directory, everything by absolute path."""
    elsewhere = run.place / "else" / "where"
    elsewhere.mkdir(parents=True)
    run.options["cwd"] = elsewhere
    run.arguments = ("apply", str(run.place / "manifest.yaml"), "-o", str(run.place / "out"), *APPLY[4:],
                     "--base", str(run.place / "base"))  # fmt: skip


def long_way_round(run: Run) -> None:
    """The base by way of links and dots."""
    (run.place / "link").symlink_to("base")
    run.arguments = (*run.arguments, "--base", "./cache/.././link/")
    (run.place / "cache").mkdir()


def order_of_the_directory(run: Run) -> None:
    """The base's files made anew in a random order, so that the directory lists them otherwise."""
    base = run.place / "base"
    files = tree(base)
    shutil.rmtree(base)
    names = sorted(files)
    random.Random(7).shuffle(names)
    for name in names:
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(files[name])


def times_of_files(run: Run) -> None:
    for n, path in enumerate(sorted((run.place / "base").rglob("*"))):
        os.utime(path, (n * 1e8, n * 1e8))
    os.utime(run.place / "manifest.yaml", (0, 0))


def modes_of_files(run: Run) -> None:
    for path in (run.place / "base").rglob("*.safetensors"):
        path.chmod(0o400)


def cold_cache(run: Run) -> None:
    for path in run.place.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def known_digests(run: Run) -> None:
    """A first run leaves its digests behind. The second one must hash again all the same."""
    for path in (run.place / "base").rglob("*"):
        os.utime(path, (1e9, 1e9))
    Run(run.place).digests()
    assert len(json.loads((run.place / "cache" / "swsurgery" / "digests.json").read_text())["digests"]) >= 7
    shutil.rmtree(run.place / "out")


def other_file_system(run: Run) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == run.place.stat().st_dev:
        pytest.skip("/dev/shm is no file system of its own")
    run.output = run.litter = memory / f"swsurgery-determinism-{os.getpid()}"
    run.arguments = ("apply", "manifest.yaml", "-o", str(run.output), *APPLY[4:])


AS_NOBODY = """
import os, pwd, sys
from swsurgery.cli import main
assert main([*sys.argv[1:3], "-o", "as-root", *sys.argv[5:]]) == 0  # loads what nobody may not read
nobody = pwd.getpwnam("nobody")
os.setgroups([]), os.setgid(nobody.pw_gid), os.setuid(nobody.pw_uid)
raise SystemExit(main(sys.argv[1:]))
"""


def other_user(run: Run) -> None:
    """As nobody, in a place of its own that belongs to it."""
    if os.geteuid() != 0:
        pytest.skip("only root can run it as another user")
    import pwd
    import tempfile

    nobody = pwd.getpwnam("nobody")
    run.litter = Path(tempfile.mkdtemp(prefix="swsurgery-determinism-"))  # pytest's own folders are root's alone
    run.place = write_inputs(run.litter)
    for path in (run.place, *run.place.rglob("*")):
        os.chown(path, nobody.pw_uid, nobody.pw_gid)
    run.program = ("-c", AS_NOBODY)


def other_clock(run: Run) -> None:
    if shutil.which("faketime") is None:
        pytest.skip("faketime is not there")
    run.prefix = ("faketime", "2038-02-03 04:05:06")


def other_host(run: Run) -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode:
        pytest.skip("unshare --uts is not there or not allowed")
    run.prefix = ("unshare", "--uts", "sh", "-c", 'hostname elsewhere && exec "$@"', "sh")


def no_address_randomness(run: Run) -> None:
    if shutil.which("setarch") is None or subprocess.run(["setarch", "-R", "true"], capture_output=True).returncode:
        pytest.skip("setarch -R is not there or not allowed")
    run.prefix = ("setarch", "-R")


def interrupted_before(run: Run) -> None:
    """What a killed run left is gone on from: one shard whole, one half written."""
    stage = run.place / ".out.partial"
    stage.mkdir()
    whole = (run.place / "base" / SECOND).read_bytes()
    (stage / SECOND).write_bytes(whole[: len(whole) // 2])
    (stage / "tokenizer.json").write_bytes((run.place / "base" / "tokenizer.json").read_bytes())


VARIATIONS: dict[str, Callable[[Run], None]] = {
    "another place": plain,
    "hash seed 0": environment(PYTHONHASHSEED="0"),
    "hash seed 1": environment(PYTHONHASHSEED="1"),
    "hash seed random": environment(PYTHONHASHSEED="random"),
    "time zone": environment(TZ="Pacific/Kiritimati"),
    "locale C": environment(LC_ALL="C", LANG="C", PYTHONUTF8="0"),
    "locale de_DE": environment(LC_ALL="de_DE.UTF-8", LANG="de_DE.UTF-8"),
    "umask 022": options(umask=0o022),
    "umask 077": options(umask=0o077),
    "another user": other_user,
    "another host name": other_host,
    "absolute paths": absolute_paths,
    "the base by a link": long_way_round,
    "order of the directory": order_of_the_directory,
    "times of files": times_of_files,
    "modes of files": modes_of_files,
    "1 thread": environment(SWSURGERY_THREADS="1"),
    "8 threads": environment(SWSURGERY_THREADS="8"),
    "cold cache": cold_cache,
    "known digests": known_digests,
    "--reuse-digests, nothing known": arguments("--reuse-digests"),
    "--link copy": arguments("--link", "copy"),
    "--link hard": arguments("--link", "hard"),
    "file system": other_file_system,
    "clock": other_clock,
    "no address randomness": no_address_randomness,
    "after a killed run": interrupted_before,
    "debug": arguments("--debug"),
    "no terminal, no home": environment(TERM="dumb", HOME="/nonexistent", COLUMNS="20"),
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, str]:
    """The digests of the plain run."""
    return Run(write_inputs(tmp_path_factory.mktemp("plain"))).digests()


@pytest.mark.parametrize("name", VARIATIONS)
def test_the_same_inputs_give_the_same_bytes(tmp_path, expected, name):
    run = Run(write_inputs(tmp_path / "a place of its own"))
    VARIATIONS[name](run)
    try:
        assert run.digests() == expected
    finally:
        if run.litter is not None:
            shutil.rmtree(run.litter)


def test_the_output_is_complete(expected):
    """What the digests above are of: nothing is compared that is not there."""
    assert {"swsurgery.json", "manifest.yaml", "SHA256SUMS", "config.json", SECOND} <= set(expected)
    assert len(expected) == 11 and len(VARIATIONS) >= 12


@pytest.mark.parametrize("number", range(len(EDITS)))
def test_another_manifest_gives_other_bytes(tmp_path, expected, number):
    """The twin: a real difference is seen."""
    changed = [dict(edit) for edit in EDITS]
    changed[number]["index"] = [2, 2]
    digests = Run(write_inputs(tmp_path, tuple(changed))).digests()
    different = {name for name in expected if digests[name] != expected[name]}
    assert {"swsurgery.json", "manifest.yaml", "SHA256SUMS"} <= different
    assert any(name.endswith(".safetensors") for name in different) == (changed[number]["op"] != "protect")


def test_another_date_on_purpose_gives_another_record_only(tmp_path, expected):
    digests = Run(write_inputs(tmp_path), environment={"SOURCE_DATE_EPOCH": "1700000000"}).digests()
    assert {name for name in expected if digests[name] != expected[name]} == {"swsurgery.json", "SHA256SUMS"}


def test_no_file_says_where_it_was_made(tmp_path):
    place = write_inputs(tmp_path / "canaryplace")
    run = Run(place, environment={"USER": "canaryuser", "LOGNAME": "canaryuser", "HOSTNAME": "canaryhost"})
    absolute_paths(run)
    run.digests()
    for name, data in tree(place / "out").items():
        assert b"canary" not in data and str(tmp_path).encode() not in data, name


def test_reverting_twice_gives_the_same_bytes(tmp_path, expected):
    place = write_inputs(tmp_path)
    assert Run(place).digests() == expected
    revert = ("revert", "out", "-o", "back", "--quiet")
    back = Run(place, revert, {"PYTHONHASHSEED": "1", "SWSURGERY_THREADS": "8"}, output=place / "back").digests()
    assert back == digests_of(place / "base")

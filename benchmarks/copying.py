"""Measure `apply` against `cp -r` + sync, and against what the machine can do at best.

usage: python benchmarks/copying.py [--work DIR] [--rounds N] [--size "1.9 GB"]... [--cold] [--write]

One scalar is edited. Each round runs both commands in turn and measures the limits of the machine in between: the rate
at which files of the same sizes are written past the page cache and synced, the rate of sha256 in one thread and in one
thread for each core, and the rate at which the base is read. The *hashing limit* is the time that sha256 alone takes
for the bytes that `apply` must hash. All ratios are medians over the rounds. The base is in the page cache; --cold
empties it first. --write replaces the section "Copying" of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bytecode import compile_package
from page import describe_machine, replace_section
from run import INDEX, SIZES, SWSURGERY, TENSOR, make_once, write_checkpoint
from values import forget

BLOCK = 4 << 20
HASHED = 1 << 30
"""Number of bytes that each thread hashes to find the rate of sha256."""


@dataclass(frozen=True)
class Cost:
    """What one command needed: seconds until the result was synced, processor time in seconds, and peak MB."""

    seconds: float
    processor: float
    megabytes: float


@dataclass(frozen=True)
class Round:
    """One round. Rates are in bytes/s, `hashing` is the hashing limit in seconds."""

    ours: Cost
    copy: Cost
    write: float
    read: float
    one_thread: float
    all_threads: float
    hashing: float

    @property
    def limit(self) -> float:
        """The larger of both limits in seconds: copying with sync, and hashing."""
        return max(self.copy.seconds, self.hashing)


def run(command: list[str], output: Path) -> Cost:
    """Run a command that writes the directory `output`, then sync."""
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    seconds = time.perf_counter() - begin
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000)


def measure_rate(work: Callable[[], int]) -> float:
    """Return how many bytes per second `work` handles; it returns the number of bytes."""
    begin = time.perf_counter()
    return work() / (time.perf_counter() - begin)


def read_files(files: list[Path]) -> int:
    """Read files one after the other into one buffer, and return the number of bytes."""
    buffer, total = memoryview(mmap.mmap(-1, BLOCK)), 0
    for file in files:
        fd, at = os.open(file, os.O_RDONLY), 0
        while count := os.preadv(fd, [buffer], at):
            at += count
        os.close(fd)
        total += at
    return total


def write_files(folder: Path, sizes: list[int]) -> int:
    """Write one file of each size at the same time, past the page cache, sync them, and return the number of bytes."""
    folder.mkdir()
    data = memoryview(mmap.mmap(-1, BLOCK))
    data[:] = os.urandom(BLOCK)

    def write(number: int, size: int) -> int:
        fd = os.open(folder / str(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT)
        blocks = -(-size // BLOCK)
        for _ in range(blocks):
            os.write(fd, data)
        os.fsync(fd)
        os.close(fd)
        return blocks * BLOCK

    with ThreadPoolExecutor(len(sizes)) as pool:
        return sum(pool.map(write, range(len(sizes)), sizes))


def hash_memory(threads: int) -> int:
    """Hash HASHED bytes in each of several threads, and return the number of bytes."""

    def hash_one(_: int) -> None:
        digest, data = hashlib.sha256(), bytes(BLOCK)
        for _ in range(HASHED // BLOCK):
            digest.update(data)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(hash_one, range(threads)))
    return threads * HASHED


def find_offset(shard: Path) -> int:
    """Return the offset of the edited scalar in its shard."""
    with open(shard, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        info = json.loads(file.read(length))[TENSOR]
    return 8 + length + info["data_offsets"][0] + 2 * (INDEX[0] * info["shape"][1] + INDEX[1])


def measure(base: Path, manifest: Path, out: Path, cold: bool) -> Round:
    """Measure one round."""
    files = sorted(base.glob("*.safetensors"))
    sizes = [file.stat().st_size for file in files]
    weight_map = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    touched = base / weight_map[TENSOR]
    hashed = sum(sizes) + touched.stat().st_size - find_offset(touched)

    def prepare() -> None:
        """Fill the page cache with the base, or empty it."""
        forget(files) if cold else read_files(files)

    prepare()
    read = measure_rate(lambda: read_files(files))
    prepare()
    options = ["--base", str(base), "-o", str(out), "--check", "off", "--link", "copy", "--quiet"]
    ours = run([*SWSURGERY, "apply", str(manifest), *options], out)
    prepare()
    copy = run(["cp", "-r", str(base), str(out)], out)
    shutil.rmtree(out)
    os.sync()
    write = measure_rate(lambda: write_files(out, sizes))
    shutil.rmtree(out)
    one = measure_rate(lambda: hash_memory(1))
    everywhere = measure_rate(lambda: hash_memory(len(os.sched_getaffinity(0))))
    return Round(ours, copy, write, read, one, everywhere, max(max(sizes) / one, hashed / everywhere))


def describe(size: str, total: int, rounds: list[Round]) -> list[str]:
    """Return the rows of the table for one checkpoint of `total` bytes."""

    def make_row(what: str, seconds: Callable[[Round], float], *more: str, to_limit: str = "") -> str:
        median = statistics.median(seconds(r) for r in rounds)
        ratio = statistics.median(seconds(r) / r.copy.seconds for r in rounds)
        cells = (size, what, f"{median:.2f}", f"{total / median / 1e9:.2f}", *(more or ("", "")), f"{ratio:.2f}")
        return f"| {' | '.join(cells)} | {to_limit} |"

    def make_command(what: str, cost: Callable[[Round], Cost], to_limit: str = "") -> str:
        processor = statistics.median(cost(r).processor for r in rounds)
        peak = max(cost(r).megabytes for r in rounds)
        return make_row(what, lambda r: cost(r).seconds, f"{processor:.2f}", f"{peak:.0f} MB", to_limit=to_limit)

    to_limit = statistics.median(r.ours.seconds / r.limit for r in rounds)
    return [
        make_command("swsurgery apply --link copy", lambda r: r.ours, f"{to_limit:.2f}"),
        make_command("cp -r + sync", lambda r: r.copy),
        make_row("hashing limit", lambda r: r.hashing),
        make_row("write past the page cache + fsync", lambda r: total / r.write),
        make_row("read, one thread", lambda r: total / r.read),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", action="append", choices=[*SIZES], help="default: 1.9 GB and 5.6 GB")
    parser.add_argument("--cold", action="store_true", help="empty the page cache of the base first")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md")
    options = parser.parse_args()
    compile_package()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    manifest = work / "manifest.json"
    edit = {"op": "set", "tensor": TENSOR, "index": INDEX, "value": 3.5}
    manifest.write_text(json.dumps({"version": 1, "base": {"path": "."}, "edits": [edit]}))
    rows: list[str] = []
    rates: list[Round] = []
    for size in options.size or ["1.9 GB", "5.6 GB"]:
        base = work / size.replace(" ", "")
        make_once(base, write_checkpoint, size)
        rounds = []
        for _ in range(options.rounds):
            rounds.append(measure(base, manifest, work / "out", options.cold))
            print(f"  {size}: {rounds[-1]}", flush=True)
        rows += describe(size, sum(file.stat().st_size for file in base.iterdir()), rounds)
        rates += rounds
    one = statistics.median(r.one_thread for r in rates) / 1e9
    everywhere = statistics.median(r.all_threads for r in rates) / 1e9
    cache = "not in the page cache" if options.cold else "in the page cache"
    lines = [
        "Made by `python benchmarks/copying.py --write`: one edited scalar of an F16 checkpoint. The base is",
        f"{cache}. Times are of whole processes, including sync: medians of {options.rounds} rounds in turn.",
        f"{describe_machine()}",
        "",
        "| checkpoint | what | seconds | GB/s | processor seconds | peak memory | to cp -r + sync | to the limit |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
        *rows,
        "",
        f"sha256 of OpenSSL: {one:.2f} GB/s in one thread, {everywhere:.2f} GB/s in one thread for each core. The",
        "hashing limit is the time that sha256 takes at this rate for all bytes of the base, and again for the bytes",
        "from the edit to the end of its shard, but at least for the largest shard. The last column compares with the",
        "larger of `cp -r` + sync and the hashing limit, in the same round.",
    ]
    print("\n".join(lines))
    if options.write:
        replace_section("Copying", lines)


if __name__ == "__main__":
    main()

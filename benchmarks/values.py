"""Measure `verify --values`: the ratio of its time to that of `sha256sum` over the same shards.

usage: python benchmarks/values.py [--work DIR] [--rounds N] [--size "1.9 GB"] [--write]

Every time is that of a whole process, measured from outside. The commands take turns, and the page cache of the shards
is emptied before each, so every byte comes from the disk. `sha256sum` of some systems does not use OpenSSL, so a Python
process that hashes the shards with OpenSSL is measured too. --write replaces the section "Values" of
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path

from page import describe_machine, replace_section
from run import SIZES, SWSURGERY, make_once, median, run, write_checkpoint

OPENSSL = (
    "import hashlib, sys\nfor name in sys.argv[1:]:\n    with open(name, 'rb') as f: hashlib.file_digest(f, 'sha256')"
)


def write_distinct(folder: Path, size: str) -> None:
    """Write a checkpoint in which no two tensors have the same bytes."""
    write_checkpoint(folder, size)
    number = 0
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "r+b") as shard:
            length = int.from_bytes(shard.read(8), "little")
            header = json.loads(shard.read(length))
            header.pop("__metadata__")
            for info in header.values():
                number += 1
                shard.seek(8 + length + info["data_offsets"][0])
                shard.write((0x2000 + number).to_bytes(2, "little"))


def forget(files: list[Path]) -> None:
    """Drop the files from the page cache. Pages must be on the disk before they can be dropped."""
    os.sync()
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", choices=[*SIZES], default="1.9 GB")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    folder = work / ("distinct-" + options.size.replace(" ", ""))
    make_once(folder, write_distinct, options.size)
    files = sorted(folder.glob("*.safetensors"))
    names = [str(file) for file in files]
    jobs = {
        "swsurgery verify --values": [*SWSURGERY, "verify", str(folder), "--values", "--quiet"],
        "swsurgery verify --finite": [*SWSURGERY, "verify", str(folder), "--finite", "--quiet"],
        "sha256sum": ["sha256sum", *names],
        "sha256 of OpenSSL, one thread": [SWSURGERY[0], "-c", OPENSSL, *names],
    }
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
    for _ in range(options.rounds):
        for name, job in jobs.items():
            forget(files)
            runs[name].append(run(job, work / "none"))
            print(f"  {name}: {runs[name][-1][0]:.2f} s", flush=True)

    def compare(name: str, other: str) -> float:
        return statistics.median(a[0] / b[0] for a, b in zip(runs[name], runs[other], strict=True))

    _, rival, fast = list(jobs)[1:]
    lines = [
        f"Made by `python benchmarks/values.py --write`: all values of an F16 checkpoint of {options.size}, the page",
        f"cache of its shards emptied before each run. Medians of {options.rounds} rounds in turn, whole processes.",
        describe_machine(),
        "",
        "| what | seconds | peak memory | relative to sha256sum | relative to OpenSSL |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, found in runs.items():
        seconds, megabytes = median(found)
        lines.append(
            f"| {name} | {seconds:.2f} | {megabytes:.0f} MB | {compare(name, rival):.2f} | {compare(name, fast):.2f} |"
        )
    print("\n".join(lines))
    if options.write:
        replace_section("Values", lines)


if __name__ == "__main__":
    main()

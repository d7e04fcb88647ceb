"""Compare one GPU with several: a paired check of a checkpoint that is streamed layer by layer.

usage: python benchmarks/several_gpus.py [--work /dev/shm/several] [--size "141 GB"] [--rounds N] [--write]

The checkpoint has random weights and lies in a file system in memory, so that no disk limits the reading. Each run is a
process of its own; the number of GPUs changes from run to run. The limits of the machine are measured in the same
command: how fast threads read the files, and how fast pinned memory is copied to each GPU and to all at once.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import sys
from pathlib import Path

from limits import measure_copies, measure_reads
from page import replace_section
from run import write_checkpoint
from stream import OURS, measured

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks-streaming.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("/dev/shm/several"))
    parser.add_argument("--size", default="141 GB")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--write", action="store_true", help=f"write the section into {PAGE.name}")
    options = parser.parse_args()
    folder = options.work / options.size.replace(" ", "")
    writer = multiprocessing.get_context("spawn").Process(target=write_checkpoint, args=(folder, options.size))
    if not folder.exists():
        writer.start()
        writer.join()
    files = sorted(folder.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    reads = {threads: measure_reads(files, threads, 32 << 30) for threads in (8, 16, 32)}
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # this process must not use a GPU itself
        gpus = pool.apply(count_gpus)
        sets = [*((number,) for number in range(gpus)), *([tuple(range(gpus))] if gpus > 1 else [])]
        copies = {devices: pool.apply(measure_copies, (devices,)) for devices in sets}
    runs: dict[int, list[dict[str, float]]] = {count: [] for count in dict.fromkeys((1, gpus))}
    for _ in range(options.rounds):
        for count, found in runs.items():
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(count)))
            found.append(measured(OURS, folder, "cuda"))
            print(f"  {count}: {found[-1]}", flush=True)
    lines = describe(options.size, size, reads, copies, runs)
    print("\n".join(lines))
    if options.write:
        replace_section("Several GPUs", lines, PAGE)
    shutil.rmtree(folder)


def count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def describe(
    size: str,
    bytes_read: int,
    reads: dict[int, float],
    copies: dict[tuple[int, ...], float],
    runs: dict[int, list[dict[str, float]]],
) -> list[str]:
    """Return the lines of the section: a table of the runs, the limits, and the ratio of the medians."""
    middle = {count: statistics.median(run["seconds"] for run in found) for count, found in runs.items()}
    first = next(iter(runs.values()))[0]
    rates = ", ".join(f"{rate:.1f} with {threads}" for threads, rate in reads.items())
    receive = ", ".join(f"{rate:.1f} (GPU {' and '.join(map(str, which))})" for which, rate in copies.items())
    lines = [
        f"Made by `python {' '.join(['benchmarks/several_gpus.py', *sys.argv[1:]])}`.",
        "",
        f"A paired check of a Llama-shaped F16 checkpoint of {size} in a file system in memory, 4 windows of 512",
        f"tokens, on {first['machine'].partition(' x ')[2]}, torch {first['torch']}, transformers",
        f"{first['transformers']}. Seconds after the imports.",
        "",
        "| GPUs | seconds | GB/s | main memory | device memory, each |",
        "|---:|---:|---:|---:|---:|",
    ]
    for count, found in runs.items():
        seconds = ", ".join(f"{run['seconds']:.2f}" for run in found)
        rate = bytes_read / middle[count] / 1e9
        memory, device = (max(run[key] for run in found) for key in ("memory", "device"))
        lines.append(f"| {count} | {seconds} | {rate:.1f} | {memory:.1f} GB | {device:.2f} GB |")
    lines += [
        "",
        f"Limits of the same machine in the same run, in GB/s: `preadv` threads read {rates}; pinned memory is",
    ]
    lines += [f"copied at {receive}."]
    if len(middle) > 1:
        counts = list(middle)
        lines += ["", f"{counts[1]} GPUs are {middle[counts[0]] / middle[counts[1]]:.2f} times as fast as one."]
    return lines


if __name__ == "__main__":
    main()

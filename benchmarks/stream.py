"""Compare streaming one layer at a time with loading a whole model, on a checkpoint of Llama-7B's shapes.

usage: python benchmarks/stream.py [--work DIR] [--rounds N] [--device cpu|cuda] [--size SIZE] [--write]

The weights are random. Each row is measured in a process of its own: seconds after the imports, and the peaks of main
and of device memory. On the CPU, one prompt of 9 tokens is run. On CUDA, swsurgery runs base and patched over 4 windows
of 512 tokens.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

from limits import measure_copies, measure_reads
from run import make_once, write_checkpoint

PREAMBLE = """
import json, resource, sys, time, warnings
warnings.simplefilter("ignore")
import torch, transformers
from transformers import AutoModelForCausalLM, LlamaForCausalLM  # loaded lazily otherwise
from pathlib import Path
folder, device = Path(sys.argv[1]), sys.argv[2]
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
generator = torch.Generator().manual_seed(0)
windows = torch.randint(3, 32000, (1, 9) if device == "cpu" else (4, 512), generator=generator).tolist()
devices = torch.cuda.device_count() if device == "cuda" else 0
if devices:  # run a tiny model first, so that loading the kernels is not measured
    tiny = transformers.LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(tiny).to(device, torch.float16)(input_ids=torch.tensor(windows, device=device)).logits.float()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
"""
REPORT = """
for n in range(devices):
    torch.cuda.synchronize(n)
print(json.dumps({
    "seconds": time.perf_counter() - begin,
    "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    "device": max((torch.cuda.max_memory_reserved(n) / 1e9 for n in range(devices)), default=0.0),
    "machine": f"{devices} x {torch.cuda.get_device_name()}" if devices else "", "torch": torch.__version__,
    "transformers": transformers.__version__, "steady": globals().get("steady", 0.0),
}))
"""
OURS = """
from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.storage.coordinate import Coordinate
from swsurgery.model import load, measure, wake
from swsurgery.progress import Silent
class Clock(Silent):
    layers = []
    def advance(self, n):
        self.layers.append((time.perf_counter(), n))
PLACE = Coordinate("model.layers.2.mlp.down_proj.weight", (17, 90))
shapes = open_checkpoint(folder).shapes.values()
wake.prepare_device(device, "streamed", torch.float16, shapes)  # the product does this during the imports
begin = time.perf_counter()
model = load.open_model(open_checkpoint(folder), device=device, placement="streamed", say=sys.exit)
variants = [{PLACE: 3.5}, {}] if device == "cuda" else [{}]
totals = measure.Totals([], len(variants))
for outcomes in model.run(windows, variants, progress=Clock()):
    totals.add_window(windows[outcomes.sequence], outcomes)
assert model.method == "streamed" and totals.summarise_side(0).finite
layers = [(at, n) for at, n in Clock.layers if n]
steady = sum(n for _, n in layers[1:]) / (layers[-1][0] - layers[0][0]) / 1e9
"""
LOAD = """
begin = time.perf_counter()
model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype={dtype}, **({{"device_map": device}} if device == "cuda" else {{}})
)
"""
RUN = """
with torch.no_grad():
    model(input_ids=torch.tensor(windows[:1], device=device)).logits.float().log_softmax(-1)
"""
AS_STORED, CONVERTED = LOAD.format(dtype="'auto'"), LOAD.format(dtype="torch.bfloat16")
JOBS = {
    "cpu": {
        "swsurgery, streamed": OURS,
        "transformers: load, run": AS_STORED + RUN,
        "transformers: load as bfloat16, run": CONVERTED + RUN,
    },
    "cuda": {
        "swsurgery, streamed": OURS,
        "transformers: load": AS_STORED,
        "transformers: load, run one window": AS_STORED + RUN,
    },
}
"""The scripts to measure on each device. The others are compared with the second one."""


def forget_files() -> None:
    """Empty the page cache, so that every byte is read from the disk. Needs root."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def measured(script: str, folder: Path, device: str) -> dict:
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + script + REPORT, str(folder), device], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr or done.stdout)
    return json.loads(done.stdout.splitlines()[-1]) | {"process": time.perf_counter() - begin}


def read_all(folder: Path) -> float:
    """Return the seconds that `cat` needs to read all shards."""
    begin = time.perf_counter()
    subprocess.run(["cat", *map(str, sorted(folder.glob("*.safetensors")))], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begin


def scan_weights(folder: Path) -> float:
    """Return the seconds that a process of `swsurgery scan --method weights` needs."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "swsurgery", "scan", str(folder), "--method", "weights"]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begin


def describe_limits(folder: Path, seconds: float, steady: float) -> list[str]:
    """Measure the limits of the machine, and return lines that compare the streaming on a GPU with them.

    `seconds` is the time of a whole check, and `steady` the rate between its first and its last layer, in GB/s.
    """
    files = sorted(folder.glob("*.safetensors"))
    reads = {threads: measure_reads(files, threads) for threads in (1, 4, 8, 12, 16)}
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # so that this process does not keep a GPU
        copies = pool.apply(measure_copies)
    limit, rate = min(copies, max(reads.values())), sum(file.stat().st_size for file in files) / seconds / 1e9
    listed = ", ".join(f"{rate:.1f} with {threads}" for threads, rate in reads.items())
    return [
        "",
        f"Limits of the machine in the same run, in GB/s: threads read cached files with `preadv` at {listed};",
        f"pinned memory is copied to the GPU at {copies:.1f}. From its first to its last layer, swsurgery streams at",
        f"{steady:.1f} GB/s, {steady / limit:.0%} of the smaller limit. The whole check, which also builds the",
        f"model and computes the output head, processes {rate:.1f} GB/s ({rate / limit:.0%}).",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", default="13.5 GB")
    parser.add_argument(
        "--only-ours", action="store_true", help="measure only swsurgery, for checkpoints that nothing else can load"
    )
    parser.add_argument("--cold", action="store_true", help="empty the page cache before each run (as root)")
    parser.add_argument("--write", type=Path, help="write the table to this file")
    options = parser.parse_args()
    folder = options.work.resolve() / options.size.replace(" ", "")
    make_once(folder, write_checkpoint, options.size)
    jobs = {name: job for name, job in JOBS[options.device].items() if not options.only_ours or job is OURS}
    against = list(JOBS[options.device])[1]
    runs: dict[str, list[dict]] = {name: [] for name in jobs}
    prepare = forget_files if options.cold else lambda: read_all(folder)
    cats, scans = [], []
    for number in range(options.rounds + 1):  # round 0 only warms up libraries and kernels
        for name, script in jobs.items():
            prepare()
            run = measured(script, folder, options.device)
            print(f"  {name}: {run}", flush=True)
            if number:
                runs[name].append(run)
        if not number:
            continue
        prepare()
        cats.append(read_all(folder))
        if options.device == "cpu":
            prepare()
            scans.append(scan_weights(folder))
    middle = {name: statistics.median(run["seconds"] for run in found) for name, found in runs.items()}
    first = next(iter(runs.values()))[0]
    where = first["machine"] or f"{os.cpu_count()} cores"
    cache = "emptied before each run" if options.cold else "filled before each run"
    lines = [
        f"A Llama-shaped F16 checkpoint of {options.size}, page cache {cache}.",
        f"{where}, Linux",
        f"{platform.release()}, torch {first['torch']}, transformers {first['transformers']}. Medians of",
        f"{options.rounds} rounds in turn, in seconds after the imports. "
        + ("One prompt of 9 tokens." if options.device == "cpu" else "4 windows of 512 tokens, base and patched."),
        f"One `cat` of the shards takes {statistics.median(cats):.1f} s.",
        "",
        f"| what | seconds | whole process | main memory | device memory | against {against.split(': ')[1]} |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, found in runs.items():
        process = statistics.median(run["process"] for run in found)
        memory, device = (max(run[key] for run in found) for key in ("memory", "device"))
        ratio = f"{middle[name] / middle[against]:.2f}" if against in middle else ""
        lines.append(f"| {name} | {middle[name]:.2f} | {process:.1f} | {memory:.1f} GB | {device:.2f} GB | {ratio} |")
    if options.device == "cuda":
        steady = statistics.median(run["steady"] for run in next(iter(runs.values())))
        lines += describe_limits(folder, next(iter(middle.values())), steady)
    if scans:
        ratio = statistics.median(scan / cat for scan, cat in zip(scans, cats, strict=True))
        lines += ["", f"`scan --method weights`, a whole process: {statistics.median(scans):.1f} s, {ratio:.1f} times"]
        lines += ["that `cat` (median of the pairs)."]
    print("\n".join(lines))
    if options.write:
        options.write.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

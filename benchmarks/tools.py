"""Edit one scalar with several tools, and write what each costs to docs/measured/tools.json.

usage: python benchmarks/tools.py [--work DIR] [--mergekit PYTHON] [--llm-compressor PYTHON] [--write]

Each tool is a process of its own on the same F16 checkpoint of 1.9 GB. Measured are the peak memory of the process,
the bytes that it made the kernel write, and which files and scalars of its output differ from the base. The options
name a Python in which mergekit or llm-compressor is installed. `python docs/generate.py` makes the tables of README.md
and docs/comparison.md from the result.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
from run import INDEX, LOAD_EDIT_SAVE, SWSURGERY, TENSOR, write_checkpoint

SIZE = "1.9 GB"
MEASURED = Path(__file__).parents[1] / "docs" / "measured" / "tools.json"
QUANTISE = """
import sys
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
recipe = QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"])
oneshot(model=sys.argv[1], recipe=recipe, output_dir=sys.argv[2])
"""
MERGE = "merge_method: passthrough\ndtype: float16\nmodels:\n  - model: {base}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/tools"))
    parser.add_argument("--mergekit", help="a Python that has mergekit")
    parser.add_argument("--llm-compressor", help="a Python that has llm-compressor")
    parser.add_argument("--write", action="store_true", help="write docs/measured/tools.json")
    options = parser.parse_args()
    base, out = options.work.resolve() / "base", options.work.resolve() / "out"
    if not base.exists():
        call_alone(write_checkpoint, base, SIZE)
    rows = [
        measure(name, command, base, out, tool, before)
        for name, tool, command, before in list_commands(options, base, out)
    ]
    document = {
        "checkpoint": {"bytes": count_bytes(base), "files": len(list(base.iterdir())), "dtype": "F16"},
        "system": f"{os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}",
        "rows": rows,
    }
    shutil.rmtree(out)
    if options.write:
        MEASURED.parent.mkdir(exist_ok=True)
        MEASURED.write_text(json.dumps(document, indent=2) + "\n")


def list_commands(options: argparse.Namespace, base: Path, out: Path) -> list[tuple]:
    """Return for each row its name, the tool's version, the command, and whether it edits a copy of the base."""
    manifest = options.work / "manifest.json"
    edit = {"op": "set", "tensor": TENSOR, "index": INDEX, "value": 3.5}
    touched = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"][TENSOR]
    digest = subprocess.run(["sha256sum", str(base / touched)], capture_output=True, text=True, check=True).stdout[:64]
    pinned = {"path": ".", "sha256": {touched: digest}}  # without the digest, no edit in place is made
    manifest.write_text(json.dumps({"version": 1, "base": pinned, "edits": [edit]}))
    apply = [*SWSURGERY, "apply", str(manifest), "--check", "off", "--quiet", "--base"]
    ours = f"swsurgery {version('swsurgery')}"
    rows = [
        ("swsurgery --in-place", ours, [*apply, str(out), "--in-place"], True),
        ("swsurgery", ours, [*apply, str(base), "-o", str(out), "--link", "copy"], False),
    ]
    for (_, script), library in zip(LOAD_EDIT_SAVE.items(), ("transformers", "safetensors"), strict=True):
        command = [sys.executable, "-c", script, str(base), str(out), "1GB"]
        rows.append((library, f"{library} {version(library)}", command, False))
    if options.mergekit:
        config = options.work / "merge.yaml"
        config.write_text(MERGE.format(base=base))
        words = ["-m", "mergekit.scripts.run_yaml", str(config), str(out), "--no-copy-tokenizer"]
        rows.append(("mergekit", ask_version(options.mergekit, "mergekit"), [options.mergekit, *words], False))
    if options.llm_compressor:
        command = [options.llm_compressor, "-c", QUANTISE, str(base), str(out)]
        tool = ask_version(options.llm_compressor, "llmcompressor").replace("llmc", "llm-c")
        rows.append(("llm-compressor", tool, command, False))
    return rows


def call_alone(function: Callable, *arguments: object) -> object:
    """Call a function in a new process, because a measured command's peak memory counts from the fork of this one."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def ask_version(python: str, package: str) -> str:
    code = f"from importlib.metadata import version; print({package!r}, version({package!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def measure(name: str, command: list[str], base: Path, out: Path, tool: str, copy_first: bool) -> dict:
    """Run a command, and return its peak memory, the bytes written, and what differs from the base."""
    shutil.rmtree(out, ignore_errors=True)
    if copy_first:
        shutil.copytree(base, out)
    os.sync()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    names = {path.name for path in base.iterdir()}
    changed = sorted(n for n in names if not (out / n).exists() or not same_bytes(base / n, out / n))
    row = {
        "name": name,
        "tool": tool,
        "peak_bytes": usage.ru_maxrss * 1024,
        "written_bytes": usage.ru_oublock * 512,
        "changed_files": changed,
        "scalars": call_alone(count_differences, base, out),
    }
    print(json.dumps(row), flush=True)
    return row


def same_bytes(a: Path, b: Path) -> bool:
    return subprocess.run(["cmp", "-s", str(a), str(b)]).returncode == 0


def count_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def count_differences(base: Path, out: Path) -> int | None:
    """Return how many scalars differ, or None if the dtypes or the names of the tensors differ."""
    ours, theirs = read_tensors(base), read_tensors(out)
    if {name: place[0] for name, place in ours.items()} != {name: place[0] for name, place in theirs.items()}:
        return None
    return sum(int((read(ours[name]) != read(theirs[name])).sum()) for name in ours)


def read(place: tuple) -> np.ndarray:
    _, path, offset, size = place
    return np.memmap(path, "<u2", "r", offset, (size // 2,))


def read_tensors(folder: Path) -> dict[str, tuple]:
    """Return for each tensor its dtype and shape, its file, and the offset and the number of its bytes."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            found[name] = ((entry["dtype"], tuple(entry["shape"])), path, 8 + length + begin, end - begin)
    return found


if __name__ == "__main__":
    main()

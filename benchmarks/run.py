"""Compare swsurgery with other ways to edit a checkpoint: print a table, and write it to docs/benchmarks.md.

usage: python benchmarks/run.py [--work DIR] [--rounds N] [--full] [--mergekit PYTHON] [--write]

Every time is that of a whole process, measured from outside. The compared commands take turns, so their ratio holds
if the machine becomes slower. --full adds a 13.5 GB checkpoint. --mergekit names a Python with mergekit installed.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bytecode import compile_package
from page import PAGE

SIZES = {  # hidden, intermediate, layers, key-value width, vocabulary, gigabytes per shard
    "0.3 GB": (1024, 2816, 10, 1024, 32000, 0.1),
    "1.9 GB": (2048, 5632, 16, 2048, 32000, 1.0),
    "5.6 GB": (3072, 8192, 26, 1024, 32000, 2.0),
    "13.5 GB": (4096, 11008, 32, 4096, 32000, 5.0),
    "141 GB": (8192, 28672, 80, 1024, 128256, 5.0),  # the shapes of Llama-3-70B
}
TENSOR, INDEX = "model.layers.2.mlp.down_proj.weight", [17, 90]
SWSURGERY = [sys.executable, "-m", "swsurgery"]

LOAD_EDIT_SAVE = {
    "transformers: load, edit, save": """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
with torch.no_grad():
    model.get_parameter("model.layers.2.mlp.down_proj.weight")[17, 90] = 3.5
model.save_pretrained(sys.argv[2], max_shard_size=sys.argv[3])
""",
    "safetensors: load, edit, save the shard": """
import shutil, sys, json
from pathlib import Path
from safetensors.torch import load_file, save_file
base, out = Path(sys.argv[1]), Path(sys.argv[2])
out.mkdir()
name = "model.layers.2.mlp.down_proj.weight"
touched = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"][name]
for file in base.iterdir():
    if file.name != touched:
        shutil.copy(file, out / file.name)
tensors = load_file(base / touched)
tensors[name][17, 90] = 3.5
save_file(tensors, out / touched, metadata={"format": "pt"})
""",
}


def write_checkpoint(folder: Path, size: str) -> None:
    """Write an F16 checkpoint of random finite weights, with the tensors of a Llama model of this size."""
    hidden, inner, layers, kv, vocabulary, gigabytes = SIZES[size]
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "self_attn.q_proj.weight": (hidden, hidden),
            prefix + "self_attn.k_proj.weight": (kv, hidden),
            prefix + "self_attn.v_proj.weight": (kv, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, hidden),
            prefix + "mlp.gate_proj.weight": (inner, hidden),
            prefix + "mlp.up_proj.weight": (inner, hidden),
            prefix + "mlp.down_proj.weight": (hidden, inner),
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "post_attention_layernorm.weight": (hidden,),
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    shards: list[list[str]] = [[]]
    room = gigabytes * 1e9
    for name, shape in shapes.items():
        count = 2 * math.prod(shape)
        if shards[-1] and count > room:
            shards.append([])
            room = gigabytes * 1e9
        shards[-1].append(name)
        room -= count
    import numpy as np

    pool = (np.random.default_rng(0).standard_normal(1 << 23) * 0.02).astype(np.float16).tobytes()
    folder.mkdir(parents=True)
    weight_map, total = {}, 0
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name in names:
            begin, end = end, end + 2 * math.prod(shapes[name])
            header[name] = {"dtype": "F16", "shape": list(shapes[name]), "data_offsets": [begin, end]}
            weight_map[name] = file
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        with open(folder / file, "wb") as out:
            out.write(struct.pack("<Q", len(raw)) + raw)
            for written in range(0, end, len(pool)):
                out.write(pool[: end - written])
        total += end
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": hidden // 128,
        "num_key_value_heads": kv // 128, "vocab_size": vocabulary, "tie_word_embeddings": False,
        "torch_dtype": "float16", "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def make_once(base: Path, write: Callable[..., None], *arguments: object) -> None:
    """Write a checkpoint if it does not exist yet.

    A process of its own writes it: the peak memory of a command counts from the fork, so this process must stay small.
    """
    if not base.exists():
        writer = multiprocessing.get_context("spawn").Process(target=write, args=(base, *arguments))
        writer.start()
        writer.join()


def run(command: list[str], output: Path, **environment: str) -> tuple[float, float]:
    """Run a command and a sync. Return the seconds of both, and the peak resident MB of the largest process."""
    output.unlink() if output.is_file() else shutil.rmtree(output, ignore_errors=True)
    os.sync()
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | environment)
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    return time.perf_counter() - begin, usage.ru_maxrss / 1000


def median(rounds: list[tuple[float, float]]) -> tuple[float, float]:
    return statistics.median(r[0] for r in rounds), max(r[1] for r in rounds)


def versus(
    name: str, ours: list[str], theirs: list[str], out: Path, rounds: int, before: list[str] | None = None
) -> tuple[list, list, float]:
    """Run two commands in turn. Return the runs of each, and the median ratio of their times, `ours` to `theirs`.

    The command `before` is run before each run of `ours`, and is not measured.
    """
    a, b = [], []
    for _ in range(rounds):
        if before:
            run(before, out)
        a.append(run(ours, out))
        b.append(run(theirs, out))
    print(f"  {name}: {median(a)[0]:.2f} s against {median(b)[0]:.2f} s", flush=True)
    return a, b, statistics.median(x[0] / y[0] for x, y in zip(a, b, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--mergekit", help="a Python that has mergekit")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md")
    options = parser.parse_args()
    compile_package()
    work, out = options.work.resolve(), options.work.resolve() / "out"
    work.mkdir(parents=True, exist_ok=True)
    manifest = work / "manifest.yaml"
    manifest.write_text(
        f'version: 1\nbase: {{path: "."}}\nedits:\n  - {{op: set, tensor: {TENSOR}, index: {INDEX}, value: 3.5}}\n'
    )

    def apply(base: Path, *more: str) -> list[str]:
        return [*SWSURGERY, "apply", str(manifest), "--base", str(base), "-o", str(out), "--check", "off", *more]

    rows, memory = [], []
    for size in ["0.3 GB", "5.6 GB", *(["13.5 GB"] if options.full else [])]:
        base = work / size.replace(" ", "")
        make_once(base, write_checkpoint, size)
        print(size, flush=True)
        copy = ["cp", "-r", str(base), str(out)]
        rounds = options.rounds if size == "5.6 GB" else 1
        ours, theirs, ratio = versus("copy", apply(base, "--link", "copy"), copy, out, rounds)
        memory.append((size, f"{median(ours)[1]:.0f} MB"))
        if size != "5.6 GB":
            continue
        rows.append(("swsurgery apply --link copy, all digests", *median(ours), ratio))
        rows.append(("cp -r + sync", *median(theirs), 1.0))
        reference = median(theirs)[0]
        weight_map = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
        touched = ["cp", str(base / weight_map[TENSOR]), str(out)]
        # Removing the hard links of the previous round changes ctimes, which makes the stored digests invalid. A copy
        # hashes all files again and stores their digests.
        hard, single, hard_ratio = versus(
            "hard links", apply(base, "--link", "hard", "--reuse-digests"), touched, out, options.rounds,
            apply(base, "--link", "copy"),
        )  # fmt: skip
        for name, script in LOAD_EDIT_SAVE.items():
            result = run([sys.executable, "-c", script, str(base), str(out), "2GB"], out)
            print(f"  {name}: {result[0]:.2f} s, {result[1]:.0f} MB", flush=True)
            rows.append((name, *result, result[0] / reference))
        if options.mergekit:
            config = work / "passthrough.yaml"
            config.write_text(f"merge_method: passthrough\ndtype: float16\nmodels:\n  - model: {base}\n")
            command = [options.mergekit, "-m", "mergekit.scripts.run_yaml", str(config), str(out)]
            command.append("--no-copy-tokenizer")  # the checkpoint has none
            result = run(command, out, HF_HUB_OFFLINE="1")
            rows.append(("mergekit passthrough (copies, edits nothing)", *result, result[0] / reference))
    start = {
        name: statistics.median(run([*SWSURGERY, *words], out)[0] for _ in range(5))
        for name, words in {"--help": ["--help"], "lookup llama-7b": ["lookup", "llama-7b"]}.items()
    }
    shutil.rmtree(out, ignore_errors=True)
    lines = [
        "One edited scalar of a 5.6 GB checkpoint (3 shards). Times are of whole processes, including sync: medians",
        f"of {options.rounds} rounds in turn. {os.cpu_count()} cores, Linux {platform.release()},",
        f"Python {platform.python_version()}.",
        "",
        "| what | seconds | peak memory | relative to cp -r + sync |",
        "|---|---:|---:|---:|",
        *(f"| {name} | {seconds:.1f} | {megabytes:.0f} MB | {ratio:.2f} |" for name, seconds, megabytes, ratio in rows),
        "",
        "Our ratios are medians over pairs of runs. The programs that load, edit and save write neither digests nor",
        "a record.",
        "",
        "With hard links and without hashing unchanged shards again (`--link hard --reuse-digests`):",
        f"{median(hard)[0]:.1f} s, {hard_ratio:.2f} times copying",
        f"the edited shard alone with `cp` + sync ({median(single)[0]:.1f} s). This includes its digests.",
        "On a disk that writes more than 1.5 GB/s the two digests take longest, and the ratio is higher.",
        "",
        "Peak memory of apply by size of the checkpoint:",
        "",
        "| checkpoint | peak memory |",
        "|---|---:|",
        *(f"| {size} | {peak} |" for size, peak in memory),
        "",
        "Start-up times: " + ", ".join(f"`swsurgery {name}` {seconds:.2f} s" for name, seconds in start.items()) + ".",
    ]
    print("\n".join(lines))
    if options.write:
        head = "# Benchmarks\n\nMade by `make bench BENCH=--write`; see benchmarks/run.py.\n\n"
        _, hub, rest = PAGE.read_text().partition("\n## The Hub\n")  # by benchmarks/hub.py
        PAGE.write_text(head + "\n".join(lines) + "\n" + hub + rest)


if __name__ == "__main__":
    main()

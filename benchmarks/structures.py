"""Measure edits of structures and of whole tensors: the ratios of their times to `cp -r` + sync and to one scalar.

usage: python benchmarks/structures.py [--work DIR] [--rounds N] [--size "13.5 GB"] [--only TEXT] [--write]

Every time is that of a whole process and a sync, measured from outside. The compared commands take turns. --write
replaces the section "Structures and whole tensors" of docs/benchmarks.md. --only measures the edits whose names begin
with TEXT. Edits of whole tensors are not compared with one scalar.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from page import describe_machine, replace_section
from run import SIZES, SWSURGERY, make_once, median, run, write_checkpoint

EDITS = {
    "one scalar: zero": "{op: zero, layer: 2, row: 17, col: 90}",
    "one row: zero": "{op: zero, layer: 2, row: 17}",
    "one column: zero": "{op: zero, layer: 2, col: 90}",
    "one neuron: scale 0.5": "{op: scale, layer: 2, neuron: 90, factor: 0.5}",
    "round, 4 bits per 128, all layers": '{op: round, tensors: "model.layers.*.weight", bits: 4, block: 128}',
    "round, 4 bits per 128, asymmetric": (
        '{op: round, tensors: "model.layers.*.weight", bits: 4, block: 128, symmetric: false}'
    ),
    "clip, z = 9, all layers": '{op: clip, tensors: "model.layers.*.weight", z: 9}',
}
"""What is measured. Each is one edit of a manifest."""

EXPERT = "one expert of 8: zero"


def write_mixture(folder: Path) -> None:
    """Write a mixture of experts with the stored tensors of Mixtral, of 5.7 GB: 10 layers of 8 experts."""
    write_checkpoint(folder, "5.6 GB")
    config = json.loads((folder / "config.json").read_text())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    experts = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    names = {}
    for name in index["weight_map"]:
        layer, _, matrix = name.removeprefix("model.layers.").partition(".mlp.")
        if matrix:  # three layers of the dense model become the experts of one layer
            number = int(layer)
            part = experts[matrix.removesuffix(".weight")]
            names[name] = f"model.layers.{number // 8}.block_sparse_moe.experts.{number % 8}.{part}.weight"
    for file in folder.glob("*.safetensors"):
        _rename(file, names)
    index["weight_map"] = {names.get(name, name): file for name, file in index["weight_map"].items()}
    config |= {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 8}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))


def _rename(file: Path, names: dict[str, str]) -> None:
    """Rename tensors of a shard in place, in a header that is padded to the old length."""
    with open(file, "r+b") as shard:
        size = int.from_bytes(shard.read(8), "little")
        header = json.loads(shard.read(size))
        raw = json.dumps({names.get(n, n): v for n, v in header.items()}, separators=(",", ":")).encode()
        assert len(raw) <= size, "the new names do not fit"
        shard.seek(8)
        shard.write(raw + b" " * (size - len(raw)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", choices=[*SIZES], default="13.5 GB")
    parser.add_argument("--only", default="", help="measure the edits whose names begin so")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md")
    options = parser.parse_args()
    work = options.work.resolve()
    out = work / "out"
    work.mkdir(parents=True, exist_ok=True)
    dense, mixture = work / options.size.replace(" ", ""), work / "mixture"
    make_once(dense, write_checkpoint, options.size)
    if EXPERT.startswith(options.only):
        make_once(mixture, write_mixture)

    def apply(base: Path, edit: str) -> list[str]:
        manifest = work / "edit.yaml"
        manifest.write_text(f'version: 1\nbase: {{path: "."}}\nedits:\n  - {edit}\n')
        return [*SWSURGERY, "apply", str(manifest), "--base", str(base), "-o", str(out), "--check", "off",
                "--link", "copy"]  # fmt: skip

    rows = []
    scalar = EDITS["one scalar: zero"]
    for base, name, edit in (
        *((dense, name, edit) for name, edit in EDITS.items()),
        (mixture, EXPERT, "{op: zero, layer: 1, expert: 3}"),
    ):
        if not name.startswith(options.only):
            continue
        of_copy, of_scalar, ours = [], [], []
        whole = "tensors:" in edit
        reference = scalar if base == dense else "{op: zero, layer: 1, expert: 3, row: 17, col: 90}"
        for _ in range(options.rounds):
            copied = run(["cp", "-r", str(base), str(out)], out)
            one = None if whole else run(apply(base, reference), out)
            ours.append(run(apply(base, edit), out))
            of_copy.append(ours[-1][0] / copied[0])
            if one:
                of_scalar.append(ours[-1][0] / one[0])
        seconds, megabytes = median(ours)
        scalars = f"{statistics.median(of_scalar):.2f}" if of_scalar else ""
        rows.append((name, seconds, megabytes, statistics.median(of_copy), scalars))
        print(
            "  {}: {:.1f} s, {:.0f} MB, {:.2f} of cp + sync, {} of one scalar".format(*rows[-1][:4], scalars or "-"),
            flush=True,
        )
    rounds = "one round" if options.rounds == 1 else f"medians of {options.rounds} rounds in turn"
    lines = [
        "Made by `python benchmarks/structures.py --write`.",
        "",
        f"Edits of a {options.size} F16 checkpoint; an expert is one of a mixture of experts of 5.6 GB. Times are of",
        f"whole processes, including sync: {rounds}. Each ratio compares with `cp -r` + sync, or with",
        "the edit of one scalar, in the same round.",
        describe_machine(),
        "",
        "| edit | seconds | peak memory | relative to cp -r + sync | relative to one scalar |",
        "|---|---:|---:|---:|---:|",
        *(f"| {name} | {s:.1f} | {mb:.0f} MB | {copy:.2f} | {one} |" for name, s, mb, copy, one in rows),
    ]
    print("\n".join(lines))
    if options.write:
        replace_section("Structures and whole tensors", lines)


if __name__ == "__main__":
    main()

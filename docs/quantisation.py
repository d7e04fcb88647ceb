"""Measure simple quantisation of a real model with `compare`, and write docs/quantisation.md.

usage: python docs/quantisation.py CHECKPOINT [--windows N] [--window TOKENS] [--device DEVICE]

CHECKPOINT is SmolLM2-135M-Instruct, as `make demo` converts it. Every number on the page comes from this run.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import swsurgery
from swsurgery.cli.output import Bar

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TENSORS = "model.layers.*.weight"
"""The linear layers of the decoder. `round` skips the norms, which have one dimension."""

GROUPS: dict[str, Mapping[str, Any]] = {
    "tensor": {"per": "tensor"},
    "512 x 512": {"block": [512, 512]},
    "128 x 128": {"block": [128, 128]},
    "channel": {"per": "channel"},
    "128 of a row": {"block": 128},
}
"""The scalars that share a scale, from the largest group to the smallest."""

WIDTHS = (8, 4, 3)
CLIP = {"z": 5}
METHODS = {"plain": (False, False), "kept": (False, True), "clipped": (True, False), "clipped, kept": (True, True)}
"""Maps each column to (values are clipped first, super weights keep their bits)."""


def write_manifest(base: Path, group: Mapping[str, Any], bits: int, clipped: bool, kept: bool) -> dict[str, Any]:
    """Return the manifest of one cell of the table."""
    edit: dict[str, Any] = {"op": "round", "tensors": TENSORS, "bits": bits, "symmetric": False, **group}
    if clipped:
        edit["clip"] = CLIP
    edits = [edit, *([{"op": "protect", "known": "all"}] if kept else [])]
    return {"version": 1, "base": {"path": str(base), "model": MODEL}, "edits": edits}


def format_cell(model: Any) -> str:
    """Format the perplexity ratio of a model with its interval, such as "1.27 (1.21-1.33)"."""
    if not model.finite:
        return "not finite"
    interval = f" ({_format(model.ratio_low)}-{_format(model.ratio_high)})" if model.ratio_low is not None else ""
    return f"{_format(model.ratio)}{interval}"


def _format(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.1f}" if ratio >= 10 else f"{ratio:.2f}"


def render(tables: Mapping[int, Mapping[str, list[Any]]], found: swsurgery.Comparison) -> str:
    """Render the page."""
    base = found.models[0]
    lines = [
        "# Simple quantisation and super weights",
        "",
        "`round` rounds weights to the nearest of a few evenly spaced levels, as simple quantisation does, and stores",
        "the rounded values in the same dtype. `compare` then measures what the rounding does to the model.",
        "arXiv:2411.07191 (section 4) claims that simple quantisation works with large blocks if super weights are",
        "kept. This page shows when that is true for SmolLM2-135M-Instruct.",
        "",
        "**Result.** Keeping super weights exact gains nothing in plain rounding to the nearest level. A super weight",
        "is the largest value of its block, so it is itself a level and survives. It is decisive whenever something",
        "clips the weights: the clip cuts the super weights too, and most of the damage comes from these few scalars.",
        "",
        f"All linear layers of the decoder are rounded (`{TENSORS}`), with asymmetric levels. *Kept*: the known super",
        "weights keep their bits and do not count in the ranges of their blocks. *Clipped*: values above",
        f"mean(|w|) + {CLIP['z']} std(|w|) of their tensor are clipped before they are rounded.",
        f"Each cell is the perplexity divided by that of the base ({base.perplexity:.2f}), with its 95% interval:",
        f"{found.windows} windows of {found.window_tokens} tokens of the built-in text, {found.dtype} on"
        f" {found.device}.",
    ]  # fmt: skip
    for bits, rows in tables.items():
        lines += ["", f"## {bits} bits", "", f"| scalars that share a scale | {' | '.join(METHODS)} |"]
        lines += ["|---|" + "---:|" * len(METHODS)]
        lines += [f"| {group} | {' | '.join(map(format_cell, models))} |" for group, models in rows.items()]
    lines += [
        "",
        "The page is written by `python docs/quantisation.py CHECKPOINT`. One cell as a manifest, to compare it with",
        "other edits:",
        "",
        "```yaml",
        "version: 1",
        "base: {path: ./smollm2-135m-instruct, model: HuggingFaceTB/SmolLM2-135M-Instruct}",
        "edits:",
        f'  - {{op: round, tensors: "{TENSORS}", bits: 4, symmetric: false, block: [128, 128], clip: {{z: 5}}}}',
        "  - {op: protect, known: all}",
        "```",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    base = options.checkpoint.resolve()
    cells = [(bits, group, method) for bits in WIDTHS for group in GROUPS for method in METHODS]
    manifests = [write_manifest(base, GROUPS[group], bits, *METHODS[method]) for bits, group, method in cells]
    found = swsurgery.compare(
        manifests, windows=options.windows, window=options.window, device=options.device, reporter=Bar()
    )
    tables: dict[int, dict[str, list[Any]]] = {}
    for (bits, group, _), model in zip(cells, found.models[1:], strict=True):
        tables.setdefault(bits, {}).setdefault(group, []).append(model)
    Path(__file__).with_name("quantisation.md").write_text(render(tables, found))


if __name__ == "__main__":
    main()

"""Print the tables of docs/detection.md about massive activations: trained models, and random models.

    python benchmarks/detection_table.py FOLDER... [--random SEEDS]

Each folder contains a checkpoint with a tokenizer, such as those of benchmarks/train.py. `--random` builds models with
random weights of several families, depths and spreads, from transformers' own classes, and scans them too. A quotient
is the magnitude of a hidden state that persists, divided by the typical channel maximum of its layer, in the layer
where it is smallest.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import transformers

from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.model import load
from swsurgery.model.forward import LayeredModel
from swsurgery.scanning.activation_report import LargestActivation
from swsurgery.scanning.by_activations import SCAN_PROMPTS, open_with_prompts, scan_activations, scan_sequences
from swsurgery.scanning.persistence import KEPT, count_layers_to_last
from swsurgery.scanning.spikes import MADE, OUTSTANDING, LayerSpikes, Trace

COMMON = {"vocab_size": 1000, "tie_word_embeddings": False}
WIDE = {"hidden_size": 320, "num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 64}
NARROW = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
FAMILIES = {  # further settings
    "llama": {"intermediate_size": 512},
    "qwen3": {"intermediate_size": 512},
    "gemma3_text": {"intermediate_size": 512},
    "olmo2": {"intermediate_size": 512},
    "mixtral": {"intermediate_size": 256, "num_local_experts": 4},
    "gpt_neox": {"intermediate_size": 512},
    "gpt2": {},
}
SPREADS = (0.02, 0.1, 0.5)
LENGTHS = (10, 11, 8, 30, 2, 1)


def find_quotient(traces: Sequence[Trace]) -> float:
    """Find the largest quotient of a state that a layer makes and that persists."""
    found = 0.0
    for trace in traces:
        further = count_layers_to_last(len(trace.hidden))
        states = torch.stack(trace.hidden)
        quotients = states.abs() / (torch.tensor(trace.bars) / OUTSTANDING)[:, None, None]
        before = torch.zeros_like(states[0]) if trace.entry is None else trace.entry
        for layer in range(len(states) - further):
            here = states[layer : layer + further + 1]
            kept = (here / here[0] >= KEPT).all(0) & ((here[0] - before).abs() >= MADE * here[0].abs())
            found = (
                max(found, float(quotients[layer : layer + further + 1].amin(0)[kept].max())) if kept.any() else found
            )
            before = states[layer]
    return found


def describe_largest(one: LargestActivation | None) -> str:
    if one is None:
        return "-"
    return f"{one.value:,.0f} ({one.ratio:,.0f}), layer {one.layer}, channel {one.channel}, token {one.token}"


def scan_trained(folder: Path) -> str:
    checkpoint = open_checkpoint(folder)
    with load.hide_output():
        model, sequences, _, _ = open_with_prompts(checkpoint, SCAN_PROMPTS, "cpu", "whole", lambda line: None)
        watch = LayerSpikes(model)
        quotient = find_quotient(watch.run(sequences, ()))
    report = scan_activations(checkpoint, device="cpu")
    extremes = {one.bos: one for one in report.passport.find_extremes()} if report.passport else {}
    main = [one for one in report.activations if not one.side]
    main.sort(key=lambda one: -abs(one.value))
    first = main[0].cause.describe() if main and main[0].cause else "-"
    span = f"{main[0].layer} to {main[0].last}" if main else "-"
    cells = [
        folder.name,
        f"{quotient:.1f}",
        *(describe_largest(extremes.get(bos)) for bos in (True, False)),
        f"{len(main)} + {len(report.activations) - len(main)}",
        span,
        first,
        str(len(report.candidates)),
    ]
    return f"| {' | '.join(cells)} |"


def build_random(seeds: int) -> Iterator[tuple[str, transformers.PreTrainedModel]]:
    for family, settings in FAMILIES.items():
        for size, layers in ((NARROW, 6), (WIDE, 12)):
            given = {**COMMON, **size, **settings, "num_hidden_layers": layers}
            if family == "gpt2":
                given |= {"n_embd": size["hidden_size"], "n_layer": layers, "n_head": size["num_attention_heads"]}
            for spread in SPREADS:
                for seed in range(seeds):
                    config = transformers.AutoConfig.for_model(family, **given, initializer_range=spread)
                    torch.manual_seed(seed)
                    name = f"{family}, {layers} layers of {size['hidden_size']}"
                    yield name, transformers.AutoModelForCausalLM.from_config(config).eval()


def scan_random(seeds: int) -> Iterator[str]:
    quotients: dict[str, list[float]] = {}
    listed: dict[str, int] = {}
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(0, 1000, (length,), generator=generator).tolist() for length in LENGTHS]
    for name, model in build_random(seeds):
        with tempfile.TemporaryDirectory() as folder, load.hide_output():
            model.save_pretrained(folder)
            layered = LayeredModel(model, open_checkpoint(Path(folder)))
            quotients.setdefault(name, []).append(find_quotient(LayerSpikes(layered).run(sequences, ())))
            report = scan_sequences(layered, sequences)
            listed[name] = listed.get(name, 0) + len(report.activations) + len(report.candidates)
    for name, found in quotients.items():
        yield f"| {name} | {len(found)} | {sorted(found)[len(found) // 2]:.1f} | {max(found):.1f} | {listed[name]} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--random", type=int, default=0, metavar="SEEDS")
    options = parser.parse_args()
    if options.folders:
        print("| model | quotient | largest with BOS (medians) | without BOS | found | layers | made by | scalars |")
        print("|---|---:|---|---|---|---|---|---:|")
        for folder in options.folders:
            print(scan_trained(folder), flush=True)
    if options.random:
        print("\n| random model | models | median quotient | largest | found |\n|---|---:|---:|---:|---:|")
        for row in scan_random(options.random):
            print(row, flush=True)


if __name__ == "__main__":
    main()

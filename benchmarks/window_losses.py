"""Measure per-window losses for the coverage test of `scan --confirm`'s intervals.

Writes tests/assets/window_losses.json. For each window of a text, the file contains the mean negative log-likelihood of
the scored tokens: once for the stored model, and once with each of two super weights zeroed. The text is not stored.

    python benchmarks/window_losses.py MODEL_DIRECTORY wikitext2-test.txt
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import torch
import transformers

from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.checkpoint.projections import locate
from swsurgery.model import load, measure, tokens
from swsurgery.model.cutting import cut_windows
from swsurgery.model.protocol import Protocol

WINDOWS, TOKENS = 256, 256
SUPER_WEIGHTS = {"layer 11 [507, 1229]": (11, 507, 1229), "layer 2 [507, 90]": (2, 507, 90)}
OUTPUT = Path(__file__).parent.parent / "tests" / "assets" / "window_losses.json"


def main() -> None:
    """Run the model once over all windows: unedited, and with each super weight zeroed. Write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    arguments = parser.parse_args()
    text = arguments.text.read_text(encoding="utf-8")
    checkpoint = open_checkpoint(arguments.model)
    with load.hide_output():
        tokenizer = load.load_tokenizer(checkpoint.root)
        model = load.open_model(checkpoint, device="cpu", placement="whole")
    ids, bos = tokens.encode(tokenizer, text), tokens.get_bos_prefix(tokenizer)
    windows = cut_windows(ids, bos, Protocol(windows=WINDOWS, window=TOKENS))
    coordinates = [
        locate(checkpoint.config, checkpoint.shapes, layer=layer, row=row, col=col)
        for layer, row, col in SUPER_WEIGHTS.values()
    ]
    totals = measure.Totals([], 1 + len(coordinates))
    with load.convert_run_errors(model.device, streamed=False):
        # Eight windows at a time, to limit the memory for hidden states.
        for first in range(0, len(windows), 8):
            part = windows[first : first + 8]
            for outcomes in model.run(part, [{}, *({coordinate: 0.0} for coordinate in coordinates)]):
                totals.add_window(part[outcomes.sequence], outcomes)
            print(f"{first + len(part)} of {len(windows)} windows", flush=True)
    means = [[round(float(window.mean()), 6) for window in variant] for variant in totals.token_nll]
    document = {
        "made_by": "benchmarks/window_losses.py",
        "model": "SmolLM2-135M-Instruct as demo/convert_smollm2.py writes it, float32 on a CPU",
        "weights_sha256": {shard.path.name: digest(shard.path) for shard in checkpoint.shards.values()},
        "text": "WikiText-2, test split, the version with <unk> for rare words",
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "windows": len(windows),
        "window_tokens": TOKENS,
        "scored_tokens_per_window": len(windows[0]) - 1,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "mean_loss": dict(zip(["stored", *SUPER_WEIGHTS], means, strict=True)),
    }
    OUTPUT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def digest(path: Path) -> str:
    """Return the sha256 of a file. The file is read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()

"""Compare `swsurgery compare` of N manifests with N + 1 plain passes of transformers over the same text.

usage: python benchmarks/compare.py CHECKPOINT [--rounds N] [--windows N] [--window N]

Each measurement is a process of its own, from its start to its end. A plain pass loads the model with transformers in
float32 and computes the perplexity of each window; it is multiplied by N + 1. The manifests zero a scalar, zero a row,
clip a matrix and round all linear layers in blocks.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PLAIN = """
import sys
from pathlib import Path
import torch, transformers
folder, text, windows, window = sys.argv[1], Path(sys.argv[2]).read_text(), int(sys.argv[3]), int(sys.argv[4])
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
ids = transformers.AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
pieces = [ids[at : at + window] for at in range(0, len(ids) - window + 1, window)][:windows]
total = count = 0
with torch.no_grad():
    for piece in pieces:
        logits = model(torch.tensor([piece])).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(piece[1:]), reduction="sum"))
        count += len(piece) - 1
print(torch.tensor(total / count).exp().item())
"""

EDITS = {
    "scalar": [{"op": "zero", "layer": 11, "row": 507, "col": 1229}],
    "row": [{"op": "zero", "layer": 20, "row": 12}],
    "clip": [{"op": "clip", "tensors": "model.layers.15.mlp.down_proj.weight", "z": 5}],
    "round": [{"op": "round", "tensors": "model.layers.*_proj.weight", "bits": 8, "block": 128}],
}


def main() -> None:
    """Measure and print seconds and ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window", type=int, default=512)
    asked = parser.parse_args()
    sizes = [str(asked.windows), str(asked.window)]
    from swsurgery.model.text import read_built_in_text

    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        text.write_text(read_built_in_text())
        sets = {"scalar, row and clip": ["scalar", "row", "clip"], "four of round": ["round"] * 4, "all": list(EDITS)}
        for name, edits in EDITS.items():
            base = {"path": str(asked.checkpoint.resolve())}
            Path(folder, f"{name}.yaml").write_text(json.dumps({"version": 1, "base": base, "edits": edits}))
        plain = [sys.executable, "-c", PLAIN, str(asked.checkpoint), str(text), *sizes]
        for label, names in sets.items():
            files = [str(Path(folder, f"{name}.yaml")) for name in names]
            ours = [sys.executable, "-m", "swsurgery", "compare", *files, "--quiet", "--text", str(text)]
            ours += ["--windows", sizes[0], "--window", sizes[1], "--placement", "whole", "--device", "cpu"]
            pairs = [(measure(plain), measure(ours)) for _ in range(asked.rounds)]
            once, together = (statistics.median(column) for column in zip(*pairs, strict=True))
            count = len(names) + 1
            ratio = together / (once * count)
            print(f"{label}: compare {together:.1f} s, plain pass {once:.1f} s, {count} passes: ratio {ratio:.2f}")


def measure(words: list[str]) -> float:
    """Run a command and return its seconds."""
    begin = time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()

"""Compare whole processes: swsurgery's check with a plain script of transformers that computes the same perplexities.

usage: python benchmarks/start_up.py [FOLDER] [--device cpu|cuda] [--windows N] [--layer N] [--rounds N] [--cold]

With a model's FOLDER, `swsurgery apply` copies the model with one edit, and runs both. Without it, a Llama-shaped F16
checkpoint of random weights (13.5 GB) is edited in place, and `swsurgery check` runs it and its base, streamed. The
script loads the model, measures, changes the scalar, measures again, and saves the model if swsurgery makes a copy.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bytecode import compile_package
from page import describe_machine, replace_section
from run import SWSURGERY, write_checkpoint
from stream import forget_files, read_all

ROOT = Path(__file__).resolve().parent.parent
PASSAGE = ROOT / "swsurgery" / "model" / "passage.txt"

SCRIPT = """
import sys
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, passage, device, dtype, windows, layer, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=device).eval()
ids = tokenizer(Path(passage).read_text(), add_special_tokens=False)["input_ids"]
texts = [torch.tensor([ids[512 * n : 512 * n + 512]], device=device) for n in range(int(windows))]
@torch.no_grad()
def perplexity():
    losses = []
    for text in texts:
        log = model(input_ids=text).logits[0, :-1].float().log_softmax(-1)
        losses.append(-log.gather(-1, text[0, 1:, None]).double().mean())
    return float(torch.stack(losses).mean().exp())
print(perplexity())
with torch.no_grad():
    model.get_parameter(f"model.layers.{layer}.mlp.down_proj.weight")[17, 90] = 0.5
print(perplexity())
if output:
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
"""


def write_big(folder: Path, layer: int) -> None:
    """Write the random checkpoint with a tokenizer whose tokens are bytes, and edit it in place in `layer`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    write_checkpoint(folder, "13.5 GB")
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    manifest = write_manifest(folder, folder.parent, layer, hash_shard_of(folder, layer))
    subprocess.run([*SWSURGERY, "apply", str(manifest), "--in-place", "--check", "off"], check=True)


def hash_shard_of(folder: Path, layer: int) -> dict[str, str]:
    """Return the digest of the shard with the edited tensor, by the shard's name, which an edit in place needs."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = index["weight_map"][f"model.layers.{layer}.mlp.down_proj.weight"]
    with (folder / shard).open("rb") as file:
        return {shard: hashlib.file_digest(file, "sha256").hexdigest()}


def write_manifest(folder: Path, work: Path, layer: int, sha256: dict[str, str] | None = None) -> Path:
    """Write a manifest that changes one scalar of the down projection in `layer` of the model in `folder`."""
    manifest = work / "edit.yaml"
    edit = {"op": "set", "layer": layer, "row": 17, "col": 90, "value": 0.5}
    base = {"path": str(folder)} | ({"sha256": sha256} if sha256 else {})
    manifest.write_text(json.dumps({"version": 1, "base": base, "edits": [edit]}))
    return manifest


def run(command: list[str]) -> dict[str, float]:
    """Run a command. Return its seconds, and the processor seconds of it and of its children."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr or done.stdout)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - begin, "processor": processor}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--windows", type=int)
    parser.add_argument("--layer", type=int, default=11, help="where the edited scalar is; layers before it are equal")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="empty the page cache before each run (as root)")
    parser.add_argument("--work", type=Path, help="where the random checkpoint is written and kept")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    compile_package()
    small, windows = options.folder is not None, str(options.windows or (16 if options.folder else 4))
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        folder = options.folder or work / f"13.5GB-layer-{options.layer}"
        if not folder.exists():
            write_big(folder, options.layer)
        ours = [*SWSURGERY, "check", str(folder), "--placement", "streamed"]
        if small:
            ours = [*SWSURGERY, "apply", str(write_manifest(folder, work, options.layer)), "-o", str(work / "ours")]
        ours += ["--windows", windows, "--device", options.device]
        dtype = "float32" if small else "auto"
        saved = str(work / "theirs") if small else ""
        theirs = [sys.executable, "-c", SCRIPT, str(folder), str(PASSAGE), options.device, dtype, windows]
        theirs += [str(options.layer), saved]
        found: dict[str, list[dict[str, float]]] = {"swsurgery": [], "script": []}
        for number in range(options.rounds + 1):  # round 0 only warms up
            for name, command in (("script", theirs), ("swsurgery", ours)):
                for output in (work / "ours", work / "theirs"):
                    shutil.rmtree(output, ignore_errors=True)
                forget_files() if options.cold else read_all(folder)
                measured = run(command)
                print(f"  {name}: {measured}", flush=True)
                if number:
                    found[name].append(measured)
    what = folder.name if small else "13.5 GB, random weights, streamed"
    lines = [
        f"`{'apply' if small else 'check'}` of {what}; {windows} windows of 512 tokens; {options.device};",
        f"the edited scalar is in layer {options.layer} (layers before it are the same in both models);",
        f"page cache {'emptied' if options.cold else 'filled'} before each run; {options.rounds} rounds in turn.",
        describe_machine(),
        "",
        "| whole process | seconds | processor seconds | relative to the script | processor, relative |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, runs in found.items():
        cells = [name]
        for key in ("seconds", "processor"):
            cells.append(f"{statistics.median(run[key] for run in runs):.1f}")
        for key in ("seconds", "processor"):
            pairs = zip(runs, found["script"], strict=True)
            cells.append(f"{statistics.median(mine[key] / other[key] for mine, other in pairs):.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    print("\n".join(lines))
    if options.write:
        title = f"Whole processes: {what}, {options.device}{', page cache emptied' if options.cold else ''}"
        replace_section(title, lines, ROOT / "docs" / "benchmarks-streaming.md")


if __name__ == "__main__":
    main()

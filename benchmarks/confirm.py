"""Measure how long the causal test of `scan --confirm` takes by phase, beside a plain loop of transformers.

usage: python benchmarks/confirm.py [MODEL] [--device cpu|cuda] [--windows N] [--window N] [--nulls N] [--rounds N]
                                    [--other FOLDER] [--work DIR] [--no-rival] [--write]

MODEL is a directory with SmolLM2-135M-Instruct. Without it, a checkpoint of random weights in the shapes of
Gemma-3-270M (vocabulary 262,144) is written and used. --other is the folder of another version's source, which takes
turns with this one; its results are compared. The plain loop loads the model once, edits it in memory, and computes the
perplexities of the same variants without KL. Every program runs in its own process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from page import PAGE, replace_section

ROOT = Path(__file__).resolve().parent.parent
STREAMING = "benchmarks-streaming.md"
GEMMA = "Gemma-3-270M's shapes, random weights"
CANDIDATES = {
    GEMMA: [(2, 5, 6), (7, 100, 200), (11, 300, 1500), (15, 600, 40)],
    "SmolLM2-135M-Instruct": [(11, 507, 1229), (11, 507, 1487), (2, 507, 90), (2, 507, 430)],
}
"""Layer, row and col of the scalars that are tested in each model. Those of SmolLM2 are its super weights."""

WRITE_GEMMA = """
import sys, torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig
config = Gemma3TextConfig(
    vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
    num_key_value_heads=1, head_dim=256, tie_word_embeddings=True, max_position_embeddings=2048,
)
torch.manual_seed(0)
model = Gemma3ForCausalLM(config).to(torch.bfloat16)
with torch.no_grad():
    for layer, row, col in CANDIDATES:
        model.model.layers[layer].mlp.down_proj.weight[row, col] = 4.0
model.save_pretrained(sys.argv[1])
"""
MAKE_WINDOWS = """
import json, sys
from swsurgery.model import load, tokens
from swsurgery.model.text import read_built_in_text
folder, windows, window = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
from pathlib import Path
if (Path(folder) / "tokenizer.json").exists():
    ids = tokens.encode(load.load_tokenizer(Path(folder)), read_built_in_text())
else:
    import torch
    ids = torch.randint(3, 262144, (windows * window,), generator=torch.Generator().manual_seed(0)).tolist()
print(json.dumps([ids[at : at + window] for at in range(0, min(windows * window, len(ids) - window + 1), window)]))
"""
PREAMBLE = """
import json, resource, sys, time, warnings
begin = time.perf_counter()
warnings.simplefilter("ignore")
import torch, transformers
from pathlib import Path
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
folder, device, places, windows, variants, nulls = json.loads(Path(sys.argv[1]).read_text())
phases = {}
def mark(name):
    global begin
    if device == "cuda":
        torch.cuda.synchronize()
    now = time.perf_counter()
    phases[name] = phases.get(name, 0.0) + now - begin
    if name == "imports":
        phases["CPU time of imports"] = time.process_time()
    begin = now
"""
REPORT = """
cpu = globals().get("cpu", time.process_time())
print(json.dumps({
    "phases": phases, "cpu": cpu - phases.pop("CPU time of imports"), "result": result, "variants": variants,
    "ppl": found_ppl, "settings": globals().get("settings"),
    "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    "device": torch.cuda.max_memory_reserved() / 1e9 if device == "cuda" else 0.0,
    "machine": torch.cuda.get_device_name() if device == "cuda" else "", "torch": torch.__version__,
    "transformers": transformers.__version__,
}))
"""
OURS = """
from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.checkpoint.projections import locate
from swsurgery.model import load
from swsurgery.model.forward import LayeredModel
from swsurgery.scanning.report import Candidate
try:
    from swsurgery.scanning.causal_test import CausalOptions
    from swsurgery.scanning.confirm import confirm_scalars
    def run_test(progress):
        return confirm_scalars(model, candidates, windows, CausalOptions(nulls=nulls, progress=progress))
except ImportError:  # a version that takes the options one by one
    from swsurgery.scanning.confirm import confirm_windows
    def run_test(progress):
        return confirm_windows(model, candidates, windows, nulls=nulls, progress=progress)
from swsurgery.storage.dtypes import decode
mark("imports")
checkpoint = open_checkpoint(folder)
candidates = []
for layer, row, col in places:
    name = locate(checkpoint.config, checkpoint.shapes, layer=layer, row=row, col=col)
    stored = checkpoint.shards[checkpoint.weight_map[name.tensor]].read_scalar(*name)
    value = float(decode(checkpoint.get_info(name.tensor).dtype, stored))
    candidates.append(Candidate(name, layer, row, col, None, value, score=1.0, rank=1))
class Phases:
    phase = "other"
    def start(self, total, unit, label):
        mark("other")
        self.phase = "layers"
    def advance(self, n): pass
    def relabel(self, label):
        if label.startswith("sequence") and self.phase == "layers":
            mark("layers")
            self.phase = "scores"
    def close(self):
        if self.phase != "other":
            mark(self.phase)
        self.phase = "other"
run, variants, found_ppl = LayeredModel.run, [], []
def note(self, sequences, given=({},), **options):
    variants.extend([[[name.tensor, name.index, value] for name, value in one.items()] for one in given])
    return run(self, sequences, given, **options)
LayeredModel.run = note
from swsurgery.model import measure
make_totals, totals = measure.Totals, []
def keep(*given, **options):
    totals.append(make_totals(*given, **options))
    return totals[-1]
measure.Totals = keep
with load.hide_output():
    model = load.open_model(checkpoint, device=device)
    mark("loading")
    found = run_test(Phases())
mark("other")
try:
    from swsurgery.model.figures import LIMITS
    from swsurgery.model.forward import GPU_FACTOR, TOKENS_AT_ONCE
    limits, vocabulary = LIMITS[device], model.model.config.get_text_config().vocab_size
    block = min(max(1, limits.base // vocabulary), max(map(len, windows)))
    settings = {
        "layer": TOKENS_AT_ONCE * (GPU_FACTOR if device == "cuda" else 1), "block": block,
        "variants": max(1, limits.read // (vocabulary * block)),
        "estimated": sum(len(getattr(one, "estimated", ())) for one in totals),
    }
except ImportError:
    settings = None
result = [found.to_json(), [trial.to_json() for trial in found.trials], [s.to_json() for s in found.joint_sets]]
found_ppl = [found.base_perplexity] + [found.base_perplexity * trial.alone.ratio for trial in found.trials]
"""
RIVAL = """
mark("imports")
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
mark("loading")
result, found_ppl = None, []
with torch.no_grad():
    for variant in variants:
        kept = []
        for tensor, index, value in variant:
            weight = model.get_parameter(tensor)
            kept.append((weight, tuple(index), weight[tuple(index)].clone()))
            weight[tuple(index)] = value
        loss = 0.0
        for ids in windows:
            tokens = torch.tensor([ids], device=device)
            logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
            loss += torch.nn.functional.cross_entropy(logits.float(), tokens[0, 1:], reduction="sum").double().item()
        found_ppl.append(float(torch.tensor(loss / sum(len(ids) - 1 for ids in windows)).double().exp()))
        for weight, index, old in reversed(kept):
            weight[index] = old
mark("layers and scores")
"""
LIMIT = """
cpu = time.process_time()
clock = time.perf_counter if device == "cuda" else time.process_time
weight = model.model.get_output_embeddings().weight
rows = torch.randn(256, weight.shape[1], device=weight.device, dtype=weight.dtype)
def measure_products(times):
    start = clock()
    for _ in range(times):
        rows @ weight[:4096].T
    mark("rate")
    return clock() - start
measure_products(3)
rate = 20 * 2 * rows.numel() * 4096 / measure_products(20)
del phases["rate"]
phases["head's products alone"] = 2 * weight.numel() * sum(map(len, windows)) * len(variants) / rate
"""


def run_script(script: str, job: list, work: Path, source: Path | None) -> dict:
    """Run a script in a process of its own, with the package in `source` if it is given."""
    path = work / "job.json"
    path.write_text(json.dumps(job))
    env = dict(os.environ)
    if source is not None:
        env["PYTHONPATH"] = os.pathsep.join([str(source), *filter(None, [env.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, env=env, cwd=work)
    if done.returncode:
        raise SystemExit(done.stderr or done.stdout)
    return json.loads(done.stdout.splitlines()[-1])


def prepare(options: argparse.Namespace) -> tuple[str, Path, list[list[int]]]:
    """Return the name of the model, its folder, and the windows of token ids."""
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    name, folder = GEMMA, work / "gemma-3-270m-shape"
    if options.model:
        name, folder = "SmolLM2-135M-Instruct", options.model.resolve()
    elif not (folder / "config.json").exists():
        script = WRITE_GEMMA.replace("CANDIDATES", repr(CANDIDATES[GEMMA]))
        subprocess.run([sys.executable, "-c", script, str(folder)], check=True, capture_output=True)
    command = [sys.executable, "-c", MAKE_WINDOWS, str(folder), str(options.windows), str(options.window)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    made = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)
    return name, folder, json.loads(made.stdout.splitlines()[-1])


def round_figures(value: object) -> object:
    """Round every float to the six digits that JSON documents contain."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: round_figures(item) for key, item in value.items()}
    return [round_figures(item) for item in value] if isinstance(value, list) else value


def keep_common(value: object, other: object) -> object:
    """Leave out the keys of `value` that `other` does not have, because only one of two versions reports them."""
    if isinstance(value, dict) and isinstance(other, dict):
        return {key: keep_common(item, other[key]) for key, item in value.items() if key in other}
    if isinstance(value, list) and isinstance(other, list) and len(value) == len(other):
        return [keep_common(item, theirs) for item, theirs in zip(value, other, strict=True)]
    return value


def sum_phases(run: dict) -> float:
    """Return the seconds after the imports and without the limit."""
    return sum(value for key, value in run["phases"].items() if key not in ("imports", "head's products alone"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--nulls", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--other", type=Path, help="the source of another version, to compare with")
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    parser.add_argument("--no-rival", action="store_true")
    parser.add_argument("--write", action="store_true", help="write the table into docs/benchmarks-streaming.md")
    options = parser.parse_args()
    name, folder, windows = prepare(options)
    work = options.work.resolve()
    runs: dict[str, list[dict]] = {}
    variants: list = []
    for _ in range(options.rounds):
        sources = {"swsurgery": ROOT} | ({"swsurgery, before": options.other.resolve()} if options.other else {})
        for who, source in sources.items():
            job = [str(folder), options.device, CANDIDATES[name], windows, [], options.nulls]
            run = run_script(PREAMBLE + OURS + LIMIT + REPORT, job, work, source)
            runs.setdefault(who, []).append(run)
            variants = run["variants"]
            print(f"  {who}: {run['phases']}, {run['memory']:.2f} GB", flush=True)
        if not options.no_rival:
            job = [str(folder), options.device, [], windows, variants, 0]
            run = run_script(PREAMBLE + RIVAL + REPORT, job, work, None)
            runs.setdefault("transformers: plain loop", []).append(run)
            print(f"  transformers: {run['phases']}, {run['memory']:.2f} GB", flush=True)
    first = runs["swsurgery"][0]
    lines = list_lines(name, windows, len(variants), options, runs)
    if options.other:
        lines += ["The line `before` is the version that `--other` names.", ""]
        mine, theirs = first["result"], runs["swsurgery, before"][0]["result"]
        same = round_figures(keep_common(mine, theirs)) == round_figures(keep_common(theirs, mine))
        lines.append(f"All common figures of both versions are {'' if same else 'NOT '}identical to six digits.")
    if not options.no_rival:
        theirs = runs["transformers: plain loop"][0]["ppl"]
        nearest = [min(abs(one / other - 1) for other in theirs) for one in first["ppl"]]
        lines.append(f"The perplexities of swsurgery and of the plain loop differ by at most {max(nearest):.1e}.")
    print("\n".join(lines))
    if options.write:
        title = f"Confirming candidates of {name.split(',')[0]} on {'a GPU' if first['machine'] else 'a CPU'}"
        used = " ".join(
            f"--{key} {getattr(options, key)}" for key in ("device", "windows", "window", "nulls", "rounds")
        )
        lines = [f"Made by `python benchmarks/confirm.py {used}`.", "", *lines]
        replace_section(title, lines, PAGE.with_name(STREAMING))


def list_lines(
    name: str, windows: list[list[int]], variants: int, options: argparse.Namespace, runs: dict[str, list[dict]]
) -> list[str]:
    """Return the lines of the table."""
    first = runs["swsurgery"][0]
    machine = first["machine"] or f"{os.cpu_count()} cores"
    kind = "" if first["machine"] else " of CPU time"
    settings = first["settings"]
    limit = statistics.median(run["phases"]["head's products alone"] for run in runs["swsurgery"])
    lines = [
        f"{name}, {len(CANDIDATES[name])} candidates, {len(windows)} windows of {options.window} tokens, {variants}",
        f"variants, float32. {machine}, torch {first['torch']}, transformers {first['transformers']}.",
        f"{options.rounds} rounds in turn, medians in seconds. The sum and the CPU time leave out imports, and include",
        "a little other work.",
        f"The products of the output matrix alone take {limit:.1f} s{kind} at the rate of products of 256 rows",
        f"by 4,096 columns. The load average of the machine at the end was {os.getloadavg()[0]:.0f}.",
        "",
        f"A call of a layer gets at most {settings['layer']:,} tokens. The head computes at most {settings['block']}",
        f"tokens of {settings['variants']} variants at once. Losses of {settings['estimated']} variants are estimates.",
        "",
        "| what | imports | loading | layers | scores | sum | CPU time | main memory | device memory |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for who, found in runs.items():
        cells = []
        for key in ("imports", "loading", "layers", "scores"):
            key = "layers and scores" if key == "scores" and "transformers" in who else key
            values = [run["phases"][key] for run in found if key in run["phases"]]
            cells.append(f"{statistics.median(values):.1f}" if values else "")
        cells += [f"{statistics.median(map(sum_phases, found)):.1f}"]
        cells += [f"{statistics.median(run['cpu'] for run in found):.1f}"]
        memory, device = (max(run[key] for run in found) for key in ("memory", "device"))
        lines.append(f"| {who} | {' | '.join(cells)} | {memory:.2f} GB | {device:.2f} GB |")
    return [*lines, ""]


if __name__ == "__main__":
    main()

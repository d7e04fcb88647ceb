"""Compare `swsurgery compare` of three manifests on a task with four runs of lm-eval, one for each model.

usage: python benchmarks/tasks.py MODEL [--device cpu|cuda] [--task NAME] [--tasks-dir DIR] [--limit N] [--rounds N]
                                  [--batch N] [--write]

MODEL is a directory with SmolLM2-135M-Instruct. The extra `tasks` must be installed. The three edited checkpoints are
written first. In each round, lm-eval runs on each of the four models, and then `compare` on all of them. On a CPU the
figure is processor time, because other programs may share the machine; on a GPU it is the time from start to end. The
default task is the cloze task of benchmarks/cloze. `--task mmlu_shipped` is a task of the 282 questions of MMLU that
lm-eval ships. The scores of both sides must be equal. On a GPU, run:

    python benchmarks/tasks.py MODEL --device cuda --task mmlu_shipped --batch 16 --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from page import describe_machine, replace_section

ROOT = Path(__file__).resolve().parent.parent
CLOZE = "swsurgery_cloze"
EDITS = {
    "zero": {"op": "zero", "layer": 11, "row": 507, "col": 1229},
    "half": {"op": "scale", "layer": 11, "row": 507, "col": 1229, "factor": 0.5},
    "nine": {"op": "zero", "layer": 9, "row": 507, "col": 200},
}
TARGET = 0.75


def main() -> None:
    """Measure, and print seconds and ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--task", default=CLOZE)
    parser.add_argument("--tasks-dir", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1, help="batch size of lm-eval")
    parser.add_argument("--write", action="store_true", help="write the figures into docs/tasks.md")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tasks_dir = asked.tasks_dir or prepare_task(asked.task, folder)
        manifests = write_manifests(asked.model.resolve(), folder)
        models = [asked.model.resolve(), *(apply(manifest, folder) for manifest in manifests)]
        rows = []
        for _ in range(asked.rounds):
            theirs = [measure(make_harness_command(asked, tasks_dir, model)) for model in models]
            ours, output = measure(make_own_command(asked, tasks_dir, manifests))
            refuse_other_scores(output, [output for _, output in theirs], asked.task)
            rows.append((sum(seconds for seconds, _ in theirs), ours))
            print(f"four runs of lm-eval {rows[-1][0]:.1f} s, compare {ours:.1f} s", flush=True)
    report(asked, rows, json.loads(output)["tasks"])


def prepare_task(task: str, folder: Path) -> Path:
    """Return the directory of a task's file, and write the file of the questions that lm-eval ships."""
    if task != "mmlu_shipped":
        return ROOT / "benchmarks" / "cloze"
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import task_files

    task_files.write_shipped_questions(folder / "tasks")
    return folder / "tasks"


def write_manifests(model: Path, folder: Path) -> list[Path]:
    """Write one manifest for each of EDITS."""
    paths = []
    for name, edit in EDITS.items():
        paths.append(folder / f"{name}.yaml")
        paths[-1].write_text(json.dumps({"version": 1, "base": {"path": str(model)}, "edits": [edit]}))
    return paths


def apply(manifest: Path, folder: Path) -> Path:
    """Write the edited checkpoint."""
    output = folder / manifest.stem
    words = [sys.executable, "-m", "swsurgery", "apply", str(manifest), "-o", str(output), "--check", "off", "--quiet"]
    subprocess.run(words, check=True, capture_output=True, cwd=ROOT)
    return output


def make_harness_command(asked: argparse.Namespace, tasks_dir: Path, model: Path) -> list[str]:
    """Return the command of lm-eval, with float32 as `compare` has it. It prints its results as JSON."""
    code = (
        "import json, sys; from lm_eval import simple_evaluate; from lm_eval.tasks import TaskManager\n"
        "model, folder, task, device, batch, limit = sys.argv[1:]\n"
        "manager = TaskManager(include_path=folder, include_defaults=False)\n"
        "found = simple_evaluate('hf', model_args={'pretrained': model, 'dtype': 'float32'}, tasks=[task],"
        " device=device, batch_size=int(batch), limit=int(limit) or None, task_manager=manager)\n"
        "print(json.dumps(found['results']))\n"
    )
    numbers = [str(asked.batch), str(asked.limit or 0)]
    return [sys.executable, "-c", code, str(model), str(tasks_dir), asked.task, asked.device, *numbers]


def make_own_command(asked: argparse.Namespace, tasks_dir: Path, manifests: list[Path]) -> list[str]:
    """Return the command of swsurgery, which also measures the perplexity of a few tokens."""
    words = [sys.executable, "-m", "swsurgery", "compare", *map(str, manifests), "--tasks", asked.task]
    words += ["--tasks-dir", str(tasks_dir), "--device", asked.device, "--placement", "whole", "--json", "--quiet"]
    words += ["--windows", "1", "--window", "16"]
    return words if asked.limit is None else [*words, "--limit", str(asked.limit)]


def measure(words: list[str]) -> tuple[float, str]:
    """Run a command, and return its seconds and its output. On a CPU, the seconds are processor time."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return (time.perf_counter() - began if "cuda" in " ".join(words) else used), done.stdout


def refuse_other_scores(ours: str, theirs: list[str], task: str) -> None:
    """Stop if an accuracy differs between swsurgery and lm-eval."""
    for metric in json.loads(ours)["tasks"]["results"]:
        for score, output in zip(metric["scores"], theirs, strict=True):
            other = json.loads(output.strip().splitlines()[-1])[task][f"{metric['metric']},{metric['filter']}"]
            if abs(score["value"] - other) > 1e-5:
                raise SystemExit(f"{metric['metric']} differs for {score['model']}: {score['value']}, lm-eval {other}")


def report(asked: argparse.Namespace, rows: list[tuple[float, float]], tasks: dict[str, object]) -> None:
    """Print the medians and their ratio, and write them into the page if that was asked for."""
    theirs, ours = (statistics.median(column) for column in zip(*rows, strict=True))
    kind = "seconds" if "cuda" in asked.device else "seconds of processor time"
    line = (
        f"| {asked.task}, {tasks['requests']:,} requests as {tasks['sequences']:,} inputs | {asked.device} | "
        f"{theirs:.1f} | {ours:.1f} | {ours / theirs:.2f}x |"
    )
    print(f"{line}\nratio {ours / theirs:.2f}, target at most {TARGET}")
    if asked.write:
        head = f"| task | device | four runs of lm-eval, {kind} | `compare`, {kind} | ratio |"
        made = f"Made by `python benchmarks/tasks.py MODEL --write`: medians of {asked.rounds}. {describe_machine()}"
        lines = [made, "", head, "| --- | --- | --- | --- | --- |", line]
        replace_section("Measured time", lines, ROOT / "docs" / "tasks.md")


if __name__ == "__main__":
    main()

"""Compare `swsurgery compare` of three manifests on tasks with four runs of lm-eval, one for each model.

usage: python benchmarks/tasks.py MODEL [--device cpu|cuda] [--task NAME]... [--tasks-dir DIR] [--limit N] [--rounds N]
                                  [--batch N] [--write]

MODEL is a directory with SmolLM2-135M-Instruct. The extra `tasks` must be installed; `make tasks` installs it and then
runs this program. The three edited checkpoints are written first. In each round, lm-eval runs on each of the four
models, and then `compare` on all of them. On a CPU the figure is processor time, because other programs may share the
machine; on a GPU it is the time from start to end. The tasks are the cloze task of benchmarks/cloze and mmlu_shipped,
the 282 questions of MMLU that lm-eval ships, of which a CPU runs the first 16. The scores of both sides must be equal.
On a GPU, run:

    python benchmarks/tasks.py MODEL --device cuda --batch 16
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
import textwrap
import time
from pathlib import Path
from typing import Any, NamedTuple

from page import describe_machine, replace_section

ROOT = Path(__file__).resolve().parent.parent
TASKS = ("swsurgery_cloze", "mmlu_shipped")
MMLU_ON_CPU = 16
"""Number of questions of MMLU that a CPU runs if `--limit` is not given."""

EDITS = {
    "zero": {"op": "zero", "layer": 11, "row": 507, "col": 1229},
    "half": {"op": "scale", "layer": 11, "row": 507, "col": 1229, "factor": 0.5},
    "nine": {"op": "zero", "layer": 9, "row": 507, "col": 200},
}
TARGET = 0.75


def main() -> None:
    """Measure, and print seconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--task", action="append", help="a task; repeat the option for several")
    parser.add_argument("--tasks-dir", type=Path)
    parser.add_argument("--limit", type=int, help="run the first N items of each task; 0 runs all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1, help="batch size of lm-eval")
    parser.add_argument("--write", action="store_true", help="write the figures into docs/tasks.md")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifests = write_manifests(asked.model.resolve(), folder)
        models = [asked.model.resolve(), *(apply(manifest, folder) for manifest in manifests)]
        lines = []
        for task in asked.task or TASKS:
            tasks_dir = asked.tasks_dir or prepare_task(task, folder)
            lines.append(measure_task(Case(asked, task, tasks_dir, choose_limit(asked, task)), models, manifests))
    if asked.write:
        write_page(asked, lines)


class Case(NamedTuple):
    """One task to measure: the arguments, its name, the directory of its file, and how many items run (0: all)."""

    asked: argparse.Namespace
    task: str
    tasks_dir: Path
    limit: int


def choose_limit(asked: argparse.Namespace, task: str) -> int:
    """Return how many items of a task run; 0 stands for all."""
    if asked.limit is not None:
        return int(asked.limit)
    return MMLU_ON_CPU if task == "mmlu_shipped" and asked.device == "cpu" else 0


def measure_task(case: Case, models: list[Path], manifests: list[Path]) -> str:
    """Run both sides in rounds, and return a row of the table with the medians."""
    rows = []
    for _ in range(case.asked.rounds):
        theirs = [measure(make_harness_command(case, model)) for model in models]
        ours, output = measure(make_own_command(case, manifests))
        refuse_other_scores(output, [output for _, output in theirs], case.task)
        rows.append((sum(seconds for seconds, _ in theirs), ours))
        print(f"{case.task}: four runs of lm-eval {rows[-1][0]:.1f} s, compare {ours:.1f} s", flush=True)
    line = format_row(case, rows, json.loads(output)["tasks"])
    print(line, flush=True)
    return line


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


def make_harness_command(case: Case, model: Path) -> list[str]:
    """Return the command of lm-eval, with float32 as `compare` has it. It prints its results as JSON."""
    code = (
        "import json, sys; from lm_eval import simple_evaluate; from lm_eval.tasks import TaskManager\n"
        "model, folder, task, device, batch, limit = sys.argv[1:]\n"
        "manager = TaskManager(include_path=folder, include_defaults=False)\n"
        "found = simple_evaluate('hf', model_args={'pretrained': model, 'dtype': 'float32'}, tasks=[task],"
        " device=device, batch_size=int(batch), limit=int(limit) or None, task_manager=manager)\n"
        "print(json.dumps(found['results']))\n"
    )
    device, numbers = case.asked.device, [str(case.asked.batch), str(case.limit)]
    return [sys.executable, "-c", code, str(model), str(case.tasks_dir), case.task, device, *numbers]


def make_own_command(case: Case, manifests: list[Path]) -> list[str]:
    """Return the command of swsurgery, which also measures the perplexity of a few tokens."""
    words = [sys.executable, "-m", "swsurgery", "compare", *map(str, manifests), "--tasks", case.task]
    words += ["--tasks-dir", str(case.tasks_dir), "--device", case.asked.device, "--placement", "whole"]
    words += ["--json", "--quiet", "--windows", "1", "--window", "16"]
    return words if not case.limit else [*words, "--limit", str(case.limit)]


def measure(words: list[str]) -> tuple[float, str]:
    """Run a command, and return its seconds and its output. On a CPU, the seconds are processor time."""
    places = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": places, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
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


def format_row(case: Case, rows: list[tuple[float, float]], tasks: dict[str, Any]) -> str:
    """Return a row of the table: the task, the medians of both sides, the median of the ratios and their range."""
    theirs, ours = (statistics.median(column) for column in zip(*rows, strict=True))
    ratios = sorted(mine / other for other, mine in rows)
    items = f"the first {case.limit} items" if case.limit else f"{tasks['results'][0]['items']:,} items"
    cells = [
        f"{case.task}, {items}",
        f"{tasks['requests']:,}",
        f"{tasks['sequences']:,}",
        f"{theirs:.1f}",
        f"{ours:.1f}",
    ]
    cells.append(f"{statistics.median(ratios):.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    return f"| {' | '.join(cells)} |"


def write_page(asked: argparse.Namespace, rows: list[str]) -> None:
    """Write the table into docs/tasks.md."""
    kind = "seconds" if "cuda" in asked.device else "seconds of processor time"
    threads = " Both sides compute in one thread." if os.environ.get("OMP_NUM_THREADS") == "1" else ""
    made = (
        f"Made by `{'make tasks' if asked.device == 'cpu' else 'benchmarks/tasks.py --device cuda'}` on "
        f"SmolLM2-135M-Instruct, in {kind}: medians of {asked.rounds} rounds, and the range of the ratios. The scores "
        f"of both sides are equal. The target is a ratio of at most {TARGET}. The tasks are small, so starting the "
        f"programs is a large part of these figures. {describe_machine()}{threads}"
    )
    head = "| task | requests | inputs | four runs of lm-eval | `compare` with three manifests | ratio |"
    lines = [*textwrap.wrap(made, 120, break_on_hyphens=False), "", head, "|" + " --- |" * 6, *rows]
    device = "CPU" if asked.device == "cpu" else "GPU"
    replace_section(f"Measured time on a {device}", lines, ROOT / "docs" / "tasks.md")


if __name__ == "__main__":
    main()

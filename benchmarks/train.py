"""Train small language models with massive activations, on which the thresholds of `scan` can be calibrated.

    python benchmarks/train.py --out FOLDER [--minutes 8.5] [--models llama-1 mixtral-1 ...]

The text is the Python source code of the installed packages; nothing is downloaded. All models are trained at the same
time on one GPU, each in a process of its own, and the learning rate of each reaches its end when the time is over.
FOLDER gets a checkpoint for each model and train.json: loss curves, perplexity of held-out text with and without BOS,
and the largest activation of each layer. The command needs torch, transformers, tokenizers and numpy.
With --steps instead of --minutes the schedule does not depend on the speed of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

VOCABULARY, CONTEXT, WINDOWS, TEXT_BYTES = 4096, 512, 64, 240_000_000
TINY_VOCABULARY, TINY_CONTEXT, TINY_WINDOWS, TINY_TEXT_BYTES = 384, 32, 2, 200_000
RETRY = 0.35
"""A model whose process fails is started again without compilation if more than this part of the time is left."""


@dataclass
class Job:
    """One model and the process that trains it."""

    name: str
    deadline: float
    process: subprocess.Popen[bytes]
    plain: bool
    begun: float = field(default_factory=time.time)


def main() -> int:
    """Make the text, train the models and write train.json. Return 1 if any model failed."""
    arguments = parse_arguments()
    if arguments.one:
        train_here(arguments)
        return 0
    begun = time.time()
    end = begun + 60 * arguments.minutes
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.corpus.mkdir(parents=True, exist_ok=True)
    # The schedule of each model ends before `end`: the rest of the time is for saving and measuring.
    deadline = end - min(30.0, 0.15 * (end - begun))
    waves = [arguments.models[at : at + arguments.jobs] for at in range(0, len(arguments.models), arguments.jobs)]
    failed: list[str] = []
    for number, wave in enumerate(waves):
        now = time.time()
        last = now + (deadline - now) / (len(waves) - number)
        jobs = [start_job(name, last, arguments, plain=arguments.plain) for name in wave]
        try:
            prepare_corpus(arguments)
            failed += wait_for_jobs(jobs, arguments)
        finally:
            for job in jobs:
                job.process.terminate()
    write_report(arguments, failed, time.time() - begun)
    return 1 if failed else 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line, and apply the defaults that depend on --tiny."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoints and train.json")
    parser.add_argument("--corpus", type=Path, help="folder for the tokenized text; default: FOLDER/corpus")
    parser.add_argument(
        "--source", type=Path, action="append", help="folder of Python source code; default: the installed packages"
    )
    parser.add_argument("--minutes", type=float, default=8.5, help="time for everything")
    parser.add_argument("--steps", type=int, help="number of steps of each model; --minutes is then no limit")
    parser.add_argument("--models", nargs="+", help="names of RECIPES in train_models.py; default: all")
    parser.add_argument("--jobs", type=int, default=16, help="number of models that are trained at the same time")
    parser.add_argument("--plain", action="store_true", help="compile nothing")
    parser.add_argument("--tiny", action="store_true", help="tiny models and little text, to try the command")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "DEADLINE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.corpus = arguments.corpus or arguments.out / "corpus"
    if not arguments.one:
        from train_models import RECIPES

        arguments.models = arguments.models or list(RECIPES)
        if unknown := set(arguments.models) - set(RECIPES):
            parser.error(f"unknown models: {', '.join(sorted(unknown))} (known: {', '.join(RECIPES)})")
    return arguments


def prepare_corpus(arguments: argparse.Namespace) -> None:
    """Make the tokenized text, unless the folder already has it, and print its size and digest."""
    if (arguments.corpus / "corpus.json").exists():
        return
    from train_corpus import list_sources, make_corpus

    begun = time.time()
    corpus = make_corpus(
        arguments.corpus,
        arguments.source or list_sources(),
        vocabulary=TINY_VOCABULARY if arguments.tiny else VOCABULARY,
        limit=TINY_TEXT_BYTES if arguments.tiny else TEXT_BYTES,
    )
    print(f"text in {time.time() - begun:.0f} s: {json.dumps(asdict(corpus))}", flush=True)


def start_job(name: str, deadline: float, arguments: argparse.Namespace, *, plain: bool) -> Job:
    """Start a process that trains the model `name`. Its output goes to the file NAME.log."""
    command = [sys.executable, __file__, "--out", str(arguments.out), "--corpus", str(arguments.corpus)]
    command += ["--one", name, str(deadline)]
    command += ["--steps", str(arguments.steps)] if arguments.steps else []
    command += ["--tiny"] if arguments.tiny else []
    command += ["--plain"] if plain else []
    threads = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "2", "TOKENIZERS_PARALLELISM": "false"}
    with (arguments.out / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | threads)
    return Job(name, deadline, process, plain)


def wait_for_jobs(jobs: list[Job], arguments: argparse.Namespace) -> list[str]:
    """Wait for all processes, start those that failed early once more, and return the names of those that failed."""
    failed = []
    while jobs:
        job = jobs.pop(0)
        code = job.process.poll()
        if code is None:
            jobs.append(job)
            time.sleep(0.2)
        elif code == 0:
            print(f"{job.name}: done after {time.time() - job.begun:.0f} s", flush=True)
        else:
            text = (arguments.out / f"{job.name}.log").read_text(encoding="utf-8", errors="replace")
            print(f"{job.name}: exit code {code}; the last lines are\n{text[-1500:]}", flush=True)
            left = (job.deadline - time.time()) / (job.deadline - job.begun)
            if job.plain or left < RETRY:
                failed.append(job.name)
            else:
                jobs.append(start_job(job.name, job.deadline, arguments, plain=True))
    return failed


def train_here(arguments: argparse.Namespace) -> None:
    """Train one model in this process."""
    import torch
    from train_one import Settings, train_model

    torch.set_num_threads(2)
    name, deadline = arguments.one
    tiny = arguments.tiny
    settings = Settings(
        corpus=arguments.corpus,
        output=arguments.out,
        deadline=float(deadline),
        steps=arguments.steps,
        context=TINY_CONTEXT if tiny else CONTEXT,
        windows=TINY_WINDOWS if tiny else WINDOWS,
        vocabulary=TINY_VOCABULARY if tiny else VOCABULARY,
        tiny=tiny,
        plain=arguments.plain,
    )
    train_model(name, settings)


def write_report(arguments: argparse.Namespace, failed: list[str], seconds: float) -> None:
    """Collect the reports of the models in train.json, and print one line for each."""
    models = []
    for name in arguments.models:
        path = arguments.out / name / "train.json"
        if name in failed or not path.exists():
            continue
        model = json.loads(path.read_text(encoding="utf-8"))
        models.append(model)
        for case in ("with_bos", "without_bos"):
            ratios = " ".join(f"{layer['ratio']:.0f}" for layer in model[case]["layers"])
            print(f"{name} {case}: perplexity {model[case]['perplexity']:.2f}, activations {ratios}")
        print(f"{name}: {model['steps']} steps of {model['milliseconds_per_step']} ms, loss {model['loss'][-1][1]}")
    report = {"seconds": round(seconds), "failed": failed, "models": models}
    (arguments.out / "train.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{len(models)} models in {seconds:.0f} s; failed: {', '.join(failed) or 'none'}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

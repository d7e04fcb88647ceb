"""Measure how soon each command prints its first byte, and how long it then prints nothing.

usage: python benchmarks/first_output.py [--model DIR] [--rounds N] [--limit SECONDS] [--write]

Standard output and standard error are pipes, as in a CI job. The base is a copy of the demo's model, SmolLM2-135M, and
the page cache is warm. Other work on the machine makes a command slower, so the round with the least processor time
until the first byte counts. That time is close to what an idle machine takes, but other work lengthens it too, and
waiting for the disk is not part of it. On a busy machine, only processor time is reported. A command that runs the
model is stopped after --limit seconds. --write replaces the section "First output" of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bytecode import compile_package
from page import describe_machine, replace_section

MODEL = Path.home() / ".cache/swsurgery-demo/smollm2-135m-instruct"
EDIT = "version: 1\nbase: {path: base}\nedits:\n  - {op: zero, layer: 11, row: 507, col: 1229}\n"
SHORT = "--windows 1 --window 64"
COMMANDS = (
    "--help",
    "lookup",
    "lookup llama-7b",
    "schema",
    "lint edit.yaml",
    "inspect base",
    "inspect base --tensor model.layers.11.mlp.down_proj.weight --at 507,1229",
    "preflight base",
    "pin edit.yaml --dry-run",
    "recipe base --for torchao --model smollm2-135m-instruct",
    "export patched --format sparse -o new",
    "apply edit.yaml --dry-run",
    "apply edit.yaml -o new --check off",
    "revert patched -o new",
    "diff base patched",
    "verify patched",
    "verify patched --base base",
    "verify base --known --model smollm2-135m-instruct",
    "verify base --values",
    "verify base --complete",
    "publish patched org/name --dry-run",
    "sign patched --key key.pem --signature new",
    "scan base --method weights",
    "verify base --complete --transformers",
    f"apply edit.yaml -o new {SHORT}",
    f"check patched {SHORT}",
    "scan base",
    f"scan base --confirm {SHORT}",
    f"sweep edit.yaml --factors 0,2 {SHORT}",
    f"compare edit.yaml {SHORT}",
)
"""The commands. `new` is an output, which is removed before each run."""


IDLE_LOAD = 1.5
"""Highest load of two cores at which seconds are reported. On a busier machine, other programs make them longer."""


@dataclass(frozen=True)
class Timing:
    """Seconds until the first byte, the longest silence after it, and the whole run; `ended` is False if stopped.

    `processor` is the processor time in seconds that the process had used when the first byte arrived.
    """

    first: float
    processor: float
    silence: float
    total: float
    ended: bool


def measure(words: list[str], folder: Path, limit: float) -> Timing:
    """Run a command, and stop it after `limit` seconds. Raises SystemExit if it reports bad input or a bug."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "swsurgery", *words],
        cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    times, said, ended, processor = [], b"", False, 0.0
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (left := begin + limit - time.perf_counter()) > 0:
            if not selector.select(left):
                continue
            data = os.read(process.stdout.fileno(), 1 << 16)
            if not data:
                ended = True
                break
            times.append(time.perf_counter() - begin)
            processor = processor or read_processor_time(process.pid)
            said += data
    total = time.perf_counter() - begin
    if not ended:
        process.terminate()
    process.stdout.close()
    if process.wait() not in (0, 1) and ended:
        raise SystemExit(f"{' '.join(words)}: {said.decode()}")
    moments = [*times, total]
    silence = max((after - before for before, after in zip(times, moments[1:], strict=True)), default=0.0)
    return Timing(times[0] if times else total, processor, silence, total, ended)


def read_processor_time(pid: int) -> float:
    """Return the processor time of a process in seconds, in steps of 0.01 s (proc(5), fields 14 and 15 of stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def prepare(folder: Path, model: Path) -> None:
    """Make the files that the commands need."""
    shutil.copytree(model, folder / "base")
    (folder / "edit.yaml").write_text(EDIT)
    key = ["openssl", "ecparam", "-genkey", "-noout", "-name", "prime256v1", "-out", "key.pem"]
    subprocess.run(key, cwd=folder, check=True, capture_output=True)
    (folder / "key.pem").chmod(0o600)
    words = ["apply", "edit.yaml", "-o", "patched", "--check", "off", "--quiet"]
    subprocess.run([sys.executable, "-m", "swsurgery", *words], cwd=folder, check=True)


def measure_all(folder: Path, rounds: int, limit: float) -> dict[str, Timing]:
    """Measure each command `rounds` times, in turn, and return the round that used the least processor time."""
    best: dict[str, Timing] = {}
    for _ in range(rounds):
        for command in COMMANDS:
            new = folder / "new"
            shutil.rmtree(new) if new.is_dir() else new.unlink(missing_ok=True)
            found = measure(command.split(), folder, limit)
            print(
                f"{found.first:6.2f} {found.processor:6.2f} {found.silence:6.2f} {found.total:6.2f}  {command}",
                flush=True,
            )
            if command not in best or found.processor < best[command].processor:
                best[command] = found
    return best


def _describe_end(timing: Timing) -> str:
    return "" if timing.ended else " (stopped)"


def render(best: dict[str, Timing], rounds: int, load: float) -> list[str]:
    """Return the lines of the section. On a busy machine, seconds say nothing and are left out."""
    busy = load > IDLE_LOAD
    lines = [
        "Made by `python benchmarks/first_output.py --write`: the demo's model, SmolLM2-135M, with a warm page",
        "cache. The modules are compiled, as pip does when it installs the package. Output goes into a pipe.",
        f"The figures are those of the round, out of {rounds}, with the least processor time until the first byte.",
        describe_machine(),
        "",
    ]
    if busy:
        lines[-1:] = [
            f"The load was {load:.1f} before the first round, so the table has no seconds. Processor time is also",
            "longer than on an idle machine.",
            "",
            "| swsurgery | processor seconds to the first byte |",
            "|---|---:|",
        ]
        return [*lines, *(f"| `{command}` | {t.processor:.2f} |" for command, t in best.items())]
    lines += [
        "| swsurgery | seconds to the first byte | of processor time | longest silence after it | whole run |",
        "|---|---:|---:|---:|---:|",
    ]
    return [
        *lines,
        *(
            f"| `{command}` | {t.first:.2f} | {t.processor:.2f} | {t.silence:.1f} | {t.total:.1f}{_describe_end(t)} |"
            for command, t in best.items()
        ),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=20)
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md")
    options = parser.parse_args()
    compile_package()
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), options.model)
        load = os.getloadavg()[0]
        best = measure_all(Path(name), options.rounds, options.limit)
    lines = render(best, options.rounds, load)
    print("\n".join(lines))
    if options.write:
        replace_section("First output", lines)

"""Other writers of checkpoints under the same faults, judged by what lies under the final name afterwards.

Each writer is a short program that makes one directory, either new or over an older one. Nothing is expected of them:
every state that a fault leaves is counted.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults import tracing
from faults.cases import Tree, tree, write_room
from faults.disks import CUTS, Disk
from faults.forks import Program
from faults.tracing import Point, Start

STATES = ("old", "new", "partial", "partial, loads")
"""What is there: what was before (or nothing), the new files, something else, or something else whose weights the
official reader loads without an error."""

_SAVE_FILE = """
import sys, numpy
from safetensors.numpy import save_file
folder, value = sys.argv[1], float(sys.argv[2])
import os; os.makedirs(folder, exist_ok=True)
save_file({"weight": numpy.full(1 << 20, value, "float32")}, folder + "/model.safetensors")
"""

_SAVE_PRETRAINED = """
import sys, torch, transformers
config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                  num_attention_heads=2, num_key_value_heads=2)
model = transformers.LlamaForCausalLM(config)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.fill_(float(sys.argv[2]))
model.save_pretrained(sys.argv[1])
"""

_MERGEKIT = """
import sys, torch
from mergekit.io.tensor_writer import TensorWriter
writer = TensorWriter(sys.argv[1], safe_serialization=True)
writer.save_tensor("weight", torch.full((1 << 20,), float(sys.argv[2])))
writer.finalize()
"""

_SWSURGERY = """
import os, sys
from swsurgery.cli import main
folder = os.path.dirname(sys.argv[1])
sys.exit(main(["apply", folder + "/room/m.json", "-o", sys.argv[1], "--check", "off", "--quiet"]))
"""


@dataclass(frozen=True)
class Writer:
    """A program that is given a directory and a number to write. `python` None is this interpreter."""

    name: str
    program: str
    library: str
    replaces: bool = True
    python: str | None = None


WRITERS = (
    Writer("swsurgery apply", _SWSURGERY, "swsurgery", replaces=False),  # it never writes over anything
    Writer("safetensors save_file", _SAVE_FILE, "safetensors"),
    Writer("transformers save_pretrained", _SAVE_PRETRAINED, "transformers"),
)


def mergekit(python: str) -> Writer:
    """mergekit's writer, by an interpreter that has it."""
    return Writer("mergekit TensorWriter", _MERGEKIT, "mergekit", python=python)


@dataclass
class Count:
    """How often each state was left by one fault on one writer."""

    writer: str
    version: str
    fault: str
    place: str
    over: str
    cases: int = 0
    states: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "states": {state: self.states[state] for state in STATES}}


class Bench:
    """One writer, in a folder, with an older directory to write over or none."""

    def __init__(self, writer: Writer, folder: Path, over: bool, package: Path | None):
        self.writer, self.folder, self.over = writer, folder, over
        self.out = folder / "out"
        self.env = os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
                                 "PYTHONDONTWRITEBYTECODE": "1", "RAYON_NUM_THREADS": "1", "SWSURGERY_THREADS": "1",
                                 "HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache")}  # fmt: skip
        self.env.pop("PYTHONPATH", None)
        self.package = None if writer.python else package
        self.env |= {"PYTHONPATH": str(self.package)} if self.package else {}
        folder.mkdir(parents=True)
        write_room(folder / "room")
        self.new, self.old = self._made("2.0"), self._made("1.0") if over else None

    def _made(self, value: str) -> Tree | None:
        self.clear()
        done = self.start(value)(())
        if done.code:
            raise OSError(f"{self.writer.name} ended with {done.code}: {done.err[-300:]}")
        return tree(self.out)

    def start(self, value: str = "2.0") -> Start:
        program = Program(self.writer.program, self.package, self.writer.python or sys.executable)
        return program.started([str(self.out), value], self.env, self.folder, self._modules)

    def _modules(self, program: Program) -> Sequence[str]:
        with tempfile.TemporaryDirectory() as name:
            write_room(Path(name) / "room")
            return program.rehearsed([[f"{name}/out", "1.0"]], self.env, Path(name))

    def clear(self) -> None:
        for path in self.folder.iterdir():
            if path.name != "room":
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def reset(self) -> None:
        self.clear()
        for name, data in (self.old or {}).items():
            path = self.out / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if data is not None:
                path.write_bytes(data)

    def points(self) -> list[Point]:
        self.reset()
        points, _ = tracing.count(self.start(), self.folder, self.folder)
        return [p for p in points if not p.file.startswith(("cache/", "room/"))]

    def kill(self, point: Point) -> bool:
        """False where the writer, which has threads, came by in another order."""
        try:
            tracing.kill(self.start(), self.folder, self.folder, point)
        except tracing.Shifted:
            return False
        return True

    def state(self) -> str:
        """One of STATES, of the final names alone: what temporary files a fault leaves is not counted."""
        finals = {*(self.new or {}), *(self.old or {})}
        now = {name: data for name, data in (tree(self.out) or {}).items() if name in finals}
        if now == self.new:
            return "new"
        if now == (self.old or {}):
            return "old"
        return "partial, loads" if self._loads(now) else "partial"

    def _loads(self, now: Tree) -> bool:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        weights = [name for name in now if name.endswith(".safetensors") and now[name] is not None]
        try:
            for name in weights:
                load_file(self.out / name)
        except (SafetensorError, OSError):
            return False
        known = (self.new, self.old or {})
        return any(now[name] not in [files.get(name) for files in known if files] for name in weights)


def killed(bench: Bench, version: str, place: str, most: int) -> Count:
    """SIGKILL at each mutating call, or at `most` of them."""
    count = Count(bench.writer.name, version, "SIGKILL", place, _over(bench))
    for point in _spread(bench.points(), most):
        bench.reset()
        if bench.kill(point):
            count.cases += 1
            count.states[bench.state()] += 1
    return count


def power(benches: Sequence[Bench], version: str, disks: Sequence[Disk], most: int) -> list[Count]:
    """The power cut at each mutating call, and after success; benches play in parallel."""
    during, after = (
        Count(benches[0].writer.name, version, fault, disks[0].kind, _over(benches[0]))
        for fault in ("power cut", "power cut after success")
    )
    jobs: list[tuple[Point | None, Any]] = [
        (point, how) for point in [*_spread(benches[0].points(), most), None] for how in CUTS
    ]

    def play(lane: int) -> None:
        bench, disk = benches[lane], disks[lane]
        for point, how in jobs[lane :: len(benches)]:
            bench.reset()
            disk.sync()
            if point and not bench.kill(point):
                continue
            if not point:
                bench.start()(())
            disk.cut(how)
            count = during if point else after
            count.cases += 1
            count.states[bench.state()] += 1

    with ThreadPoolExecutor(len(benches)) as pool:
        list(pool.map(play, range(len(benches))))
    return [during, after]


def _over(bench: Bench) -> str:
    return "an older one" if bench.over else "nothing"


def _spread(points: list[Point], most: int) -> list[Point]:
    return points if len(points) <= most else [points[i * len(points) // most] for i in range(most)]

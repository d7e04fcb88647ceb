"""Measure the traffic with the Hub that an edit of one scalar needs. Print a table; exit 1 if a target is missed.

usage: python benchmarks/hub.py BASE [--work DIR] [--write]

BASE is a checkpoint that benchmarks/run.py made, such as build/bench/13.5GB from `make bench BENCH=--full`. The Hub is
the server of the tests, on loopback and in this process. Every command is a process of its own. The server counts the
bytes in the bodies of requests and responses. The directory --work (build/bench-hub) must have room for three times the
edited shard.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from page import replace_section

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))  # before this folder, which has a hub.py too

from hub.server import Hub

TENSOR, INDEX = "model.layers.2.mlp.down_proj.weight", [17, 90]
BASE, NEW = "org/base", "ada/edited"
SHARD_HEADER, BESIDE, DRY_RUN = 2_000_000, 64_000, 1.0
"""Targets: bytes read from one shard by `inspect --at`, bytes of everything else that it reads, and seconds of
`publish --dry-run`."""


@dataclass
class Ran:
    """One command: wall and processor seconds, bytes down and up, and the number of requests.

    `store` maps each path of the server's large-file store, which contains the shards, to the bytes sent from it.
    """

    wall: float
    cpu: float
    down: int
    up: int
    requests: int
    store: dict[str, int]


@dataclass
class Row:
    what: str
    measured: str
    target: str
    met: bool


def bytes_of(size: float) -> str:
    return f"{size:,.0f} B"


def command(hub: Hub, home: Path, *words: str) -> Ran:
    """Run a command of swsurgery with this Hub, and measure it. Exits if the command or the Hub fails."""
    environment = {**os.environ, **hub.environment(home), "XDG_CACHE_HOME": str(home)}
    hub.traffic.clear()
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "swsurgery", *words], stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begin
    if status or hub.errors:
        raise SystemExit("\n".join([f"failed: swsurgery {' '.join(words)}", *hub.errors]))
    store = {r.path: hub.traffic.sent(f"^{r.path}", origin="store") for r in hub.traffic.requests(origin="store")}
    ran = Ran(
        wall, usage.ru_utime + usage.ru_stime, hub.traffic.sent(), hub.traffic.received(),
        len(hub.traffic.requests()), store,
    )  # fmt: skip
    print(f"  {words[0]}: {wall:.1f} s, {ran.down:,} B down, {ran.up:,} B up, {ran.requests} requests", flush=True)
    return ran


def measured(base: Path, work: Path, busy: bool) -> tuple[list[Row], dict[str, float]]:
    """Return the rows of the table, and the seconds of each command. If `busy`, wall time has no target."""
    sizes = {file.name: file.stat().st_size for file in base.iterdir()}
    touched = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"][TENSOR]
    shards = [name for name in sizes if name.endswith(".safetensors")]
    small, edited, whole = sum(sizes[n] for n in sizes if n not in shards), sizes[touched], sum(sizes.values())
    with Hub(work / "hub") as hub:
        print("hashing the base, as an upload to the Hub would", flush=True)
        commit = hub.add_repo(BASE, base)
        place = f"hf://{BASE}@{commit}"
        manifest = work / "edit.yaml"
        manifest.write_text(
            f'version: 1\nbase: {{repo_id: {BASE}, revision: "{commit}"}}\n'
            f"edits:\n  - {{op: set, tensor: {TENSOR}, index: {INDEX}, value: 3.5}}\n"
        )
        at = ",".join(map(str, INDEX))
        inspect = command(hub, work / "inspect-home", "inspect", place, "--tensor", TENSOR, "--at", at)
        home, out = work / "home", work / "edited"
        apply = command(hub, home, "apply", str(manifest), "--for-publish", "-o", str(out))
        publish = ["publish", str(out), NEW]
        dry = [command(hub, home, *publish, "--dry-run") for _ in range(5)]
        fastest, processor = min(dry, key=lambda ran: ran.wall), min(ran.cpu for ran in dry)
        trips = _round_trips(hub, fastest.requests)
        sent = command(hub, home, *publish, "--yes", "--accept", "check-missing")
        assert hub.read(NEW, "config.json") == (base / "config.json").read_bytes()
    headers, wall = len(shards) * SHARD_HEADER, fastest.wall - trips
    beside = inspect.down - sum(inspect.store.values())
    most = max(inspect.store.values())
    down, up = edited + headers + small + BESIDE, edited + 1_000_000
    rows = [
        Row("`inspect --at` of one scalar, of each shard", bytes_of(most), f"{bytes_of(SHARD_HEADER)}",
            most <= SHARD_HEADER),
        Row("`inspect --at` of one scalar, everything else", bytes_of(beside), bytes_of(BESIDE), beside <= BESIDE),
        Row("`apply --for-publish`, down", bytes_of(apply.down), f"{bytes_of(down)} (1)", apply.down <= down),
        Row("`publish`, up", bytes_of(sent.up), f"{bytes_of(up)} (2)", sent.up <= up),
        Row("`publish`, down: the new revision read back", bytes_of(sent.down), f"{bytes_of(headers)} (3)",
            sent.down <= headers),
        Row(f"`publish --dry-run`, best of 5, less its {fastest.requests} round trips ({trips:.2f} s)",
            f"{wall:.2f} s", "(4)" if busy else f"{DRY_RUN:.2f} s", busy or wall <= DRY_RUN),
        Row("`publish --dry-run`, best of 5, processor time", f"{processor:.2f} s", f"{DRY_RUN:.2f} s",
            processor <= DRY_RUN),
        Row("the plain way, down: the whole model", bytes_of(whole), "computed", True),
        Row("the plain way, up: the whole model", bytes_of(whole), "computed", True),
    ]  # fmt: skip
    seconds = {"inspect": inspect.wall, "apply": apply.wall, "publish --dry-run": fastest.wall, "publish": sent.wall}
    return rows, seconds


def _round_trips(hub: Hub, number: int) -> float:
    """Return the seconds that `number` small requests take, one after the other."""
    begin = time.perf_counter()
    for _ in range(number):
        with urllib.request.urlopen(f"{hub.endpoint}/api/models/{BASE}") as answer:
            answer.read()
    return time.perf_counter() - begin


def section(base: Path, rows: list[Row], seconds: dict[str, float], load: float, busy: bool) -> list[str]:
    """Return the results as lines in Markdown."""
    total = sum(file.stat().st_size for file in base.iterdir()) / 1e9
    other = f"busy with other work (load {load:.1f} before it began)" if busy else f"idle (load {load:.1f})"
    table = [
        "| what | measured | at most |", "|---|---:|---:|",
        *(f"| {row.what} | {row.measured} | {row.target}{'' if row.met else ', **missed**'} |" for row in rows),
    ]  # fmt: skip
    return [
        "Made by `python benchmarks/hub.py BASE --write`: a server with the Hub's protocol on loopback, the real",
        f"client, a base of {total:.1f} GB, one edited scalar. Only the bodies of requests and answers are",
        f"counted. {os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()};",
        f"the machine was {other}.", "",
        *table, "",
        "(1) The edited shard, 2 MB for the header of each shard, and the small files. (2) The edited shard and",
        "1 MB. (3) 2 MB for the header of each shard."
        + (" (4) At most 1 s if the machine is idle." if busy else ""), "",
        "The plain way is `snapshot_download`, an edit, `save_pretrained` and `upload_folder`. Its bytes are those of",
        "the model; Xet may save some of them.", "",
        "Seconds here, with almost no time for a round trip: "
        + ", ".join(f"`{name}` {value:.1f}" for name, value in seconds.items()) + ".",
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("--work", type=Path, default=Path("build/bench-hub"))
    parser.add_argument("--write", action="store_true", help="write the table into docs/benchmarks.md")
    options = parser.parse_args()
    work, load = options.work.resolve(), os.getloadavg()[0]
    busy = load > (os.cpu_count() or 1) / 2
    if work.exists():
        parser.error(f"the --work directory already exists: {work} (remove it or choose another)")
    (work / "hub").mkdir(parents=True)
    try:
        rows, seconds = measured(options.base.resolve(), work, busy)
    finally:
        shutil.rmtree(work)
    lines = section(options.base, rows, seconds, load, busy)
    print("\n".join(lines))
    if options.write:
        replace_section("The Hub", lines)
    return 0 if all(row.met for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())

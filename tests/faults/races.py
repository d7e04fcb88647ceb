"""Many runs at once on one target, on one directory, and on a base that is being edited.

Every run is slowed down at each fsync by the preloaded shim, so that they overlap. At most one may win; the others
say that another run is at it, or that the work is done; what is there at the end is whole.
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from checkpoints import FIRST, down, place, sha256, write_manifest

from faults.cases import IN_PLACE, Prepared, Stage, Tree, Workshop, copy_arguments, tree
from faults.sweeps import Result
from faults.tracing import Done

RACERS = 8
SLOW = (("SHIM_SLOW", "100000"),)
BUSY = ("another run is", "the output already exists")
"""What a run says that was not alone, or came late."""


def targets(prepared: Prepared, folder: Path, shim: Path, rounds: int, killed: bool = False) -> Result:
    """RACERS runs of the case's command; with `killed` one of them gets SIGKILL at some moment."""
    name = f"{RACERS} runs of '{prepared.case.name}'" + (", one of them killed" if killed else "")
    result, chance = Result("race", name, "", f"{rounds} rounds"), random.Random(0)
    stage = Stage(prepared, folder / "stage")
    shop = _slowed(stage.shop, shim)
    for number in range(rounds):
        stage.reset()
        kill = (chance.randrange(RACERS), chance.uniform(0.2, 1.5)) if killed else None
        done = _together(shop, [prepared.case.arguments] * RACERS, kill)
        winners = [d for d in done if d.code == 0]
        faults = [f for d in done for f in _told(d, prepared.case.in_place)]
        if not prepared.case.in_place and len(winners) > 1:
            faults.append(f"{len(winners)} runs say that they made the target")
        if winners and not stage.complete:
            faults.append("one run won, and the target is not whole")
        faults += stage.broken()
        faults += stage.unfinished()
        result.cases += 1
        result.violations += [f"round {number}: {fault}" for fault in faults]
    return result


def mixed(prepared: Prepared, folder: Path, shim: Path, rounds: int) -> Result:
    """Edits in place by two manifests, and copies of what they edit, at the same time: every result is one of the
    checkpoints that come of doing one after the other."""
    result = Result("race", "edits in place by two manifests, and copies of their base", "", f"{rounds} rounds")
    stage = Stage(prepared, folder / "stage")
    shop, room = _slowed(stage.shop, shim), stage.shop.room
    at, _ = place(room / "base" / FIRST, down(0), (5, 5))
    other = {"op": "zero", "tensor": down(0), "index": [5, 5]}
    pins = {"path": "model", "sha256": {FIRST: sha256(room / "model" / FIRST)}}
    write_manifest(room / "other.json", pins, other)
    write_manifest(room / "plain.json", {"path": "model"}, other)
    stage.names |= {"other.json", "plain.json"}
    stage.identities = stage.identify()
    old, new = _weights(prepared.old or {}), _weights(prepared.new)
    states = [old, new, _with(old, at), _with(new, at)]
    copies = [copy_arguments()[:1] + ("plain.json", "-o", f"out{n}", "--check", "off", "--quiet") for n in range(4)]
    edits = [IN_PLACE, ("apply", "--in-place", "other.json", *IN_PLACE[3:])] * 2
    for number in range(rounds):
        stage.reset()
        done = _together(shop, [a for pair in zip(copies, edits, strict=True) for a in pair])
        faults = [f for d in done for f in _told(d, True)]
        for n, copy in enumerate(done[::2]):
            made = tree(room / f"out{n}")
            if (copy.code == 0) != (made is not None) or made and _weights(made) not in (states[2], states[3]):
                faults.append(f"copy {n} ended with {copy.code} and is not whole")
        if _weights(tree(stage.target) or {}) not in states:
            faults.append("the edited directory is no whole checkpoint")
        check = stage.shop.run("verify", "model")
        if any(d.code == 0 for d in done[1::2]) and check.code:
            faults.append(f"verify says no: {check.out[-200:]}{check.err[-200:]}")
        result.cases += 1
        result.violations += [f"round {number}: {fault}" for fault in faults]
    return result


def _slowed(shop: Workshop, shim: Path) -> Workshop:
    return replace(shop, more=(("LD_PRELOAD", str(shim)), *SLOW))


def _together(shop: Workshop, runs: Sequence[tuple[str, ...]], kill: tuple[int, float] | None = None) -> list[Done]:
    started = [
        subprocess.Popen(shop.command(arguments), env=shop.env, cwd=shop.room, text=True,
                         stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for arguments in runs
    ]  # fmt: skip
    if kill:
        victim, after = kill
        try:
            started[victim].wait(after)
        except subprocess.TimeoutExpired:
            started[victim].kill()
    done = []
    for process in started:
        out, err = process.communicate(timeout=300)
        done.append(Done(process.returncode, out, err))
    return done


def _told(done: Done, in_place: bool) -> list[str]:
    """What is wrong with how one racer ended."""
    if done.code in (0, -9):
        return []
    if done.code != 2 or "Traceback" in done.err or len(done.lines) != 1:
        return [f"a run ended with {done.code}: {done.err[-300:]}"]
    late = in_place and any(words in done.lines[0] for words in ("changed", "says", "cut off"))
    return [] if late or any(words in done.lines[0] for words in BUSY) else [f"a run said: {done.lines[0]}"]


def _weights(files: Tree) -> dict[str, bytes | None]:
    return {name: data for name, data in files.items() if name.endswith(".safetensors")}


def _with(files: dict[str, bytes | None], at: int) -> dict[str, bytes | None]:
    data = bytearray(files[FIRST] or b"")
    data[at : at + 2] = bytes(2)
    return {**files, FIRST: bytes(data)}

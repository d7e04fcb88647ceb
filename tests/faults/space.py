"""Clones, file systems without room, and file systems that cannot be written."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

from checkpoints import FIRST

from faults.cases import Prepared, Stage, misreported, tree
from faults.disks import Disk
from faults.sweeps import Result
from faults.tracing import run


def clones(prepared: Prepared, disk: Disk) -> Result:
    """A copy by clone, and an edit of it in place: neither shows in the base, whose blocks it shares."""
    result = Result("clone", "--link clone, then an edit in place of the clone", disk.kind, cases=1)
    cloning = replace(prepared.case, arguments=(*prepared.case.arguments, "--link", "clone"))
    stage = Stage(replace(prepared, case=cloning), disk.mount / "shop")
    stage.reset()
    done = stage.shop.run(*stage.case.arguments)
    if done.code or not stage.complete:
        result.violations.append(f"exit {done.code}: {done.err[-300:]}")
        return result
    disk.sync()
    done = stage.shop.run("revert", "out")
    if done.code or tree(stage.target) != tree(stage.shop.room / "base"):
        result.violations.append(f"revert in place ended with {done.code}: {done.err[-300:]}")
    with open(stage.target / FIRST, "r+b") as shard:
        shard.write(b"\xff" * 64)
    result.violations += stage.others_changed()
    return result


def full(prepared: Prepared, disk: Disk, steps: int = 12) -> Result:
    """The command with ever more room left: done, or exit 2 and nothing half; then again when there is room."""
    result = Result("full disk", prepared.case.name, disk.kind, f"{steps} amounts of room left")
    stage = Stage(prepared, disk.mount / "shop")
    most = 1 << (21 if disk.kind == "btrfs" else 19)
    for step in range(steps):
        leaving = most * step // (steps - 1)
        disk.empty()
        stage.reset()
        if prepared.case.in_place:  # blocks that a clone shares must be had anew before they are written
            _share(stage)
        disk.fill(leaving)
        done = stage.shop.run(*stage.case.arguments)
        faults = [] if done.code == 0 else misreported(done)
        if done.code == 0 and not stage.complete:
            faults.append("exit 0, and the target is not whole")
        faults += stage.broken()  # still without room
        disk.empty()
        faults += stage.unfinished()
        result.cases += 1
        result.violations += [f"{leaving} bytes left: {fault}" for fault in faults]
    disk.empty()
    return result


def read_only(prepared: Prepared, disk: Disk) -> Result:
    """Everything on a file system that is mounted read-only: exit 2, one line, nothing changed."""
    result = Result("read-only file system", prepared.case.name, disk.kind, cases=1)
    stage = Stage(prepared, disk.mount / "shop")
    stage.reset()
    before = tree(stage.shop.room)
    disk.read_only(True)
    try:
        done = stage.shop.run(*stage.case.arguments)
    finally:
        disk.read_only(False)
    result.violations += misreported(done)
    if tree(stage.shop.room) != before:
        result.violations.append("something changed")
    return result


def _share(stage: Stage) -> None:
    """Give each file of the target a clone beside it, where the file system can."""
    peers = stage.shop.folder / "peers"
    shutil.rmtree(peers, ignore_errors=True)
    peers.mkdir()
    run(["cp", "-r", "--reflink=auto", str(stage.target), str(peers)], os.environ, stage.shop.folder)

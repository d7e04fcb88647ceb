"""Transfers that move less than they were asked to, and a shard that is too large for one call."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

from checkpoints import NORM, write_manifest, write_sparse_shard

from faults.cases import Prepared, Stage, Workshop
from faults.sweeps import Result

ELEMENTS = 5 << 29
"""Scalars of the large shard, of two bytes each: 5 GiB. The kernel moves at most 2 GiB less a page in one call."""

CHUNK = 1 << 24


def missing() -> str:
    """Why the shim cannot be built here; empty where it can."""
    return "" if shutil.which("cc") else "cc is not installed"


def build_shim(folder: Path) -> Path:
    """shim.c as a library to preload."""
    library = folder / "shim.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


def short(prepared: Prepared, folder: Path, shim: Path, place: str) -> tuple[Result, Counter[str]]:
    """One run in which every transfer is halved; also how often each kind of transfer was."""
    result = Result("short transfers", prepared.case.name, place, "every transfer", cases=1)
    log = folder / "shim.log"
    stage = Stage(prepared, folder / "stage")
    stage.reset()
    more = (("LD_PRELOAD", str(shim)), ("SHIM_SHORT", "1"), ("SHIM_LOG", str(log)))
    done = replace(stage.shop, more=more).run(*prepared.case.arguments)
    if done.code:
        result.violations.append(f"exit {done.code}: {done.err[-300:]}")
    if not stage.complete:
        result.violations.append(f"exit {done.code}, and the target is not whole")
    result.violations += stage.others_changed()
    counts: Counter[str] = Counter()
    for line in log.read_text().splitlines():
        name, number = line.split()
        counts[name] += int(number)
    return result, counts


def large(folder: Path, package: Path, in_place: bool) -> Result:
    """An edit of the last scalar of a sparse shard of 5 GiB, copied or in place; every byte is compared."""
    result = Result("over 2 GiB", "edit in place" if in_place else "copy", "", cases=1)
    shop = Workshop(folder, package, (("SWSURGERY_THREADS", "4"),))
    base, out = shop.room / "base", shop.room / ("base" if in_place else "out")
    base.mkdir(parents=True)
    (base / "config.json").write_text('{"model_type": "llama"}')
    shard = base / "model.safetensors"
    write_sparse_shard(shard, NORM, "BF16", ELEMENTS)
    at = shard.stat().st_size - 2
    edit = {"op": "set", "tensor": NORM, "index": [ELEMENTS - 1], "value": 1.0}
    before = _sha256(shard, at, b"\x00\x00")
    write_manifest(shop.room / "m.json", {"path": "base", "sha256": {shard.name: before}}, edit)
    done = shop.run("apply", "m.json", *(["--in-place"] if in_place else ["-o", "out"]), "--check", "off")
    wanted = {"size": at + 2, "sha256": _sha256(shard, at, b"\x80\x3f")}
    if done.code:
        result.violations.append(f"exit {done.code}: {done.err[-300:]}")
    else:
        made = out / shard.name
        with open(made, "rb") as file:
            file.seek(at)
            last = file.read()
        if last != b"\x80\x3f" or made.stat().st_size != wanted["size"] or _sha256(made) != wanted["sha256"]:
            result.violations.append(f"the last scalar is {last.hex()}, or other bytes are wrong")
    if not in_place and _sha256(shard) != before:
        result.violations.append("the base changed")
    shutil.rmtree(folder)
    return result


def _sha256(path: Path, at: int = -1, new: bytes = b"") -> str:
    """Digest of a file; of one that ends at `at` in the bytes `new`, if given."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        left = at if at >= 0 else os.path.getsize(path)
        while left:
            data = file.read(min(CHUNK, left))
            digest.update(data)
            left -= len(data)
    digest.update(new)
    return digest.hexdigest()

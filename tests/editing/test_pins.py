"""What a dry run compares with pins, and pins of files that are not copied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import FIRST, SECOND, THIRD, sha256, tree, write_llama, write_manifest

import swsurgery
from swsurgery.cli import main
from swsurgery.errors import PlanError
from swsurgery.progress import Silent

ZERO = {"op": "zero", "layer": 1, "row": 2, "col": 3}  # in SECOND
WRONG = "1" * 64


@pytest.fixture
def base(tmp_path) -> Path:
    return write_llama(tmp_path / "base")


def pinned(base: Path, **pins: str) -> Path:
    """A manifest with the true digest of each shard, but for those given."""
    names = {"first": FIRST, "second": SECOND, "third": THIRD}
    digests = {name: pins.get(key) or sha256(base / name) for key, name in names.items()}
    return write_manifest(base.parent / "pinned.json", {"path": str(base), "sha256": digests}, ZERO)


def dry(manifest: Path, *more: str, capsys: Any) -> tuple[int, str, str]:
    code = main(["apply", str(manifest), "--dry-run", *more])
    return code, *capsys.readouterr()


def test_a_touched_shard_of_another_digest_is_refused(base, capsys):
    before = tree(base.parent)
    code, out, err = dry(pinned(base, second=WRONG), capsys=capsys)
    assert (code, out) == (2, "")
    said = f"its sha256 is {sha256(base / SECOND)}, but the manifest says {WRONG}: {base / SECOND}"
    assert err == f"swsurgery: {said} (is this the right checkpoint?)\n"
    assert {n: d for n, d in tree(base.parent).items() if n != "pinned.json"} == before


def test_so_it_is_of_a_patch(base, tmp_path, capsys):
    """A patch pins the shards that it touches."""
    patch = tmp_path / "p.safetensors"
    free = write_manifest(tmp_path / "free.json", base, ZERO)
    assert main(["export", str(free), "--format", "sparse", "-o", str(patch)]) == 0
    assert dry(patch, "--base", str(base), capsys=capsys)[0] == 0
    other = write_llama(tmp_path / "other")
    raw = bytearray((other / SECOND).read_bytes())
    raw[-1] ^= 1
    (other / SECOND).write_bytes(raw)
    code, _, err = dry(patch, "--base", str(other), capsys=capsys)
    assert code == 2 and err.startswith("swsurgery: its sha256 is ") and "but the manifest says" in err


def test_so_it_is_of_a_patched_base_that_was_changed_since(base, tmp_path, capsys):
    out = tmp_path / "out"
    swsurgery.apply(write_manifest(tmp_path / "m.json", base, ZERO), output=out, check="off")
    second = write_manifest(tmp_path / "second.json", out, {**ZERO, "row": 1})
    assert dry(second, capsys=capsys)[0] == 0
    raw = bytearray((out / SECOND).read_bytes())
    raw[-1] ^= 1
    (out / SECOND).write_bytes(raw)
    code, _, err = dry(second, capsys=capsys)
    assert code == 2 and "but its record says" in err


def test_the_other_pins_are_said_to_be_unchecked(base, capsys):
    """Also one that is wrong: apply itself will refuse it."""
    manifest = pinned(base, third=WRONG)
    code, out, _ = dry(manifest, "--json", capsys=capsys)
    assert code == 0
    assert json.loads(out)["pins"] == {"checked": [SECOND], "not_checked": [FIRST, THIRD]}
    code, out, _ = dry(manifest, capsys=capsys)
    lines = [line for line in out.splitlines() if line.startswith("pins")]
    assert lines == [
        f"pins      match the sha256 of {SECOND}",
        f"pins      not checked, because only files to be edited are hashed: {FIRST}, {THIRD}",
    ]
    plan = swsurgery.plan(manifest)
    assert (plan.pins_checked, plan.pins_unchecked) == ((SECOND,), (FIRST, THIRD))


def test_without_pins_nothing_is_hashed_and_nothing_said(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("swsurgery.editing.pins.hash_file", None)
    manifest = write_manifest(tmp_path / "m.json", base, ZERO)
    code, out, _ = dry(manifest, "--json", capsys=capsys)
    assert code == 0 and "pins" not in json.loads(out)
    code, out, _ = dry(manifest, capsys=capsys)
    assert code == 0 and "\npins " not in out


def test_the_hashing_is_shown(base):
    class Seen(Silent):
        total = done = 0

        def start(self, total: int, unit: str, what: str) -> None:
            self.total += total

        def advance(self, amount: int) -> None:
            self.done += amount

    progress = Seen()
    swsurgery.plan(pinned(base), reporter=progress)
    assert progress.total == progress.done == (base / SECOND).stat().st_size


# --- pins of files that are not copied


@pytest.mark.parametrize("right", [True, False])
def test_a_pinned_file_that_is_left_out_is_compared_all_the_same(base, tmp_path, right):
    (base / "model-q4.gguf").write_bytes(b"GGUF")
    digest = sha256(base / "model-q4.gguf") if right else WRONG
    where = {"path": str(base), "copies": "omit", "sha256": {"model-q4.gguf": digest}}
    manifest = write_manifest(tmp_path / "m.json", where, ZERO)
    if right:
        swsurgery.apply(manifest, output=tmp_path / "out", check="off")
        return
    with pytest.raises(PlanError, match="its sha256 is .*but the manifest says"):
        swsurgery.apply(manifest, output=tmp_path / "out", check="off")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("in_place", [False, True])
def test_a_pinned_record_of_the_base_is_compared_too(base, tmp_path, in_place):
    first = tmp_path / "first"
    swsurgery.apply(write_manifest(tmp_path / "m.json", base, ZERO), output=first, check="off")
    before = tree(first)
    for digest in (WRONG, sha256(first / "swsurgery.json")):
        record = {"path": str(first), "sha256": {"swsurgery.json": digest}}
        second = write_manifest(tmp_path / "second.json", record, {**ZERO, "row": 1})
        target = {"in_place": True} if in_place else {"output": tmp_path / "second"}
        if digest != WRONG:
            swsurgery.apply(second, check="off", **target)
            return
        with pytest.raises(PlanError, match="its sha256 is .*but the manifest says"):
            swsurgery.apply(second, check="off", **target)
        assert tree(first) == before and not (tmp_path / "second").exists()

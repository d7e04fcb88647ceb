"""A private base has private copies: no file, record or directory is more accessible than what it was made from."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import FIRST, SECOND, THIRD, down, sha256, write_llama, write_manifest
from killed import killed

from swsurgery.cli import main
from swsurgery.storage.names import JOURNAL, OWN_FILES

SHARDS = (FIRST, SECOND, THIRD)


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def base(tmp_path) -> Path:
    return write_llama(tmp_path / "base")


def manifest(base: Path, **more: object) -> Path:
    edit = {"op": "zero", "tensor": down(1), "index": [2, 3]}
    return write_manifest(base.parent / "m.json", {"path": str(base), **more}, edit)


def apply(base: Path, *more: str) -> Path:
    out = base.parent / "out"
    assert main(["apply", str(manifest(base)), "-o", str(out), "--check", "off", "--quiet", *more]) == 0
    return out


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def modes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): mode(p) for p in folder.rglob("*")}


def make_private(base: Path) -> None:
    for path in base.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    base.chmod(0o700)


@pytest.mark.parametrize("link", ["copy", "auto", "hard"])
def test_a_private_base_has_a_private_copy(base, link):
    make_private(base)
    out = apply(base, "--link", link)
    assert mode(out) == 0o700
    assert modes(out) == modes(base) | dict.fromkeys(OWN_FILES, 0o600)


def test_a_public_base_has_a_public_copy(base):
    """The twin."""
    out = apply(base)
    assert mode(out) == 0o755
    assert modes(out) == modes(base) | dict.fromkeys(OWN_FILES, 0o644)
    assert set(modes(out).values()) == {0o644, 0o755}


@pytest.mark.parametrize(
    ("given", "made"),
    [(0o600, 0o600), (0o640, 0o640), (0o444, 0o444), (0o755, 0o755), (0o666, 0o644), (0o4755, 0o755)],
    ids=oct,
)
@pytest.mark.parametrize("name", [SECOND, THIRD, "tokenizer.json"])
def test_a_copied_file_has_the_permissions_of_the_base_less_the_umask(base, name, given, made):
    (base / name).chmod(given)
    out = apply(base, "--link", "copy")
    assert mode(out / name) == made
    assert mode(out / FIRST) == 0o644, "the others are as they were"


def test_the_umask_takes_away_what_the_base_would_give(base):
    os.umask(0o077)
    assert set(modes(apply(base)).values()) == {0o600, 0o700}


def test_one_private_shard_makes_the_records_private(base):
    """They repeat bytes of it."""
    (base / FIRST).chmod(0o600)
    out = apply(base)
    assert {mode(out / name) for name in OWN_FILES} == {0o600}


def test_a_private_folder_within_the_base_stays_private(base):
    (base / "assets").chmod(0o700)
    out = apply(base)
    assert (mode(out), mode(out / "assets")) == (0o755, 0o700)


def test_a_reversion_is_as_private_as_what_it_is_made_from(base):
    out = apply(base)
    make_private(out)
    assert main(["revert", str(out), "-o", str(base.parent / "back"), "--quiet"]) == 0
    assert set(modes(base.parent / "back").values()) == {0o600, 0o700}


def test_a_file_kept_from_a_killed_run_is_as_private_as_the_base_is_now(base):
    killed("editing.apply.write_own_files", "apply", manifest(base), "-o", base.parent / "out", "--check", "off")
    stage = base.parent / ".out.partial"
    assert mode(stage / FIRST) == 0o644
    make_private(base)
    out = apply(base)
    assert modes(out) == modes(base) | dict.fromkeys(OWN_FILES, 0o600)


def test_an_edit_in_place_of_a_private_checkpoint_leaves_private_files(base):
    make_private(base)
    pins = {SECOND: sha256(base / SECOND)}
    words = ["apply", str(manifest(base, sha256=pins)), "--in-place", "--check", "off", "--quiet"]
    before = modes(base)
    killed("checkpoint.journal._write", *words)
    working = {name: bits for name, bits in modes(base).items() if name not in before}
    assert working[JOURNAL] == 0o600, "it has old and new bytes"
    assert main(words) == 0
    assert modes(base) == before | dict.fromkeys(OWN_FILES, 0o600)
    for name in OWN_FILES:
        (base / name).chmod(0o640)
    for name in SHARDS:
        (base / name).chmod(0o644)
    again = write_manifest(base.parent / "n.json", base, {"op": "zero", "tensor": down(1), "index": [4, 4]})
    assert main(["apply", str(again), "--in-place", "--check", "off", "--quiet"]) == 0
    assert {mode(base / name) for name in OWN_FILES} == {0o640}, "what was more private than the weights stays so"


EXPORTED = {"sparse": "e", "peft": "e/adapter_model.safetensors", "vllm": "e/patches.safetensors"}


def export(base: Path, form: str, source: Path) -> Path:
    assert main(["export", str(source), "--format", form, "-o", str(base.parent / "e"), "--quiet"]) == 0
    assert (base.parent / EXPORTED[form]).is_file()
    return base.parent / "e"


@pytest.mark.parametrize("form", EXPORTED)
@pytest.mark.parametrize("recorded", [False, True], ids=["manifest", "checkpoint"])
def test_an_export_of_a_private_base_is_private(base, form, recorded):
    make_private(base)
    out = export(base, form, apply(base) if recorded else manifest(base))
    assert mode(out) == (0o600 if form == "sparse" else 0o700)
    assert set(modes(out).values()) == (set() if form == "sparse" else {0o600})


@pytest.mark.parametrize("form", EXPORTED)
def test_an_export_of_a_public_base_is_public(base, form):
    """The twin."""
    out = export(base, form, manifest(base))
    assert mode(out) == (0o644 if form == "sparse" else 0o755)
    assert set(modes(out).values()) == (set() if form == "sparse" else {0o644})


@pytest.mark.parametrize(
    ("folder", "weights", "made"),
    [(0o700, 0o644, 0o600), (0o750, 0o644, 0o640), (0o755, 0o640, 0o640), (0o744, 0o644, 0o600)],
    ids=oct,
)
def test_who_cannot_enter_the_folder_of_the_weights_cannot_read_an_export(base, folder, weights, made):
    for name in SHARDS:
        (base / name).chmod(weights)
    base.chmod(folder)
    assert mode(export(base, "sparse", manifest(base))) == made
    (base.parent / "e").unlink()
    out = export(base, "vllm", manifest(base))
    assert mode(out) == made | 0o700 | (made & 0o044) >> 2
    assert set(modes(out).values()) == {made}

"""A remembered digest is never compared with a pin, and goes into a record only if asked, and marked."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import FIRST, SECOND, THIRD, age, sha256, tree, write_llama, write_manifest

import swsurgery
from swsurgery.checkpoint.record import Record
from swsurgery.checkpoint.record_entries import FileRecord
from swsurgery.cli import main
from swsurgery.editing.check_options import CheckOptions
from swsurgery.editing.revert import revert
from swsurgery.errors import CheckpointError, PlanError
from swsurgery.progress import Silent
from swsurgery.sharing import edit_source
from swsurgery.storage import digest_cache, filesystem
from swsurgery.storage.digest_cache import DigestCache

OFF = CheckOptions("off")
ZERO = {"op": "zero", "layer": 1, "row": 2, "col": 3}  # in SECOND
FALSE = "f" * 64


@pytest.fixture
def base(tmp_path) -> Path:
    return age(write_llama(tmp_path / "base"))


@pytest.fixture
def manifest(base, tmp_path) -> Path:
    return write_manifest(tmp_path / "m.json", base, ZERO)


@pytest.fixture
def pinned(base, tmp_path) -> Path:
    record = {"path": str(base), "sha256": {name: sha256(base / name) for name in (FIRST, SECOND, THIRD)}}
    return write_manifest(tmp_path / "pinned.json", record, ZERO)


@pytest.fixture
def cache(own_cache) -> Path:
    return own_cache / "swsurgery" / "digests.json"


def apply(manifest: Path, output: Path, **options: object) -> dict[str, dict[str, object]]:
    """Apply without a check; returns the files of the record."""
    swsurgery.apply(manifest, output=output, check=OFF, **options)
    return json.loads((output / "swsurgery.json").read_text())["files"]


def remember(cache: Path, **changes: str) -> None:
    """Write the cache file anew, with a valid checksum, and with other digests for those given as `_<digest>`."""
    entries = json.loads(cache.read_text())["digests"]
    entries = {k: changes.get(f"_{v}", v) for k, v in entries.items()}
    cache.write_text(json.dumps({"sha256": digest_cache._compute_checksum(entries), "digests": entries}))


def flip(path: Path, at: int = -1) -> None:
    """Change one byte where the file lies, and give it its old times as far as a user can."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def false_cache(base, manifest, cache, tmp_path) -> Path:
    """A cache, valid in form, that remembers a false digest of every shard."""
    apply(manifest, tmp_path / "before")
    remember(cache, **{f"_{sha256(base / name)}": FALSE for name in (FIRST, SECOND, THIRD)})
    assert list(json.loads(cache.read_text())["digests"].values()).count(FALSE) == 3
    return cache


@pytest.fixture
def same_identity(monkeypatch) -> None:
    """As if an image were mounted whose files have the same device, inode, size and times as others before."""
    monkeypatch.setattr(digest_cache, "_make_identity", lambda status: str(status.st_size))


# --- without --reuse-digests every digest is computed


@pytest.mark.parametrize("link", ["auto", "copy", "hard"])
def test_every_digest_of_a_record_is_computed(base, manifest, tmp_path, false_cache, link):
    files = apply(manifest, tmp_path / "out", link=link)
    assert {name: record["base_sha256"] for name, record in files.items()} == {
        name: sha256(base / name) for name in tree(base)
    }
    assert {name: record["sha256"] for name, record in files.items()} == {
        name: sha256(tmp_path / "out" / name) for name in tree(base)
    }
    assert not any("unverified" in record for record in files.values())


@pytest.mark.parametrize("name", [FIRST, SECOND])
@pytest.mark.parametrize("reuse", [False, True])
def test_another_base_of_the_same_identity_does_not_satisfy_the_pins(
    base, pinned, tmp_path, same_identity, name, reuse
):
    apply(pinned, tmp_path / "first")
    flip(base / name)
    with pytest.raises(PlanError, match="its sha256 is .*but the manifest says"):
        apply(pinned, tmp_path / "second", reuse_digests=reuse)
    assert not (tmp_path / "second").exists()


def test_a_write_through_a_held_memory_map_does_not_satisfy_the_pins(base, pinned, tmp_path):
    """The first write of a map moves the times, later ones do not."""
    with (base / FIRST).open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[-1] ^= 1
        memory[-1] ^= 1
        age(base)
        before = digest_cache._make_identity(os.stat(base / FIRST))
        apply(pinned, tmp_path / "first")
        memory[-1] ^= 1
        if digest_cache._make_identity(os.stat(base / FIRST)) != before:
            pytest.skip("this file system notices each write of a map")
        with pytest.raises(PlanError, match="its sha256 is .*but the manifest says"):
            apply(pinned, tmp_path / "second")


def test_a_base_renamed_during_the_copy_is_not_remembered_under_its_successor(base, manifest, cache, tmp_path):
    """What is remembered belongs to the file that was hashed, not to the one that has its name afterwards."""
    other = tmp_path / "other"
    other.write_bytes(bytes((base / FIRST).stat().st_size))
    os.utime(other, (1_600_000_000, 1_600_000_000))
    real = sha256(base / FIRST)

    class Swap(Silent):
        def close(self) -> None:
            other.replace(base / FIRST)

    with contextlib.suppress(CheckpointError):
        apply(manifest, tmp_path / "out", reporter=Swap())
    entries = json.loads(cache.read_text())["digests"]
    assert entries.get(digest_cache._make_identity(os.stat(base / FIRST))) is None
    assert real in entries.values()


def test_exports_and_loaded_models_compute_the_digests_of_what_they_touch(base, pinned, tmp_path, same_identity):
    apply(pinned, tmp_path / "first")
    flip(base / SECOND)
    with pytest.raises(PlanError, match="its sha256 is .*but the manifest says"):
        edit_source.read(pinned, None, Silent())
    free = write_manifest(tmp_path / "free.json", base, ZERO)
    assert edit_source.read(free, None, Silent()).patch.base.sha256 == {SECOND: sha256(base / SECOND)}


def test_a_reversion_hashes_what_it_writes(manifest, tmp_path, same_identity):
    apply(manifest, tmp_path / "out")
    age(tmp_path / "out")
    revert(tmp_path / "out", tmp_path / "back")
    flip(tmp_path / "out" / FIRST)
    with pytest.raises(PlanError, match="its sha256 is .*but its record says"):
        revert(tmp_path / "out", tmp_path / "again")


def test_a_clone_is_hashed_and_not_the_base_that_may_change_after_it(base, manifest, tmp_path, monkeypatch):
    def clone(source: int, new: int) -> bool:
        filesystem.write_all(new, os.pread(source, os.fstat(source).st_size, 0))
        if os.readlink(f"/proc/self/fd/{source}") == str(base / FIRST):
            os.pwrite(os.open(base / FIRST, os.O_WRONLY), b"\1", os.fstat(source).st_size - 1)
            os.utime(base / FIRST, (1_600_000_000, 1_600_000_000))
        return True

    first = sha256(base / FIRST)
    monkeypatch.setattr(filesystem, "clone", clone)
    with contextlib.suppress(CheckpointError):  # if the change is noticed, nothing is written
        files = apply(manifest, tmp_path / "out", link="clone")
        assert files[FIRST]["sha256"] == sha256(tmp_path / "out" / FIRST) == first
        assert files[SECOND]["sha256"] == sha256(tmp_path / "out" / SECOND) != sha256(base / SECOND)


# --- with --reuse-digests


def test_untouched_files_have_remembered_digests_and_are_marked(base, manifest, tmp_path, false_cache):
    """False digests show which ones were copied. The touched shard is hashed."""
    files = apply(manifest, tmp_path / "out", reuse_digests=True)
    size = (base / FIRST).stat().st_size
    assert files[FIRST] == {"base_sha256": FALSE, "sha256": FALSE, "size": size, "unverified": True}
    assert files[SECOND] == {
        "base_sha256": sha256(base / SECOND),
        "sha256": sha256(tmp_path / "out" / SECOND),
        "size": (base / SECOND).stat().st_size,
    }
    assert {f.rule for f in swsurgery.verify(tmp_path / "out").findings} == {"digest"}


@pytest.mark.parametrize("link", ["copy", "hard"])
def test_verify_reports_unverified_files_and_does_not_count_them_as_proved(manifest, tmp_path, link, capsys):
    apply(manifest, tmp_path / "first", link=link)
    files = apply(manifest, tmp_path / "out", link=link, reuse_digests=True)
    unverified = sorted(name for name, record in files.items() if record.get("unverified"))
    assert FIRST in unverified and THIRD in unverified and SECOND not in unverified
    found = swsurgery.verify(tmp_path / "out")
    assert found.ok and list(found.record.unverified) == unverified and list(found.record.proved) == [SECOND]
    assert main(["verify", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert f"unproved  {len(unverified)} files whose digests were copied into the record" in said
    assert main(["verify", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unverified"] == unverified
    assert main(["verify", str(tmp_path / "first")]) == 0
    assert "unproved" not in capsys.readouterr().out


def test_the_command_reuses_only_if_told_to_and_says_so(manifest, tmp_path, false_cache, capsys):
    arguments = ["apply", str(manifest), "--check", "off"]
    assert main([*arguments, "-o", str(tmp_path / "b"), "--reuse-digests", "--json"]) == 0
    reused = json.loads(capsys.readouterr().out)["files"]
    assert main([*arguments, "-o", str(tmp_path / "a"), "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)["files"]
    assert "unverified" not in plain[FIRST] and plain[FIRST]["sha256"] != FALSE
    assert reused[FIRST] | {"how": "copy"} == {
        "size": plain[FIRST]["size"], "base_sha256": FALSE, "sha256": FALSE, "how": "copy", "unverified": True,
    }  # fmt: skip
    assert main([*arguments, "-o", str(tmp_path / "c"), "--reuse-digests"]) == 0
    assert "not hashed" in capsys.readouterr().out


def test_a_pinned_file_is_hashed_even_so(base, pinned, tmp_path, false_cache):
    files = apply(pinned, tmp_path / "out", reuse_digests=True)
    assert files[FIRST]["sha256"] == sha256(base / FIRST) and "unverified" not in files[FIRST]
    assert files["config.json"]["unverified"] is True


def test_a_patched_base_is_hashed_even_so(manifest, tmp_path, same_identity):
    """Its record says what its digests must be."""
    apply(manifest, tmp_path / "first")
    second = write_manifest(tmp_path / "second.json", age(tmp_path / "first"), {**ZERO, "row": 1})
    apply(second, tmp_path / "again")
    flip(tmp_path / "first" / FIRST)
    with pytest.raises(PlanError, match="its sha256 is .*but its record says"):
        apply(second, tmp_path / "out", reuse_digests=True)


def test_nothing_remembered_means_everything_is_hashed(manifest, tmp_path):
    files = apply(manifest, tmp_path / "out", reuse_digests=True)
    assert not any("unverified" in record for record in files.values())


def test_a_file_written_just_now_is_not_remembered(base, manifest, cache, tmp_path):
    """Within one tick of the file system's clock it could change again without a new time."""
    os.utime(base / FIRST)
    apply(manifest, tmp_path / "out")
    known = json.loads(cache.read_text())["digests"].values()
    assert (sha256(base / FIRST) in known, sha256(base / THIRD) in known) == (False, True)


# --- edits in place


def test_an_edit_in_place_takes_no_digest_from_the_cache(base, pinned, tmp_path, false_cache):
    record = {"path": str(base), "sha256": {SECOND: sha256(base / SECOND)}}
    manifest = write_manifest(tmp_path / "place.json", record, ZERO)
    swsurgery.apply(manifest, in_place=True, check=OFF)
    files = json.loads((base / "swsurgery.json").read_text())["files"]
    assert files[FIRST] == {"size": (base / FIRST).stat().st_size, "base_sha256": None, "sha256": None}


def test_an_edit_in_place_marks_what_it_copies_from_the_earlier_record(manifest, tmp_path):
    out = tmp_path / "out"
    first = apply(manifest, out)
    second = write_manifest(tmp_path / "second.json", out, {**ZERO, "row": 1})
    swsurgery.apply(second, in_place=True, check=OFF)
    files = json.loads((out / "swsurgery.json").read_text())["files"]
    assert files[FIRST] == {**first[FIRST], "unverified": True}
    assert "unverified" not in files[SECOND] and "unverified" not in files["config.json"]
    found = swsurgery.verify(out)
    assert found.ok and set(found.record.unverified) == {FIRST, THIRD} and SECOND in found.record.proved


def test_an_edit_in_place_hashes_what_the_manifest_pins(manifest, tmp_path):
    out = tmp_path / "out"
    apply(manifest, out)
    record = {"path": str(out), "sha256": {FIRST: sha256(out / FIRST)}}
    flip(out / FIRST)
    second = write_manifest(tmp_path / "second.json", record, {**ZERO, "row": 1})
    with pytest.raises(PlanError, match="its sha256 is .*but the manifest says"):
        swsurgery.apply(second, in_place=True, check=OFF)
    flip(out / FIRST)
    swsurgery.apply(second, in_place=True, check=OFF)
    files = json.loads((out / "swsurgery.json").read_text())["files"]
    assert "unverified" not in files[FIRST] and files[THIRD]["unverified"] is True


# --- the record


def test_a_record_without_unverified_files_has_the_bytes_it_always_had(manifest, tmp_path):
    apply(manifest, tmp_path / "out")
    raw = (tmp_path / "out" / "swsurgery.json").read_bytes()
    assert b"unverified" not in raw
    assert Record.model_validate_json(raw).render() == raw
    record = FileRecord(size=1, base_sha256=FALSE, sha256=FALSE)
    assert record.model_dump(mode="json") == {"size": 1, "base_sha256": FALSE, "sha256": FALSE}


# --- the cache file


def entry(path: Path) -> tuple[os.stat_result, str]:
    return os.stat(path), sha256(path)


@pytest.fixture
def saved(base, tmp_path) -> Iterator[tuple[Path, os.stat_result, str]]:
    path = tmp_path / "cache" / "digests.json"
    cache = DigestCache(path)
    status, digest = entry(base / FIRST)
    cache.put(status, digest, started=status.st_mtime + 3600)
    cache.save()
    assert DigestCache(path).get(status) == digest
    yield path, status, digest


def test_the_cache_keeps_what_other_runs_saved_meanwhile(base, saved):
    path, first, digest = saved
    ours, theirs = DigestCache(path), DigestCache(path)
    for cache, name in ((ours, SECOND), (theirs, THIRD)):
        status, other = entry(base / name)
        cache.put(status, other, started=status.st_mtime + 3600)
        cache.save()
    assert DigestCache(path).get(first) == digest
    assert DigestCache(path).get(os.stat(base / SECOND)) == sha256(base / SECOND)
    assert DigestCache(path).get(os.stat(base / THIRD)) == sha256(base / THIRD)


def test_a_flipped_digit_is_noticed(saved):
    path, status, digest = saved
    wrong = digest[:-1] + ("0" if digest[-1] != "0" else "1")
    path.write_text(path.read_text().replace(digest, wrong))
    assert DigestCache(path).get(status) is None


def test_a_cache_of_another_user_is_not_read(saved, monkeypatch):
    path, status, _ = saved
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    assert DigestCache(path).get(status) is None


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_cache_that_others_may_write_is_not_read(saved, mode):
    path, status, _ = saved
    path.chmod(mode)
    assert DigestCache(path).get(status) is None


def test_the_cache_is_written_for_its_user_alone_whatever_the_umask(base, tmp_path):
    before = os.umask(0)
    try:
        cache = DigestCache(tmp_path / "cache" / "digests.json")
        status, digest = entry(base / FIRST)
        cache.put(status, digest, started=status.st_mtime + 3600)
        cache.save()
    finally:
        os.umask(before)
    assert DigestCache(tmp_path / "cache" / "digests.json").get(status) == digest
    assert (tmp_path / "cache" / "digests.json").stat().st_mode & 0o777 == 0o600


def test_a_fifo_in_the_place_of_the_cache_does_not_hang(manifest, cache, tmp_path):
    cache.parent.mkdir()
    os.mkfifo(cache)
    thread = threading.Thread(
        target=apply, args=(manifest, tmp_path / "out"), kwargs={"reuse_digests": True}, daemon=True
    )
    thread.start()
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert (tmp_path / "out" / "swsurgery.json").is_file()


@pytest.mark.parametrize("what", ["link", "directory", "too large", "not JSON", "nested", "a list", "the old form"])
def test_what_is_no_sound_cache_is_not_read(saved, what):
    path, status, digest = saved
    raw = path.read_text()
    if what == "link":
        path.rename(path.with_name("elsewhere"))
        path.symlink_to("elsewhere")
    elif what == "directory":
        path.unlink()
        path.mkdir()
    else:
        path.write_text({
            "too large": raw + " " * digest_cache.MAX_CACHE,
            "not JSON": "{",
            "nested": "[" * 200_000,
            "a list": "[]",
            "the old form": json.dumps(json.loads(raw)["digests"]),
        }[what])  # fmt: skip
    assert DigestCache(path).get(status) is None


def test_the_size_of_the_cache_is_bounded(base, tmp_path, monkeypatch):
    monkeypatch.setattr(digest_cache, "MAX_ENTRIES", 2)
    path = tmp_path / "digests.json"
    cache = DigestCache(path)
    for name in (FIRST, SECOND, THIRD):
        status, digest = entry(base / name)
        cache.put(status, digest, started=status.st_mtime + 3600)
    cache.save()
    assert set(json.loads(path.read_text())["digests"].values()) == {sha256(base / SECOND), sha256(base / THIRD)}

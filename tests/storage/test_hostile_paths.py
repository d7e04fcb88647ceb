"""Names that lead out of the directory, or to what is no file: refused by name, never opened, and nothing blocks."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoints import CONFIG, INDEX, tensor, write_shard
from fuzz.readers import MANIFEST, RECORD, SCALAR

import swsurgery
from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.errors import CheckpointError, ManifestError, SwsurgeryError
from swsurgery.manifest.load import parse_manifest

OK = "ok.safetensors"
OUTSIDE = "x.safetensors"
NO_NAME, MISSING, LINK, NO_FILE = (
    "not a plain file name",
    "missing shard",
    "is a symbolic link",
    "is not a regular file",
)


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    """What blocks on a pipe or reads a device for ever fails after ten seconds."""

    def late(number: int, frame: object) -> None:
        raise TimeoutError("it waits for a file that never ends or never begins")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkpoint with one shard; beside it, in the folder above, a shard that is none of its business."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in (folder / OK, tmp_path / OUTSIDE):
        write_shard(path, {"a": tensor("F32", 2, 3)})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every path that os.open was given, links resolved."""
    real, paths = os.open, []

    def record(path, *arguments, dir_fd=None, **options):
        below = "" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
        paths.append(Path(os.path.realpath(os.path.join(below, path))))
        return real(path, *arguments, dir_fd=dir_fd, **options)

    monkeypatch.setattr(os, "open", record)
    return paths


def write_index(root: Path, value: object) -> None:
    (root / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"a": value}}))


def nothing(root: Path) -> None:
    pass


def fifo(root: Path) -> None:
    os.mkfifo(root / "pipe.safetensors")


def link(name: str, target: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        (root / name).symlink_to(target.format(root=root))

    return make


def hard_link(root: Path) -> None:
    os.link(root / OK, root / "hard.safetensors")


def folder(name: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        (root / name).mkdir()
        write_shard(root / name / OK, {"a": tensor("F32", 2, 3)})

    return make


TABLE = [
    ("above", "../" + OUTSIDE, nothing, NO_NAME),
    ("absolute", "{root}/" + OK, nothing, NO_NAME),
    ("down and up", "a/../../" + OUTSIDE, nothing, NO_NAME),
    ("dot slash", "./" + OK, nothing, NO_NAME),
    ("nested", "sub/" + OK, folder("sub"), NO_NAME),
    ("absolute link", "l.safetensors", link("l.safetensors", "{root}/../" + OUTSIDE), LINK),
    ("relative link", "l.safetensors", link("l.safetensors", "../" + OUTSIDE), LINK),
    ("linked folder", "linked/" + OUTSIDE, link("linked", ".."), LINK),
    ("hard link", "hard.safetensors", hard_link, None),
    ("pipe", "pipe.safetensors", fifo, NO_FILE),
    ("device", "zero.safetensors", link("zero.safetensors", "/dev/zero"), LINK),
    ("folder", "d.safetensors", folder("d.safetensors"), "is a directory, not a shard"),
    ("empty", "", nothing, NO_NAME),
    ("dot", ".", nothing, NO_NAME),
    ("dots", "..", nothing, NO_NAME),
    ("NUL", "ok\0.safetensors", nothing, NO_NAME),
    ("slash behind", OK + "/", nothing, NO_NAME),
    ("twin in capitals", "OK.safetensors", nothing, MISSING),
    ("home", "~/" + OUTSIDE, nothing, NO_NAME),
    ("drive", "C:\\" + OUTSIDE, nothing, NO_NAME),
    ("backslash", "..\\" + OUTSIDE, nothing, NO_NAME),
    ("URL", "file:///" + OUTSIDE, nothing, NO_NAME),
    ("option", "-rf.safetensors", nothing, NO_NAME),
    ("line end", "ok\n.safetensors", nothing, NO_NAME),
    ("right to left", "ok\u202e.safetensors", nothing, NO_NAME),
    ("the index", INDEX, nothing, NO_NAME),
    ("pickle", "pytorch_model.bin", nothing, NO_NAME),
    ("number", 7, nothing, NO_NAME),
    ("null", None, nothing, NO_NAME),
    ("list", [OK], nothing, NO_NAME),
    ("300 characters", "a" * 300 + ".safetensors", nothing, NO_NAME),
    ("plain", OK, nothing, None),
]
IDS = [row[0] for row in TABLE]


def test_the_table_is_whole():
    assert len(set(IDS)) == len(TABLE) == 32


@pytest.mark.parametrize("value,make,says", [row[1:] for row in TABLE], ids=IDS)
def test_an_index_leads_nowhere_but_to_a_shard_beside_it(value, make, says, root, opened):
    make(root)
    write_index(root, value.replace("{root}", str(root)) if isinstance(value, str) else value)
    if says is None:
        assert list(open_checkpoint(root).shards) == [value]
    else:
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(root)
        assert says in str(caught.value)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
    assert all(path.is_relative_to(root) for path in opened)


@pytest.mark.parametrize("make,says", [row[2:] for row in TABLE if row[2] is not nothing],
                         ids=[row[0] for row in TABLE if row[2] is not nothing])  # fmt: skip
def test_what_lies_in_the_directory_is_refused_though_no_index_names_it(make, says, root, opened):
    make(root)
    write_index(root, OK)
    if says in (None, NO_NAME):  # a second name of the same file, and a folder whose files nobody asks for
        assert list(open_checkpoint(root).shards) == [OK]
    else:
        with pytest.raises(CheckpointError, match=says):
            open_checkpoint(root)
    assert all(path.is_relative_to(root) for path in opened)


@pytest.mark.parametrize("name", ["config.json", INDEX, "swsurgery.json", "manifest.yaml"])
@pytest.mark.parametrize("target", ["pipe", "/dev/zero", "../secret", "nowhere"])
def test_no_other_file_of_a_checkpoint_is_a_pipe_or_a_link(name, target, root, opened):
    (root.parent / "secret").write_text("{}")
    (root / name).unlink(missing_ok=True)
    if target == "pipe":
        os.mkfifo(root / name)
    else:
        (root / name).symlink_to(target)
    with pytest.raises(CheckpointError, match=f"{LINK}|{NO_FILE}"):
        open_checkpoint(root)
    assert all(path.is_relative_to(root) for path in opened)


def write_record(root: Path, name: object) -> None:
    """A record in which a file, an edit and a protected scalar are of that name."""
    scalar = SCALAR | {"file": name, "tensor": "a"}
    edit = scalar | {"op": "scale", "new": 3.0, "new_bits": "0x4040", "factor": 2.0}
    files = {str(name): {"size": 1, "base_sha256": "0" * 64, "sha256": "0" * 64}}
    document = RECORD | {"files": files, "edits": [edit], "protected": [scalar], "omitted": [name], "history": []}
    (root / "swsurgery.json").write_text(json.dumps(document))
    (root / "manifest.yaml").write_text("version: 1\n")


@pytest.mark.parametrize("value", [row[1] for row in TABLE if row[2] is nothing and row[1] != OK],
                         ids=[row[0] for row in TABLE if row[2] is nothing and row[1] != OK])  # fmt: skip
def test_a_record_leads_nowhere_either(value, root, opened):
    write_record(root, value.replace("{root}", str(root)) if isinstance(value, str) else value)
    try:
        assert not swsurgery.verify(root).ok
    except SwsurgeryError as error:
        assert all(fault.isprintable() for fault in error.faults)
    assert all(path.is_relative_to(root) for path in opened if not path.is_relative_to(os.environ["XDG_CACHE_HOME"]))


@pytest.mark.parametrize("value", [row[1] for row in TABLE if isinstance(row[1], str) and row[3] == NO_NAME],
                         ids=[row[0] for row in TABLE if isinstance(row[1], str) and row[3] == NO_NAME])  # fmt: skip
def test_a_manifest_names_shards_by_their_plain_names(value):
    def text(name: str) -> bytes:
        return json.dumps(MANIFEST | {"base": {"path": "b", "sha256": {name: "0" * 64}}}).encode()

    assert parse_manifest(text(OK), Path("m")).manifest.base.sha256 == {OK: "0" * 64}
    if value in (INDEX, "pytorch_model.bin"):  # plain names of other files; the base has no such shard
        assert list(parse_manifest(text(value), Path("m")).manifest.base.sha256) == [value]
        return
    with pytest.raises(ManifestError) as caught:
        parse_manifest(text(value), Path("m"))
    assert "sha256" in str(caught.value) and str(caught.value).isprintable()

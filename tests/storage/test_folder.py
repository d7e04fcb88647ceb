"""A held directory: whatever happens to its path, what is opened below it is in it, with openat2 and without."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from swsurgery.errors import CheckpointError, ShardError, TargetError
from swsurgery.storage import filesystem
from swsurgery.storage import folder as folder_module
from swsurgery.storage.files import LocalFile
from swsurgery.storage.folder import Entry, Folder, Identity


@pytest.fixture(params=["openat2", "components"])
def way(request, monkeypatch) -> str:
    """Both ways to open below a descriptor; older kernels have only the second."""
    if request.param == "components":
        monkeypatch.setattr(folder_module, "_call_openat2", lambda *_: None)
    elif not _kernel_has_openat2():
        pytest.skip("this kernel has no openat2")
    return request.param


def _kernel_has_openat2() -> bool:
    fd = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    try:
        found = folder_module._call_openat2(fd, ".", os.O_RDONLY | os.O_DIRECTORY)
    finally:
        os.close(fd)
    if found is not None:
        os.close(found)
    return found is not None


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "root" / "sub" / "deep").mkdir(parents=True)
    (tmp_path / "root" / "a").write_bytes(b"a")
    (tmp_path / "root" / "sub" / "b").write_bytes(b"b")
    (tmp_path / "root" / "sub" / "deep" / "c").write_bytes(b"c")
    (tmp_path / "private" / "deep").mkdir(parents=True)
    for name in ("a", "b", "deep/c"):
        (tmp_path / "private" / name).write_bytes(b"private")
    return tmp_path / "root"


def read(entry: Entry) -> bytes:
    with LocalFile(entry).open() as file:
        return os.read(file.fd, 100)


@pytest.mark.parametrize("name", ["a", "sub/b", "sub/deep/c"])
def test_a_file_is_read_at_any_depth(way, root, name):
    with Folder.at(root) as folder:
        assert read(folder / name) == name[-1].encode()


def test_the_directory_is_the_one_that_was_opened_whatever_its_path_means_now(way, root):
    with Folder.at(root) as folder:
        root.rename(root.with_name("moved"))
        root.symlink_to(root.with_name("private"))
        assert read(folder / "a") == b"a"
        filesystem.write_file(folder / "new", b"new")
    assert not (root / "new").exists() and (root.with_name("moved") / "new").read_bytes() == b"new"


@pytest.mark.parametrize("replaced", ["sub", "sub/deep", "sub/deep/c"])
def test_no_component_is_followed_through_a_link(way, root, replaced):
    with Folder.at(root) as folder:
        entry = folder / "sub/deep/c"
        assert read(entry) == b"c"
        (root / replaced).rename(root / "aside")
        (root / replaced).symlink_to(root.parent / "private" / replaced.removeprefix("sub").lstrip("/"))
        assert (root / "sub/deep/c").read_bytes() == b"private", "the path does follow it"
        with pytest.raises(ShardError):
            read(entry)
        with pytest.raises(OSError):
            filesystem.open_for_patching(entry)


@pytest.mark.parametrize("name", ["../private/a", "sub/../a", "/etc/passwd", "sub//b", "sub/./b", "..", "", "a\0b"])
def test_a_name_cannot_climb(way, root, name):
    with Folder.at(root) as folder:
        with pytest.raises(ShardError):
            (folder / name).open()
        with pytest.raises(OSError):
            filesystem.create(folder / name)


def test_a_pipe_and_a_directory_are_no_files_and_do_not_block(way, root):
    os.mkfifo(root / "pipe")
    with Folder.at(root) as folder:
        for name in ("pipe", "sub"):
            with pytest.raises(ShardError, match="not a regular file"):
                (folder / name).open()
        with pytest.raises(ShardError, match="not a regular file"):
            filesystem.open_for_patching(folder / "pipe")


def test_a_listing_has_names_identities_and_no_more(way, root):
    (root / "link").symlink_to("a")
    with Folder.at(root) as folder:
        found = folder.scan()
        assert [e.name for e in found] == ["a", "link", "sub"]
        assert found[0].identity == Identity.of(os.stat(root / "a"))
        assert found[1].identity == Identity.of(os.lstat(root / "link")) and found[1].readlink() == "a"
        assert [e.name for e in folder.scan("sub")] == ["sub/b", "sub/deep"]
        assert [e.name for e in folder.scan()] == ["a", "link", "sub"], "a second listing begins anew"


def listed(folder: Folder, name: str) -> Entry:
    return next(e for e in folder.scan(name.rpartition("/")[0]) if e.name == name)


def replaced(path: Path) -> None:
    path.with_name("other").write_bytes(path.read_bytes())
    os.replace(path.with_name("other"), path)


def rewritten(path: Path) -> None:
    status = path.stat()
    path.write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # only the ctime is left to tell


def grown(path: Path) -> None:
    path.write_bytes(path.read_bytes() * 2)


@pytest.mark.parametrize("change", [replaced, rewritten, grown])
@pytest.mark.parametrize("name", ["a", "sub/b"])
def test_a_file_that_is_no_longer_what_was_listed_is_refused(way, root, name, change):
    with Folder.at(root) as folder:
        entry = listed(folder, name)
        assert read(entry) == name[-1].encode()
        change(root / name)
        with pytest.raises(CheckpointError, match="changed or replaced"):
            entry.open()
        with pytest.raises(CheckpointError, match="changed or replaced"):
            filesystem.open_for_patching(entry)


def test_a_file_that_changes_while_it_is_read_is_noticed_at_the_end(way, root):
    changed = pytest.raises(CheckpointError, match="changed or replaced")
    with Folder.at(root) as folder, changed, LocalFile(listed(folder, "a")).open() as file:
        assert os.read(file.fd, 1) == b"a"
        rewritten(root / "a")


def test_a_hard_link_is_no_change_and_what_is_written_after_it_is(way, root):
    with Folder.at(root) as folder:
        ours, theirs = listed(folder, "a"), listed(folder, "sub/b")
        filesystem.make_hard_link(ours, folder / "sub/link")
        filesystem.remove_file(folder / "sub/link")
        os.link(root / "sub/b", root / "theirs")
        assert read(ours) == b"a" and read(theirs) == b"b"
        for entry in (ours, theirs):
            grown(entry.path)
            with pytest.raises(CheckpointError, match="changed or replaced"):
                read(entry)


def test_an_identity_compares_all_but_the_fields_ignored():
    one = Identity(1, 2, 3, 4, 5)
    assert one.is_same(Identity(1, 2, 3, 4, 5))
    for other, field in zip(
        (Identity(0, 2, 3, 4, 5), Identity(1, 0, 3, 4, 5), Identity(1, 2, 0, 4, 5), Identity(1, 2, 3, 0, 5),
         Identity(1, 2, 3, 4, 0)), ("dev", "ino", "size", "mtime_ns", "ctime_ns"), strict=True,
    ):  # fmt: skip
        assert not one.is_same(other) and one.is_same(other, field)


def test_files_are_made_replaced_renamed_and_removed_below_the_directory(way, root):
    with Folder.at(root) as folder:
        filesystem.write_file(folder / "sub/new", b"1")
        filesystem.replace_file(folder / "sub/new", b"2")
        assert (root / "sub/new").read_bytes() == b"2"
        filesystem.rename_new(folder / "sub/new", folder / "newer")
        assert filesystem.is_there(folder / "newer") and not filesystem.is_there(folder / "sub/new")
        with pytest.raises(FileExistsError):
            filesystem.rename_new(folder / "newer", folder / "a")
        filesystem.sync_directory(folder)
        filesystem.remove_file(folder / "newer")
        filesystem.remove_file(folder / "newer")
        filesystem.reserve(folder / "room", 4096)
        assert (root / "room").stat().st_size == 4096
        with pytest.raises(TargetError, match="File exists"):
            filesystem.write_file(folder / "a", b"")
    assert sorted(os.listdir(root)) == ["a", "room", "sub"] and sorted(os.listdir(root / "sub")) == ["b", "deep"]


def test_the_descriptor_is_closed_with_the_object(root):
    folder = Folder.at(root)
    fd = folder.fd
    os.fstat(fd)
    del folder
    with pytest.raises(OSError):
        os.fstat(fd)

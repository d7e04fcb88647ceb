"""Bugs to plant into the product on purpose: a sweep is trusted while it finds each of them, and so is a race.

Each is one substitution in a text that occurs once in its file. `planted` puts it into the running process, `copy_with`
into a copy of the package for real ones.
"""

from __future__ import annotations

import contextlib
import importlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import swsurgery

PACKAGE = Path(swsurgery.__file__).parent


@dataclass(frozen=True)
class Bug:
    """`new` in place of `old` in a file of the package."""

    name: str
    file: str
    old: str
    new: str

    @property
    def module(self) -> str:
        """The dotted name of the file's module."""
        return "swsurgery." + self.file.removesuffix(".py").replace("/", ".")

    def text(self) -> str:
        """The file with the bug. Raises AssertionError where the place is not there, or not the only one."""
        text = (PACKAGE / self.file).read_text()
        if text.count(self.old) != 1:
            raise AssertionError(f"{self.name}: its place occurs {text.count(self.old)} times in {self.file}")
        return text.replace(self.old, self.new)


BUGS = (
    Bug(
        "no fsync of files",
        "storage/filesystem.py",
        "def sync(fd: int) -> None:\n    os.fsync(fd)\n",
        "def sync(fd: int) -> None:\n    pass\n",
    ),
    Bug(
        "no fsync of the directory",
        "storage/filesystem.py",
        "def sync_directory(path: Path | Folder) -> None:\n",
        "def sync_directory(path: Path | Folder) -> None:\n    return\n",
    ),
    Bug(
        "written straight into the target",
        "storage/staging.py",
        """\
            yield stage
            with filesystem.convert_os_errors(target):
                _commit(where, stage)
""",
        """\
                filesystem.rename_new(where.stage, where.target)
            yield stage
            with filesystem.convert_os_errors(target):
                for folder in _list_folders(stage):
                    with (stage / folder).open_folder() if folder else contextlib.nullcontext(stage) as held:
                        filesystem.sync_directory(held)
                filesystem.sync_directory(where.parent)
""",
    ),
    Bug(
        "in place without a journal",
        "checkpoint/journal.py",
        """\
            filesystem.write_file(folder / JOURNAL_NEW, raw, mode)
            filesystem.rename_new(folder / JOURNAL_NEW, folder / JOURNAL)
""",
        "",
    ),
    Bug(
        "journal not synced",
        "checkpoint/journal.py",
        """\
            filesystem.write_file(folder / JOURNAL_NEW, raw, mode)
""",
        """\
            new = filesystem.create(folder / JOURNAL_NEW, mode)
            filesystem.write_all(new, raw)
            os.close(new)
""",
    ),
    Bug(
        "journal dropped too early",
        "checkpoint/journal.py",
        """\
            filesystem.write_at(shard.fd, getattr(place, data), place.offset)
        filesystem.sync(shard.fd)
""",
        """\
            filesystem.write_at(shard.fd, getattr(place, data), place.offset)
        if data == "old":  # the new bytes are left to the kernel, and the journal goes all the same
            filesystem.sync(shard.fd)
""",
    ),
    Bug(
        "fsync error swallowed",
        "storage/filesystem.py",
        "def sync(fd: int) -> None:\n    os.fsync(fd)\n",
        "def sync(fd: int) -> None:\n    with contextlib.suppress(OSError):\n        os.fsync(fd)\n",
    ),
    Bug(
        "one write assumed complete",
        "storage/filesystem.py",
        "            view, offset = view[written:], offset + written\n",
        "            return\n",
    ),
    Bug(
        "no lock",
        "storage/filesystem.py",
        "        fcntl.flock(folder.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "        pass\n",
    ),
)
"""Found by the sweeps."""

COPY_RACES = (
    Bug(
        "listed files are opened by their paths",
        "storage/files.py",
        """\
        fd = self.where.open() if isinstance(self.where, Entry) else _open_path(self.where)
        try:
            yield replace(self, fd=fd)
            if isinstance(self.where, Entry):
                self.where.refuse_changed(fd)
""",
        """\
        fd = _open_path(self.where.path if isinstance(self.where, Entry) else self.where)
        try:
            yield replace(self, fd=fd)
""",
    ),
    Bug(
        "links are followed below a directory",
        "storage/folder.py",
        "    how = _How(flags, 0, _BENEATH)\n",
        "    how = _How(flags & ~os.O_NOFOLLOW, 0, 0)\n",
    ),
    Bug(
        "a marker is believed without the token",
        "storage/staging.py",
        "    if marker is None or token is None or marker[0] != token[0] or not _TOKEN.fullmatch(marker[0]):\n",
        "    if marker is None:\n",
    ),
)
"""Holes through which a copy becomes a mixture, gets another user's file, or replaces a user's own directory."""

IN_PLACE_RACES = (
    Bug(
        "a shard is not compared with what it was",
        "checkpoint/edited_shard.py",
        """\
        try:
            named = Identity.of(self.entry.stat())
""",
        """\
        return
        try:
            named = Identity.of(self.entry.stat())
""",
    ),
    Bug(
        "old bytes are not read before they are overwritten",
        "checkpoint/edited_shard.py",
        "        if read_exactly(self.file, len(wanted), place.offset) != wanted:\n",
        "        if False:\n",
    ),
    Bug(
        "files are opened by their paths",
        "storage/filesystem.py",
        """\
        with path.open_parent() as (fd, name):
            yield name, fd
""",
        """\
        yield os.fspath(path.path), None
""",
    ),
)
"""Holes through which another program's work is lost or overwritten while a checkpoint is edited in place."""


def bug(name: str) -> Bug:
    return next(b for b in (*BUGS, *IN_PLACE_RACES, *COPY_RACES) if b.name == name)


@contextlib.contextmanager
def planted(name: str) -> Iterator[None]:
    """Within the block this process has the bug: whoever holds the module sees it, for its namespace is refilled."""
    chosen = bug(name)
    module = importlib.import_module(chosen.module)
    kept = dict(vars(module))
    try:
        exec(compile(chosen.text(), str(PACKAGE / chosen.file), "exec"), vars(module))
        yield
    finally:
        vars(module).clear()
        vars(module).update(kept)


def copy_with(name: str, folder: Path) -> Path:
    """Write a copy of the package with the bug into `folder`, to be put into PYTHONPATH; returns `folder`."""
    chosen = bug(name)
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / PACKAGE.name / chosen.file).write_text(chosen.text())
    return folder

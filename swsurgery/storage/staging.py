"""A new directory that gets its name when all of it is there and durable, or not at all.

It is written beside its target, as `.NAME.partial`, under a lock. To give it its name, a random token is put into it
and into a marker, `.NAME.committing`; then come the rename and the removal of token and marker, each synced before
the next. A run that finds both tokens equal knows that an earlier one was killed in between, and takes the directory
back. It rewrites no directory without such a token, so none that a user made, copied or was given. The token is gone
before the marker, and the marker before success is reported, so no finished output holds anything of this.

Every system call that changes something is in filesystem.py; all are made relative to held directories.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from swsurgery.errors import (
    NOTHING_LEFT,
    CheckpointError,
    Interrupted,
    NoSpace,
    SwsurgeryError,
    TargetError,
    report_done,
)
from swsurgery.storage import filesystem
from swsurgery.storage.folder import Entry, Folder
from swsurgery.storage.names import STAGE_TOKEN

_TOKEN = re.compile(rb"[0-9a-f]{64}\n")

_LEFTOVER = re.compile(rb"[0-9a-f:]{0,64}\n?\0*")
"""What a marker may hold that a killed run left: a token, the beginning of one, zeros after a power cut, or the device
and inode that version 0.1.0 wrote."""

_MAX_MARKER = 128


@dataclass(frozen=True)
class _Names:
    """The three names of one output, in the directory that will hold it."""

    parent: Folder
    target: Entry
    stage: Entry
    marker: Entry

    @classmethod
    def of(cls, target: Path) -> _Names:
        parent = Folder(os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), target.parent)
        stage, marker = (parent / f".{target.name}{ending}" for ending in (".partial", ".committing"))
        return cls(parent, parent / target.name, stage, marker)


@contextlib.contextmanager
def staged(target: Path, names: Collection[str], last: Collection[str] = (), mode: int = 0o777) -> Iterator[Folder]:
    """A locked directory beside `target`, held open; renamed to `target`, durably, when the block ends well.

    `names` are the files, relative to it, that the block will write, and `last` those that tell of them and are always
    written anew. Of the former those that a killed run left behind are still there when the block begins, unproved,
    and it has to replace or prove them; everything else is removed. The umask takes permissions away from `mode`.

    On an exception the directory is removed, so `target` is whole or absent. It stays if it holds a finished shard on
    Interrupted, and if it was there before on NoSpace. Raises TargetError if the target exists, cannot be made, or
    another run is writing it. If an error comes after the rename and the rename cannot be undone, the error says that
    the output is there.
    """
    target = Path(os.path.abspath(target))
    with filesystem.reported(target):
        where = _Names.of(target)
        stage, made = _locked_stage(where, {*names, *last}, mode)
    with where.parent, stage:  # the lock dies with the descriptor, so a killed run leaves none
        try:
            with filesystem.reported(stage):
                _remove_strays(stage, names)
            yield stage
            with filesystem.reported(target):
                _commit(where, stage)
            report_done(f"the output was written: {target}")
        except BaseException as error:
            kept = False
            with contextlib.suppress(OSError, TargetError):
                _take_back(where, stage)
                # Files that were not finished are gone already, so a shard is something to go on from.
                shards = any(n.endswith(".safetensors") for n in _files(stage))
                kept = shards and (isinstance(error, Interrupted) or isinstance(error, NoSpace) and not made)
                if not kept:
                    _remove_tree(where.stage)
            if _is(where.target, stage):
                raise _visible(error, target) from error
            report_done(None)
            if isinstance(error, Interrupted):
                left = f"run the same command to continue, or remove {where.stage}" if kept else NOTHING_LEFT
                raise error.leaving(left) from None
            raise


def _visible(error: BaseException, target: Path) -> BaseException:
    """The same error, which says that the output is there all the same."""
    what = f"{target} is there and complete, but may not survive a power cut: remove it, or see swsurgery verify"
    if isinstance(error, Interrupted):
        return error.leaving(what)
    if isinstance(error, SwsurgeryError):
        return TargetError.of((*error.faults, f"the output could not be taken back: {what}"))
    return error


def _commit(where: _Names, stage: Folder) -> None:
    """Give the stage its name. Until the token is removed from it, a run that comes after a kill takes it back."""
    token = secrets.token_hex(32).encode() + b"\n"
    filesystem.write_file(stage / STAGE_TOKEN, token, 0o600)
    for folder in _folders(stage):
        with (stage / folder).open_folder() if folder else contextlib.nullcontext(stage) as held:
            filesystem.sync_directory(held)
    filesystem.write_file(where.marker, token, 0o600)
    filesystem.sync_directory(where.parent)
    filesystem.rename_new(where.stage, where.target)
    filesystem.sync_directory(where.parent)
    filesystem.remove_file(stage / STAGE_TOKEN)
    filesystem.sync_directory(stage)
    filesystem.remove_file(where.marker)
    filesystem.sync_directory(where.parent)


def _take_back(where: _Names, stage: Folder) -> None:
    """Undo what `_commit` did of its work, if anything."""
    if _is(where.target, stage):
        filesystem.rename_new(where.target, where.stage)
        with contextlib.suppress(OSError):
            filesystem.sync_directory(where.parent)
    _remove_leftover(where.marker)


def _locked_stage(where: _Names, names: set[str], mode: int) -> tuple[Folder, bool]:
    """(the stage, locked, whether it was made now). It is taken back from a target that a killed run had renamed but
    not yet reported."""
    exists = TargetError("the target exists", where.target, "give another -o, or remove it")
    while True:
        unreported, made = filesystem.is_there(where.target), False
        if unreported and not filesystem.is_there(where.marker):
            raise exists
        if not unreported:
            with contextlib.suppress(FileExistsError):
                filesystem.make_directory(where.stage, mode)
                made = True
        here = where.target if unreported else where.stage
        try:
            folder = here.open_folder()
        except FileNotFoundError:
            continue  # its owner renamed or removed it between our two calls
        except OSError as error:
            if unreported and error.errno in (errno.ENOTDIR, errno.ELOOP):
                raise exists from None
            raise
        try:
            if not filesystem.lock(folder):
                raise TargetError("another run is writing it", where.target, "wait for it, or stop it")
            if _is(here, folder) and (unreported or not filesystem.is_there(where.target)):
                if unreported and not _is_unreported(where, folder, names):
                    _remove_leftover(where.marker)
                    raise exists
                if os.fstat(folder.fd).st_uid != os.geteuid():  # who could change it after it was checked
                    raise TargetError("belongs to another user", here, "remove it, or give another -o")
                if unreported:
                    filesystem.rename_new(where.target, where.stage)
                filesystem.restrict(folder, mode)  # the base may be more private than when this was made
                if not _remove_leftover(where.marker):
                    raise TargetError("is in the way", where.marker, "remove it, or give another -o")
                return folder, made
            if made:
                filesystem.remove_directory(where.stage)
        except BaseException:
            if made:
                with contextlib.suppress(OSError):
                    filesystem.remove_directory(where.stage)
            folder.close()
            raise
        folder.close()


def _is(entry: Entry, folder: Folder) -> bool:
    """Whether a name is of the held directory."""
    try:
        return os.path.samestat(entry.stat(), os.fstat(folder.fd))
    except OSError:
        return False


def _is_unreported(where: _Names, target: Folder, names: set[str]) -> bool:
    """Whether a killed run gave this directory its name, and nobody changed it since: marker and token are this
    user's and the same, only files of this run are there, and none of them is younger than the marker."""
    marker, token = _own_text(where.marker), _own_text(target / STAGE_TOKEN)
    if marker is None or token is None or marker[0] != token[0] or not _TOKEN.fullmatch(marker[0]):
        return False
    found = _files(target)
    youngest = max((_ctime(target / name) for name in found), default=0)
    return found <= {*names, STAGE_TOKEN} and youngest <= marker[1]


def _ctime(entry: Entry) -> int:
    return entry.stat().st_ctime_ns


def _own_text(entry: Entry) -> tuple[bytes, int] | None:
    """(bytes, ctime) of a small regular file of this user; None for anything else."""
    try:
        fd = entry.open()
    except CheckpointError:
        return None
    try:
        status = os.fstat(fd)
        if status.st_uid != os.geteuid() or status.st_size > _MAX_MARKER:
            return None
        return os.pread(fd, _MAX_MARKER, 0), status.st_ctime_ns
    finally:
        os.close(fd)


def _remove_leftover(marker: Entry) -> bool:
    """Remove a marker of an earlier run. False if what has its name was not written by this user's swsurgery."""
    if not filesystem.is_there(marker):
        return True
    text = _own_text(marker)
    if text is None or not _LEFTOVER.fullmatch(text[0]):
        return False
    filesystem.remove_file(marker)
    return True


def _folders(folder: Folder, name: str = "") -> Iterator[str]:
    """The names of a directory and of all below it, the innermost first; its own is empty."""
    for entry in folder.scan(name):
        if stat.S_ISDIR(entry.mode):
            yield from _folders(folder, entry.name)
    yield name


def _files(folder: Folder) -> set[str]:
    """Names of everything below a directory that is no directory."""
    found = (entry for name in _folders(folder) for entry in folder.scan(name))
    return {entry.name for entry in found if not stat.S_ISDIR(entry.mode)}


def _remove_strays(stage: Folder, names: Collection[str]) -> None:
    """Remove everything that is neither one of the files nor a directory that holds one."""
    inside = {name[:at] for name in names for at in range(len(name)) if name[at] == "/"}
    for folder in _folders(stage):
        for entry in stage.scan(folder):
            if stat.S_ISDIR(entry.mode):
                if entry.name not in inside:
                    filesystem.remove_directory(entry)  # those within it came before
            elif entry.name not in names or not stat.S_ISREG(entry.mode):
                filesystem.remove_file(entry)


def _remove_tree(stage: Entry) -> None:
    with stage.open_folder() as folder:
        _remove_strays(folder, ())
    filesystem.remove_directory(stage)

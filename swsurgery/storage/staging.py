"""Create a directory that gets its final name only when it is complete and synced to the disk.

The directory is first written beside the target NAME as `.NAME.partial` (the stage), under a lock. To commit it, a
random token is written to a file in the stage and to the file `.NAME.committing` beside it (the marker). Then the stage
is renamed to NAME, the token is removed, and the marker is removed. Each step is synced before the next one. Success is
reported last, so a finished output has neither a token nor a marker. A run that finds a target and a marker with equal
tokens concludes that an earlier run was killed after the rename (the target is unreported), and renames the target
back. If the tokens differ or one is missing, the target is never changed, so a directory of the user is safe.

Every system call that changes something is in filesystem.py. All calls are relative to open directories.
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
from swsurgery.storage.files import LocalFile, read_at_most
from swsurgery.storage.folder import Entry, Folder
from swsurgery.storage.names import SHARD_ENDINGS, STAGE_TOKEN

_TOKEN = re.compile(rb"[0-9a-f]{64}\n")

_LEFTOVER = re.compile(rb"[0-9a-f:]{0,64}\n?\0*")
"""Contents of a marker that a killed run left: a token, the beginning of a token, zeros after a power cut, or the
device and inode that version 0.1.0 wrote."""

_MAX_MARKER = 128
"""Maximum size of a marker or a token file, in bytes."""


@dataclass(frozen=True)
class _Names:
    """The target, the stage and the marker of one output, and their parent directory, which is kept open."""

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
def stage_output(
    target: Path, names: Collection[str], last: Collection[str] = (), mode: int = 0o777
) -> Iterator[Folder]:
    """Create and lock a directory beside `target`, and rename it to `target` durably when the block succeeds.

    Yields the open directory. The block writes the files `names` and then the files `last`; both are names relative to
    the directory. If an earlier run was killed, some of `names` may exist when the block starts: the block must replace
    or verify them. All other files, including `last`, are removed before the block starts. `mode` contains the
    permissions of the directory, reduced by the umask.

    If the block fails, the directory is not renamed, so `target` is complete or absent. The directory is removed, with
    two exceptions: if it contains a finished shard that the next run can reuse, it is kept after Interrupted, and after
    NoSpace if an earlier run created the directory. Raises TargetError if the target exists, cannot be created, or is
    being written by another run. If an error occurs after the rename and the rename cannot be undone, the error message
    reports that the output exists.
    """
    target = Path(os.path.abspath(target))
    with filesystem.convert_os_errors(target):
        where = _Names.of(target)
        stage, made = _lock_stage(where, {*names, *last}, mode)
    with where.parent, stage:  # the lock ends with the descriptor, so a killed run leaves no lock
        try:
            with filesystem.convert_os_errors(stage):
                _remove_strays(stage, names)
            yield stage
            with filesystem.convert_os_errors(target):
                _commit(where, stage)
            report_done(f"the output was written: {target}")
        except BaseException as error:
            kept = False
            with contextlib.suppress(OSError, SwsurgeryError):
                _take_back(where, stage)
                # Unfinished files were removed already, so any remaining shard can be reused.
                shards = any(n.endswith(SHARD_ENDINGS) for n in _list_files(stage))
                kept = shards and (isinstance(error, Interrupted) or isinstance(error, NoSpace) and not made)
                if not kept:
                    _remove_tree(where.stage)
            if _is_folder(where.target, stage):
                raise _report_visible(error, target) from error
            report_done(None)
            if isinstance(error, Interrupted):
                left = f"run the same command to continue, or remove {where.stage}" if kept else NOTHING_LEFT
                raise error.replace_left(left) from None
            raise


def _report_visible(error: BaseException, target: Path) -> BaseException:
    """Add to the message of `error` that the output exists although the run failed."""
    what = f"{target} is complete, but could be lost in a power cut: remove it, or check it with swsurgery verify"
    if isinstance(error, Interrupted):
        return error.replace_left(what)
    if isinstance(error, SwsurgeryError):
        return TargetError.of((*error.faults, f"the output could not be taken back: {what}"))
    return error


def _commit(where: _Names, stage: Folder) -> None:
    """Rename the stage to the target. If a run is killed before it removes the token, the next run renames it back."""
    token = secrets.token_hex(32).encode() + b"\n"
    filesystem.write_file(stage / STAGE_TOKEN, token, 0o600)
    for folder in _list_folders(stage):
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
    """Undo the completed steps of `_commit`, if any."""
    if _is_folder(where.target, stage):
        filesystem.rename_new(where.target, where.stage)
        with contextlib.suppress(OSError):
            filesystem.sync_directory(where.parent)
    _remove_leftover(where.marker)


def _lock_stage(where: _Names, names: set[str], mode: int) -> tuple[Folder, bool]:
    """Open and lock the stage. Returns the open stage, and True if this call created it.

    An unreported target (renamed by a run that was killed before it reported success) is renamed back to the stage.
    Raises TargetError, OSError.
    """
    while True:
        unreported, made = filesystem.is_there(where.target), False
        if unreported and not filesystem.is_there(where.marker):
            raise _make_target_error(where)
        if not unreported:
            with contextlib.suppress(FileExistsError):
                filesystem.make_directory(where.stage, mode)
                made = True
        try:
            folder = (where.target if unreported else where.stage).open_folder()
        except FileNotFoundError:
            continue  # another run renamed or removed it since
        except OSError as error:
            if unreported and error.errno in (errno.ENOTDIR, errno.ELOOP):
                raise _make_target_error(where) from None
            raise
        try:
            if _claim_stage(where, folder, unreported, names, mode):
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


def _make_target_error(where: _Names) -> TargetError:
    return TargetError("the output already exists", where.target, "choose another -o")


def _claim_stage(where: _Names, folder: Folder, unreported: bool, names: set[str], mode: int) -> bool:
    """Lock the open directory `folder` and prepare it as the stage of this run.

    If `unreported` is True, `folder` is the target. It is renamed back to the stage if a killed run renamed it without
    reporting success; otherwise TargetError is raised. Returns False if another run renamed or removed `folder` in the
    meantime. Raises TargetError, OSError.
    """
    here = where.target if unreported else where.stage
    if not filesystem.lock(folder):
        raise TargetError("another run is writing this directory", where.target, "wait until that run ends, or stop it")
    if not _is_folder(here, folder) or not unreported and filesystem.is_there(where.target):
        return False
    if unreported and not _is_unreported(where, folder, names):
        _remove_leftover(where.marker)
        raise _make_target_error(where)
    if os.fstat(folder.fd).st_uid != os.geteuid():  # the other user could change the directory after this check
        raise TargetError("this directory belongs to another user", here, "choose another -o")
    if unreported:
        filesystem.rename_new(where.target, where.stage)
    filesystem.restrict(folder, mode)  # the base may have stricter permissions than when the stage was made
    if not _remove_leftover(where.marker):
        raise TargetError("this file is in the way", where.marker, "choose another -o")
    return True


def _is_folder(entry: Entry, folder: Folder) -> bool:
    """Return True if `entry` still refers to the open directory `folder`."""
    try:
        return os.path.samestat(entry.stat(), os.fstat(folder.fd))
    except OSError:
        return False


def _is_unreported(where: _Names, target: Folder, names: set[str]) -> bool:
    """Return True if a killed run renamed the directory `target` and nobody changed the directory afterwards.

    The marker and the token must belong to this user and be equal. All files in `target` must be among `names`, and no
    file may have a later ctime than the marker.
    """
    marker, token = _read_own_file(where.marker), _read_own_file(target / STAGE_TOKEN)
    if marker is None or token is None or marker[0] != token[0] or not _TOKEN.fullmatch(marker[0]):
        return False
    found = _list_files(target)
    youngest = max((_read_ctime(target / name) for name in found), default=0)
    return found <= {*names, STAGE_TOKEN} and youngest <= marker[1]


def _read_ctime(entry: Entry) -> int:
    return entry.stat().st_ctime_ns


def _read_own_file(entry: Entry) -> tuple[bytes, int] | None:
    """Read a marker or a token file. Returns (bytes, ctime in nanoseconds).

    Returns None if there is no such file, or if it is not regular, is too large or belongs to another user.
    """
    try:
        with LocalFile(entry).open() as file:
            status = os.fstat(file.fd)
            if status.st_uid != os.geteuid() or status.st_size > _MAX_MARKER:
                return None
            return read_at_most(file, _MAX_MARKER), status.st_ctime_ns
    except CheckpointError:
        return None


def _remove_leftover(marker: Entry) -> bool:
    """Remove the marker of an earlier run, if it exists.

    Returns False, and removes nothing, if the file is not a marker that swsurgery wrote for this user.
    """
    if not filesystem.is_there(marker):
        return True
    text = _read_own_file(marker)
    if text is None or not _LEFTOVER.fullmatch(text[0]):
        return False
    filesystem.remove_file(marker)
    return True


def _list_folders(folder: Folder, name: str = "") -> Iterator[str]:
    """Yield the names of all directories below the directory `name`, inner ones first, and finally `name` itself.

    "" is the name of `folder`.
    """
    for entry in folder.scan(name):
        if stat.S_ISDIR(entry.mode):
            yield from _list_folders(folder, entry.name)
    yield name


def _list_files(folder: Folder) -> set[str]:
    """Return the names of everything below a directory except directories, also in its subdirectories."""
    found = (entry for name in _list_folders(folder) for entry in folder.scan(name))
    return {entry.name for entry in found if not stat.S_ISDIR(entry.mode)}


def _remove_strays(stage: Folder, names: Collection[str]) -> None:
    """Remove everything except the files `names` and the directories that contain them."""
    inside = {name[:at] for name in names for at in range(len(name)) if name[at] == "/"}
    for folder in _list_folders(stage):
        for entry in stage.scan(folder):
            if stat.S_ISDIR(entry.mode):
                if entry.name not in inside:
                    filesystem.remove_directory(entry)  # empty by now, because inner directories come first
            elif entry.name not in names or not stat.S_ISREG(entry.mode):
                filesystem.remove_file(entry)


def _remove_tree(stage: Entry) -> None:
    with stage.open_folder() as folder:
        _remove_strays(folder, ())
    filesystem.remove_directory(stage)

"""Edit files of a directory in place, so that after any fault either all new bytes or all old bytes are stored.

The journal is a file with the old and the new bytes. It is synced before the first write and removed after the last
write is synced. If an edit was interrupted, `opening.held` restores the old bytes (`recover`) before anything else
uses the directory. All paths are relative to one descriptor of the directory, and each shard is opened once. Bytes that
are neither old nor new were written by another program: they are reported and never overwritten.

The writes are given as splices and places. This module must not interpret the bytes or decide whether they may be
changed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from swsurgery.checkpoint.edited_shard import OpenShard, make_change_error
from swsurgery.checkpoint.journal_format import MAX_JOURNAL, Journal, JournalFile, JournalPlace, parse_journal
from swsurgery.checkpoint.listing import is_edit_pending
from swsurgery.errors import CheckpointError, Interrupted, SwsurgeryError, TargetError, list_some, report_done
from swsurgery.storage import filesystem
from swsurgery.storage.files import LocalFile, read_exactly
from swsurgery.storage.folder import Entry, Folder
from swsurgery.storage.names import JOURNAL, JOURNAL_NEW, OWN_FILES, ROOM, WORKING_FILES, make_working_name
from swsurgery.storage.splice import Splice
from swsurgery.storage.strict_json import read_small

_log = logging.getLogger(__name__)

ROOM_BYTES = 1 << 20
"""Disk space in bytes that is reserved for restoring the old bytes, in addition to two blocks for each edited block.

File systems that copy on write need free space for every write.
"""

JOURNAL_BLOCK = 4096
"""The size of a file system block in bytes, as assumed when the space to reserve is computed."""


@contextlib.contextmanager
def apply_splices(
    folder: Folder,
    shards: Mapping[str, OpenShard],
    splices: Sequence[Splice],
    *,
    places: Mapping[str, Sequence[JournalPlace]] | None = None,
    undo_name: str | None = None,
    reverts: bool = False,
    mode: int = 0o600,
) -> Iterator[dict[str, bytes | None]]:
    """Apply the splices to the open `shards` before the `with` block, and undo them if the block raises an exception.

    `places` are the changes of regions in each shard; they must not overlap the splices. `undo_name` is the name of the
    undo file that the block adds or removes. `reverts` is True if an earlier edit is undone; messages then say so.

    Yields an empty dict. The block fills it with the new contents of swsurgery's own files, such as swsurgery.json
    (name -> bytes, or None to remove the file). They are written when the block ends without an exception. These files
    and the journal get the permissions `mode`, reduced by the umask. The caller must hold the directory's exclusive
    lock.

    Raises TargetError if the directory cannot be written. Raises CheckpointError if another program changes the
    directory meanwhile; the bytes that the other program wrote are then left as they are.
    """
    own: dict[str, bytes | None] = {}
    journal = _build_journal(folder, shards, splices, places, undo_name, reverts)
    raw = journal.render()
    parse_journal(raw, folder / JOURNAL)  # recovery must be able to read what is about to be written
    ending = False
    for shard in shards.values():
        shard.refuse_changed()
    try:
        with filesystem.convert_os_errors(folder):
            filesystem.reserve(folder / ROOM, ROOM_BYTES + 2 * JOURNAL_BLOCK * journal.list_blocks(JOURNAL_BLOCK))
            filesystem.write_file(folder / JOURNAL_NEW, raw, mode)
            filesystem.rename_new(folder / JOURNAL_NEW, folder / JOURNAL)
            del raw  # with the undo file it may have many megabytes
            filesystem.sync_directory(folder)
            for name, file in journal.files.items():
                _write(shards[name], file.places)
        yield own
        with filesystem.convert_os_errors(folder):
            made = {name: None if data is None else hashlib.sha256(data).hexdigest() for name, data in own.items()}
            journal = replace(journal, made=made)
            # With these digests, recovery recognises the new contents of swsurgery's own files.
            filesystem.replace_file(folder / JOURNAL, journal.render(), folder / JOURNAL_NEW, mode)
            filesystem.sync_directory(folder)
            for name, data in own.items():
                if _classify_own_file(folder, journal, name) == "foreign":
                    raise make_change_error("was changed", folder / name)
                _put(folder, name, data, mode)
            filesystem.sync_directory(folder)
            _refuse_disturbed(folder, shards, journal)
            filesystem.remove_file(folder / ROOM)
            ending = True
            filesystem.remove_file(folder / JOURNAL)
            report_done(_describe_result(folder, reverts))
            filesystem.sync_directory(folder)
    except BaseException as error:
        if ending and not filesystem.is_there(folder / JOURNAL):
            _finish(folder, reverts, error)
        elif any(filesystem.is_there(folder / name) for name in WORKING_FILES):
            _take_back(folder, shards, journal, error)
        raise


def _describe_result(folder: Folder, reverts: bool) -> str:
    """Return the message that the edit of a directory, or its reversal, is complete."""
    return f"{'the base was put back' if reverts else 'the edit was made'}: {folder}"


def _finish(folder: Folder, reverts: bool, error: BaseException) -> None:
    """Report that the edit was made, although `error` was raised after its last step.

    Raises TargetError if the directory cannot be synced, and Interrupted if `error` is an Interrupted.
    """
    report_done(_describe_result(folder, reverts))
    try:
        filesystem.sync_directory(folder)
    except OSError as failed:
        reason = os.strerror(failed.errno or 0)
        what = f"{_describe_result(folder, reverts)}, but a power cut could still undo it ({reason})"
        raise TargetError(what, remedy="repair or replace the disk, then run the same command again") from error
    if isinstance(error, Interrupted):
        raise error.replace_left(_describe_result(folder, reverts)) from None


def _take_back(folder: Folder, shards: Mapping[str, OpenShard], journal: Journal, error: BaseException) -> None:
    """Undo the writes of this run after the exception `error`.

    Bytes that another program wrote are left, with a warning. Raises TargetError if undoing fails. If `error` is an
    Interrupted, raises an Interrupted whose message states whether the old bytes were restored.
    """
    begun = filesystem.is_there(folder / JOURNAL)
    files = [_Held(shards[name].fd, folder / name, file, writable=True) for name, file in journal.files.items()]
    left = [f"{file.path} at byte {place.offset}" for file in files for place in file.foreign()]
    left += [str(folder / name) for name in journal.own if _classify_own_file(folder, journal, name) == "foreign"]
    try:
        _put_all_back(folder, journal, files)
    except TargetError as failed:
        if isinstance(error, Interrupted):
            raise error.replace_left(str(failed)) from failed
        raise
    if left:
        _log.warning("not restored, because another program wrote to it: %s", list_some(left, 1))
    if begun and isinstance(error, Interrupted):
        raise error.replace_left("the old bytes were put back") from None


def recover(folder: Folder, *, moved: bool = False) -> Journal | None:
    """Undo an interrupted edit in place, remove its working files, and return its journal.

    Returns None if no edit was interrupted, or if one was interrupted before its journal was complete. The caller must
    hold the directory's exclusive lock. If `moved` is True, a journal is also accepted if it was copied together with
    its directory. Raises TargetError if the directory cannot be written. Raises CheckpointError if the journal is
    damaged or does not match the files, or if another program changed the files after the interruption.
    """
    if not is_edit_pending(folder):
        return None
    with filesystem.convert_os_errors(folder), contextlib.ExitStack() as opened:
        journal = _read_journal(folder)
        files = _open_files(folder, journal, moved, opened) if journal else []
        _refuse_foreign(folder, journal, files)
        _put_all_back(folder, journal, files)
    if journal:
        _log.warning("an edit in place had been cut off; the old bytes were put back: %s", folder)
    return journal


def _build_journal(
    folder: Folder,
    shards: Mapping[str, OpenShard],
    splices: Sequence[Splice],
    places: Mapping[str, Sequence[JournalPlace]] | None,
    undo_name: str | None,
    reverts: bool,
) -> Journal:
    """Build the journal of an edit, before the first write. Reads swsurgery's own files.

    Version 2 of the format is used unless regions are changed.
    """
    mine: dict[str, list[JournalPlace]] = {name: [*found] for name, found in (places or {}).items()}
    for splice in splices:
        mine.setdefault(splice.file, []).append(JournalPlace(splice.offset, splice.old, splice.new))
    files = {}
    for name, found in sorted(mine.items()):
        identity = shards[name].identity
        files[name] = JournalFile(identity.ino, identity.size, _join_places(found))
    names = (*OWN_FILES, undo_name) if undo_name else OWN_FILES
    own = {name: _read_own(folder, name) for name in names}
    version: Literal[2, 3] = 2 if places is None and undo_name is None else 3
    return Journal(version, reverts, os.fstat(folder.fd).st_ino, files, own)


def _join_places(places: list[JournalPlace]) -> list[JournalPlace]:
    """Return the places of a shard sorted by offset, with adjacent places joined to one."""
    joined: list[list[JournalPlace]] = []
    for place in sorted(places, key=operator.attrgetter("offset")):
        if joined and joined[-1][-1].end == place.offset:
            joined[-1].append(place)
        else:
            joined.append([place])
    return [JournalPlace(p[0].offset, b"".join(s.old for s in p), b"".join(s.new or b"" for s in p)) for p in joined]


def _write(shard: OpenShard, places: list[JournalPlace]) -> None:
    """Write the new bytes of the edited places of a shard, and sync the shard.

    Raises CheckpointError if another program changed the shard.
    """
    # If blocks are shared with a clone, a write needs new blocks and fails on a full disk. Writing the old bytes first
    # allocates the new blocks while the file still has its old contents.
    for data in ("old", "new"):
        shard.refuse_changed()
        for place in places:
            shard.refuse_unlike(place, place.old)
            filesystem.write_at(shard.fd, getattr(place, data), place.offset)
        filesystem.sync(shard.fd)
        shard.settle()


def _refuse_disturbed(folder: Folder, shards: Mapping[str, OpenShard], journal: Journal) -> None:
    """Raise CheckpointError if another program moved the directory or changed a file of this edit.

    The files are the edited shards and swsurgery's own files.
    """
    for name, file in journal.files.items():
        shards[name].refuse_changed()
        for place in file.places:
            shards[name].refuse_unlike(place, place.new or b"")
    for name in journal.made or ():
        if _classify_own_file(folder, journal, name) == "foreign":
            raise make_change_error("was changed", folder / name)
    try:
        moved = not os.path.samestat(os.lstat(folder.path), os.fstat(folder.fd))
    except OSError:
        moved = True
    if moved:
        raise make_change_error("was moved or replaced", folder)


def _read_own(folder: Folder, name: str) -> bytes | None:
    """Return the bytes of one of swsurgery's own files, such as swsurgery.json; None if it does not exist."""
    return read_small(LocalFile(folder / name), name, MAX_JOURNAL) if filesystem.is_there(folder / name) else None


def _classify_own_file(folder: Folder, journal: Journal, name: str) -> str:
    """Return "old", "new" or "foreign" for the present contents of one of swsurgery's own files.

    "foreign" means that another program wrote the contents.
    """
    data = _read_own(folder, name)
    if data == journal.own[name]:
        return "old"
    if journal.version == 1:
        return "new"  # a journal of version 1 does not contain the digests of the new contents
    digest = None if data is None else hashlib.sha256(data).hexdigest()
    return "new" if journal.made is not None and journal.made.get(name, "") == digest else "foreign"


def _put(folder: Folder, name: str, data: bytes | None, mode: int) -> None:
    """Replace one of swsurgery's own files, or remove it if `data` is None."""
    if data is None:
        filesystem.remove_file(folder / name)
    else:
        with contextlib.suppress(FileNotFoundError):  # an existing file gets no permissions that it does not have
            mode &= (folder / name).stat().st_mode & 0o777 | 0o600
        filesystem.replace_file(folder / name, data, folder / make_working_name(name), mode)


def _read_journal(folder: Folder) -> Journal | None:
    """Return the journal of a directory; None if it has no journal. Raises CheckpointError if it is damaged."""
    path = folder / JOURNAL
    return parse_journal(read_small(LocalFile(path), JOURNAL, MAX_JOURNAL), path) if filesystem.is_there(path) else None


@dataclass(frozen=True)
class _Held:
    """An open shard that the journal describes. `writable` is True if its descriptor `fd` also permits writing."""

    fd: int
    path: Entry
    file: JournalFile
    writable: bool = False

    @property
    def opened(self) -> LocalFile:
        """The open shard as a file to read from."""
        return LocalFile(self.path, self.fd)

    def foreign(self) -> Iterator[JournalPlace]:
        """Yield the places to which another program wrote: one of their bytes is neither the old nor the new byte.

        A place may contain both old and new bytes after a power cut.
        """
        for place in self.file.places:
            if not place.is_ours(read_exactly(self.opened, len(place.old), place.offset)):
                yield place

    def put_back(self) -> None:
        """Restore the old bytes of the shard and sync it.

        Only places that differ from the old bytes are written, so a shard in which nothing differs need not be
        writable. It is synced even then, because an earlier write may not have reached the disk. Places to which
        another program wrote are left.
        """
        target = self.fd if self.writable else None
        filesystem.drop_cache(self.fd)  # after a failed fsync the cache may hold old bytes that never reached the disk
        try:
            for place in self.file.places:
                now = read_exactly(self.opened, len(place.old), place.offset)
                if now != place.old and place.is_ours(now):
                    target = self._reopen() if target is None else target
                    filesystem.write_at(target, place.old, place.offset)
            filesystem.sync(self.fd if target is None else target)
        finally:
            if target not in (None, self.fd):
                os.close(target)

    def _reopen(self) -> int:
        """Open the shard for writing and return the descriptor. Raises CheckpointError if the shard was replaced."""
        fd = filesystem.open_for_patching(self.path)
        if not os.path.samestat(os.fstat(fd), os.fstat(self.fd)):
            os.close(fd)
            raise make_change_error("was replaced", self.path)
        return fd


def _open_files(folder: Folder, journal: Journal, moved: bool, opened: contextlib.ExitStack) -> list[_Held]:
    """Open, for reading, the shards that the journal describes. They are closed when the stack `opened` is closed.

    If `moved` is True, the directory may have been copied together with its journal. Raises CheckpointError if a shard
    is not the file that the journal describes.
    """
    files = []
    for name, file in journal.files.items():
        fd = (folder / name).open()
        opened.callback(os.close, fd)
        status = os.fstat(fd)
        if not moved and (status.st_ino, os.fstat(folder.fd).st_ino) != (file.inode, journal.inode):
            what = "an edit in place was cut off before this directory was copied here"
            raise CheckpointError(what, folder, f"to put the old bytes back, run: swsurgery revert {folder}")
        if status.st_size != file.size or any(p.offset + len(p.old) > file.size for p in file.places):
            what = "the file does not match the journal of the interrupted edit"
            raise CheckpointError(what, folder / name)
        files.append(_Held(fd, folder / name, file))
    return files


def _refuse_foreign(folder: Folder, journal: Journal | None, files: list[_Held]) -> None:
    """Raise CheckpointError if another program wrote to the edited places or to swsurgery's own files.

    Recovery would overwrite what the other program wrote.
    """
    found: list[object] = []
    for file in files:
        filesystem.drop_cache(file.fd)
        found += [f"{file.path} at byte {place.offset}" for place in file.foreign()]
    if journal:
        found += [folder / name for name in journal.own if _classify_own_file(folder, journal, name) == "foreign"]
    if found:
        raise CheckpointError(
            "an edit in place was cut off, and another program has written to the edited files since",
            list_some(found, 1),
            f"restore the files from the base, or remove {folder / JOURNAL} to keep them as they are",
        )


def _put_all_back(folder: Folder, journal: Journal | None, files: list[_Held]) -> None:
    """Restore the old contents of the directory's files, remove the working files, and remove the journal last.

    If a step fails, keeps the journal and raises TargetError, or CheckpointError if another program replaced a shard.
    """
    modes = (os.fstat(file.fd).st_mode for file in files)
    mode = functools.reduce(operator.and_, modes, 0o666) | 0o600
    try:
        with filesystem.convert_os_errors(folder):
            filesystem.remove_file(folder / ROOM)  # first, because restoring may need the reserved space
            for file in files:
                file.put_back()
            for name in WORKING_FILES[1:]:
                filesystem.remove_file(folder / name)
            if journal is not None:
                for name, data in journal.own.items():
                    if _classify_own_file(folder, journal, name) == "new":
                        _put(folder, name, data, mode)
            filesystem.sync_directory(folder)
            filesystem.remove_file(folder / JOURNAL)
            filesystem.sync_directory(folder)
    except CheckpointError:
        raise
    except SwsurgeryError as error:
        remedy = f"{error}; the journal of the edit is kept, and the next command tries again"
        raise TargetError("an edit in place was cut off and could not be undone yet", folder, remedy) from error

"""Hold a shard open while it is edited in place, and notice every change that another program makes to it.

This module decides nothing about the bytes: journal.py orders the writes.
"""

from __future__ import annotations

import os

from swsurgery.checkpoint.journal_format import JournalPlace
from swsurgery.errors import CheckpointError
from swsurgery.storage import filesystem
from swsurgery.storage.files import LocalFile, read_exactly
from swsurgery.storage.folder import Entry, Identity


class OpenShard:
    """A shard that is open for reading and writing.

    `identity` is the identity of the file after the last write of this run. If it differs later, another program
    changed the file.
    """

    def __init__(self, entry: Entry):
        """Open the file of a directory entry for writing.

        Raises TargetError if it cannot be written, CheckpointError if the file was replaced after it was listed.
        """
        self.entry = entry
        with filesystem.convert_os_errors(entry):
            self.fd = filesystem.open_for_patching(entry)
        self.identity = entry.identity or Identity.of(os.fstat(self.fd))

    @property
    def file(self) -> LocalFile:
        """The open shard as a file to read from."""
        return LocalFile(self.entry, self.fd)

    def close(self) -> None:
        """Close the descriptor of the shard."""
        os.close(self.fd)

    def settle(self) -> None:
        """Set `identity` to the present identity of the file. Call this method after each write of this run."""
        self.identity = Identity.of(os.fstat(self.fd))

    def refuse_changed(self) -> None:
        """Raise CheckpointError if another program changed, removed or replaced the file."""
        try:
            named = Identity.of(self.entry.stat())
        except OSError as error:
            raise make_change_error("was removed", self.entry) from error
        if (named.dev, named.ino) != (self.identity.dev, self.identity.ino):
            raise make_change_error("was replaced", self.entry)
        if Identity.of(os.fstat(self.fd)) != self.identity:
            raise make_change_error("was changed", self.entry)

    def refuse_unlike(self, place: JournalPlace, wanted: bytes) -> None:
        """Raise CheckpointError if the file does not contain the bytes `wanted` at the offset of `place`."""
        if read_exactly(self.file, len(wanted), place.offset) != wanted:
            raise make_change_error(f"was changed at byte {place.offset}", self.entry)


def make_change_error(what: str, where: object) -> CheckpointError:
    """Return the error for a file or directory `where` that another program changed.

    `what` is the change, such as "was removed".
    """
    what = f"{what} by another program while it was edited in place"
    return CheckpointError(what, where, "run again when no other program writes there")

"""Define what is copied: the files of a checkpoint, the changes to make, and the result."""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from swsurgery.checkpoint.record_entries import UndoRecord
from swsurgery.storage.files import BaseFile
from swsurgery.storage.names import SHARD_ENDINGS
from swsurgery.storage.shard import Shard
from swsurgery.storage.splice import Splice

if TYPE_CHECKING:  # these modules import numpy, which only changes of regions need
    from swsurgery.rewriting.segments import RegionChange
    from swsurgery.rewriting.tally import Digests

Link = Literal["auto", "clone", "copy", "hard"]


@dataclass(frozen=True)
class AppliedFile:
    """One file of the patched checkpoint.

    `size` is in bytes. `base_digest` and `patched_digest` are the sha256 of the file before and after the edit, or None
    if an edit in place did not need them. `how` is how the file was made: "clone", "copy" and "hard" (a hard link) in
    this run, and "kept" in an interrupted run. A file of an edit in place has "place", and a file that stays in the
    base's repository has "elsewhere". `unverified` is True if the digests were not computed in this run but copied from
    the cache of digests or from an earlier record.
    """

    name: str
    size: int
    base_digest: str | None
    patched_digest: str | None
    how: Literal["clone", "copy", "hard", "kept", "place", "elsewhere"]
    unverified: bool = False


@dataclass(frozen=True)
class Copied:
    """What was written into the staged directory.

    `changes` and `protected` contain the digests of the changed and of the protected regions, in the order of the plan.
    `undo` describes the undo file; None if none was written.
    """

    files: tuple[AppliedFile, ...]
    changes: tuple[Digests, ...] = ()
    protected: tuple[Digests, ...] = ()
    undo: UndoRecord | None = None


@dataclass(frozen=True)
class CopyJob:
    """The files of one checkpoint to copy, the splices to make and the digests that the base must have.

    `pins` maps a file name to (digest, who states it). `shards` are the shards from which the splices were planned;
    the copied files must have the same headers. `elsewhere` are files that are not copied, only listed in the result;
    each has a digest. `changes` are the changed and protected regions of each file. The undo file `undo_name` is
    written if the old bytes of the regions have at most `undo_limit` bytes.
    """

    files: tuple[BaseFile, ...]
    splices: tuple[Splice, ...]
    pins: dict[str, tuple[str, str]]
    in_cache: bool = False
    elsewhere: tuple[BaseFile, ...] = ()
    shards: Mapping[str, Shard] = field(default_factory=dict)
    changes: Mapping[str, Sequence[RegionChange]] = field(default_factory=dict, repr=False)
    undo_name: str | None = None
    undo_limit: int = 0

    @property
    def touched(self) -> set[str]:
        """Names of the files whose bytes are changed, or hashed in parts."""
        return {splice.file for splice in self.splices} | {*self.changes}

    @property
    def names(self) -> list[str]:
        """Names of the files to copy."""
        return [f.name for f in self.files]

    @property
    def own_mode(self) -> int:
        """Permissions of swsurgery's own files, which contain values of weights.

        Users who cannot read the base's files cannot read these files either.
        """
        return compute_record_mode(self.files)

    @property
    def folder_mode(self) -> int:
        """Permissions of the new directory."""
        return compute_folder_mode(self.files)


def compute_folder_mode(files: Iterable[BaseFile]) -> int:
    """Return the permissions for a new directory: those that all directories of these files have in common."""
    folders = {file.entry.folder for file in files if file.entry}
    return functools.reduce(operator.and_, (os.fstat(f.fd).st_mode for f in folders), 0o777) | 0o700


def compute_outside_mode(files: Sequence[BaseFile]) -> int:
    """Return the permissions for a file that contains values of weights and is outside the directory of these files.

    A user who cannot read the weights, or cannot enter their directory, must not be able to read the new file.
    """
    may_enter = compute_folder_mode(files) & 0o111
    return compute_record_mode(files) & may_enter * 0o7 | 0o600  # times 7: x becomes rwx for each class of users


def compute_record_mode(files: Iterable[BaseFile]) -> int:
    """Return the permissions for a file that contains values of weights: those that all shards of `files` have."""
    modes = (file.mode for file in files if file.name.lower().endswith(SHARD_ENDINGS))
    return functools.reduce(operator.and_, modes, 0o666) | 0o600

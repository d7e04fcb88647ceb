"""List the scalars in which two checkpoints differ, by tensor and index, even if their shards are divided differently.

Both checkpoints are read in chunks, so memory use does not depend on their size. No other module of this package needs
numpy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.opening import open_checkpoint, open_for_reading
from swsurgery.checkpoint.weight_files import Weights
from swsurgery.errors import SwsurgeryError
from swsurgery.progress import Progress, Reporter, require_reporter
from swsurgery.storage.arguments import require_integer
from swsurgery.storage.dtypes import convert_to_json
from swsurgery.storage.files import BaseFile, fill, has_same_bytes, read_exactly
from swsurgery.storage.names import OWN_FILES, is_undo_name
from swsurgery.storage.result import TableResult
from swsurgery.storage.shard import Shard, TensorInfo

DIFF_CHUNK = 4 << 20
"""Number of bytes read from a tensor at a time. It is a multiple of the size of every dtype, so no scalar is split."""

MAX_DIFF_NOTES = 20
"""Maximum number of notes that the numbers listed for a tensor are not weights but codes of a quantiser."""

SHORT_RUN = 4
"""Maximum number of neighbouring changed scalars that are listed one by one. A longer run is listed as one entry."""


@dataclass(frozen=True)
class Change:
    """A run of `count` neighbouring changed scalars of one tensor, from `index` to `last` in row-major order.

    `old` and `new` are the values of the run's first scalar in the checkpoints a and b.
    """

    tensor: str
    index: tuple[int, ...]
    count: int
    old: int | float | str | None
    new: int | float | str | None
    last: tuple[int, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the entry of `changes` in the output of `diff --json`; `count` and `last` only for several scalars."""
        row = {"tensor": self.tensor, "index": list(self.index), "old": self.old, "new": self.new}
        return row if self.last is None or self.count == 1 else row | {"count": self.count, "last": list(self.last)}


@dataclass(frozen=True, repr=False)
class Difference(TableResult):
    """The result of comparing two checkpoints.

    `tensors` maps each changed tensor to (number of changed scalars, number of all scalars). `mismatched` maps each
    tensor that cannot be compared to the reason. `files` maps the name of every file to "same", "changed", "only in a"
    or "only in b". `truncated` is True if `changes` does not list every change.
    """

    changes: tuple[Change, ...]
    tensors: Mapping[str, tuple[int, int]]
    mismatched: Mapping[str, str]
    files: Mapping[str, str]
    truncated: bool
    notes: tuple[str, ...]

    @property
    def same(self) -> bool:
        """True if all tensors and all files are equal. The files that swsurgery adds to a checkpoint are ignored."""
        others = [state for name, state in self.files.items() if name not in OWN_FILES and not is_undo_name(name)]
        return not self.tensors and not self.mismatched and all(state == "same" for state in others)

    def to_json(self) -> dict[str, Any]:
        """Return the document that `diff --json` prints."""
        return {
            "changes": [c.to_json() for c in self.changes],
            "tensors": {t: {"changed": n, "of": total} for t, (n, total) in self.tensors.items()},
            "mismatched": dict(self.mismatched),
            "files": dict(self.files),
            "truncated": self.truncated,
            "notes": list(self.notes),
        }

    def to_rows(self) -> list[dict[str, object]]:
        """Return one row per entry of `changes`: tensor, index, count, old, new and last (the run's last index)."""
        return [{**vars(c), "index": list(c.index), "last": list(c.last or c.index)} for c in self.changes]

    def list_columns(self) -> tuple[str, ...]:
        """Return the keys of the rows."""
        return tuple(column.name for column in fields(Change))


@dataclass
class _Found:
    """The part of the result found so far: the same fields as in `Difference`, but mutable.

    `buffers` receive the chunks of both checkpoints and are used again for every chunk.
    """

    changes: list[Change] = field(default_factory=list)
    tensors: dict[str, tuple[int, int]] = field(default_factory=dict)
    mismatched: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    truncated: bool = False
    notes: list[str] = field(default_factory=list)
    buffers: tuple[bytearray, bytearray] = field(default_factory=lambda: (bytearray(DIFF_CHUNK), bytearray(DIFF_CHUNK)))


def diff(
    a: str | Path,
    b: str | Path,
    *,
    weights: Weights | None = None,
    variant: str | None = None,
    limit: int = 1000,
    reporter: Reporter | None = None,
) -> Difference:
    """Compare every tensor, scalar by scalar, and every other file of two checkpoints.

    `a` and `b` are directories, GGUF files or `hf://ORG/NAME[@REV][/sub]`. All changes are counted, but at most `limit`
    changes of each tensor are listed. Of a GGUF tensor that is stored in blocks, the bytes are compared. If both
    checkpoints are on the Hub, files with the same sha256 are not read. If a checkpoint has several sets of weights,
    `weights` and `variant` choose one. Memory use does not depend on the size of the checkpoints.

    Raises TypeError, HubError, CheckpointError; TargetError while another run edits one of them in place, and
    SwsurgeryError for a negative `limit`.
    """
    reporter, limit = require_reporter(reporter), require_integer("limit", limit)
    if limit < 0:
        raise SwsurgeryError("limit must be at least 0", limit)
    with open_for_reading("a", a, reporter) as first, open_for_reading("b", b, reporter) as second:
        one, other = (open_checkpoint(root, weights, variant, gguf=True) for root in (first, second))
        return _compare_checkpoints(one, other, limit, reporter)


def _compare_checkpoints(a: Checkpoint, b: Checkpoint, limit: int, progress: Progress) -> Difference:
    found = _Found()
    files_a, files_b = {f.name: f for f in a.files}, {f.name: f for f in b.files}
    for name in sorted(files_a.keys() | files_b.keys()):
        if name not in files_b or name not in files_a:
            found.files[name] = "only in a" if name in files_a else "only in b"
        elif name not in a.shards and name not in b.shards:
            found.files[name] = "same" if _has_same_bytes(files_a[name], files_b[name]) else "changed"
    progress.start(sum(s.size - s.data_start for s in a.shards.values()), "B", "comparing")
    try:
        for tensor in sorted(a.weight_map.keys() | b.weight_map.keys()):
            _compare(tensor, a, b, found, progress, limit)
    finally:
        progress.close()
    for name in a.shards.keys() & b.shards.keys():
        touched = any(a.weight_map.get(t) == name for t in [*found.tensors, *found.mismatched])
        header = files_a[name].size != files_b[name].size or _read_header(a.shards[name]) != _read_header(
            b.shards[name]
        )
        found.files[name] = "changed" if touched or header else "same"
    files = dict(sorted(found.files.items()))
    return Difference(tuple(found.changes), found.tensors, found.mismatched, files, found.truncated, tuple(found.notes))


def _compare(tensor: str, a: Checkpoint, b: Checkpoint, found: _Found, progress: Progress, limit: int) -> None:
    """Compare one tensor of both checkpoints and add its differences to `found`."""
    stored_a, stored_b = _find(tensor, a), _find(tensor, b)
    if stored_a is None or stored_b is None:
        found.mismatched[tensor] = "not in a" if stored_b is not None else "not in b"
        return
    info_a, info_b = stored_a[1], stored_b[1]
    if (info_a.dtype, info_a.shape) != (info_b.dtype, info_b.shape):
        found.mismatched[tensor] = f"{_render_form(info_a)} in a, {_render_form(info_b)} in b"
        return
    same_offsets = info_a.data_offsets == info_b.data_offsets
    if same_offsets and _has_same_digest(a.get_file(a.weight_map[tensor]), b.get_file(b.weight_map[tensor])):
        progress.advance(info_a.size)
        return
    stored_a, stored_b = (stored_a[0], info_a.stored), (stored_b[0], info_b.stored)
    changed = _compare_elements(stored_a, stored_b, found, progress, limit)
    if changed:
        found.tensors[tensor] = (changed, info_a.size // max(info_a.stored.dtype.size, 1))
        if len(found.notes) < MAX_DIFF_NOTES and (
            why := a.quantisation.explain_refusal(tensor) or b.quantisation.explain_refusal(tensor)
        ):
            found.notes.append(f"{tensor}: the numbers listed are no weights ({why})")


def _find(tensor: str, checkpoint: Checkpoint) -> tuple[Shard, TensorInfo] | None:
    """Return the shard in which loaders look for a tensor, and its header entry; None if it is not stored there."""
    shard = checkpoint.shards.get(checkpoint.weight_map.get(tensor, ""))
    info = shard.tensors.get(tensor) if shard else None
    return None if shard is None or info is None else (shard, info)


def _compare_elements(
    stored_a: tuple[Shard, TensorInfo],
    stored_b: tuple[Shard, TensorInfo],
    found: _Found,
    progress: Progress,
    limit: int,
) -> int:
    """Compare two tensors of the same dtype and shape, and return the number of scalars that differ.

    Adds at most `limit` changes to `found`. If the elements are smaller than a byte, the differing bytes are counted
    instead and no change is listed.
    """
    (shard_a, info_a), shard_b = stored_a, stored_b[0]
    changed, listed, unit = 0, 0, max(info_a.dtype.size, 1)
    at_a, at_b = (shard.data_start + info.data_offsets[0] for shard, info in (stored_a, stored_b))
    with shard_a.file.open() as file_a, shard_b.file.open() as file_b:
        for offset in range(0, info_a.size, DIFF_CHUNK):
            size = min(DIFF_CHUNK, info_a.size - offset)
            bytes_a, bytes_b = found.buffers if size == DIFF_CHUNK else (bytearray(size), bytearray(size))
            fill(file_a, bytes_a, at_a + offset)
            fill(file_b, bytes_b, at_b + offset)
            progress.advance(size)
            if bytes_a == bytes_b:
                continue
            array_a, array_b = (np.frombuffer(x, np.uint8).reshape(-1, unit) for x in (bytes_a, bytes_b))
            places = np.flatnonzero((array_a != array_b).any(axis=1))
            changed += len(places)
            if info_a.dtype.bits % 8:
                found.truncated = True
                continue
            for run in _split_runs(places, limit - listed):
                if listed == limit:
                    found.truncated = True
                    break
                listed += 1
                found.changes.append(_describe_change(info_a, offset // unit, run, array_a, array_b))
    return changed


def _split_runs(places: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """Split rising positions: yield a run of more than SHORT_RUN neighbours as one array, other positions singly.

    At most `most` + 1 runs are split, because a fine-tuned model differs in so many positions that splitting all of
    them would take most of the time.
    """
    ends = np.flatnonzero(np.diff(places) > 1) + 1
    if len(ends) > most:
        places, ends = places[: ends[most]], ends[:most]
    for run in np.split(places, ends):
        yield from [run] if len(run) > SHORT_RUN else run.reshape(-1, 1)


def _describe_change(info: TensorInfo, start: int, run: np.ndarray, array_a: np.ndarray, array_b: np.ndarray) -> Change:
    """Build the entry of a run of changed scalars.

    The positions in `run` count elements of the tensor, beginning at its element number `start`.
    """
    first, last = int(run[0]), int(run[-1])
    old, new = (convert_to_json(info.dtype, array[first].tobytes()) for array in (array_a, array_b))
    return Change(info.name, info.unflatten(start + first), len(run), old, new, info.unflatten(start + last))


def _render_form(info: TensorInfo) -> str:
    """Render the dtype and the stored shape of a tensor, such as "BF16 [2048, 7168]"."""
    return f"{info.dtype.name} {list(info.shape)}"


def _read_header(shard: Shard) -> bytes:
    """Read the raw header of a shard, including the 8 bytes that state its length."""
    return read_exactly(shard.file, shard.data_start, 0)


def _has_same_digest(a: BaseFile, b: BaseFile) -> bool:
    """Return True if both files are on the Hub and it states the same sha256 for them.

    Returns False if a file is in a local cache: the cache may be damaged, so the caller must compare the bytes.
    """
    return a.digest is not None and a.digest == b.digest and not a.is_here and not b.is_here


def _has_same_bytes(a: BaseFile, b: BaseFile) -> bool:
    """Return True if both files have the same contents. Raises CheckpointError."""
    return a.size == b.size and (_has_same_digest(a, b) or has_same_bytes(a.source, b.source, a.size))

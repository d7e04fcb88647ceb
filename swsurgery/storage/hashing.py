"""Hash files, and compare digests with expected ones."""

from __future__ import annotations

import hashlib
import os
import re

from swsurgery.errors import CheckpointError, PlanError, SwsurgeryError
from swsurgery.progress import Progress, Silent
from swsurgery.storage.files import CHUNK, BaseFile, File, fill
from swsurgery.storage.shard import Shard

THREADS_VARIABLE = "SWSURGERY_THREADS"
"""Environment variable that sets how many files are copied at a time. If it is 1, only one thread is used."""


def hash_file(file: File, progress: Progress | None = None, what: str = "hashing") -> str:
    """Compute the sha256 of a file; `what` is the label of the progress bar. Raises ShardError, SwsurgeryError."""
    progress, digest = progress or Silent(), hashlib.sha256()
    with file.open() as opened:
        size = opened.size
        progress.start(size, "B", what)
        try:
            buffer = memoryview(bytearray(min(CHUNK, size)))
            for offset in range(0, size, CHUNK):
                chunk = buffer[: size - offset]
                fill(opened, chunk, offset)
                digest.update(chunk)
                progress.advance(len(chunk))
        finally:
            progress.close()
    return digest.hexdigest()


def check_digest(file: BaseFile, digest: str, pins: dict[str, tuple[str, str]]) -> None:
    """Compare the digest of a file of the base with the expected digest and with the digest that the Hub states.

    `pins` maps a file name to the expected digest and the place that states it, such as "its record". A missing digest
    is not compared. Raises PlanError if a digest differs.
    """
    for wanted, who in (pins.get(file.name, (None, "")), (file.digest, "its blob's name")):
        if wanted and wanted != digest:
            changed = f"{file.name} was changed since the edit: restore it, or give the unchanged checkpoint"
            remedy = changed if who == "its record" else "is this the right checkpoint?"
            raise PlanError(f"its sha256 is {digest}, but {who} says {wanted}", file.source, remedy)


def refuse_other_header(digest: str, header: Shard, file: BaseFile) -> None:
    """Raise CheckpointError if a file's header changed since the edits were planned with `header`.

    `digest` is the sha256 of the bytes before the data section, as `header.header_sha256`.
    """
    if digest != header.header_sha256:
        reason = "does not have the header that the edits were planned with"
        raise CheckpointError(reason, file.source, "run again when no other program writes to the base")


def count_cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_threads() -> int:
    """Read the number of threads from the environment variable SWSURGERY_THREADS. The default is 4.

    The default exceeds the number of cores of a small machine, so that no core is idle while the last shard is copied.
    An empty value counts as unset. Raises SwsurgeryError if the value is not a number from 1 to 64.
    """
    text = os.environ.get(THREADS_VARIABLE) or "4"
    if not re.fullmatch("[0-9]{1,2}", text) or not 1 <= int(text) <= 64:
        what = "an environment variable has a bad value (not a number from 1 to 64)"
        raise SwsurgeryError(what, f"{THREADS_VARIABLE}={text}", f"change or unset {THREADS_VARIABLE}")
    return int(text)

"""Verify every patched checkpoint that contains at least one of the given files.

The pre-commit hook swsurgery-verify runs `python -I -m swsurgery.cli.changed FILE...` with the files of a commit. Any
changed file of a patched checkpoint, not only its record, can invalidate the proof. Exit codes are those of
`swsurgery verify`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from swsurgery.checkpoint.record import RECORD_NAME
from swsurgery.cli import main


def find_checkpoints(files: Iterable[Path]) -> list[Path]:
    """Return the directories that have a record and contain at least one of the files, at any depth. Sorted."""
    return sorted({d for f in files for d in f.parents if os.path.lexists(d / RECORD_NAME)})


def verify_changed(files: Sequence[str]) -> int:
    """Verify each checkpoint and return the largest exit code, or 0 if there is no checkpoint."""
    worst = 0
    for directory in find_checkpoints(map(Path, files)):
        worst = max(worst, main(["verify", "--quiet", "--", str(directory)]))
        if worst > 2:  # interrupted, or a bug: the next checkpoint would fail too
            break
    return worst


if __name__ == "__main__":
    sys.exit(verify_changed(sys.argv[1:]))

"""`python -I -m swsurgery.cli.changed FILE...` verifies every patched checkpoint that one of the files lies in.

The entry of the pre-commit hook swsurgery-verify: pre-commit knows the files that a commit changes, and a changed
tokenizer or shard undoes a proof as well as a changed registry does. Exit codes are those of `swsurgery verify`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from swsurgery.checkpoint.record import REGISTRY_NAME
from swsurgery.cli import main


def checkpoints_of(files: Iterable[Path]) -> list[Path]:
    """The directories with a registry that the files lie in, at whatever depth; each once, in the order of names."""
    return sorted({d for f in files for d in f.parents if os.path.lexists(d / REGISTRY_NAME)})


def verify_changed(files: Sequence[str]) -> int:
    """Verify each checkpoint; returns the gravest exit code, 0 where the files lie in none."""
    gravest = 0
    for directory in checkpoints_of(map(Path, files)):
        gravest = max(gravest, main(["verify", "--quiet", "--", str(directory)]))
        if gravest > 2:  # interrupted, or a bug: the next would be no better
            break
    return gravest


if __name__ == "__main__":
    sys.exit(verify_changed(sys.argv[1:]))

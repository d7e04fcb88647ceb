"""Strict reading of the JSON files that lie in a checkpoint: bounded size and depth, no duplicate keys, no NaN."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from swsurgery.errors import CheckpointError
from swsurgery.shard import no_duplicates, opened, read_exactly

MAX_JSON = 32 << 20
"""Bytes. The index of the largest published checkpoints (91,000 tensors) has 9 MB."""


def read_json(path: Path, name: str) -> dict[str, Any]:
    """A JSON object from a regular file; `name` is what the messages call it. Raises CheckpointError."""
    return parse_json(read_small(path, name), name)


def read_small(path: Path, name: str) -> bytes:
    """The bytes of a regular file of at most MAX_JSON. Raises CheckpointError."""
    with opened(path) as fd:
        size = os.fstat(fd).st_size
        if size > MAX_JSON:
            raise CheckpointError(f"has {size} bytes, more than the {MAX_JSON} accepted", name)
        return read_exactly(fd, size, 0, path)


def parse_json(raw: bytes, name: str) -> dict[str, Any]:
    """A JSON object from its bytes. Raises CheckpointError."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # ValueError covers bad UTF-8, bad JSON and the two hooks
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"is not sound JSON: {reason}", name) from None
    if type(value) is not dict:
        raise CheckpointError("is not a JSON object", name)
    return value


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number in JSON")

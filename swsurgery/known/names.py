"""List the names of all known models for shell completion, which must be fast.

The files are read without being validated: that takes a tenth of a second more. Must not depend on checkpoints or the
network.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from swsurgery.known.own import list_own_files
from swsurgery.known.shipped import list_families

_FOLDER = Path(__file__).parent

_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")
"""A name that no shell interprets. Other names are not completed."""


def list_model_names() -> tuple[str, ...]:
    """Return the names of all known models: the short names, then the repository ids, such as huggyllama/llama-7b.

    Damaged files of own entries are skipped.
    """
    models = [*_read_shipped(), *_read_own()]
    short = [name for model in models for name in model.get("aliases", ())[:1]]
    names = dict.fromkeys([*short, *(model.get("hf_id") for model in models)])
    return tuple(name for name in names if isinstance(name, str) and _SAFE.fullmatch(name))


def _read_shipped() -> Iterator[dict[str, Any]]:
    for family in list_families():
        yield from tomllib.loads((_FOLDER / f"{family}.toml").read_text("utf-8"))["models"]


def _read_own() -> Iterator[dict[str, Any]]:
    for path in list_own_files():
        try:
            model = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(model, dict) and isinstance(model.get("aliases", []), list):
            yield model

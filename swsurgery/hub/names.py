"""The names that come from a Hub or from a manifest and become parts of paths. Imports nothing of the library."""

from __future__ import annotations

import re

COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")


def is_file_name(text: object) -> bool:
    """Return True if `text` is a relative path that stays inside its repository."""
    return (
        isinstance(text, str)
        and 0 < len(text) <= 1024
        and all(part not in ("", ".", "..") and len(part.encode(errors="replace")) <= 255 for part in text.split("/"))
        and not re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", text)
    )


def is_revision(text: str) -> bool:
    """Return True if git would take `text` as the name of a branch, a tag or a commit."""
    return is_file_name(text) and not re.search(r"\.\.|[ ~^:?*\[\\]|@\{|\.lock(/|$)", text) and text[0] != "-"

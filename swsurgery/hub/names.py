"""Validate names that come from a Hub or a manifest and become parts of paths. Does not import huggingface_hub."""

from __future__ import annotations

import re

COMMIT = re.compile(r"[0-9a-f]{40}")
"""Pattern of a full commit id."""

SHA256 = re.compile(r"[0-9a-f]{64}")
"""Pattern of a sha256 digest or of a Xet hash."""


def is_file_name(text: object) -> bool:
    """Return True if `text` is a relative path inside a repository, without control characters or overlong names."""
    return (
        isinstance(text, str)
        and 0 < len(text) <= 1024
        and all(part not in ("", ".", "..") and len(part.encode(errors="replace")) <= 255 for part in text.split("/"))
        and not re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", text)
    )


def is_revision(text: str) -> bool:
    """Return True if git accepts `text` as the name of a branch, a tag or a commit."""
    return is_file_name(text) and not re.search(r"\.\.|[ ~^:?*\[\\]|@\{|\.lock(/|$)", text) and text[0] != "-"


_REPO_ID = re.compile(r"(?:hf:/?)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?:@[\w.-]+)?)")


# In a URL that was converted to a Path, the second slash is missing, and a directory may precede the URL.
_URL = re.compile(
    r"(?:.*/)?(?:https?:/{1,2})?(?:www\.)?(?:huggingface\.co|hf\.co):?/+([\w.-]+/[\w.-]+?)"
    r"(?:/(?:tree|blob|resolve)/([^/?#]+)(?:/([^?#]*))?)?/?(?:[?#].*)?"
)


def suggest_uri(given: str) -> str:
    """Return a remedy if `given`, a path that does not exist, looks like a repository of the Hub; otherwise ""."""
    if match := _URL.fullmatch(given):
        repo_id, revision, sub = match.groups()
        at = f"@{revision}" if revision and revision != "main" else ""
        return f"a repository of the Hub is written hf://{repo_id}{at}{f'/{sub}' if sub else ''}"
    if match := _REPO_ID.fullmatch(given):
        return f"a repository of the Hub is written hf://{match[1]}"
    return ""

"""Validate names that come from a Hub or a manifest and become parts of paths. Does not import huggingface_hub."""

from __future__ import annotations

import os
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
    r"(?:/(tree|blob|resolve)/([^/?#]+)(?:/([^?#]*))?)?/?(?:[?#].*)?"
)


_NOT_MODELS = frozenset({"blog", "collections", "datasets", "docs", "organizations", "papers", "spaces"})
"""First parts of the Hub's URLs that are not the owner of a model."""

_FILE_ENDINGS = (".bin", ".gguf", ".json", ".safetensors", ".sparse", ".yaml", ".yml")
"""A path with one of these endings names a file, so it is never read as the name of a repository."""


def read_url(text: str) -> str:
    """Return the location hf://ORG/NAME[@REV][/sub] of a URL of a model on the Hub, or "" for any other text.

    The URL of one file stands for the folder that contains it, except for a GGUF file, which is a whole checkpoint.
    """
    match = _URL.fullmatch(text)
    if match is None or match[1].split("/")[0] in _NOT_MODELS:
        return ""
    repo_id, kind, revision, sub = match.groups()
    if kind in ("blob", "resolve") and sub and not sub.endswith(".gguf"):
        sub = sub.rpartition("/")[0]
    at = f"@{revision}" if revision and revision != "main" else ""
    return f"hf://{repo_id}{at}{f'/{sub}' if sub else ''}"


def read_repo_id(text: str) -> str:
    """Return the location hf://ORG/NAME[@REV] for the text ORG/NAME[@REV], or "" for any other text.

    A text that may name something on this machine is not read as a repository: a path that exists, a path in a folder
    that exists, and the name of a file such as edits/zero.yaml.
    """
    match = _REPO_ID.fullmatch(text)
    if match is None or text.lower().endswith(_FILE_ENDINGS) or os.path.lexists(text.split("/")[0]):
        return ""
    return f"hf://{match[1]}"


def suggest_uri(given: str) -> str:
    """Return a remedy if `given`, a path that does not exist, looks like a repository of the Hub; otherwise ""."""
    match = None if given.lower().endswith(_FILE_ENDINGS) else _REPO_ID.fullmatch(given)
    meant = read_url(given) or (f"hf://{match[1]}" if match else "")
    return f"a repository of the Hub is written {meant}" if meant else ""

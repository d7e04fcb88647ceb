"""Read byte ranges of files on the Hub over HTTP, and count the bytes transferred.

huggingface_hub handles redirects, tokens, mirrors and retries of a refused request. If a connection breaks in the
middle of an answer, this module requests the missing bytes.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from swsurgery.errors import HubError
from swsurgery.hub.faults import convert_errors, list_transport_errors

HEAD = 64 << 10
"""Number of bytes fetched by a file's first read near its start. Most headers are smaller, so one request is enough."""

RETRIES = 5
"""Maximum number of requests for one range of bytes, if connections break."""


@dataclass
class Traffic:
    """Number of bytes transferred and requests made so far. Safe to use from several threads."""

    bytes: int = 0
    requests: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, size: int) -> None:
        """Count one request that transferred `size` bytes."""
        with self.lock:
            self.bytes += size
            self.requests += 1


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository at one commit.

    `sha256` and `xet` (the Xet hash) are None for small files, which git itself stores.
    """

    repo_id: str
    commit: str
    path: str
    size: int
    sha256: str | None
    xet: str | None
    traffic: Traffic = field(repr=False, compare=False)
    _head: dict[str, bytes] = field(default_factory=dict, repr=False, compare=False)

    def __str__(self) -> str:
        return f"hf://{self.repo_id}@{self.commit}/{self.path}"

    def open(self) -> AbstractContextManager[RemoteFile]:
        """Return a context that yields this file. Nothing is opened: no connection stays open between two reads."""
        return contextlib.nullcontext(self)

    def readinto(self, buffer: memoryview, offset: int) -> int:
        """Read bytes at `offset` into `buffer`, and return their number (0 only at the end). Raises HubError."""
        size = max(0, min(len(buffer), self.size - offset))
        if size:
            buffer[:size] = self._read(size, offset)
        return size

    def _read(self, size: int, offset: int) -> bytes:
        if offset < HEAD and "head" not in self._head:
            self._head["head"] = self._fetch_range(min(HEAD, self.size), 0)
        if offset + size <= len(self._head.get("head", b"")):
            return self._head["head"][offset : offset + size]
        if offset < HEAD:
            begin = self._head["head"][offset:]
            return begin + self._fetch_range(size - len(begin), offset + len(begin))
        return self._fetch_range(size, offset)

    def _fetch_range(self, size: int, offset: int) -> bytes:
        """Fetch exactly `size` bytes at `offset`. Raises HubError."""
        from huggingface_hub import HfApi, hf_hub_url, hf_raise_for_status

        from swsurgery.hub.guard import build_headers, stream_with_retries

        api, data = HfApi(), bytearray()
        url = hf_hub_url(self.repo_id, self.path, revision=self.commit, endpoint=api.endpoint)
        for attempt in range(RETRIES):
            begin = len(data)
            headers = build_headers(api) | {
                "Range": f"bytes={offset + begin}-{offset + size - 1}",
                "Accept-Encoding": "identity",
            }
            try:
                with convert_errors(self), stream_with_retries("GET", url, headers=headers) as response:
                    hf_raise_for_status(response)
                    self._check_range(response.status_code, response.headers, size, offset + begin)
                    # Suppressed here, because huggingface_hub would request the whole range again and discard the data.
                    with contextlib.suppress(*list_transport_errors()):
                        for chunk in response.iter_raw():
                            data += chunk
                            if len(data) >= size:
                                break
            finally:
                self.traffic.add(len(data) - begin)
            if len(data) == begin and attempt < RETRIES - 1:
                time.sleep(attempt)
            if len(data) >= size:
                return bytes(data[:size])
        raise HubError(f"the connection broke {RETRIES} times", self, "run the same command again")

    def _check_range(self, status: int, headers: Mapping[str, str], size: int, begin: int) -> None:
        """Raise HubError if the answer does not start at `begin`.

        For a range that is the whole file, a mirror may answer with status 200.
        """
        if status == 200 and begin == 0 and size == self.size:
            return
        if status != 206:  # the body would be the whole file
            raise HubError("the server does not support range requests", self, "download it with hf download")
        if not headers.get("Content-Range", "").replace(" ", "").startswith(f"bytes{begin}-"):
            raise HubError("the server returned another range than requested", self, "download it with hf download")


@dataclass(frozen=True)
class RemoteTree:
    """The files of a model repository at one commit, or those in its folder `sub`, with names relative to `sub`.

    `blobs` contains the git object id (sha1) of each file that git itself stores.
    """

    repo_id: str
    commit: str
    sub: str
    files: dict[str, RemoteFile] = field(repr=False)
    blobs: dict[str, str] = field(repr=False)
    private: bool
    traffic: Traffic = field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"hf://{self.repo_id}@{self.commit}" + (f"/{self.sub}" if self.sub else "")


def require_commit(commit: str | None) -> str:
    """Return the commit that an answer of the Hub names. Raises ValueError if the answer names no commit."""
    if commit is None:
        raise ValueError("the answer names no commit")
    return commit


def open_tree(repo_id: str, revision: str | None = None, sub: str = "") -> RemoteTree:
    """Resolve a revision (a branch, tag or commit; None is main) to its commit and list the files. Raises HubError."""
    where = f"hf://{repo_id}" + (f"@{revision}" if revision else "")
    with convert_errors(where + (f"/{sub}" if sub else "")):
        return list_tree(repo_id, revision, sub)


def list_tree(repo_id: str, revision: str | None, sub: str = "") -> RemoteTree:
    """List files like `open_tree`, but raise the errors of huggingface_hub instead of HubError."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api, traffic = HfApi(), Traffic()
    files: dict[str, RemoteFile] = {}
    blobs: dict[str, str] = {}
    prefix = f"{sub}/" if sub else ""
    info = api.repo_info(repo_id, revision=revision)
    commit = require_commit(info.sha)
    for entry in api.list_repo_tree(repo_id, sub or None, recursive=True, revision=commit):
        if isinstance(entry, RepoFile):
            name, sha256 = entry.path.removeprefix(prefix), entry.lfs.sha256 if entry.lfs else None
            files[name] = RemoteFile(repo_id, commit, entry.path, entry.size, sha256, entry.xet_hash, traffic)
            if sha256 is None:
                blobs[name] = entry.blob_id
    return RemoteTree(repo_id, commit, sub, files, blobs, bool(info.private), traffic)

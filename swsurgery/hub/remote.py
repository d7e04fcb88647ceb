"""A repository's files, read by ranges over HTTP: headers and single scalars, and a count of the bytes that moved.

Whether a range came from the Hub or from the host that it redirects to is the library's business; so are tokens,
mirrors and retries of a refused request. A connection that breaks in the middle of an answer is taken up again here.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from swsurgery.errors import HubError
from swsurgery.hub.faults import broken_off, told

HEAD = 64 << 10
"""Bytes fetched with the first ones of a file: most headers are smaller, and a header costs one request then."""

RETRIES = 5


@dataclass
class Traffic:
    """What reading by ranges has cost so far."""

    bytes: int = 0
    requests: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, size: int) -> None:
        with self.lock:
            self.bytes += size
            self.requests += 1


@dataclass(frozen=True)
class RemoteFile:
    """One file at one commit. `sha256` and `xet` are known for large files (LFS), not for those in git itself."""

    repo_id: str
    commit: str
    path: str
    size: int
    sha256: str | None
    xet: str | None
    traffic: Traffic = field(repr=False)
    _head: dict[str, bytes] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        return f"hf://{self.repo_id}@{self.commit}/{self.path}"

    def pread(self, size: int, offset: int) -> bytes:
        """Up to `size` bytes at `offset`; fewer only at the end of the file. Raises HubError."""
        size = max(0, min(size, self.size - offset))
        if not size:
            return b""
        if offset < HEAD and "head" not in self._head:
            self._head["head"] = self._range(min(HEAD, self.size), 0)
        if offset + size <= len(self._head.get("head", b"")):
            return self._head["head"][offset : offset + size]
        if offset < HEAD:
            begin = self._head["head"][offset:]
            return begin + self._range(size - len(begin), offset + len(begin))
        return self._range(size, offset)

    def _range(self, size: int, offset: int) -> bytes:
        from huggingface_hub import HfApi, hf_hub_url, hf_raise_for_status

        from swsurgery.hub.guard import request_headers, stream_with_retries

        api, data = HfApi(), bytearray()
        url = hf_hub_url(self.repo_id, self.path, revision=self.commit, endpoint=api.endpoint)
        for attempt in range(RETRIES):
            begin = len(data)
            headers = request_headers(api) | {
                "Range": f"bytes={offset + begin}-{offset + size - 1}",
                "Accept-Encoding": "identity",
            }
            try:
                with told(self), stream_with_retries("GET", url, headers=headers) as response:
                    hf_raise_for_status(response)
                    self._check_range(response.status_code, response.headers, size, offset + begin)
                    # Kept from the library, which would ask for the same range once more and throw the answer away.
                    with contextlib.suppress(*broken_off()):
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
        """Raise HubError unless the answer begins at `begin`. Mirrors may answer a small file whole."""
        if status == 200 and begin == 0 and size == self.size:
            return
        if status != 206:  # the whole file would follow
            raise HubError("the server does not answer ranges", self, "download it: hf download")
        if not headers.get("Content-Range", "").replace(" ", "").startswith(f"bytes{begin}-"):
            raise HubError("the server answers another range than it was asked for", self, "download it: hf download")


@dataclass(frozen=True)
class Repo:
    """A model repository, or the folder `sub` of it, at one commit."""

    repo_id: str
    commit: str
    sub: str
    files: dict[str, RemoteFile] = field(repr=False)
    traffic: Traffic = field(default_factory=Traffic, repr=False)

    def __str__(self) -> str:
        return f"hf://{self.repo_id}@{self.commit}" + (f"/{self.sub}" if self.sub else "")


def require_commit(commit: str | None) -> str:
    """Return the commit that an answer of the Hub names. Raises ValueError if it names none."""
    if commit is None:
        raise ValueError("the answer names no commit")
    return commit


def open_repo(repo_id: str, revision: str | None = None, sub: str = "") -> Repo:
    """Resolve a revision (a branch, tag or commit; None is main) to its commit and list the files. Raises HubError."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    where, traffic = f"hf://{repo_id}" + (f"@{revision}" if revision else ""), Traffic()
    prefix = f"{sub}/" if sub else ""
    with told(where + (f"/{sub}" if sub else "")):
        api = HfApi()
        commit = require_commit(api.repo_info(repo_id, revision=revision).sha)
        files = {}
        for entry in api.list_repo_tree(repo_id, sub or None, recursive=True, revision=commit):
            if isinstance(entry, RepoFile):
                sha256 = entry.lfs.sha256 if entry.lfs else None
                files[entry.path.removeprefix(prefix)] = RemoteFile(
                    repo_id, commit, entry.path, entry.size, sha256, entry.xet_hash, traffic
                )
    return Repo(repo_id, commit, sub, files, traffic)

"""Limit what a Hub may answer, with two hooks for every request and answer of the client of huggingface_hub.

A Hub or a mirror may be hostile. Its answers become paths in the cache (commits, names, ETags), use memory (bodies) and
time (slow bodies, endless pages, long waits), and cause further requests (links and redirects). The hooks refuse
answers beyond the limits before huggingface_hub uses them. They act only during calls of this package, so that other
calls of a process that imports swsurgery are not affected. Only this module uses private names of huggingface_hub.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import httpx2
from huggingface_hub.utils import _http

from swsurgery.hub.names import COMMIT, SHA256, is_file_name

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MAX_RESPONSE = 16 << 20
"""Maximum size of an answer kept in memory, in bytes, after decompression. A page of 1,000 files has 0.4 MB."""

MAX_PAGES = 300
"""Maximum number of requests for lists (pages of 1,000 files) in one call."""

MAX_SECONDS = 600.0
"""Maximum duration of all requests for lists in one call, in seconds."""

MAX_WAIT = 330
"""Longest wait that the Hub may ask for, in seconds. The Hub's rate limits are per 300 seconds."""

GRACE = 60.0
"""The body of an answer may take this many seconds, and one more second per MIN_RATE bytes received."""

MIN_RATE = 4096
"""Minimum rate at which a body must arrive after GRACE seconds, in bytes per second."""

READ_TIMEOUT = 60.0
"""Maximum number of seconds without a byte, for GET and HEAD requests without a timeout of their own."""

WRITE_TIMEOUT = 300.0
"""Maximum number of seconds without a byte for other requests; the Hub needs some time for a large commit."""

ETAG = re.compile(r'(?:W/)?"?[0-9A-Za-z_][0-9A-Za-z_.+=:-]{0,127}"?')
"""Pattern that an ETag must match, because huggingface_hub uses it as a file name."""

BROKEN_OFF = _http._DEFAULT_RETRY_ON_EXCEPTIONS
"""Exceptions that the HTTP client raises if a connection ends in the middle of an answer."""

LOGGERS = tuple(
    f"huggingface_hub.{name}"
    for name in (
        "_commit_api",
        "_snapshot_download",
        "file_download",
        "hf_api",
        "lfs",
        "utils._auth",
        "utils._http",
        "utils._xet",
    )
)
"""Loggers of huggingface_hub, one per module, that repeat what a server sent: its words, headers and links."""

stream_with_retries = _http.http_stream_backoff
"""Function of huggingface_hub that makes a streaming request with retries. Its name is not declared as exported."""

_KIND = "swsurgery_kind"
"""Key in the extensions of a request. The value is "content" if a file is requested, otherwise "answer"."""


class Refused(Exception):
    """A request or an answer beyond the limits. `convert_errors` converts it to a HubError about the repository."""

    def __init__(self, what: str, remedy: str = "check that HF_ENDPOINT names the right Hub"):
        super().__init__(what)
        self.what, self.remedy = what, remedy


@dataclass
class _Budget:
    """Number of requests for lists that one call has made so far, and the time when the call began."""

    pages: int = 0
    begin: float = field(default_factory=time.monotonic)

    def spend(self) -> None:
        """Count one request for a list. Raises Refused if a limit is exceeded."""
        self.pages += 1
        if self.pages > MAX_PAGES:
            raise Refused(f"the Hub's list has more than {MAX_PAGES} pages")
        if time.monotonic() - self.begin > MAX_SECONDS:
            raise Refused(f"the Hub's list is not complete after {MAX_SECONDS:.0f} seconds")


_budget: ContextVar[_Budget | None] = ContextVar("_budget", default=None)
_active = 0
_active_lock = threading.Lock()  # _active is global: threads of the client inherit no context variables


def build_headers(api: HfApi) -> dict[str, str]:
    """Build the headers that the library sends with a request: the token, if any, and the user agent."""
    return api._build_hf_headers()


@contextlib.contextmanager
def guard_requests() -> Iterator[None]:
    """Check every request and answer of huggingface_hub's HTTP client during the block. Raises Refused."""
    global _active
    factory = _http._GLOBAL_CLIENT_FACTORY
    if not isinstance(factory, _GuardedFactory):
        _http.set_client_factory(_GuardedFactory(factory))
    with _active_lock:
        _active += 1
    token = _budget.set(_Budget()) if _budget.get() is None else None
    try:
        yield
    finally:
        if token is not None:
            _budget.reset(token)
        with _active_lock:
            _active -= 1


class _GuardedFactory:
    """Make clients with another factory and add the two hooks of this module."""

    def __init__(self, factory: Callable[[], httpx2.Client]):
        self._factory = factory

    def __call__(self) -> httpx2.Client:
        client = self._factory()
        hooks = client.event_hooks
        client.event_hooks = {
            "request": [*hooks["request"], _check_request],
            "response": [*hooks["response"], _check_response],
        }
        return client


def _is_hub(url: httpx2.URL) -> bool:
    """Return True if the token may be sent to this URL: the endpoint, or another origin of the Hub."""
    return _http._url_origin(str(url)) in _http._HUB_ORIGINS


def _is_identity_provider(url: httpx2.URL) -> bool:
    """Return True if this URL issues the identity tokens of GitHub Actions, which trusted publishing uses."""
    named = os.environ.get("ACTIONS_ID_TOKEN_REQUEST_URL")
    return named is not None and _http._url_origin(str(url)) == _http._url_origin(named)


def _check_request(request: httpx2.Request) -> None:
    """Check a request and set its timeouts. Raises Refused."""
    if not _active:
        return
    hub, path = _is_hub(request.url), request.url.path
    if "Authorization" in request.headers and not hub and not _is_identity_provider(request.url):
        raise Refused("the Hub names another host for a request with your token; nothing was sent there")
    if _KIND not in request.extensions:  # a redirected request keeps the kind of the first one
        content = request.method == "GET" and (not hub or "/resolve/" in path)
        request.extensions[_KIND] = "content" if content else "answer"
    request.headers["Accept-Encoding"] = "identity"
    timeouts = request.extensions.setdefault("timeout", {})
    silence = READ_TIMEOUT if request.method in ("GET", "HEAD") else WRITE_TIMEOUT
    for name in ("connect", "read", "write"):
        if timeouts.get(name) is None:
            timeouts[name] = silence
    budget = _budget.get()
    if budget is not None and hub and request.method == "GET" and "/api/" in path:
        budget.spend()


def _check_response(response: httpx2.Response) -> None:
    """Check an answer and limit the size and duration of its body. Raises Refused."""
    if not _active:
        return
    request, headers = response.request, response.headers
    _check_headers(response)
    length = headers.get("Content-Length")
    if length is not None and not (length.isascii() and length.isdigit() and len(length) < 17):
        raise Refused("the Hub's answer has no valid Content-Length")
    unpack = _make_decoder(response)
    content = request.extensions.get(_KIND) == "content" and response.is_success
    if request.method != "HEAD" and not content and length is not None and int(length) > MAX_RESPONSE:
        raise Refused(f"the Hub's answer is larger than {MAX_RESPONSE >> 20} MB")
    most = int(length) if content and length is not None and unpack is None else MAX_RESPONSE
    response.stream = _Bounded(response.stream, most, unpack)
    if not content and response.is_success and request.method in ("GET", "POST") and _is_hub(request.url):
        _check_document(response)


def _check_headers(response: httpx2.Response) -> None:
    """Check headers that huggingface_hub uses as file names or as waiting times. Raises Refused."""
    headers, request = response.headers, response.request
    commit = headers.get("X-Repo-Commit")
    if commit is not None:
        asked = re.search(r"/resolve(?:-cache/models/[^/]+/[^/]+)?/([0-9a-f]{40})/", request.url.path)
        if not COMMIT.fullmatch(commit):
            raise Refused("the Hub's answer names an invalid commit")
        if asked and asked[1] != commit:
            raise Refused("the Hub returned another commit than requested")
    etags = [headers.get("X-Linked-ETag"), headers.get("ETag") if request.method == "HEAD" else None]
    if not all(ETAG.fullmatch(etag) for etag in etags if etag is not None):
        raise Refused("the Hub's answer has an invalid ETag, which would be used as a file name")
    xet = headers.get("X-Xet-Hash")
    if xet is not None and not SHA256.fullmatch(xet):
        raise Refused("the Hub's answer has an invalid Xet hash")
    if response.status_code in _http._DEFAULT_RETRY_ON_STATUS_CODES:
        limit = _http.parse_ratelimit_headers(headers)
        after = headers.get("Retry-After", "").strip()
        waits = [limit.reset_in_seconds] if limit is not None else []
        if after.isdigit():
            if not after.isascii():
                raise Refused("the Hub's answer has no valid Retry-After")
            waits.append(int(after[:9]))
        if max(waits, default=0) > MAX_WAIT:
            raise Refused(f"the Hub asks to wait {max(waits)} seconds (HTTP {response.status_code})", "try again later")


def _make_decoder(response: httpx2.Response) -> zlib._Decompress | None:
    """Return a decompressor for a body that is compressed although this was not requested; None for a plain body.

    Raises Refused if the compression is not supported.
    """
    coding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if coding in ("", "identity") or response.request.method == "HEAD":
        return None
    if coding != "gzip" or "Range" in response.request.headers:
        raise Refused("the Hub's answer is compressed, which was not asked for", "download it with hf download")
    for name in ("Content-Encoding", "Content-Length"):  # they describe the compressed body
        if name in response.headers:
            del response.headers[name]
    return zlib.decompressobj(zlib.MAX_WBITS | 16)


class _Bounded(httpx2.SyncByteStream):
    """A body of at most `most` bytes that must arrive at MIN_RATE or faster."""

    def __init__(self, stream: object, most: int, unpack: zlib._Decompress | None):
        assert isinstance(stream, httpx2.SyncByteStream)
        self._stream, self._most, self._unpack = stream, most, unpack

    def __iter__(self) -> Iterator[bytes]:
        begin, received, given = time.monotonic(), 0, 0
        for piece in self._stream:
            received += len(piece)
            if time.monotonic() - begin > GRACE + received / MIN_RATE:
                what = f"the Hub's answer comes too slowly ({received} bytes after {GRACE:.0f} seconds)"
                raise Refused(what, "run the same command again")
            if self._unpack is not None:
                try:
                    piece = self._unpack.decompress(piece, self._most - given + 1)
                except zlib.error:
                    raise Refused("the Hub's answer cannot be decompressed") from None
            given += len(piece)
            if given > self._most:
                raise Refused(f"the Hub's answer is larger than {self._most} bytes")
            yield piece

    def close(self) -> None:
        self._stream.close()


def _check_document(response: httpx2.Response) -> None:
    """Check the names, commits and sizes in a JSON document, which huggingface_hub does not check. Raises Refused."""
    method, path = response.request.method, response.request.url.raw_path.decode("ascii", "replace").split("?")[0]
    check = next((c for verb, pattern, c in _DOCUMENTS if verb == method and pattern.search(path)), None)
    if check is None:
        return
    try:
        check(json.loads(response.read()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        remedy = "check that HF_ENDPOINT names the right Hub, and run the same command again"
        raise Refused("the Hub's answer is not valid", remedy) from None


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 53


def _check_info(info: dict[str, object]) -> None:
    commit, siblings = info["sha"], info.get("siblings") or []
    if not (isinstance(commit, str) and COMMIT.fullmatch(commit)):
        raise Refused("the Hub's answer names an invalid commit")
    _require(isinstance(info.get("private", False), bool) and isinstance(siblings, list))


def _check_tree(entries: list[dict[str, object]]) -> None:
    _require(isinstance(entries, list))
    for entry in entries:
        if not is_file_name(entry["path"]):
            raise Refused(f"the Hub lists a file with an invalid name: {ascii(entry['path'])[:80]}")
        _require(entry["type"] in ("file", "directory") and COMMIT.fullmatch(str(entry["oid"])) is not None)
        _require(_is_size(entry.get("size", 0)))
        lfs, xet = entry.get("lfs"), entry.get("xetHash")
        _require(xet is None or SHA256.fullmatch(str(xet)) is not None)
        if lfs is not None:
            if not isinstance(lfs, dict):
                raise ValueError
            _require(SHA256.fullmatch(str(lfs["oid"])) is not None and _is_size(lfs["size"]))


def _check_refs(refs: dict[str, list[dict[str, object]]]) -> None:
    for kind in ("branches", "tags", "converts", "pullRequests"):
        for ref in refs.get(kind) or []:
            _require(isinstance(ref["name"], str) and COMMIT.fullmatch(str(ref["targetCommit"])) is not None)


def _check_commit(done: dict[str, object]) -> None:
    _require(COMMIT.fullmatch(str(done["commitOid"])) is not None)


_DOCUMENTS: tuple[tuple[str, re.Pattern[str], Callable[..., None]], ...] = (
    ("GET", re.compile(r"/api/models/.+/tree/"), _check_tree),
    ("GET", re.compile(r"/api/models/.+/refs$"), _check_refs),
    ("GET", re.compile(r"/api/models/[^/]+(/[^/]+)?(/revision/[^/]+)?$"), _check_info),
    ("POST", re.compile(r"/api/models/.+/commit/[^/]+$"), _check_commit),
)

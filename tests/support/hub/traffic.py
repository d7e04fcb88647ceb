"""What went over the wire, for tests to assert on: requests, bytes of bodies, and who was shown a token."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class Request:
    """One request. `received` and `sent` are bytes of the two bodies; `target` is `path?query`, decoded.

    `sent` counts what was handed to the socket: a client that hangs up early may have taken less.
    """

    origin: str
    method: str
    target: str
    range: str | None
    authorization: str | None
    status: int | None = None
    received: int = 0
    sent: int = 0

    @property
    def path(self) -> str:
        return self.target.split("?")[0]


class Traffic:
    """Every request since the start or the last `clear`, in the order in which they came."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: list[Request] = []

    def record(self, request: Request) -> Request:
        """Keep a request whose numbers are still to grow."""
        with self._lock:
            self._requests.append(request)
        return request

    def clear(self) -> None:
        """Forget what was."""
        with self._lock:
            self._requests.clear()

    def requests(self, pattern: str = "", *, method: str | None = None, origin: str | None = None) -> list[Request]:
        """The requests whose target matches, of one method and to one origin ("hub" or "store") if given."""
        return list(self._select(pattern, method, origin))

    def sent(self, pattern: str = "", *, method: str | None = None, origin: str | None = None) -> int:
        """Bytes of answers' bodies: what clients downloaded."""
        return sum(each.sent for each in self._select(pattern, method, origin))

    def received(self, pattern: str = "", *, method: str | None = None, origin: str | None = None) -> int:
        """Bytes of requests' bodies: what clients uploaded."""
        return sum(each.received for each in self._select(pattern, method, origin))

    def sent_by_path(self) -> dict[str, int]:
        """Bytes of answers' bodies for each path."""
        totals: dict[str, int] = {}
        for each in self._select("", None, None):
            totals[each.path] = totals.get(each.path, 0) + each.sent
        return totals

    def authorizations(self, origin: str) -> list[str]:
        """The Authorization headers that arrived at an origin, in order."""
        return [each.authorization for each in self._select("", None, origin) if each.authorization is not None]

    def _select(self, pattern: str, method: str | None, origin: str | None) -> Iterator[Request]:
        with self._lock:
            requests = list(self._requests)
        for each in requests:
            if method in (None, each.method) and origin in (None, each.origin) and re.search(pattern, each.target):
                yield each

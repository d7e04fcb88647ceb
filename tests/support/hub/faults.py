"""A script of things that go wrong: which request, and what happens to it instead of, or beside, its answer.

An action says what happens; `Faults.add` says to which request: by method, by a regular expression searched in
`path?query` (percent signs decoded), and by its number among those that match.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Answer:
    """Answer with this status in place of doing anything; `echo` puts the request's Authorization in the body."""

    status: int
    message: str = "scripted"
    code: str | None = None
    retry_after: int | None = None
    echo: bool = False


@dataclass(frozen=True)
class Drop:
    """Close the connection without an answer: before the request is acted on, or, with `done`, after it was.

    `reset` sends the peer a reset in place of an orderly end.
    """

    done: bool = False
    reset: bool = False


@dataclass(frozen=True)
class CutAnswer:
    """Close the connection `at` bytes into the answer's body; 0 is right after the headers."""

    at: int = 0
    reset: bool = False


@dataclass(frozen=True)
class CutRequest:
    """Close the connection once `at` bytes of the request's body were read; the request is not acted on.

    A body that is shorter is not cut. The peer sees a reset, since bytes of its are left unread.
    """

    at: int = 0


@dataclass(frozen=True)
class Delay:
    """Wait this many seconds, then go on as usual."""

    seconds: float


@dataclass(frozen=True)
class Redirect:
    """Answer 307 to the same path on the other origin, or to `location`."""

    location: str | None = None


@dataclass(frozen=True)
class ObjectError:
    """In an answer of git-lfs's batch, this error for each object of more than `above` bytes, in place of a link."""

    code: int
    message: str = "scripted"
    above: int = 0


@dataclass(frozen=True)
class Reply:
    """Answer this in place of doing anything. A header `Transfer-Encoding: chunked` sends `body` over and over."""

    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200


@dataclass(frozen=True)
class Altered:
    """Answer as usual, but with these headers."""

    headers: dict[str, str]


@dataclass(frozen=True)
class Drip:
    """Answer as usual, but send the body in pieces of `size` bytes, one each `seconds`."""

    seconds: float
    size: int = 1


Action = Answer | Reply | Altered | Drip | Drop | CutAnswer | CutRequest | Delay | ObjectError | Redirect


@dataclass
class Fault:
    """One line of the script. `seen` counts the requests that match, `hits` those that it struck."""

    method: str
    pattern: re.Pattern[str]
    action: Action
    nth: int
    times: int | None
    seen: int = 0
    hits: int = 0


@dataclass
class Faults:
    """The script of one server."""

    script: list[Fault] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, method: str, pattern: str, action: Action, *, nth: int = 1, times: int | None = 1) -> Fault:
        """Strike the `nth` matching request from now on and those after it, `times` in all (None: for ever)."""
        fault = Fault(method, re.compile(pattern), action, nth, times)
        with self.lock:
            self.script.append(fault)
        return fault

    def strike(self, method: str, target: str) -> Action | None:
        """The action for a request that just came, or None; the first line that is due wins, all count it."""
        action = None
        with self.lock:
            for fault in self.script:
                if fault.method not in ("*", method) or not fault.pattern.search(target):
                    continue
                fault.seen += 1
                due = fault.seen >= fault.nth and (fault.times is None or fault.seen < fault.nth + fault.times)
                if due and action is None:
                    fault.hits += 1
                    action = fault.action
        return action

    def clear(self) -> None:
        """Nothing goes wrong any more."""
        with self.lock:
            self.script.clear()

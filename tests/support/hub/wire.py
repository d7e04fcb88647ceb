"""HTTP/1.1 with keep-alive, by http.server: bodies, ranges, scripted faults and counting; knows no route.

Each origin is a `ThreadingHTTPServer` of its own port. A handler hands a request to the first route whose method and
pattern match the path as it was sent, still quoted, since a quoted slash is part of a revision.
"""

from __future__ import annotations

import json
import re
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote

from hub.faults import Altered, Answer, CutAnswer, CutRequest, Delay, Drip, Drop, ObjectError, Redirect, Reply
from hub.repos import Refused, User
from hub.traffic import Request

if TYPE_CHECKING:
    from hub.server import Hub

_PIECE = 1 << 20


class HangUp(ConnectionError):
    """The server closes this connection here and now."""


@dataclass(frozen=True)
class Route:
    """A function for the requests whose method is one of `methods` and whose whole path matches."""

    methods: tuple[str, ...]
    pattern: re.Pattern[str]
    function: Callable[..., None]


def table(*rows: tuple[str, str, Callable[..., None]]) -> list[Route]:
    """Routes from rows of methods, pattern and function; `{name}` stands for one segment, `{name*}` for the rest."""
    routes = []
    for methods, pattern, function in rows:
        pattern = pattern.replace("{repo}", r"(?P<repo_id>[^/]+/[^/]+?)")
        pattern = re.sub(r"\{(\w+)\*\}", r"(?P<\1>.+)", pattern)
        pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", pattern)
        routes.append(Route(tuple(methods.split()), re.compile(pattern), function))
    return routes


def byte_range(header: str | None, size: int) -> tuple[int, int] | None:
    """The half-open range of bytes that a Range header asks for; None for the whole. Raises Refused (416)."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    if not match or match.groups() == ("", ""):
        return None  # no range, several, or another unit: the whole is a fair answer
    first, last = match.groups()
    if first:
        start, stop = int(first), min(int(last) + 1, size) if last else size
    else:
        start, stop = max(size - int(last), 0), size
    if start >= stop:
        raise Refused(416, "Range Not Satisfiable", Content_Range=f"bytes */{size}")
    return start, stop


class Call(BaseHTTPRequestHandler):
    """One request and its answer, for as long as the connection lives; what routes see of HTTP."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Origin

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is printed; `Hub.traffic` has it all."""

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def serve(self) -> None:
        """Find what happens to this request: a fault, a route, or a refusal."""
        path, _, query = self.path.partition("?")
        self.query = parse_qs(query, keep_blank_values=True)
        self._cut_answer: CutAnswer | None = None
        self._cut_request: CutRequest | None = None
        self._lose_answer: Drop | None = None
        self._altered: dict[str, str] = {}
        self._drip: Drip | None = None
        self.object_error: ObjectError | None = None
        target = unquote(self.path)
        heard = (self.headers["Range"], self.headers["Authorization"])
        self.noted = self.hub.traffic.record(Request(self.server.name, self.command, target, *heard))
        if self.server.name == "store" and self.noted.authorization is not None:
            self.hub.leaks.append(target)
        self._unread = self.pieces()
        try:
            if not self._struck(self.hub.faults.strike(self.command, target)):
                self._route(path)
        except Refused as refused:
            self.refuse(refused)
        for _ in self._unread:  # so that the next request on this connection starts where it should
            pass

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def _struck(self, action: object) -> bool:
        """Play a fault; True when it was the whole answer."""
        match action:
            case Delay(seconds):
                self.server.stopping.wait(seconds)
            case CutAnswer():
                self._cut_answer = action
            case CutRequest():
                self._cut_request = action
            case ObjectError():
                self.object_error = action
            case Altered():
                self._altered = action.headers
            case Drip():
                self._drip = action
            case Reply():
                self.reply(action)
                return True
            case Drop(done=True):
                self._lose_answer = action
            case Drop():
                self.body()  # unread bytes would turn an orderly end into a reset
                self._hang_up(action.reset)
            case Redirect(location):
                self.answer(307, {"Location": location or self.hub.store.url + self.path})
                return True
            case Answer():
                told = f"{action.message}: {self.headers['Authorization']}" if action.echo else action.message
                refused = Refused(action.status, told, action.code)
                if action.retry_after is not None:
                    refused.headers["Retry-After"] = str(action.retry_after)
                raise refused
        return False

    def _route(self, path: str) -> None:
        for route in self.server.routes:
            match = route.pattern.fullmatch(path)
            if match and self.command in route.methods:
                given = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                route.function(self, **given)
                return
        raise Refused(404, f"no such page: {self.command} {path}")

    @property
    def user(self) -> User | None:
        """Who asks; None without a token. Raises Refused for an unknown token."""
        header = self.headers["Authorization"]
        if header is None:
            return None
        user = self.hub.state.users.get(header.removeprefix("Bearer "))
        if user is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return user

    def flag(self, name: str) -> bool:
        """A switch of the query."""
        return self.query.get(name, [""])[0].lower() in ("1", "true")

    def pieces(self) -> Iterator[bytes]:
        """The request's body as it arrives. Raises HangUp where the peer or a fault ends it early."""
        chunked = self.headers.get("Transfer-Encoding", "").lower() == "chunked"
        left = 0 if chunked else int(self.headers.get("Content-Length", 0))
        while True:
            if chunked and left == 0:
                left = int(self.rfile.readline().split(b";")[0] or b"0", 16)
                if left == 0:
                    self.rfile.readline()
                    return
            elif left == 0:
                return
            room = min(left, _PIECE)
            if self._cut_request is not None:
                room = min(room, self._cut_request.at - self.noted.received)
                if room <= 0:
                    self._hang_up(reset=True)
            piece = self.rfile.read(room)
            if not piece:
                raise HangUp("the client went away")
            left -= len(piece)
            self.noted.received += len(piece)
            yield piece
            if chunked and left == 0:
                self.rfile.readline()

    def body(self) -> bytes:
        """The whole body of the request."""
        return b"".join(self._unread)

    def body_pieces(self) -> Iterator[bytes]:
        """The body in pieces, for what is too large to hold."""
        return self._unread

    def body_json(self) -> dict:
        """The body as a JSON object. Raises Refused."""
        try:
            value = json.loads(self.body() or b"{}")
        except ValueError:
            raise Refused(400, "the body is not JSON") from None
        if not isinstance(value, dict):
            raise Refused(400, "the body is not an object")
        return value

    def refuse(self, refused: Refused) -> None:
        """Answer an error as the Hub does: JSON, and headers that the client tells errors apart by."""
        headers = dict(refused.headers)
        headers["X-Error-Message"] = refused.message.encode("ascii", "replace").decode().replace("\n", " ")
        if refused.code:
            headers["X-Error-Code"] = refused.code
        self.json({"error": refused.message}, refused.status, headers)

    def json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Answer a JSON document."""
        kind = {"Content-Type": "application/json; charset=utf-8"}
        self.answer(status, kind | (headers or {}), json.dumps(value).encode())

    def answer(self, status: int, headers: dict[str, str], content: bytes | Path = b"") -> None:
        """Answer bytes, or a file; a Range header is heeded where the answer is the content itself."""
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        part = byte_range(self.headers["Range"], size) if status == 200 and "ETag" in headers else None
        start, stop = part or (0, size)
        if part:
            status, headers = 206, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        if self._lose_answer is not None:
            self.body()
            self._hang_up(self._lose_answer.reset)
        self.noted.status = status
        self.send_response(status)
        for name, value in ({"Content-Length": str(stop - start)} | headers | self._altered).items():
            self.send_header(name, value)
        self.end_headers()
        if self._cut_answer is not None:
            stop = min(stop, start + self._cut_answer.at)
        if self.command != "HEAD":
            self._send(content, start, stop)
        if self._cut_answer is not None:
            self._hang_up(self._cut_answer.reset)

    def reply(self, action: Reply) -> None:
        """Answer what the script says; a chunked body never ends."""
        endless = action.headers.get("Transfer-Encoding") == "chunked"
        self.body()
        self.send_response(action.status)
        length = {} if endless else {"Content-Length": str(len(action.body))}
        for name, value in (length | action.headers).items():
            self.send_header(name, value)
        self.end_headers()
        chunk = b"%x\r\n%s\r\n" % (len(action.body), action.body) if endless else action.body
        while self.command != "HEAD":
            self.noted.sent += len(action.body)
            self.wfile.write(chunk)
            if not endless or self.server.stopping.is_set():
                break

    def _send(self, content: bytes | Path, start: int, stop: int) -> None:
        if self._drip is not None:
            data = content[start:stop] if isinstance(content, bytes) else content.read_bytes()[start:stop]
            for at in range(0, len(data), self._drip.size):
                self.wfile.write(data[at : at + self._drip.size])
                if self.server.stopping.wait(self._drip.seconds):
                    raise HangUp
            return
        if isinstance(content, bytes):
            self.noted.sent += stop - start  # counted first: whoever has the last byte also sees the sum
            self.wfile.write(content[start:stop])
            return
        with content.open("rb") as file:
            while start < stop:
                room = min(_PIECE, stop - start)
                self.noted.sent += room
                try:
                    self.connection.sendfile(file, start, room)
                except ConnectionError:
                    self.noted.sent -= room
                    raise
                start += room

    def _hang_up(self, reset: bool) -> None:
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            for end in (self.rfile, self.wfile, self.connection):
                end.close()
        raise HangUp


class Origin(ThreadingHTTPServer):
    """One port. `name` is "hub" or "store" in the traffic."""

    daemon_threads = False  # joined when the server closes: nothing outlives a test
    block_on_close = True
    request_queue_size = 128

    def __init__(self, hub: Hub, name: str, routes: Sequence[Route], port: int = 0) -> None:
        self.hub, self.name, self.routes = hub, name, routes
        self.connections: set[socket.socket] = set()
        self.stopping = threading.Event()
        super().__init__(("127.0.0.1", port), Call)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, name=f"hub-{name}")
        self._thread.start()

    def handle_error(self, request: object, client_address: object) -> None:
        """Keep what went wrong in the server itself; a connection that ended early is everyday."""
        report = traceback.format_exc()
        if not isinstance(sys.exception(), ConnectionError):
            self.hub.errors.append(report)

    def stop(self) -> None:
        """Close the port and every connection, and wait for their threads."""
        self.stopping.set()
        self.shutdown()
        self._thread.join()
        for connection in list(self.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # closed in the meantime
        self.server_close()

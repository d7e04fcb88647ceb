"""The second origin: large objects by signed links, as an object store or a CDN gives them out; takes no token."""

from __future__ import annotations

import hashlib
import hmac
import shutil
from urllib.parse import urlencode

from hub.repos import Refused, file_sha256
from hub.wire import Call, table


def signature(secret: bytes, path: str, query: dict[str, str]) -> str:
    """What makes a link to the store valid, for as long as the server's secret is the same."""
    text = f"{path}?{urlencode(sorted(query.items()))}"
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()


def _check_link(call: Call) -> dict[str, str]:
    """The query of a link. Raises Refused for a wrong link, and where a token was sent along."""
    if call.headers["Authorization"] is not None:
        raise Refused(400, "a signed link and an Authorization header: only one is allowed")
    query = {name: values[0] for name, values in call.query.items()}
    given = query.pop("signature", "")
    if not hmac.compare_digest(given, signature(call.hub.secret, call.path.split("?")[0], query)):
        raise Refused(403, "the link is not valid, or no longer")
    return query


def get_object(call: Call, sha256: str) -> None:
    """The bytes of an object, or a range of them."""
    _check_link(call)
    path = call.hub.state.paths.get(sha256)
    if path is None:
        raise Refused(404, "no such object")
    call.answer(200, {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes", "Content-Type": "binary/octet-stream"}, path)


def put_object(call: Call, sha256: str) -> None:
    """Take an object, or with `part` a part of one; nothing of it is there before the last byte is and is right."""
    query = _check_link(call)
    state = call.hub.state
    part = query.get("part")
    final = state.folder / (sha256 if part is None else f"{sha256}.{part}")
    incoming = call.hub.scratch("incoming")
    digest = hashlib.sha256()
    try:
        with incoming.open("wb") as file:
            for piece in call.body_pieces():
                digest.update(piece)
                file.write(piece)
        if part is None and digest.hexdigest() != sha256:
            raise Refused(400, "the content does not have the digest that was announced")
        incoming.replace(final)
    finally:
        incoming.unlink(missing_ok=True)
    if part is None:
        state.hold(query["repo"], sha256, final)
    call.answer(200, {"ETag": f'"{digest.hexdigest()}"', "Content-Type": "text/plain"})


def complete_object(call: Call, sha256: str) -> None:
    """Join the parts of an object. The client sends no token here: the link is all."""
    query = _check_link(call)
    state = call.hub.state
    parts = sorted(call.body_json().get("parts", []), key=lambda part: part["partNumber"])
    paths = [state.folder / f"{sha256}.{part['partNumber']}" for part in parts]
    joined = call.hub.scratch("joined")
    try:
        with joined.open("wb") as file:
            for part, path in zip(parts, paths, strict=True):
                if not path.exists() or f'"{file_sha256(path)}"' != part["etag"]:
                    raise Refused(400, f"part {part['partNumber']} is not the one that was uploaded")
                with path.open("rb") as source:
                    shutil.copyfileobj(source, file)
        if file_sha256(joined) != sha256:
            raise Refused(400, "the parts do not make up the object")
        joined.replace(state.folder / sha256)
    finally:
        joined.unlink(missing_ok=True)
    for path in paths:
        path.unlink()
    state.hold(query["repo"], sha256, state.folder / sha256)
    call.json({"success": True})


ROUTES = table(
    ("GET HEAD", "/objects/{sha256}", get_object),
    ("PUT", "/objects/{sha256}", put_object),
    ("POST", "/objects/{sha256}", complete_object),
)

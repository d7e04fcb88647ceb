"""Routes of the Hub that give out files and take large ones: resolve, raw, and git-lfs's batch."""

from __future__ import annotations

from urllib.parse import quote

from hub.repos import Commit, Entry, Refused, Repo, xet_hash
from hub.wire import Call, table


def _entry(call: Call, repo_id: str, revision: str, path: str) -> tuple[Repo, Commit, Entry]:
    state, user = call.hub.state, call.user
    repo = state.repo(repo_id, user)
    commit = repo.commit(revision)
    state.require_read(repo, user)
    if path not in commit.tree:
        raise Refused(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.oid)
    return repo, commit, commit.tree[path]


def resolve(call: Call, repo_id: str, revision: str, path: str) -> None:
    """A file's content: small ones from here, large ones by a redirect to the store.

    With `Hub.resolve_cache` small ones by a relative redirect to a path that names their commit.
    """
    repo, commit, entry = _entry(call, repo_id, revision, path)
    if entry.content is not None and call.hub.resolve_cache and not call.path.startswith(_CACHE):
        call.answer(307, {"Location": f"{_CACHE}models/{repo_id}/{commit.oid}/{quote(path)}"})
        return
    headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes", "Vary": "Origin, Accept"}
    name = quote(path.rsplit("/", 1)[-1])
    headers["Content-Disposition"] = f"inline; filename*=UTF-8''{name}; filename=\"{name}\";"
    if entry.content is not None:
        headers |= {"ETag": f'"{entry.oid}"', "Content-Type": "text/plain; charset=utf-8"}
        call.answer(200, headers, entry.content)
        return
    headers |= {"X-Linked-ETag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
    if repo.xet:
        token = f"{call.hub.endpoint}/api/models/{repo_id}/xet-read-token/{commit.oid}"
        headers |= {"X-Xet-Hash": xet_hash(entry.sha256), "Link": f'<{token}>; rel="xet-auth"'}
    headers["Location"] = call.hub.link(f"/objects/{entry.sha256}")
    call.answer(302, headers)


def raw(call: Call, repo_id: str, revision: str, path: str) -> None:
    """What git holds: the content, or the pointer to a large object."""
    _, commit, entry = _entry(call, repo_id, revision, path)
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{entry.oid}"', "Content-Type": "text/plain; charset=utf-8"}
    call.answer(200, headers, entry.pointer if entry.content is None else entry.content)


def lfs_batch(call: Call, repo_id: str) -> None:
    """Where to upload objects; none for one that the repository holds already."""
    state, user = call.hub.state, call.user
    repo = state.repo(repo_id, user)
    wanted = call.body_json()
    if user is None:
        raise Refused(401, "Invalid username or password.")
    if wanted.get("ref") is not None:  # without one it is for a pull request, which every user may open
        state.require_push(repo, wanted["ref"]["name"], user)
    error = call.object_error
    multipart = "multipart" in wanted.get("transfers", [])
    objects = []
    for each in wanted["objects"]:
        oid, size = each["oid"], each["size"]
        answer = {"oid": oid, "size": size}
        if error and size > error.above:
            answer["error"] = {"code": error.code, "message": error.message}
        elif oid not in repo.objects:
            in_parts = multipart and size > call.hub.part_size
            upload = {"href": call.hub.link(f"/objects/{oid}", repo=repo_id), "header": {}}
            if in_parts:
                count = -(-size // call.hub.part_size)
                links = {
                    str(n): call.hub.link(f"/objects/{oid}", repo=repo_id, part=str(n)) for n in range(1, count + 1)
                }
                upload["header"] = {"chunk_size": str(call.hub.part_size), **links}
            verify = {"href": f"{call.hub.endpoint}/{repo_id}.git/info/lfs/objects/verify", "header": {}}
            answer |= {"authenticated": True, "actions": {"upload": upload, "verify": verify}}
        objects.append(answer)
    chosen = "multipart" if multipart and any(each["size"] > call.hub.part_size for each in objects) else "basic"
    call.json({"transfer": chosen, "objects": objects, "hash_algo": "sha256"})


def lfs_verify(call: Call, repo_id: str) -> None:
    """Whether an object has arrived, whole."""
    state = call.hub.state
    repo = state.repo(repo_id, call.user)
    wanted = call.body_json()
    if wanted.get("oid") not in repo.objects or state.object_size(wanted["oid"]) != wanted.get("size"):
        raise Refused(404, "no such object")
    call.json({})


_CACHE = "/api/resolve-cache/"

ROUTES = table(
    ("GET HEAD", _CACHE + "models/{repo}/{revision}/{path*}", resolve),
    ("GET HEAD", r"/{repo}/resolve/(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+)/{path*}", resolve),
    ("GET HEAD", r"/{repo}/raw/(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+)/{path*}", raw),
    ("POST", r"/{repo}\.git/info/lfs/objects/batch", lfs_batch),
    ("POST", r"/{repo}\.git/info/lfs/objects/verify", lfs_verify),
)

"""Routes of the Hub's API about repositories, their files' names and refs; answers have the keys the client reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar
from urllib.parse import parse_qs, urlencode

import yaml

from hub.repos import MAIN, Commit, Refused, Repo, State, User, git_hash, is_ref_name, moment, xet_hash
from hub.wire import Call, table

T = TypeVar("T")


def _seen(call: Call, repo_id: str) -> tuple[State, User | None, Repo]:
    user = call.user
    return call.hub.state, user, call.hub.state.repo(repo_id, user)


def _written(call: Call, repo_id: str) -> tuple[State, User, Repo]:
    state, user, repo = _seen(call, repo_id)
    state.require_write(repo, user)
    assert user is not None
    return state, user, repo


def whoami(call: Call) -> None:
    """Who the token stands for."""
    if (user := call.user) is None:
        raise Refused(401, "Invalid username or password.")
    others = sorted(user.namespaces - {user.name})
    role = {"displayName": "tests", "role": "write" if user.write else "read"}
    organizations = [{"type": "org", "id": name, "name": name, "roleInOrg": "write"} for name in others]
    known = {"type": "user", "id": user.name, "name": user.name, "fullname": user.name, "orgs": organizations}
    call.json(known | {"auth": {"type": "access_token", "accessToken": role}})


def front_matter(text: str) -> object:
    """The metadata at the head of a card; None where there is none. Raises yaml.YAMLError."""
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return None
    return yaml.safe_load(text[4:].split("\n---", 1)[0])


def validate_yaml(call: Call) -> None:
    """Judge a card's metadata as the Hub does: errors refuse it, a card without any is warned of."""
    try:
        metadata = front_matter(call.body_json().get("content", ""))
    except yaml.YAMLError as error:
        call.json({"errors": [{"message": f"Invalid YAML: {error}"}], "warnings": []}, 400)
        return
    if metadata is not None and not isinstance(metadata, dict):
        call.json({"errors": [{"message": '"metadata" must be an object'}], "warnings": []}, 400)
        return
    warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
    call.json({"errors": [], "warnings": warnings})


def create_repo(call: Call) -> None:
    """Make an empty repository; 409 with its address where it exists."""
    state, user, wanted = call.hub.state, call.user, call.body_json()
    if user is None:
        raise Refused(401, "Invalid username or password.")
    if wanted.get("type", "model") != "model":
        raise Refused(400, "only models live here")
    namespace = wanted.get("organization") or user.name
    repo_id = f"{namespace}/{wanted['name']}"
    url = f"{call.hub.endpoint}/{repo_id}"
    with state.lock:
        if repo_id in state.repos:
            call.json({"error": "You already created this model repo", "url": url}, 409)
            return
        if namespace not in user.namespaces or not user.write:
            raise Refused(403, f"You don't have the rights to create a model under the namespace {namespace}")
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        state.create(repo_id, private, wanted.get("region") or call.hub.region, call.hub.xet, "system")
    call.json({"url": url, "name": repo_id, "id": repo_id})


def delete_repo(call: Call) -> None:
    """Forget a repository."""
    wanted = call.body_json()
    user = call.user
    repo_id = f"{wanted.get('organization') or (user.name if user else '')}/{wanted['name']}"
    state, _, _ = _written(call, repo_id)
    with state.lock:
        del state.repos[repo_id]
    call.json({})


def settings(call: Call, repo_id: str) -> None:
    """Change who may see a repository."""
    _, _, repo = _written(call, repo_id)
    wanted = call.body_json()
    if "visibility" in wanted:
        repo.private = wanted["visibility"] == "private"
    if "gated" in wanted:
        repo.gated = wanted["gated"]
    call.json({"private": repo.private, "gated": repo.gated})


def auth_check(call: Call, repo_id: str, write: str = "") -> None:
    """Whether the token may read, or write."""
    state, user, repo = _seen(call, repo_id)
    if write:
        state.require_write(repo, user)
    state.require_read(repo, user)
    call.json({})


def repo_info(call: Call, repo_id: str, revision: str = "main") -> None:
    """A repository at a revision; with `blobs` its files' sizes and digests too, with `expand` only what was named."""
    _, _, repo = _seen(call, repo_id)
    commit = repo.commit(revision)
    siblings = []
    for path, entry in sorted(commit.tree.items()):
        sibling: dict = {"rfilename": path}
        if call.flag("blobs"):
            sibling |= {"size": entry.size, "blobId": entry.oid}
            if entry.sha256:
                lfs = {"sha256": entry.sha256, "size": entry.size, "pointerSize": len(entry.pointer)}
                sibling["lfs"] = lfs
        siblings.append(sibling)
    card = commit.tree.get("README.md")
    try:
        metadata = front_matter(card.content.decode()) if card and card.content else None
    except (yaml.YAMLError, UnicodeDecodeError):
        metadata = None
    info = {
        "author": repo.namespace,
        "sha": commit.oid,
        "lastModified": moment(commit.date),
        "createdAt": moment(repo.created),
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": metadata.get("tags") or [] if isinstance(metadata, dict) else [],
        "siblings": siblings,
        "usedStorage": sum(call.hub.state.object_size(oid) for oid in repo.objects),
    }
    if isinstance(metadata, dict):
        info["cardData"] = metadata
    if named := call.query.get("expand"):
        info = {key: value for key, value in info.items() if key in named}
    call.json({"_id": git_hash("repo", repo_id.encode())[:24], "id": repo_id, "modelId": repo_id} | info)


def _described(repo: Repo, commit: Commit, path: str, expand: bool) -> dict | None:
    """A file or folder as `tree` and `paths-info` give it; None where there is nothing of that name."""
    entry = commit.tree.get(path)
    if entry is None:
        inside = sorted(f"{name} {e.oid}" for name, e in commit.tree.items() if name.startswith(f"{path}/"))
        if not inside:
            return None
        found: dict = {"type": "directory", "oid": git_hash("tree", "\n".join(inside).encode()), "size": 0}
    else:
        found = {"type": "file", "oid": entry.oid, "size": entry.size}
        if entry.sha256:
            found["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": len(entry.pointer)}
            if repo.xet:
                found["xetHash"] = xet_hash(entry.sha256)
    if expand:
        last = repo.last_commit(commit.oid, path)
        found["lastCommit"] = {"id": last.oid, "title": last.title, "date": moment(last.date)}
    return found | {"path": path}


def tree(call: Call, repo_id: str, revision: str, path: str = "") -> None:
    """The files and folders below a folder, page by page."""
    _, _, repo = _seen(call, repo_id)
    commit, prefix = repo.commit(revision), f"{path.strip('/')}/" if path else ""
    names = set()
    for name in commit.tree:
        if name.startswith(prefix):
            parts = name.removeprefix(prefix).split("/")
            depths = range(1, len(parts) + 1) if call.flag("recursive") else (1,)
            names |= {prefix + "/".join(parts[:depth]) for depth in depths}
    if prefix and not names:
        raise Refused(404, f'"{path}" does not exist on "{revision}"', "EntryNotFound", X_Repo_Commit=commit.oid)
    expand = call.flag("expand")
    page_size = min(call.hub.page_size, 50) if expand else call.hub.page_size
    names_of_page = _page(call, sorted(names), page_size)
    _answer_page(call, [_described(repo, commit, name, expand) for name in names_of_page], len(names), page_size)


def paths_info(call: Call, repo_id: str, revision: str) -> None:
    """The files and folders that were named, those that exist."""
    _, _, repo = _seen(call, repo_id)
    commit, form = repo.commit(revision), parse_qs(call.body().decode())
    paths = form.get("paths", [])
    if len(paths) > 1000:
        raise Refused(413, "too many parameters")
    expand = form.get("expand", [""])[0].lower() in ("1", "true")
    found = (_described(repo, commit, path.strip("/"), expand) for path in paths)
    call.json([each for each in found if each is not None])


def commits(call: Call, repo_id: str, revision: str) -> None:
    """The history of a revision, last commit first, page by page."""
    _, _, repo = _seen(call, repo_id)
    history, size = repo.history(revision), call.hub.page_size
    rows = [
        {"id": each.oid, "title": each.title, "message": each.message, "date": moment(each.date)}
        | {"authors": [{"user": each.author}]}
        for each in _page(call, history, size)
    ]
    _answer_page(call, rows, len(history), size)


def _cursor(call: Call) -> int:
    return int(call.query.get("cursor", ["0"])[0])


def _page(call: Call, items: Sequence[T], size: int) -> Sequence[T]:
    return items[_cursor(call) : _cursor(call) + size]


def _answer_page(call: Call, rows: list, total: int, size: int) -> None:
    headers, after = {}, _cursor(call) + size
    if after < total:
        query = {name: values[0] for name, values in call.query.items()} | {"cursor": str(after)}
        headers["Link"] = f'<{call.hub.endpoint}{call.path.split("?")[0]}?{urlencode(query)}>; rel="next"'
    call.json(rows, headers=headers)


def refs(call: Call, repo_id: str) -> None:
    """Branches, tags and, if asked for, pull requests."""
    _, _, repo = _seen(call, repo_id)

    def under(prefix: str) -> list[dict]:
        found = sorted((name, oid) for name, oid in repo.refs.items() if name.startswith(prefix))
        return [{"name": name.removeprefix(prefix), "ref": name, "targetCommit": oid} for name, oid in found]

    answer = {"branches": under("refs/heads/"), "tags": under("refs/tags/"), "converts": []}
    call.json(answer | ({"pullRequests": under("refs/pr/")} if call.flag("include_prs") else {}))


def create_branch(call: Call, repo_id: str, name: str) -> None:
    """A branch at `startingPoint`, or at the main branch's head."""
    _make_ref(call, repo_id, f"refs/heads/{name}", call.body_json().get("startingPoint") or "main")


def create_tag(call: Call, repo_id: str, revision: str) -> None:
    """A tag at a revision."""
    _make_ref(call, repo_id, f"refs/tags/{call.body_json().get('tag') or ''}", revision)


def _make_ref(call: Call, repo_id: str, ref: str, revision: str) -> None:
    state, _, repo = _written(call, repo_id)
    if not is_ref_name(ref.split("/", 2)[2]):
        raise Refused(400, f"Invalid reference: {ref}")
    with state.lock:
        if ref in repo.refs:
            raise Refused(409, f"Reference {ref} already exists")
        repo.refs[ref] = repo.commit(revision).oid
    call.json({})


def delete_ref(call: Call, repo_id: str, kind: str, name: str) -> None:
    """Remove a branch other than main, or a tag."""
    state, _, repo = _written(call, repo_id)
    ref = f"refs/{'heads' if kind == 'branch' else 'tags'}/{name}"
    with state.lock:
        if ref == MAIN:
            raise Refused(403, "Cannot delete the main branch")
        if repo.refs.pop(ref, None) is None:
            raise Refused(404, f"Invalid rev id: {name}", "RevisionNotFound")
    call.json({})


ROUTES = table(
    ("GET", "/api/whoami-v2", whoami),
    ("POST", "/api/validate-yaml", validate_yaml),
    ("POST", "/api/repos/create", create_repo),
    ("DELETE", "/api/repos/delete", delete_repo),
    ("PUT", "/api/models/{repo}/settings", settings),
    ("GET", "/api/models/{repo}/auth-check(?P<write>/write)?", auth_check),
    ("GET", "/api/models/{repo}", repo_info),
    ("GET", "/api/models/{repo}/revision/{revision}", repo_info),
    ("GET", "/api/models/{repo}/tree/{revision}(?:/{path*})?", tree),
    ("POST", "/api/models/{repo}/paths-info/{revision}", paths_info),
    ("GET", "/api/models/{repo}/commits/{revision}", commits),
    ("GET", "/api/models/{repo}/refs", refs),
    ("POST", "/api/models/{repo}/branch/{name}", create_branch),
    ("POST", "/api/models/{repo}/tag/{revision}", create_tag),
    ("DELETE", "/api/models/{repo}/(?P<kind>branch|tag)/{name}", delete_ref),
)

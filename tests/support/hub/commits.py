"""Routes that make a commit: what to upload, the commit itself, and objects copied from another repository."""

from __future__ import annotations

import base64
import binascii
import json
from fnmatch import fnmatch

from hub.discussions import open_discussion, says
from hub.repos import Refused, is_large, xet_hash
from hub.wire import Call, table


def preupload(call: Call, repo_id: str, revision: str) -> None:
    """For each file of a coming commit: kept as a large object or not, ignored or not, and what is there now."""
    user = call.user
    repo = call.hub.state.repo(repo_id, user)
    if user is None or not call.flag("create_pr"):
        call.hub.state.require_push(repo, revision, user)
    there, wanted = repo.commit(revision).tree, call.body_json()
    rules = wanted.get("gitIgnore")
    if rules is None and ".gitignore" in there:
        rules = (there[".gitignore"].content or b"").decode()
    ignored = [line.strip() for line in (rules or "").splitlines() if line.strip() and line[0] != "#"]
    files = []
    for each in wanted["files"]:
        path = each["path"]
        mode = "lfs" if is_large(path, each["size"]) else "regular"
        skip = any(fnmatch(path, rule) or fnmatch(path.rsplit("/", 1)[-1], rule) for rule in ignored)
        file = {"path": path, "uploadMode": mode, "shouldIgnore": skip}
        files.append(file | ({"oid": there[path].etag} if path in there else {}))
    call.json({"files": files})


def _operations(body: bytes) -> tuple[dict, list[tuple[str, dict]]]:
    """The header and the operations of a commit. Raises Refused unless every line can be read."""
    header, operations = None, []
    for line in body.splitlines():
        try:
            row = json.loads(line)
            key, value = row["key"], row["value"]
            if not isinstance(value, dict):
                raise TypeError
            if key == "file":
                value = {"path": value["path"], "content": base64.b64decode(value["content"], validate=True)}
        except (ValueError, KeyError, TypeError, binascii.Error):
            raise Refused(400, "a line of the commit cannot be read") from None
        if key == "header":
            header = value
        else:
            operations.append((key, value))
    texts = {name: (header or {}).get(name) for name in ("summary", "description", "parentCommit")}
    if not texts["summary"] or not all(isinstance(text, str | None) for text in texts.values()):
        raise Refused(400, "a commit needs a summary, and its header holds text")
    return header, operations


def commit(call: Call, repo_id: str, revision: str) -> None:
    """One commit on a branch, or on a pull request of its own; the head moves only if all of it is valid."""
    state, user = call.hub.state, call.user
    repo = state.repo(repo_id, user)
    header, operations = _operations(call.body())
    parent = header.get("parentCommit")
    with state.lock:
        ref, pull = repo.ref(revision), None
        if user is None or not call.flag("create_pr"):
            state.require_push(repo, revision, user)
        assert user is not None
        if call.flag("create_pr"):
            base = repo.commit(parent or revision)
            new = state.apply(repo, base.tree, operations)
            pull = open_discussion(state, repo, header["summary"], header.get("description", ""), user.name, base)
            pull.status, ref = "open", f"refs/pr/{pull.num}"
        else:
            if ref is None or ref.startswith("refs/tags/"):
                raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            if parent and not repo.refs[ref].startswith(parent):
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            new = state.apply(repo, repo.commits[repo.refs[ref]].tree, operations)
        made = state.add_commit(repo, ref, new, header["summary"], header.get("description", ""), user.name)
        if ref.startswith("refs/pr/"):
            says(
                repo.discussion(int(ref[8:])), made.date, user.name, "commit", {"subject": made.title, "oid": made.oid}
            )
    answer = {"success": True, "commitOid": made.oid, "hookOutput": ""}
    answer["commitUrl"] = f"{call.hub.endpoint}/{repo_id}/commit/{made.oid}"
    if pull is not None:
        answer["pullRequestUrl"] = f"{call.hub.endpoint}/{repo_id}/discussions/{pull.num}"
    call.json(answer)


def duplicate(call: Call, repo_id: str) -> None:
    """Let another repository, which the user may change, hold objects of this one, where both lie in one region and on
    Xet."""
    state, user = call.hub.state, call.user
    repo = state.repo(repo_id, user)
    state.require_read(repo, user)
    wanted = call.body_json()
    target = state.repo(wanted["target"]["name"], user)
    state.require_write(target, user)
    failed = []
    with state.lock:
        for each in wanted["files"]:
            sha256 = each["sha256"]
            if sha256 not in repo.objects or each["xetHash"] != xet_hash(sha256) or not repo.xet:
                failed.append({"sha256": sha256, "error": "file not found in the source repository"})
            elif repo.region != target.region:
                failed.append({"sha256": sha256, "error": "the repositories are in different storage regions"})
            else:
                target.objects.add(sha256)
    call.json({"success": not failed, "failed": failed})


def no_xet(call: Call, repo_id: str, revision: str, kind: str) -> None:
    """There is no Xet storage here: clients set HF_HUB_DISABLE_XET=1."""
    raise Refused(404, f"no Xet storage to {kind}: set HF_HUB_DISABLE_XET=1")


ROUTES = table(
    ("POST", "/api/models/{repo}/preupload/{revision}", preupload),
    ("POST", "/api/models/{repo}/commit/{revision}", commit),
    ("POST", "/api/models/{repo}/lfs-files/duplicate", duplicate),
    ("GET", "/api/models/{repo}/xet-(?P<kind>read|write)-token/{revision}", no_xet),
)

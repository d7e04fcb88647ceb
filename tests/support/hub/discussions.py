"""Discussions and pull requests: what they hold, and their routes."""

from __future__ import annotations

from datetime import datetime

from hub.repos import Commit, Discussion, Refused, Repo, State, User, git_hash, moment
from hub.wire import Call, table


def says(discussion: Discussion, date: datetime, author: str, kind: str, data: dict) -> dict:
    """Add an event; returns it as the client reads it."""
    name = f"{discussion.num} {len(discussion.events)}"
    event = {"id": git_hash("event", name.encode())[:24], "type": kind, "createdAt": moment(date)}
    event |= {"author": {"name": author}, "data": data}
    discussion.events.append(event)
    return event


def comment_data(text: str, date: datetime) -> dict:
    """What a comment's event holds."""
    latest = {"raw": text, "html": "", "updatedAt": moment(date)}
    return {"edited": False, "hidden": False, "latest": latest, "history": []}


def open_discussion(
    state: State, repo: Repo, title: str, description: str, author: str, base: Commit | None
) -> Discussion:
    """A new discussion; with `base` a draft of a pull request whose ref starts there. The caller holds the lock."""
    date = state.now()
    opened = Discussion(len(repo.discussions) + 1, title.strip(), author, date, "draft" if base else "open")
    repo.discussions.append(opened)
    if base is not None:
        opened.base = base.oid
        repo.refs[f"refs/pr/{opened.num}"] = base.oid
    if description:
        says(opened, date, author, "comment", comment_data(description, date))
    return opened


def _row(repo: Repo, each: Discussion) -> dict:
    row = {"num": each.num, "title": each.title, "author": {"name": each.author}, "status": each.status}
    row |= {"createdAt": moment(each.date), "isPullRequest": each.base is not None}
    return row | {"repo": {"name": repo.repo_id, "type": "model"}}


def _open(call: Call, repo_id: str, num: str) -> tuple[State, User, Repo, Discussion]:
    state, user = call.hub.state, call.user
    repo = state.repo(repo_id, user)
    if user is None:
        raise Refused(401, "Invalid username or password.")
    return state, user, repo, repo.discussion(int(num))


def listing(call: Call, repo_id: str) -> None:
    """The discussions of a kind, state and author, newest first, ten a page."""
    repo = call.hub.state.repo(repo_id, call.user)
    asked = {name: values[0] for name, values in call.query.items()}
    kept = []
    for each in reversed(repo.discussions):
        kind = "discussion" if each.base is None else "pull_request"
        status = "open" if each.status in ("open", "draft") else "closed"
        if asked.get("type", "all") not in ("all", kind) or asked.get("status", "all") not in ("all", status):
            continue
        if asked.get("author", each.author) == each.author:
            kept.append(_row(repo, each))
    start = 10 * int(asked.get("p", 0))
    call.json({"discussions": kept[start : start + 10], "count": len(kept), "start": start})


def details(call: Call, repo_id: str, num: str) -> None:
    """One discussion with its events."""
    repo = call.hub.state.repo(repo_id, call.user)
    each = repo.discussion(int(num))
    row = _row(repo, each) | {"events": each.events, "filesWithConflicts": [], "diff": ""}
    if each.base is not None:
        changes = {"base": "refs/heads/main"} | ({"mergeCommitId": each.merged} if each.merged else {})
        row["changes"] = changes
    call.json(row)


def create(call: Call, repo_id: str) -> None:
    """Open a discussion, or a draft of a pull request on the main branch's head."""
    state, user = call.hub.state, call.user
    repo, wanted = state.repo(repo_id, user), call.body_json()
    if user is None:
        raise Refused(401, "Invalid username or password.")
    with state.lock:
        base = repo.head if wanted.get("pullRequest") else None
        opened = open_discussion(state, repo, wanted["title"], wanted.get("description", ""), user.name, base)
    call.json({"num": opened.num, "pullRequest": base is not None})


def comment(call: Call, repo_id: str, num: str) -> None:
    """Say something."""
    state, user, _, each = _open(call, repo_id, num)
    date, text = state.now(), call.body_json()["comment"]
    call.json({"newMessage": says(each, date, user.name, "comment", comment_data(text, date))})


def status(call: Call, repo_id: str, num: str) -> None:
    """Open or close."""
    state, user, repo, each = _open(call, repo_id, num)
    if each.author != user.name:
        state.require_write(repo, user)
    each.status = call.body_json()["status"]
    call.json({"newStatus": says(each, state.now(), user.name, "status-change", {"status": each.status})})


def title(call: Call, repo_id: str, num: str) -> None:
    """Give another title."""
    state, user, _, each = _open(call, repo_id, num)
    old, each.title = each.title, call.body_json()["title"]
    call.json({"newTitle": says(each, state.now(), user.name, "title-change", {"from": old, "to": each.title})})


def merge(call: Call, repo_id: str, num: str) -> None:
    """Bring a pull request to the main branch."""
    state, user, repo, each = _open(call, repo_id, num)
    state.require_write(repo, user)
    with state.lock:
        commit = state.merge(repo, each, user.name)
        says(each, commit.date, user.name, "status-change", {"status": "merged"})
    call.json({"mergeCommitId": commit.oid})


ROUTES = table(
    ("GET", "/api/models/{repo}/discussions", listing),
    ("POST", "/api/models/{repo}/discussions", create),
    ("GET", "/api/models/{repo}/discussions/{num}", details),
    ("POST", "/api/models/{repo}/discussions/{num}/comment", comment),
    ("POST", "/api/models/{repo}/discussions/{num}/status", status),
    ("POST", "/api/models/{repo}/discussions/{num}/title", title),
    ("POST", "/api/models/{repo}/discussions/{num}/merge", merge),
)

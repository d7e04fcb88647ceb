"""Describe a publication as a value, which can be shown and compared before anything is sent.

plan_checkpoint.py and plan_patch.py make plans, and publish.py carries them out. This module reads and writes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from swsurgery.checkpoint.record import Record
from swsurgery.errors import HubError
from swsurgery.hub.commit import MAIN, Branch
from swsurgery.hub.remote import RemoteTree
from swsurgery.storage.files import File
from swsurgery.storage.numbers import format_size
from swsurgery.storage.result import TableResult
from swsurgery.verifying.findings import Finding

How = Literal["copy", "upload", "keep", "delete"]
"""What happens to a file in the commit.

"copy": the Hub copies it from the base's repository. "upload": its bytes are sent to the Hub. "keep": it is already in
the repository. "delete": it is removed from the repository.
"""


@dataclass(frozen=True)
class Item:
    """One file of the plan: a file of the new revision, or a file to delete.

    `how` is what happens to the file in the commit, and `why` is the reason. `content` is None if the file is not in
    the directory. `sha256` is None if the file is not hashed yet. `blob` is git's sha1 digest of a small file. `source`
    is the path of the file in the base's repository, which differs from `name` if the base is a folder of its
    repository.
    """

    name: str
    how: How
    size: int
    why: str
    sha256: str | None = None
    blob: str | None = None
    content: File | bytes | None = field(default=None, repr=False)
    source: str | None = None

    def is_in(self, listing: RemoteTree, path: str = "") -> bool:
        """Return True if a revision contains exactly this file at `path`, by default at the path `name`."""
        path = path or self.name
        there = listing.files.get(path)
        if there is None or there.size != self.size:
            return False
        if there.sha256 is not None:
            return there.sha256 == self.sha256
        return self.blob is not None and listing.blobs[path] == self.blob


_NO_REF = re.compile(
    r"[\x00-\x20~^:?*\[\\\x7f\ud800-\udfff]|\.\.|@\{|//|^[/.-]|/\.|[/.]$|\.lock(/|$)|^(@|HEAD)$|^refs/|^[0-9a-f]{40}$"
)
"""Matches in names that git refuses for a branch or a tag (git check-ref-format), and in names that git would read as a
ref or a commit."""


_NO_TEXT = re.compile(r"[\ud800-\udfff]")
"""Matches a surrogate. Python makes surrogates from bytes of a command's argument that are not valid UTF-8."""


def is_ref_name(name: str) -> bool:
    """Return True if a branch or a tag can have this name."""
    return bool(name) and _NO_REF.search(name) is None


@dataclass(frozen=True)
class Wish:
    """The options of a publication that the user chose.

    If `tag` is None, the tag is named after the base's commit. If `message` is None or empty, the message is made from
    the edits. Leading and trailing blanks of the message are removed, as git and the Hub do.

    Raises HubError for an invalid name of a repository, branch or tag, before any work begins.
    """

    repo_id: str
    private: bool = False
    create_pr: bool = False
    branch: str = MAIN
    tag: str | None = None
    message: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", (self.message or "").strip() or None)
        if self.message and _NO_TEXT.search(self.message):
            raise HubError("the commit's message is not valid UTF-8", self.message)
        if self.repo_id.count("/") != 1:
            raise HubError("the name of a repository must have the form ORG/NAME", self.repo_id)
        for kind, name in (("branch", self.branch), ("tag", self.tag)):
            if name is not None and not is_ref_name(name):
                raise HubError(f"git does not accept this name for a {kind}", name or "the empty name")


@dataclass(frozen=True, repr=False)
class Publication(TableResult):
    """The plan of a publication.

    `left_out` maps the names of files that are not published to the reasons. `base` is None if the Hub cannot copy from
    the base, and `target` is None if the repository does not exist yet. `pull_request` is the number of
    an open pull request that already has exactly these files. If `offline`, the plan was made without asking the Hub,
    and both are None.
    """

    root: Path
    wish: Wish
    record: Record
    items: tuple[Item, ...]
    left_out: Mapping[str, str]
    notes: tuple[str, ...]
    accepted: tuple[Finding, ...]
    base: RemoteTree | None
    target: Branch | None
    tag: str | None
    message: str
    pull_request: int | None = None
    offline: bool = False

    @property
    def private(self) -> bool:
        """True if the repository is private, or will be created as a private one."""
        return self.target.head.private if self.target else self.wish.private

    @property
    def changes(self) -> tuple[Item, ...]:
        """Files that the commit changes."""
        return tuple(item for item in self.items if item.how != "keep")

    @property
    def copy_bytes(self) -> int:
        """Number of bytes that the Hub copies."""
        return sum(item.size for item in self.items if item.how == "copy")

    @property
    def upload_bytes(self) -> int:
        """Number of bytes that are uploaded."""
        return sum(item.size for item in self.items if item.how == "upload")

    def to_rows(self) -> list[dict[str, object]]:
        """Return one row per file: its name, how it gets into the new revision, its size in bytes, and why."""
        return [{"name": i.name, "how": i.how, "size": i.size, "why": i.why} for i in self.items]

    def to_json(self) -> dict[str, Any]:
        """Return the plan as a JSON document."""
        return {
            "repo_id": self.wish.repo_id,
            "branch": self.wish.branch,
            "created": None if self.offline else self.target is None,
            "offline": self.offline,
            "private": self.private,
            "create_pr": self.wish.create_pr,
            "parent": self.target.head.commit if self.target else None,
            "base": {"repo_id": self.base.repo_id, "commit": self.base.commit} if self.base else None,
            "files": self.to_rows(),
            "left_out": [{"name": name, "why": why} for name, why in self.left_out.items()],
            "copy_bytes": self.copy_bytes,
            "upload_bytes": self.upload_bytes,
            "tag": self.tag,
            "message": self.message,
            "accepted": sorted({f.rule for f in self.accepted}),
            "notes": list(self.notes),
        }


def is_published(plan: Publication, head: RemoteTree) -> bool:
    """Return True if a revision contains every file of the plan, and none of the files to delete."""
    return all(item.name not in head.files if item.how == "delete" else item.is_in(head) for item in plan.items)


def format_lines(plan: Publication) -> Iterator[str]:
    """Yield the plan as lines of text."""
    kind = "private" if plan.private else "public"
    at = f"branch {plan.wish.branch}" if plan.wish.branch != MAIN else "main"
    what = f"a pull request to {at}" if plan.wish.create_pr else at
    if plan.offline:
        yield f"{plan.wish.repo_id}: {kind} if it is new; one commit to {what}"
    elif plan.target is None:
        yield f"{plan.wish.repo_id}: new, {kind}; one commit to {what}"
    else:
        yield f"{plan.wish.repo_id}: {kind}; one commit to {what} on top of {plan.target.head.commit}"
    if plan.base:
        yield f"base: {plan.base}"
    for item in plan.items:
        yield f"  {item.how:7} {format_size(item.size):>9}  {item.name}: {item.why}"
    for name, why in plan.left_out.items():
        yield f"  not     {'':9}  {name}: {why}"
    yield from plan.notes
    if plan.accepted:
        yield f"accepted findings: {', '.join(sorted({f.rule for f in plan.accepted}))}"
    if plan.tag:
        yield f"tag: {plan.tag}"
    yield f"to copy on the Hub: {format_size(plan.copy_bytes)}; to upload: {format_size(plan.upload_bytes)}"

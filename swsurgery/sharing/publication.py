"""A publication as a value, before anything is sent: each file and how it gets there, to be shown, compared and sent.

Plans are made in publish_plan.py and publish_patch.py, and carried out in publishing.py. Reads and writes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from swsurgery.checkpoint.record import Registry
from swsurgery.errors import HubError
from swsurgery.hub.commit import MAIN, Listing, Target
from swsurgery.storage.files import Place
from swsurgery.verifying.findings import Finding

How = Literal["copy", "upload", "keep", "delete"]


@dataclass(frozen=True)
class Item:
    """One file of the new revision, or one that goes. `content` is None where it is not in the directory; `sha256` is
    None where it is not known before the file is hashed; `blob` is git's name for a small content, `source` the path
    in the base's repository, where a base that lies in a folder of it has another."""

    name: str
    how: How
    size: int
    why: str
    sha256: str | None = None
    blob: str | None = None
    content: Place | bytes | None = field(default=None, repr=False)
    source: str | None = None

    def is_in(self, listing: Listing, path: str = "") -> bool:
        """Whether a revision has this very file, here or at another path."""
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
"""In what git refuses as the name of a branch or a tag (git check-ref-format), and what reads as a ref or a commit."""


_NO_TEXT = re.compile(r"[\ud800-\udfff]")
"""What Python makes of an argument's bytes that are not UTF-8."""


def is_ref_name(name: str) -> bool:
    """Whether a branch or a tag can have this name."""
    return bool(name) and _NO_REF.search(name) is None


@dataclass(frozen=True)
class Wish:
    """What the user asked for. `tag` None is named after the base's commit; `message`, without blanks around it as git
    and the Hub keep it, says what was done where it is None or empty.

    Raises HubError for a name that no repository, branch or tag can have: once the work has begun it is too late.
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
            raise HubError("not UTF-8, in the commit's message", self.message)
        if self.repo_id.count("/") != 1:
            raise HubError("a repository is named ORG/NAME", self.repo_id)
        for kind, name in (("branch", self.branch), ("tag", self.tag)):
            if name is not None and not is_ref_name(name):
                raise HubError(f"git takes no such name for a {kind}", name or "the empty one")


@dataclass(frozen=True)
class Publication:
    """The plan. `base` is None where it cannot be copied from, `target` where there is no repository yet;
    `pull_request` is an open one that holds all this already."""

    root: Path
    wish: Wish
    registry: Registry
    items: tuple[Item, ...]
    left_out: Mapping[str, str]
    notes: tuple[str, ...]
    accepted: tuple[Finding, ...]
    base: Listing | None
    target: Target | None
    tag: str | None
    message: str
    pull_request: int | None = None

    @property
    def private(self) -> bool:
        return self.target.head.private if self.target else self.wish.private

    @property
    def changes(self) -> tuple[Item, ...]:
        return tuple(item for item in self.items if item.how != "keep")

    @property
    def copy_bytes(self) -> int:
        return sum(item.size for item in self.items if item.how == "copy")

    @property
    def upload_bytes(self) -> int:
        return sum(item.size for item in self.items if item.how == "upload")

    def to_json(self) -> dict[str, Any]:
        return {
            "repo_id": self.wish.repo_id,
            "branch": self.wish.branch,
            "created": self.target is None,
            "private": self.private,
            "create_pr": self.wish.create_pr,
            "parent": self.target.head.commit if self.target else None,
            "base": {"repo_id": self.base.repo_id, "commit": self.base.commit} if self.base else None,
            "files": [{"name": i.name, "how": i.how, "size": i.size, "why": i.why} for i in self.items],
            "left_out": [{"name": name, "why": why} for name, why in self.left_out.items()],
            "copy_bytes": self.copy_bytes,
            "upload_bytes": self.upload_bytes,
            "tag": self.tag,
            "message": self.message,
            "accepted": sorted({f.rule for f in self.accepted}),
            "notes": list(self.notes),
        }


def is_published(plan: Publication, head: Listing) -> bool:
    """Whether a revision has every file of the plan, and none that was to go."""
    return all(item.name not in head.files if item.how == "delete" else item.is_in(head) for item in plan.items)


def lines(plan: Publication, size: Callable[[int], str]) -> Iterator[str]:
    """The plan for people; `size` writes a number of bytes."""
    kind = "private" if plan.private else "public"
    at = f"branch {plan.wish.branch}" if plan.wish.branch != MAIN else "main"
    what = f"a pull request to {at}" if plan.wish.create_pr else at
    if plan.target is None:
        yield f"{plan.wish.repo_id}: to be made, {kind}; one commit to {what}"
    else:
        yield f"{plan.wish.repo_id}: {kind}; one commit to {what} on top of {plan.target.head.commit}"
    if plan.base:
        yield f"base: {plan.base}"
    for item in plan.items:
        yield f"  {item.how:7} {size(item.size):>9}  {item.name}: {item.why}"
    for name, why in plan.left_out.items():
        yield f"  not     {'':9}  {name}: {why}"
    yield from plan.notes
    if plan.accepted:
        yield f"accepted findings: {', '.join(sorted({f.rule for f in plan.accepted}))}"
    if plan.tag:
        yield f"tag: {plan.tag}"
    yield f"to copy on the Hub: {size(plan.copy_bytes)}; to upload: {size(plan.upload_bytes)}"

"""What the server holds: users, repositories, commits, refs and large objects; knows nothing of HTTP.

A commit is an immutable tree of entries. Small files are bytes in memory; a large object is a path on disk with its
digest, so that a base of many gigabytes is never copied. A ref moves only after a whole commit was built and found
valid, under `State.lock`: no reader sees half of one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType

LFS_PATTERNS = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth", "*.onnx", "*.npz", "*.h5", "*.zip", "*.tar.*")
LFS_ABOVE = 10 << 20  # a larger file is a large object whatever its name
MAIN = "refs/heads/main"
_FIRST_DAY = datetime(2026, 1, 1, tzinfo=UTC)  # commits are one second apart from here on: runs are reproducible


class Refused(Exception):
    """A request that cannot be done: the status and the `X-Error-Code` that the client tells apart."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def is_large(path: str, size: int) -> bool:
    """Whether a new file is kept as a large object, by its name or its size in bytes."""
    return size > 0 and (size > LFS_ABOVE or any(fnmatch(path.rsplit("/", 1)[-1], each) for each in LFS_PATTERNS))


_NO_REF = re.compile(r"[\x00-\x20~^:?*\[\\\x7f]|\.\.|@\{|//|(^|/)\.|[/.]$|\.lock(/|$)|^(/|-|refs/)|^(HEAD)?$")


def is_ref_name(name: str) -> bool:
    """Whether git, and the Hub, take it for a branch or a tag (git check-ref-format)."""
    return _NO_REF.search(name) is None


def git_hash(kind: str, content: bytes) -> str:
    """The name that git gives to `content`: sha1, in hexadecimal."""
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


def moment(date: datetime) -> str:
    """A date as the Hub writes it."""
    return date.strftime("%Y-%m-%dT%H:%M:%S.000Z")


def xet_hash(sha256: str) -> str:
    """A stand-in for an object's Xet hash (64 hexadecimal digits); the real one is a Merkle hash over chunks."""
    return hashlib.blake2s(bytes.fromhex(sha256)).hexdigest()


def file_sha256(path: Path) -> str:
    """The digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Entry:
    """A file of one commit: either `content` or the digest of a large object. `size` is in bytes."""

    size: int
    content: bytes | None = None
    sha256: str | None = None

    @property
    def pointer(self) -> bytes:
        """What git keeps in place of a large object."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @property
    def oid(self) -> str:
        """The git blob's name: of the content, or of the pointer to it."""
        return git_hash("blob", self.pointer if self.content is None else self.content)

    @property
    def etag(self) -> str:
        """What the client names its cached blob after."""
        return self.sha256 or self.oid


@dataclass(frozen=True)
class Commit:
    """One immutable revision of a repository."""

    oid: str
    parent: str | None
    tree: Mapping[str, Entry]
    title: str
    message: str
    author: str
    date: datetime


@dataclass(frozen=True)
class User:
    """Who a token stands for, and the namespaces that belong to them."""

    name: str
    namespaces: frozenset[str]
    write: bool = True


@dataclass
class Discussion:
    """A discussion or, with `base`, a pull request: `base` is the commit that it was opened on."""

    num: int
    title: str
    author: str
    date: datetime
    status: str = "open"
    base: str | None = None
    merged: str | None = None
    events: list[dict] = field(default_factory=list)


@dataclass
class Repo:
    """A model repository. `region` and `xet` decide whether its objects can be copied to another one."""

    repo_id: str
    private: bool = False
    gated: str | bool = False
    region: str = "us"
    xet: bool = True
    granted: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    objects: set[str] = field(default_factory=set)
    discussions: list[Discussion] = field(default_factory=list)
    created: datetime = _FIRST_DAY

    @property
    def namespace(self) -> str:
        return self.repo_id.split("/")[0]

    @property
    def head(self) -> Commit:
        """The last commit of the main branch."""
        return self.commits[self.refs[MAIN]]

    def ref(self, revision: str) -> str | None:
        """The full name of a branch, tag or pull request; None where there is none."""
        names = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
        return next((name for name in names if name in self.refs), None)

    def commit(self, revision: str) -> Commit:
        """The commit that a branch, tag, ref or commit's name (7 digits at least) stands for. Raises Refused."""
        if name := self.ref(revision):
            return self.commits[self.refs[name]]
        if re.fullmatch(r"[0-9a-f]{7,40}", revision):
            found = [each for each in self.commits.values() if each.oid.startswith(revision)]
            if len(found) == 1:
                return found[0]
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def history(self, revision: str) -> list[Commit]:
        """A revision and its ancestors, last commit first."""
        commits, at = [], self.commit(revision)
        while at is not None:
            commits.append(at)
            at = self.commits[at.parent] if at.parent else None
        return commits

    def last_commit(self, revision: str, path: str) -> Commit:
        """The commit that gave `path`, a file or a folder, its present content."""

        def under(commit: Commit) -> dict[str, str]:
            return {name: e.oid for name, e in commit.tree.items() if name == path or name.startswith(f"{path}/")}

        history = self.history(revision)
        present = under(history[0])
        return list(itertools.takewhile(lambda commit: under(commit) == present, history))[-1]

    def discussion(self, num: int) -> Discussion:
        """A discussion by its number, from 1. Raises Refused."""
        if not 1 <= num <= len(self.discussions):
            raise Refused(404, f"no discussion {num}")
        return self.discussions[num - 1]


class State:
    """All users, repositories and large objects of one server. `folder` takes what is uploaded."""

    def __init__(self, folder: Path) -> None:
        self.lock = threading.RLock()
        self.folder = folder
        self.repos: dict[str, Repo] = {}
        self.users: dict[str, User] = {}  # by token
        self.paths: dict[str, Path] = {}  # of large objects, by sha256
        self._ticks = itertools.count(1)

    def now(self) -> datetime:
        """A clock that only commits and discussions wind."""
        return _FIRST_DAY + timedelta(seconds=next(self._ticks))

    def repo(self, repo_id: str, user: User | None) -> Repo:
        """A repository that `user` may see; a private one is as missing to others. Raises Refused."""
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and not self.owns(repo, user)):
            if user is None:
                raise Refused(401, "Invalid username or password.", "RepoNotFound")
            raise Refused(404, "Repository not found", "RepoNotFound")
        return repo

    def owns(self, repo: Repo, user: User | None) -> bool:
        """Whether the repository lies in one of the user's namespaces."""
        return user is not None and repo.namespace in user.namespaces

    def require_read(self, repo: Repo, user: User | None) -> None:
        """Raise Refused where the files are gated and the user was not let in."""
        if repo.gated and not self.owns(repo, user) and (user is None or user.name not in repo.granted):
            raise Refused(403 if user else 401, f"Access to model {repo.repo_id} is restricted.", "GatedRepo")

    def require_write(self, repo: Repo, user: User | None) -> None:
        """Raise Refused where the user's token may not change the repository."""
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if not (user.write and self.owns(repo, user)):
            raise Refused(403, f"You don't have the rights to write to {repo.repo_id}")

    def require_push(self, repo: Repo, revision: str, user: User | None) -> None:
        """Raise Refused where the user may not commit to a revision: a pull request takes its author's commits too."""
        match = re.fullmatch(r"refs/pr/(\d+)", revision)
        if not (match and user and repo.discussion(int(match[1])).author == user.name):
            self.require_write(repo, user)

    def create(self, repo_id: str, private: bool, region: str, xet: bool, author: str) -> Repo:
        """A new repository with the system's first commit, as the Hub makes it. The caller holds the lock."""
        repo = Repo(repo_id, private=private, region=region, xet=xet, created=self.now())
        self.repos[repo_id] = repo
        rules = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()
        self.add_commit(repo, MAIN, {".gitattributes": Entry(len(rules), rules)}, "initial commit", "", author)
        return repo

    def seed(self, repo: Repo, folder: Path, digests: Mapping[str, str], message: str) -> Commit:
        """Put the files below `folder` into one commit; large ones stay where they are and must not change."""
        tree = {}
        for path in sorted(each for each in folder.rglob("*") if each.is_file()):
            name, size = path.relative_to(folder).as_posix(), path.stat().st_size
            if is_large(name, size):
                sha256 = digests.get(name) or file_sha256(path)
                self.add_object(repo, sha256, path.resolve())
                tree[name] = Entry(size, sha256=sha256)
            else:
                tree[name] = Entry(size, path.read_bytes())
        with self.lock:
            return self.add_commit(repo, MAIN, tree, message, "", repo.namespace)

    def add_object(self, repo: Repo, sha256: str, path: Path) -> None:
        """Let `repo` hold a large object that lies at `path`; the first place known of an object stays."""
        with self.lock:
            self.paths.setdefault(sha256, path)
            repo.objects.add(sha256)

    def hold(self, repo_id: str, sha256: str, path: Path) -> None:
        """Let the repository of this name hold an object that was uploaded. Raises Refused where it was deleted."""
        with self.lock:
            if repo_id not in self.repos:
                raise Refused(404, "Repository not found", "RepoNotFound")
            self.add_object(self.repos[repo_id], sha256, path)

    def object_size(self, sha256: str) -> int:
        """The size in bytes of a large object that is held."""
        return os.stat(self.paths[sha256]).st_size

    def add_commit(
        self, repo: Repo, ref: str, tree: Mapping[str, Entry], title: str, message: str, author: str
    ) -> Commit:
        """Move `ref` to a new commit with `tree`. The caller holds the lock and has checked everything."""
        parent, date = repo.refs.get(ref), self.now()
        listing = json.dumps([repo.repo_id, parent, title, date.isoformat(), {n: e.oid for n, e in tree.items()}])
        oid = git_hash("commit", listing.encode())
        repo.commits[oid] = Commit(oid, parent, MappingProxyType(dict(tree)), title, message, author, date)
        repo.refs[ref] = oid
        return repo.commits[oid]

    def apply(self, repo: Repo, tree: Mapping[str, Entry], operations: Iterable[tuple[str, dict]]) -> dict[str, Entry]:
        """The tree after the operations of a commit, each a pair of key and value. Raises Refused; changes nothing."""
        new = dict(tree)
        for key, value in operations:
            path = _checked_path(value.get("path"))
            if key == "file":
                new[path] = Entry(len(value["content"]), value["content"])
            elif key == "lfsFile":
                if value.get("oid") not in repo.objects:
                    raise Refused(400, f"the large object of {path} was not uploaded to {repo.repo_id}")
                new[path] = Entry(self.object_size(value["oid"]), sha256=value["oid"])
            elif key == "deletedFile":
                if new.pop(path, None) is None:
                    raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
            elif key == "deletedFolder":
                inside = [name for name in new if name.startswith(f"{path}/")]
                if not inside:
                    raise Refused(404, "A folder with this name doesn't exist", "EntryNotFound")
                for name in inside:
                    del new[name]
            else:
                raise Refused(400, f"unknown operation {key}")
        files = set(new)
        for name in new:
            parts = name.split("/")
            if any("/".join(parts[:depth]) in files for depth in range(1, len(parts))):
                raise Refused(400, f"{name} lies below a file")
        return new

    def merge(self, repo: Repo, pull: Discussion, author: str) -> Commit:
        """Bring a pull request's changes to the main branch. Raises Refused on a conflict."""
        if pull.status != "open" or pull.base is None:
            raise Refused(400, f"discussion {pull.num} cannot be merged: {pull.status}")
        base, theirs = repo.commits[pull.base].tree, repo.commit(f"refs/pr/{pull.num}").tree
        merged = dict(repo.head.tree)
        for path in sorted(set(base) | set(theirs)):
            if base.get(path) == theirs.get(path):
                continue
            if merged.get(path) not in (base.get(path), theirs.get(path)):
                raise Refused(409, f"{path} changed on both sides")
            if path in theirs:
                merged[path] = theirs[path]
            else:
                merged.pop(path, None)
        commit = self.add_commit(repo, MAIN, merged, f"{pull.title} (#{pull.num})", "", author)
        pull.status, pull.merged = "merged", commit.oid
        return commit


def _checked_path(path: object) -> str:
    if not isinstance(path, str):
        raise Refused(400, "an operation without a path")
    stripped = path.rstrip("/")
    if not stripped or any(part in ("", ".", "..", ".git") for part in stripped.split("/")):
        raise Refused(400, f"not a path in a repository: {path}")
    return stripped

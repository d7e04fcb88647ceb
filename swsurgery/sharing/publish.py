"""Publish a patched checkpoint: check it, plan, make one commit, and read the result back.

    check_gate         see gate.py: verify, the sanity check, secrets           -> accepted findings, or an error
    make_publication   see plan_checkpoint.py and plan_patch.py                 -> a plan that can be shown first
    publish            one commit on top of the parent in the plan              -> the published state
    compare_published  see read_back.py: what the Hub serves                    -> findings

The commit is one request, and readers of the repository see nothing before it. If the work is interrupted, the
repository has either the old files or the new ones, and the same call finishes the work.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, overload

from swsurgery.checkpoint.opening import held
from swsurgery.errors import (
    CheckpointError,
    HubError,
    HubUnreachable,
    Interrupted,
)
from swsurgery.hub import Uri, fetch, parse_directory
from swsurgery.hub import commit as hub
from swsurgery.hub.commit import Branch, Conflict, Copy, CopyRefused, Draft, Sent
from swsurgery.hub.remote import open_tree
from swsurgery.progress import Progress, Reporter, require_reporter
from swsurgery.sharing.commit_text import describe_edits
from swsurgery.sharing.gate import check_gate, find_early, refuse_secrets
from swsurgery.sharing.plan_checkpoint import make_publication
from swsurgery.sharing.publication import Item, Publication, Wish, is_published
from swsurgery.sharing.read_back import compare_published
from swsurgery.storage.arguments import require_location, require_strings, require_type
from swsurgery.storage.files import File, LocalFile
from swsurgery.storage.folder import Entry
from swsurgery.storage.result import TableResult
from swsurgery.verifying.findings import Finding


@dataclass(frozen=True, repr=False)
class Published(TableResult):
    """Result of `publish`: the commit, and what was read back from the Hub.

    `already` is True if an earlier run had published everything. `uploaded`, `copied` and `read` are numbers of bytes;
    `files` and `scalars` are the numbers of files and edited scalars that were then compared with `plan`.
    `findings` report the differences.
    """

    plan: Publication = field(repr=False)
    repo_id: str
    commit: str
    pull_request: int | None
    already: bool
    uploaded: int
    copied: int
    read: int
    files: int
    scalars: int
    tag: str | None
    findings: tuple[Finding, ...]

    @property
    def url(self) -> str:
        """Address of the web page of the commit or the pull request."""
        page = f"discussions/{self.pull_request}" if self.pull_request else f"tree/{self.commit}"
        return f"{hub.get_endpoint()}/{self.repo_id}/{page}"

    def to_json(self) -> dict[str, Any]:
        """Return the document that `publish --json` prints."""
        published = {
            "repo_id": self.repo_id,
            "commit": self.commit,
            "pull_request": self.pull_request,
            "url": self.url,
            "already_published": self.already,
            "tag": self.tag,
            "bytes": {"uploaded": self.uploaded, "copied": self.copied, "read_back": self.read},
            "verified": {"files": self.files, "scalars": self.scalars},
            "findings": [f.to_json() for f in self.findings],
        }
        return {"plan": self.plan.to_json(), "published": published}

    def to_rows(self) -> list[dict[str, object]]:
        """Return one row per file of the plan: its name, how it was published, its size in bytes, and why."""
        return self.plan.to_rows()


@dataclass(frozen=True, repr=False)
class Proposal(TableResult):
    """Result of a dry run: the plan, and the findings that prevent publishing if they are not accepted."""

    plan: Publication
    findings: tuple[Finding, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the document that `publish --dry-run --json` prints."""
        return {"plan": self.plan.to_json(), "findings": [f.to_json() for f in self.findings]}

    def to_rows(self) -> list[dict[str, object]]:
        """Return one row per file of the plan: its name, how it is published, its size in bytes, and why."""
        return self.plan.to_rows()


@overload
def publish(
    checkpoint: str | Path,
    repo_id: str,
    *,
    patch: bool = False,
    private: bool = False,
    create_pr: bool = False,
    dry_run: Literal[False] = False,
    accept: Sequence[str] = (),
    revision: str = "main",
    tag: str | None = None,
    message: str | None = None,
    confirm: Callable[[Publication], None] = lambda plan: None,
    bars: bool = False,
    reporter: Reporter | None = None,
) -> Published: ...


@overload
def publish(
    checkpoint: str | Path,
    repo_id: str,
    *,
    patch: bool = False,
    private: bool = False,
    create_pr: bool = False,
    dry_run: bool,
    accept: Sequence[str] = (),
    revision: str = "main",
    tag: str | None = None,
    message: str | None = None,
    confirm: Callable[[Publication], None] = lambda plan: None,
    bars: bool = False,
    reporter: Reporter | None = None,
) -> Published | Proposal: ...


def publish(
    checkpoint: str | Path,
    repo_id: str,
    *,
    patch: bool = False,
    private: bool = False,
    create_pr: bool = False,
    dry_run: bool = False,
    accept: Sequence[str] = (),
    revision: str = "main",
    tag: str | None = None,
    message: str | None = None,
    confirm: Callable[[Publication], None] = lambda plan: None,
    bars: bool = False,
    reporter: Reporter | None = None,
) -> Published | Proposal:
    """Publish a patched checkpoint on the Hub in one commit that uploads only the changed files.

    `checkpoint` is a directory, and `repo_id` is ORG/NAME. With `patch`, only the edits are published, and no weights.
    A repository that does not exist is created, `private` if requested; `create_pr` opens a pull request instead of
    committing to the branch `revision`. `accept` lists the rules whose findings do not forbid publishing. By default,
    `tag` is named after the base's commit, and `message` summarises the edits.

    `confirm` is called with the plan before anything is sent, and can raise an exception to stop. By default, nobody is
    asked. With `dry_run`, nothing is sent and a Proposal is returned; if the Hub does not answer, its plan is made from
    the directory and its record alone. `bars` lets the Hub's client draw its own progress bars. If the work is
    interrupted, the same call finishes it.

    Raises TypeError, CheckpointError, HubError; CheckFailed, which lists the findings that are not accepted.
    """
    reporter = require_reporter(reporter)
    root = parse_directory(require_location("checkpoint", checkpoint))
    require_type("repo_id", repo_id, str)
    require_strings("accept", accept)
    for name, value in (("patch", patch), ("private", private), ("create_pr", create_pr), ("dry_run", dry_run)):
        require_type(name, value, bool)
    require_type("revision", revision, str)
    require_type("tag", tag, str, optional=True)
    require_type("message", message, str, optional=True)
    wish = Wish(repo_id, private, create_pr, revision, tag, message)
    early = find_early(root)
    if dry_run:
        return Proposal(_propose(root, wish, patch, reporter), tuple(early))
    accepted = check_gate(root, accept, early, reporter)
    plan = _make_plan(root, wish, accepted, patch, True, reporter)
    confirm(plan)
    return _carry_out(plan, bars, reporter)


def _propose(root: Path, wish: Wish, patch: bool, progress: Progress) -> Publication:
    """Plan without hashing. If the Hub does not answer, the plan is made from the directory and its record alone."""
    try:
        return _make_plan(root, wish, (), patch, False, progress)
    except HubUnreachable as error:
        plan = _make_plan(root, wish, (), patch, False, progress, offline=True)
        fault = error.faults[0]
        note = f"{fault.what}, so the plan does not consider what the repositories contain ({fault.remedy})"
        return replace(plan, notes=(note, *plan.notes))


def _make_plan(
    root: Path,
    wish: Wish,
    accepted: Sequence[Finding],
    patch: bool,
    hashing: bool,
    progress: Progress,
    *,
    offline: bool = False,
) -> Publication:
    if patch:
        from swsurgery.sharing.plan_patch import make_patch_publication

        return make_patch_publication(root, wish, accepted, progress, offline=offline)
    return make_publication(root, wish, accepted, progress, hashing=hashing, offline=offline)


def _carry_out(plan: Publication, bars: bool, reporter: Reporter) -> Published:
    """Carry out the plan. Files that the Hub refuses to copy are uploaded, and `reporter` prints their names.

    Raises CheckpointError if a file changed since it was planned, Conflict if the branch changed, HubError, and
    Interrupted.
    """
    try:
        refuse_secrets(plan)
        sent, uploaded, copied = _find_earlier_commit(plan), 0, 0
        already = sent is not None
        if sent is None:
            with held(plan.root), hub.show_bars(bars):
                sent, uploaded, copied = _send(plan, reporter.say)
        if plan.tag and not (plan.target and plan.tag in plan.target.tags):
            hub.create_tag(plan.wish.repo_id, plan.tag, sent.commit)
        findings, listing, scalars = compare_published(plan, sent, reporter)
    except Interrupted as error:
        raise error.replace_left(
            "the repository is either unchanged or has the whole commit; run the same command again"
        ) from None
    return Published(
        plan,
        plan.wish.repo_id,
        sent.commit,
        sent.pull_request,
        already,
        uploaded,
        copied,
        listing.traffic.bytes,
        sum(item.how != "delete" for item in plan.items),
        scalars,
        plan.tag,
        tuple(findings),
    )


def _find_earlier_commit(plan: Publication) -> Sent | None:
    """Return the commit of an earlier run that published everything, or None."""
    if plan.pull_request is not None:
        return Sent(open_tree(plan.wish.repo_id, f"refs/pr/{plan.pull_request}").commit, plan.pull_request)
    if plan.target and plan.target.branch_is_there and not plan.changes:
        return Sent(plan.target.head.commit, None)
    return None


def _send(plan: Publication, say: Callable[[str], None]) -> tuple[Sent, int, int]:
    """Make the commit. Returns it, and the numbers of bytes uploaded and copied."""
    target = _prepare_target(plan)
    _refuse_public(plan)  # checked before the upload too, which may take hours
    draft = Draft(plan.wish.repo_id, plan.wish.branch, target.head.commit, plan.wish.create_pr)
    items = {item.name: item for item in plan.items}
    uploads = [item for item in plan.items if item.how == "upload"]
    while True:
        _upload(draft, plan, uploads, say)
        copies = [
            Copy(name, item.source or name, item.sha256 or "") for name, item in items.items() if item.how == "copy"
        ]
        gone = [name for name, item in items.items() if item.how == "delete"]
        _refuse_public(plan)
        try:
            sent = draft.send(copies, plan.base, gone, plan.message, describe_edits(plan.record, plan.accepted))
        except CopyRefused as error:
            say(f"the Hub did not copy {', '.join(error.names)} from {plan.base}: uploading instead")
            uploads = [replace(items[name], how="upload") for name in error.names]
            items |= {item.name: item for item in uploads}
        except Conflict:
            now = None if plan.wish.create_pr else hub.find_branch(plan.wish.repo_id, plan.wish.branch)
            if now is None or not is_published(plan, now.head):
                raise
            sent = Sent(now.head.commit, None)  # the commit was made, and only the Hub's answer was lost
            break
        else:
            break
    sizes = {how: sum(item.size for item in items.values() if item.how == how) for how in ("upload", "copy")}
    return sent, sizes["upload"], sizes["copy"]


def _refuse_public(plan: Publication) -> None:
    """Raise HubError if the repository is public although the plan requires a private one.

    The Hub does not check this when it makes a commit. A change between this request and the commit is reported only
    afterwards, by `compare_published`.
    """
    if plan.private and not hub.is_private(plan.wish.repo_id):
        remedy = "make it private in its settings, then run the same command again"
        raise HubError("the repository has become public, and nothing was committed", plan.wish.repo_id, remedy)


def _prepare_target(plan: Publication) -> Branch:
    """Create the repository and the branch if they do not exist.

    Raises Conflict if somebody else created the repository in the meantime.
    """
    wish, target = plan.wish, plan.target
    if target is None:
        hub.create_repository(wish.repo_id, wish.private)
        target = hub.find_branch(wish.repo_id, wish.branch)
        if target is None:
            raise HubError("the repository was created but cannot be read", wish.repo_id, "run the same command again")
        if target.head.private != wish.private or set(target.head.files) - {".gitattributes"}:
            raise Conflict(
                "somebody else created the repository at the same time", wish.repo_id, "run the same command again"
            )
    if not target.branch_is_there and not wish.create_pr:
        hub.create_branch(wish.repo_id, wish.branch, target.head.commit)
    return target


def _upload(draft: Draft, plan: Publication, items: Collection[Item], say: Callable[[str], None]) -> None:
    """Upload the contents of `items` for the commit. A file that is only in the base is first downloaded.

    Raises CheckpointError if a file changed since it was planned.
    """
    absent = {item.name: item.source or item.name for item in items if item.content is None}
    contents = {item.name: _check_content(item.content) for item in items if item.content is not None}
    if absent:
        assert plan.base is not None, "only the base has what is not in the directory"
        say(f"downloading {', '.join(absent)} from {plan.base}, to upload it")
        folder = fetch(Uri(plan.base.repo_id, plan.base.commit, ""), list(absent.values()))
        contents |= {name: (folder / path).resolve() for name, path in absent.items()}
    if not contents:
        return
    wanted = {item.name: item.sha256 for item in items}
    for name, sha256 in draft.add(contents).items():
        if sha256 != wanted[name]:
            remedy = "nothing was committed; run the same command again"
            raise CheckpointError("the file changed while it was being published", plan.root / name, remedy)


def _check_content(content: File | bytes) -> Path | bytes:
    """Return the path or the bytes to upload. Raises CheckpointError if the path now belongs to another file.

    The check is needed because the library opens the file by its path.
    """
    if isinstance(content, bytes):
        return content
    assert isinstance(content, LocalFile) and isinstance(content.where, Entry), "other files are downloaded first"
    content.where.refuse_replaced()
    return content.where.path

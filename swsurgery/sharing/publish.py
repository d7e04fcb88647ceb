"""Publishing a patched checkpoint, on one page: the gate, the plan, one commit, and reading it back.

    gate               what `verify` finds, what the check says, secrets   -> accepted findings, or no
    make_publication   see publish_plan.py, publish_patch.py              -> a plan that can be shown first
    publish            one commit on top of the parent that the plan saw   -> what is there now, re-read

Until the commit no reader of the repository sees anything of it, and the commit is one request: whatever cuts the
work off, the repository shows the old state or the new one, and the same call goes on from there.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from swsurgery.checkpoint.listing import LEFT_OUT
from swsurgery.checkpoint.record import REGISTRY_NAME, Registry, read_patched
from swsurgery.errors import CheckFailed, CheckpointError, HubError, Interrupted, ShardError, SwsurgeryError, printable
from swsurgery.hub import Uri, fetch
from swsurgery.hub import commit as hub
from swsurgery.hub.commit import Conflict, Copy, CopyRefused, Draft, Listing, Sent, Target
from swsurgery.hub.remote import RemoteFile
from swsurgery.progress import Progress, Silent
from swsurgery.sharing import card
from swsurgery.sharing.plan_checkpoint import SMALL, make_publication
from swsurgery.sharing.publication import Item, Publication, Wish, is_published, lines
from swsurgery.storage.files import Place
from swsurgery.storage.folder import Entry
from swsurgery.storage.shard import open_shard
from swsurgery.verifying.findings import RULES, Finding
from swsurgery.verifying.verify import Question, prove

__all__ = [
    "Publication",
    "Published",
    "Wish",
    "early_findings",
    "gate",
    "lines",
    "make_publication",
    "publish",
    "refused",
    "secrets",
]

TOKEN = re.compile(rb"hf_(?:jwt_|oauth_)?[A-Za-z0-9]{20,}")
"""What a token of the Hub looks like in a file; shorter strings of this kind are words of program code."""


@dataclass(frozen=True)
class Published:
    """What is there now. `already` where nothing was left to do; `findings` say what differs from the plan."""

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
        """Its page."""
        page = f"discussions/{self.pull_request}" if self.pull_request else f"tree/{self.commit}"
        return f"{hub.endpoint()}/{self.repo_id}/{page}"

    def to_json(self) -> dict[str, Any]:
        return {
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


def early_findings(root: Path) -> list[Finding]:
    """What stands in the way and needs no reading of weights: the check, and secrets in small files.

    Raises CheckpointError where the directory has no registry.
    """
    patched = read_patched(root)
    if patched is None:
        raise CheckpointError("no registry", root / REGISTRY_NAME, "only a checkpoint that swsurgery patched has one")
    findings = _check_findings(patched.registry)
    names = (path.relative_to(root) for path in sorted(root.rglob("*")) if path.is_file())
    small = (name for name in names if name.parts[0] not in LEFT_OUT and (root / name).stat().st_size <= SMALL)
    return findings + secrets((name.as_posix(), (root / name).read_bytes()) for name in small)


def _check_findings(registry: Registry) -> list[Finding]:
    check = registry.check
    if check.get("kind") == "forward":
        failures = check.get("failures")
        if check.get("ok") is True and not failures:
            return []
        said = "; ".join(map(str, failures)) if isinstance(failures, list) and failures else "the check says no"
        return [Finding("check-failed", said, REGISTRY_NAME)]
    if not registry.edits:
        return []
    reason = check.get("reason")
    why = f" ({reason})" if isinstance(reason, str) else ""
    return [Finding("check-missing", f"the edited model was never run{why}", REGISTRY_NAME)]


def secrets(files: Iterable[tuple[str, bytes]]) -> list[Finding]:
    """Files (name, content) that hold a token. The findings do not repeat it."""
    return [
        Finding("secret", "it holds what looks like a token of the Hub", name)
        for name, data in files
        if TOKEN.search(data) or hub.holds_token(data)
    ]


def gate(root: Path, accept: Collection[str], progress: Progress | None = None) -> list[Finding]:
    """Everything that speaks against publishing the directory, if `accept` names the rule of each.

    Further copies of the weights are no finding here, for they are left out. Raises CheckFailed with those that were
    not accepted, SwsurgeryError for a rule that does not exist, CheckpointError.
    """
    if unknown := sorted(set(accept) - set(RULES)):
        raise SwsurgeryError("there is no such finding to accept", ", ".join(unknown), "verify names them")
    findings = early_findings(root)
    findings += prove(root, Question(), progress or Silent()).findings
    findings = [f for f in findings if f.rule != "duplicate-weights"]
    if any(f.rule not in accept for f in findings):
        raise refused([f for f in findings if f.rule not in accept])
    return findings


def refused(findings: Iterable[Finding]) -> SwsurgeryError:
    """The error that lists findings, exit 1."""
    faults = [f"not published: {f.rule}: {f.file or f.tensor or '-'}: {f.message}" for f in findings]
    return CheckFailed.of([*faults, "not published: --accept NAME accepts findings, and the card will say so"])


def publish(
    plan: Publication,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
    *,
    bars: bool = False,
) -> Published:
    """Carry the plan out. What the Hub refuses to copy is uploaded, and said. `bars` lets the client draw its own.

    Raises CheckpointError where a file changed since it was planned, Conflict where the branch did, HubError, and
    Interrupted; then nothing of it shows, and the same call with a new plan finishes the job.
    """
    try:
        _refuse_secrets(plan)
        sent, uploaded, copied = _sent_already(plan), 0, 0
        already = sent is not None
        if sent is None:
            with hub.drawing(bars):
                sent, uploaded, copied = _send(plan, say)
        if plan.tag and not (plan.target and plan.tag in plan.target.tags):
            hub.tag(plan.wish.repo_id, plan.tag, sent.commit)
        findings, listing, scalars = _read_back(plan, sent, progress or Silent())
    except Interrupted as error:
        raise error.leaving("the repository is as it was or all new; run the same command again") from None
    return Published(
        plan.wish.repo_id, sent.commit, sent.pull_request, already, uploaded, copied, listing.traffic.bytes,
        sum(item.how != "delete" for item in plan.items), scalars, plan.tag, tuple(findings),
    )  # fmt: skip


def _refuse_secrets(plan: Publication) -> None:
    """What is written here, and the base's card in it, was in no file when the gate looked."""
    made = [(item.name, item.content) for item in plan.items if isinstance(item.content, bytes)]
    found = secrets([("the commit's message", plan.message.encode()), *made])
    if found and not any(f.rule == "secret" for f in plan.accepted):
        raise refused(found)


def _sent_already(plan: Publication) -> Sent | None:
    """What an earlier run left finished."""
    if plan.pull_request is not None:
        return Sent(hub.listing(plan.wish.repo_id, f"refs/pr/{plan.pull_request}").commit, plan.pull_request)
    if plan.target and plan.target.branch_is_there and not plan.changes:
        return Sent(plan.target.head.commit, None)
    return None


def _send(plan: Publication, say: Callable[[str], None]) -> tuple[Sent, int, int]:
    """The commit, and the bytes that were uploaded and copied."""
    target = _made(plan)
    _refuse_public(plan)  # an upload may take hours
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
            sent = draft.send(copies, plan.base, gone, plan.message, card.describe(plan.registry, plan.accepted))
        except CopyRefused as error:
            say(f"the Hub does not copy {', '.join(error.names)} from {plan.base}: uploading instead")
            uploads = [replace(items[name], how="upload") for name in error.names]
            items |= {item.name: item for item in uploads}
        except Conflict:
            now = None if plan.wish.create_pr else hub.look(plan.wish.repo_id, plan.wish.branch)
            if now is None or not is_published(plan, now.head):
                raise
            sent = Sent(now.head.commit, None)  # it was this commit: only the answer had been lost
            break
        else:
            break
    sizes = {how: sum(item.size for item in items.values() if item.how == how) for how in ("upload", "copy")}
    return sent, sizes["upload"], sizes["copy"]


def _refuse_public(plan: Publication) -> None:
    """Raise HubError if the repository was to be private, by the option or when the plan was made, and is public.

    The Hub makes a commit without looking at this, so a change between this request and the commit is noticed only
    afterwards, by `_read_back`.
    """
    if plan.private and not hub.is_private(plan.wish.repo_id):
        raise HubError("the repository has become public, and nothing was committed", plan.wish.repo_id,
                       "make it private in its settings, then run the same command again")  # fmt: skip


def _made(plan: Publication) -> Target:
    """The repository and the branch, made where they are not there yet, as long as nobody else fills them."""
    wish, target = plan.wish, plan.target
    if target is None:
        hub.create(wish.repo_id, wish.private)
        target = hub.look(wish.repo_id, wish.branch)
        if target is None:
            raise HubError("the repository was made and cannot be seen", wish.repo_id, "run the same command again")
        if target.head.private != wish.private or set(target.head.files) - {".gitattributes"}:
            raise Conflict("somebody else made it meanwhile", wish.repo_id, "run the same command again")
    if not target.branch_is_there and not wish.create_pr:
        hub.create_branch(wish.repo_id, wish.branch, target.head.commit)
    return target


def _upload(draft: Draft, plan: Publication, items: Collection[Item], say: Callable[[str], None]) -> None:
    """Give contents to the draft; what is not in the directory is fetched from the base first."""
    absent = {item.name: item.source or item.name for item in items if item.content is None}
    contents = {item.name: _to_send(item.content) for item in items if item.content is not None}
    if absent:
        assert plan.base is not None, "only the base has what is not in the directory"
        say(f"fetching {', '.join(absent)} from {plan.base}, to upload it")
        folder = fetch(Uri(plan.base.repo_id, plan.base.commit, ""), list(absent.values()))
        contents |= {name: (folder / path).resolve() for name, path in absent.items()}
    if not contents:
        return
    wanted = {item.name: item.sha256 for item in items}
    for name, sha256 in draft.add(contents).items():
        if sha256 != wanted[name]:
            raise CheckpointError("changed while it was being published", plan.root / name,
                                  "nothing was committed; run the same command again")  # fmt: skip


def _to_send(content: Place | bytes) -> Path | bytes:
    """The library opens what it sends by its path, so what the path means is compared once more. Raises
    CheckpointError."""
    if isinstance(content, Entry):
        content.refuse_replaced()
        return content.path
    assert isinstance(content, Path | bytes), "what is elsewhere is fetched first"
    return content


def _read_back(plan: Publication, sent: Sent, progress: Progress) -> tuple[list[Finding], Listing, int]:
    """Hold the new revision, as the Hub lists and serves it, against the plan; returns also how many scalars."""
    listing = hub.listing(plan.wish.repo_id, sent.commit)
    findings, scalars = [], 0
    if plan.private and not listing.private:
        findings.append(Finding("public", "the repository has become public, so anybody may have read what was "
                                "published: make it private in its settings, or delete it"))  # fmt: skip
    for item in plan.items:
        findings += _differences(item, listing)
        if isinstance(item.content, bytes) and item.name in listing.files:
            data = listing.files[item.name].pread(listing.files[item.name].size, 0)
            if data != item.content:
                findings.append(Finding("digest", "the Hub serves other bytes than were published", item.name))
    shards = {}
    edits = [e for e in plan.registry.edits if e.file in listing.files]
    progress.start(len(edits), "scalar", "reading back")
    try:
        for edit in edits:
            try:
                if edit.file not in shards:
                    shards[edit.file] = open_shard(listing.files[edit.file])
                stored = shards[edit.file].read_scalar(edit.tensor, edit.index)
            except (ShardError, KeyError, IndexError):
                found = "a shard without it"
            else:
                found = "" if stored == edit.new_bytes else f"0x{stored[::-1].hex()}"
            if found:
                what = f"the Hub serves {found}, not {edit.new_bits}"
                findings.append(Finding("edit-changed", what, edit.file, edit.tensor, edit.index))
            scalars += 1
            progress.advance(1)
    finally:
        progress.close()
    return findings, listing, scalars


def _differences(item: Item, listing: Listing) -> list[Finding]:
    there = listing.files.get(item.name)
    if item.how == "delete":
        return [Finding("file-undeclared", "it is still there", item.name)] if there else []
    if there is None:
        return [Finding("file-missing", "it was published and is not there", item.name)]
    if item.is_in(listing) or there.sha256 is None and item.blob is None and _remote_sha256(there) == item.sha256:
        return []
    return [Finding("digest", f"the Hub has other bytes than {printable(item.sha256 or '?')}", item.name)]


def _remote_sha256(file: RemoteFile) -> str:
    """Of a file that git holds itself and that was never on this machine."""
    digest = hashlib.sha256()
    for offset in range(0, file.size, SMALL):
        digest.update(file.pread(SMALL, offset))
    return digest.hexdigest()

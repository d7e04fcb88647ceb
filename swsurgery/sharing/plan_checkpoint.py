"""Plan the publication of a checkpoint: for each file, whether it is copied on the Hub, uploaded, kept or deleted.

Reads the directory and the listings of the base and of the target, and writes nothing. A file is copied if its sha256
is the one that the Hub lists for the base's file. All other files are uploaded from the directory.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.listing import LEFT_OUT
from swsurgery.checkpoint.opening import held, read_checkpoint
from swsurgery.checkpoint.projections import find_short_form
from swsurgery.checkpoint.record import RECORD_NAME, Patched, Record, find_record, read_record
from swsurgery.checkpoint.record_entries import FileRecord
from swsurgery.errors import ArchitectureError, CheckpointError, HubError, list_some
from swsurgery.hub.cards import read as read_card
from swsurgery.hub.cards import render as render_card
from swsurgery.hub.commit import Branch, find_branch, open_pull_requests, open_visible_tree
from swsurgery.hub.remote import RemoteFile, RemoteTree, open_tree
from swsurgery.progress import Progress
from swsurgery.sharing.card import MAX_CARD, render_body
from swsurgery.sharing.card_fields import FIELDS, list_omitted_fields, make_fields
from swsurgery.sharing.card_tables import ShortForm
from swsurgery.sharing.commit_text import summarise_edits
from swsurgery.sharing.page import draw_record
from swsurgery.sharing.publication import Item, Publication, Wish, is_published
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.files import BaseFile, File, read_at_most, read_exactly
from swsurgery.storage.ggml import BlockDtype
from swsurgery.storage.hashing import hash_file
from swsurgery.storage.names import CARD_NAME, FIGURE_NAME, OWN_FILES, SIGNATURE_NAME, is_undo_name
from swsurgery.verifying.findings import Finding

SMALL_FILE = 16 << 20
"""Maximum size in bytes of a file whose contents are read into memory while planning.

No file that the Hub stores in git itself, without LFS, is larger.
"""


MAX_IN_GIT = 10 << 20
"""Size in bytes above which the Hub does not accept a file in git itself, so that it can copy the file."""


UNDO = "the old bytes of the edits"
"""Reason for publishing the undo file."""


def make_publication(
    root: Path,
    wish: Wish,
    findings: Sequence[Finding],
    progress: Progress,
    *,
    hashing: bool = True,
    offline: bool = False,
) -> Publication:
    """Plan the publication of the patched checkpoint in `root`.

    `findings` are the accepted findings. If a finding concerns a file, the record's digest of the file is not trusted.
    If `hashing` is False, a large file whose digest is unknown is assumed to equal the base's file of the same name and
    size. With `offline`, the Hub is not asked: what is copied on the Hub is decided from the record alone.

    Raises HubError, and CheckpointError if the directory is not a patched checkpoint.
    """
    with held(root) as entered:
        patched = read_record(entered)
        record = patched.record
        notes: list[str] = []
        checkpoint = read_checkpoint(entered, record.base, elsewhere=record.elsewhere, gguf=True)
        base, target = (None, None) if offline else (list_base(record), find_target(wish))
        if base is None and not offline:
            named = record.base.repo_id or "the base, which the record does not name,"
            notes.append(f"{named} is not visible on this Hub, so nothing is copied from it")
        elif base and base.private and not (target.head.private if target else wish.private):
            notes.append(f"{base.repo_id} is private, but the files copied from it will be public")
        left_out = _list_left_out(checkpoint, record)
        distrusted = {f.file for f in findings}
        planner = FilePlanner(checkpoint, record, base, target, distrusted, hashing, progress, offline)
        names = [n for n in record.files if n not in left_out and (n in planner.there or n in record.elsewhere)]
        names += [n for n in planner.there if n not in record.files and n not in left_out and n not in OWN_FILES]
        items = [planner.plan_item(name) for name in sorted(names)]
        notes += list_loader_notes(names)
        published = _make_record(record, items, base)
        records = Patched(published, published.render(), patched.manifest_raw)
        text = read_base_card(planner, record, base)
        base_fields, base_text = read_card(text, FIELDS)
        notes += list_card_notes(list_omitted_fields(base_fields))
        figure = draw_record(published)
        body = render_body(
            published,
            wish.repo_id,
            patched.manifest_raw,
            base_text,
            findings,
            find_short_forms(checkpoint, record),
            figure is not None,
        )
        own = records.render_own_files() | {CARD_NAME: render_card(make_fields(published, base_fields), body)}
        own |= {FIGURE_NAME: figure} if figure else {}
        items += [planner.plan_own(name, data) for name, data in own.items()]
    message = wish.message or summarise_edits(record)
    plan = assemble(root, wish, published, items, left_out, notes, findings, base, target, message)
    _refuse_second_set(plan)
    return replace(plan, offline=offline)


def _refuse_second_set(plan: Publication) -> None:
    """Raise HubError if the repository would contain both model.safetensors and an index of shards.

    Some loaders would then load the edited weights, and others the weights that were already in the repository.
    """
    sets = {"model.safetensors", "model.safetensors.index.json"}
    there = set(plan.target.head.files) if plan.target else set()
    ours = sets & {item.name for item in plan.items if item.how != "delete"}
    theirs = sorted(sets & there - {item.name for item in plan.items})
    if ours and theirs:
        what = f"the repository contains other weights, which some loaders would load instead ({theirs[0]})"
        raise HubError(what, plan.wish.repo_id, "delete them, or publish to another repository")


def assemble(
    root: Path,
    wish: Wish,
    record: Record,
    items: Sequence[Item],
    left_out: Mapping[str, str],
    notes: Sequence[str],
    findings: Sequence[Finding],
    base: RemoteTree | None,
    target: Branch | None,
    message: str,
) -> Publication:
    """Build the plan from the files to publish. Adds the files to delete and the tag.

    Also adds the number of an open pull request that already has exactly these files, if a pull request was requested.
    """
    gone, said = _find_obsolete(target, {item.name for item in items})
    notes = [*notes, *said]
    tag = _choose_tag(wish, record, base, target, notes)
    plan = Publication(
        root,
        wish,
        record,
        tuple(sorted([*items, *gone], key=lambda i: i.name)),
        left_out,
        tuple(notes),
        tuple(findings),
        base,
        target,
        tag,
        message,
    )
    return replace(plan, pull_request=_find_pull_request(plan)) if wish.create_pr and target else plan


def list_base(record: Record) -> RemoteTree | None:
    """List the files of the base's repository at its commit.

    Returns None if the record names no repository, or if the repository is not visible on this Hub. Raises HubError.
    """
    named = record.base
    return open_visible_tree(named.repo_id, named.revision) if named.repo_id else None


def find_target(wish: Wish) -> Branch | None:
    """Find the branch to commit to. Returns None if the repository does not exist yet.

    Raises HubError if the repository is public although a private one was requested.
    """
    target = find_branch(wish.repo_id, wish.branch)
    if target and wish.private and not target.head.private:
        raise HubError(
            "--private was given, but the repository is public",
            wish.repo_id,
            "make it private in its settings, or leave out --private",
        )
    return target


def join_base_path(record: Record, name: str) -> str:
    """Return the path of a file in the base's repository. The base may be a folder of this repository."""
    return f"{record.base.sub}/{name}" if record.base.sub else name


def _list_left_out(checkpoint: Checkpoint, record: Record) -> dict[str, str]:
    """Return (name -> reason) of the files that are not published."""
    left = dict.fromkeys(checkpoint.left_out, "belongs to the tool that downloaded it, not to the checkpoint")
    left |= dict.fromkeys(checkpoint.copies, "is another copy of the weights, which was not edited")
    for file in checkpoint.files:
        if set(file.name.split("/")) & set(LEFT_OUT):
            left[file.name] = "is in a folder that the Hub does not accept"
    names = {f.name for f in checkpoint.files} | set(record.files)
    for name, why in (
        (SIGNATURE_NAME, "signs the local directory, whose card and record are not the published ones"),
        (CARD_NAME, "is replaced by the new card, which quotes it"),
        (FIGURE_NAME, "shows the edit of the base"),
    ):
        if name in names:
            left[name] = why
    left |= {name: "was left out when the manifest was applied" for name in record.omitted if name not in left}
    return dict(sorted(left.items()))


class FilePlanner:
    """Decides for each file how it gets into the repository."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        record: Record,
        base: RemoteTree | None,
        target: Branch | None,
        distrusted: set[str | None],
        hashing: bool,
        progress: Progress,
        offline: bool = False,
    ):
        self.there = {f.name: f for f in checkpoint.files}
        self.edited = {e.file for e in record.edits} | {c.file for c in record.changes}
        self.record, self.base, self.target = record, base, target
        self.distrusted, self.hashing, self.progress, self.offline = distrusted, hashing, progress, offline
        self.by_digest = {f.sha256: f for f in base.files.values() if f.sha256} if base else {}

    def plan_item(self, name: str) -> Item:
        """Plan a file of the checkpoint. Raises CheckpointError if it is neither in the directory nor in the base."""
        file = self.there.get(name)
        if file is None:
            return self._plan_elsewhere(name, self.record.files[name])
        if file.size <= SMALL_FILE:
            found = _make_item(name, read_exactly(file.source, file.size, 0), file.source)
        else:
            found = Item(name, "upload", file.size, "", self._get_digest(file), None, file.source)
        why = UNDO if name == self.record.undo_name else "edited" if name in self.edited else ""
        return self._decide(found, why)

    def plan_own(self, name: str, data: bytes) -> Item:
        """Plan a file that swsurgery makes for the repository, such as the card, with the content `data`."""
        return self._decide(_make_item(name, data, data), "made for this repository")

    def _find_in_base(self, name: str, sha256: str | None) -> RemoteFile | None:
        """Return the base's file with this sha256, or else the base's file with this name, or else None."""
        return self.by_digest.get(sha256 or "") or (
            self.base.files.get(join_base_path(self.record, name)) if self.base else None
        )

    def _plan_elsewhere(self, name: str, record: FileRecord) -> Item:
        """Plan a file that is only in the base's repository. Raises CheckpointError if the file is not there."""
        if self.offline:
            return Item(name, "copy", record.size, "only in the base's repository", record.sha256)
        theirs = self._find_in_base(name, record.sha256)
        if theirs is None or theirs.size != record.size or (theirs.sha256 or record.sha256) != record.sha256:
            what = "the file is neither in the directory nor in the base's repository"
            raise CheckpointError(what, name, "apply the manifest again without --for-publish")
        blob = self.base.blobs.get(theirs.path) if self.base else None
        return self._decide(Item(name, "upload", theirs.size, "", record.sha256, blob), "downloaded first")

    def _decide(self, item: Item, why: str) -> Item:
        theirs = self._find_in_base(item.name, item.sha256)
        if theirs is not None:
            item = replace(item, source=theirs.path)
        if self.target and item.is_in(self.target.head):
            return replace(item, how="keep", why="already in the repository")
        if why in ("edited", UNDO, "made for this repository"):
            return replace(item, why=why)
        aside = f", {why}" if why else ""
        if self.offline:
            return self._decide_offline(item)
        if self.base is None:
            return replace(item, why=f"the base is not visible on this Hub{aside}")
        if theirs is None:
            return replace(item, why=f"the base's repository does not have it{aside}")
        if theirs.sha256 is None:
            return replace(item, why=f"a small file{aside}")
        if item.sha256 is None and theirs.size == item.size:
            return replace(
                item, how="copy", why="as large as the base's file; its sha256 is computed before publishing"
            )
        if theirs.sha256 != item.sha256:
            return replace(item, why=f"not the same file as in the base's repository{aside}")
        if theirs.xet is None:
            return replace(item, why=f"the Hub copies only files with a Xet hash, and this one has none{aside}")
        return replace(item, how="copy", why="unchanged from the base")

    def _decide_offline(self, item: Item) -> Item:
        """Decide from the record. The Hub stores files of weights, and other large files, so that it can copy them."""
        if self.record.base.repo_id is None:
            return replace(item, why="the record names no repository of the base")
        entry = self.record.files.get(item.name)
        if entry is None or entry.sha256 != entry.base_sha256 or item.name in self.distrusted:
            return replace(item, why="not the base's file")
        if item.size > MAX_IN_GIT or item.name.endswith(".safetensors"):
            return replace(item, how="copy", why="unchanged from the base")
        return replace(item, why="a small file")

    def _get_digest(self, file: BaseFile) -> str | None:
        """Return the sha256 in the record. If it is missing or not trusted, hash the file.

        Returns None if the file would have to be hashed and `hashing` is False.
        """
        record = self.record.undo if file.name == self.record.undo_name else self.record.files.get(file.name)
        if record and record.sha256 and file.name not in self.distrusted:
            return record.sha256
        return hash_file(file.source, self.progress, f"hashing {file.name}") if self.hashing else None


def _make_item(name: str, data: bytes, content: File | bytes) -> Item:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return Item(name, "upload", len(data), "", hashlib.sha256(data).hexdigest(), blob, content)


def _make_record(record: Record, items: Sequence[Item], base: RemoteTree | None) -> Record:
    """Return the record to publish. It lists exactly the files that are published, with every known digest."""
    found = {item.name: item for item in items}
    files = {}
    for name, entry in record.files.items():
        if name not in found:
            continue
        if (
            entry.sha256 is None
            and found[name].sha256
            and base
            and found[name].is_in(base, join_base_path(record, name))
        ):
            entry = FileRecord(size=entry.size, base_sha256=found[name].sha256, sha256=found[name].sha256)
        files[name] = entry
    omitted = sorted({*record.omitted, *(n for n in record.files if n not in files)})
    return record.model_copy(update={"files": files, "omitted": omitted, "elsewhere": []})


def read_base_card(planner: FilePlanner, record: Record, base: RemoteTree | None) -> str:
    """Read the base's card: the copy in the directory, or else the one in the base's repository.

    Returns "" if the base has no card, or if the Hub does not permit reading it.
    """
    here = planner.there.get(CARD_NAME)
    if here is not None and CARD_NAME in record.files and CARD_NAME not in planner.distrusted:
        return read_at_most(here.source, 4 * MAX_CARD).decode("utf-8", "replace")
    theirs = base.files.get(join_base_path(record, CARD_NAME)) if base else None
    if theirs is None:
        return ""
    with contextlib.suppress(HubError):  # a gated repository permits listing files, but not reading them
        return read_at_most(theirs, 4 * MAX_CARD).decode("utf-8", "replace")
    return ""


def list_card_notes(names: Sequence[str]) -> list[str]:
    """Return a note on the fields `names`, which the new card omits, as a list; [] if there are no such fields."""
    return [f"fields of the base's card that are not copied, or only in part: {', '.join(names)}"] if names else []


def list_loader_notes(names: Collection[str]) -> list[str]:
    """Return a note about loaders that read an undo file as weights, as a list; [] if none of `names` is one."""
    undo = sorted(name for name in names if is_undo_name(name))
    if not undo or "model.safetensors.index.json" in names:
        return []
    return [
        f"without an index of shards, vLLM reads {undo[0]} as weights and fails (apply --undo-limit 0 leaves it out)"
    ]


def find_short_forms(checkpoint: Checkpoint, record: Record) -> dict[Coordinate, ShortForm]:
    """Return the short form (layer, row, column, expert) of each edited scalar that has one.

    A byte of a GGUF tensor of blocks has none.
    """
    found: dict[Coordinate, ShortForm] = {}
    blocks = {name for name, info in checkpoint.infos.items() if isinstance(info.dtype, BlockDtype)}
    for entry in (edit for edit in record.edits if edit.tensor not in blocks):
        with contextlib.suppress(ArchitectureError):
            if form := find_short_form(checkpoint.config, checkpoint.shapes, entry.coordinate):
                found[entry.coordinate] = form
    return found


def _find_obsolete(target: Branch | None, names: set[str]) -> tuple[list[Item], list[str]]:
    """Return the files to delete, and notes on other files that stay in the repository.

    A file is deleted if an earlier publication contained it and `names`, the files of this one, do not.
    """
    if target is None:
        return [], []
    head = target.head
    earlier: Collection[str] = ()
    notes: list[str] = []
    if RECORD_NAME in head.files:
        try:
            patched = find_record(head)
            earlier = {*patched.record.files, *patched.record.own_names[len(OWN_FILES) :]} if patched else ()
            earlier = {*earlier, FIGURE_NAME}
        except CheckpointError:
            notes.append(
                f"{RECORD_NAME} in the repository cannot be read, so files of an earlier publication are not removed"
            )
    rest = sorted(set(head.files) - names - {".gitattributes"})
    gone = [Item(n, "delete", head.files[n].size, "from an earlier publication") for n in rest if n in earlier]
    if strange := [name for name in rest if name not in earlier]:
        what = "these files in the repository are not part of this publication and stay unchanged"
        notes.append(f"{what}: {list_some(strange, 5)}")
    return gone, notes


def _choose_tag(
    wish: Wish, record: Record, base: RemoteTree | None, target: Branch | None, notes: list[str]
) -> str | None:
    """Return the name of the tag to create, or None.

    No tag is created for a pull request, because its commit is not in the branch until it is merged. A tag that exists
    at another commit is not moved: a default tag is then skipped with a note, and a tag that was chosen with --tag
    raises HubError.
    """
    commit = base.commit if base else record.base.revision or ""
    name = wish.tag or (f"base-{commit[:12]}" if len(commit) == 40 else None)
    if wish.create_pr:
        if wish.tag:
            raise HubError(
                "a pull request cannot have a tag", wish.tag, "leave out --tag, and tag the commit when it is merged"
            )
        return None
    if name and target and name in target.tags and target.tags[name] != target.head.commit:
        if wish.tag:
            raise HubError("the tag already exists at another commit", name, "choose another --tag")
        notes.append(f"the tag {name} is not moved: it marks the first publication of this base")
        return None
    return name


def _find_pull_request(plan: Publication) -> int | None:
    """Return the number of an open pull request with exactly these files, or None.

    An earlier run may have opened it without receiving the Hub's answer.
    """
    for number in open_pull_requests(plan.wish.repo_id, plan.message):
        head = open_tree(plan.wish.repo_id, f"refs/pr/{number}")
        if is_published(plan, head):
            return number
    return None

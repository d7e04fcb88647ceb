"""Compare a published revision with its plan, by what the Hub lists and the bytes that it serves.

This module changes nothing on the Hub.
"""

from __future__ import annotations

from swsurgery.checkpoint.record import Record
from swsurgery.errors import ShardError, escape_control
from swsurgery.hub.commit import Sent
from swsurgery.hub.remote import RemoteTree, open_tree
from swsurgery.progress import Progress
from swsurgery.sharing.publication import Item, Publication
from swsurgery.storage.files import read_at_most
from swsurgery.storage.hashing import hash_file
from swsurgery.storage.shard import Shard, open_shard
from swsurgery.verifying.findings import Finding


def compare_published(plan: Publication, sent: Sent, progress: Progress) -> tuple[list[Finding], RemoteTree, int]:
    """Compare the new revision with the plan: the Hub's listing of it, and the bytes that the Hub serves.

    Returns the findings, the new listing, and the number of scalars that were compared.
    """
    listing = open_tree(plan.wish.repo_id, sent.commit)
    findings: list[Finding] = []
    if plan.private and not listing.private:
        exposed = "the repository has become public, so anybody may have read what was published"
        findings.append(Finding("public", f"{exposed}: make it private in its settings, or delete it"))
    for item in plan.items:
        findings += _compare_file(item, listing)
        if isinstance(item.content, bytes) and item.name in listing.files:
            data = read_at_most(listing.files[item.name], listing.files[item.name].size)
            if data != item.content:
                findings.append(
                    Finding("digest", "the Hub serves bytes that differ from the published ones", item.name)
                )
    changed, scalars = _compare_scalars(plan.record, listing, progress)
    return findings + changed, listing, scalars


def _compare_scalars(record: Record, listing: RemoteTree, progress: Progress) -> tuple[list[Finding], int]:
    """Compare the edited scalars that the Hub serves with the record. Returns the findings and the number compared."""
    findings: list[Finding] = []
    shards: dict[str, Shard] = {}
    edits = [e for e in record.edits if e.file in listing.files]
    progress.start(len(edits), "scalar", "reading back")
    try:
        for edit in edits:
            try:
                if edit.file not in shards:
                    shards[edit.file] = open_shard(listing.files[edit.file])
                stored = shards[edit.file].read_scalar(edit.tensor, edit.index)
            except (ShardError, KeyError, IndexError):
                found = "a shard without this scalar"
            else:
                found = "" if stored == edit.new_bytes else f"0x{stored[::-1].hex()}"
            if found:
                what = f"the Hub serves {found}, not {edit.new_bits}"
                findings.append(Finding("edit-changed", what, edit.file, edit.tensor, edit.index))
            progress.advance(1)
    finally:
        progress.close()
    return findings, len(edits)


def _compare_file(item: Item, listing: RemoteTree) -> list[Finding]:
    """Compare one file of the plan with the new listing."""
    there = listing.files.get(item.name)
    if item.how == "delete":
        return (
            [Finding("file-undeclared", "the file should have been deleted, but still exists", item.name)]
            if there
            else []
        )
    if there is None:
        return [Finding("file-missing", "the file was published but does not exist", item.name)]
    if item.is_in(listing) or there.sha256 is None and item.blob is None and hash_file(there) == item.sha256:
        return []
    return [
        Finding(
            "digest", f"the file on the Hub does not have the sha256 {escape_control(item.sha256 or '?')}", item.name
        )
    ]

"""Describe the documents of `publish`, `export` and `recipe`."""

from __future__ import annotations

from typing import Literal

from swsurgery.cli.documents.document import Document, DocumentPart
from swsurgery.cli.documents.findings import FindingItem


class PlannedFile(DocumentPart):
    """A file of the commit, how it gets there, its size in bytes, and why."""

    name: str
    how: str
    size: int
    why: str


class LeftOutFile(DocumentPart):
    """A file that is not published, and why."""

    name: str
    why: str


class BaseCommit(DocumentPart):
    """The repository and the commit from which unchanged files are copied."""

    repo_id: str
    commit: str


class PublicationItem(DocumentPart):
    """The plan of a publication. `parent` is the commit that it follows; null if the repository is `created`.

    If the Hub could not be reached in a dry run, `offline` is true and `created` is null.
    """

    repo_id: str
    branch: str
    created: bool | None
    offline: bool
    private: bool
    create_pr: bool
    parent: str | None
    base: BaseCommit | None
    files: list[PlannedFile]
    left_out: list[LeftOutFile]
    copy_bytes: int
    upload_bytes: int
    tag: str | None
    message: str
    accepted: list[str]
    notes: list[str]


class ProposalDocument(Document):
    """The plan (`publish --dry-run`), and the findings that prevent publishing if they are not accepted."""

    plan: PublicationItem
    findings: list[FindingItem]


class MovedBytes(DocumentPart):
    """The numbers of bytes that were uploaded, copied on the Hub, and read back."""

    uploaded: int
    copied: int
    read_back: int


class ComparedCounts(DocumentPart):
    """The numbers of files and edited scalars that were compared with the plan after publishing."""

    files: int
    scalars: int


class PublishedItem(DocumentPart):
    """The commit, and what was read back from the Hub."""

    repo_id: str
    commit: str
    pull_request: int | None
    url: str
    already_published: bool
    tag: str | None
    bytes: MovedBytes
    verified: ComparedCounts
    findings: list[FindingItem]


class PublishedDocument(Document):
    """The plan, and what was published."""

    plan: PublicationItem
    published: PublishedItem


class ExportedDocument(Document):
    """The files that were written, with their sizes in bytes."""

    output: str
    format: Literal["sparse", "peft", "vllm", "outliers"]
    files: dict[str, int]
    scalars: int
    notes: list[str]


class RecipeDocument(Document):
    """A quantiser's configuration, the modules that it keeps, and the patterns that select them."""

    tool: str
    model: str
    modules: list[str]
    patterns: list[str]
    text: str
    notes: list[str]

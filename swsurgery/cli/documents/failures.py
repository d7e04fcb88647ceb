"""Describe the document of an error."""

from __future__ import annotations

from swsurgery.cli.documents.document import ABSENT, Document, DocumentPart


class FaultItem(DocumentPart):
    """What is wrong, where, and what to do about it. A part without content is ""."""

    what: str
    where: str
    remedy: str


class ErrorDocument(Document):
    """The reason why a command failed. `faults` exists if there are several reasons; `error` is the first of them."""

    error: FaultItem
    faults: list[FaultItem] = ABSENT

"""Define the file names that have a special meaning in the directory of a checkpoint. Opens no file."""

from __future__ import annotations

import re

SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,250}\.safetensors")
"""Pattern of the file name of a shard. Names in an index or a patch must match it. Such a name contains no slash, so it
cannot lead out of the directory."""

EDITABLE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,250}\.(safetensors|gguf)")
"""Pattern of the names of files that an edit in place may change: shards and GGUF files. A journal contains no other
name."""

SHARD_ENDINGS = (".safetensors", ".gguf")
"""Endings of the names of files that contain weights and that swsurgery can edit."""

VARIANT = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"
"""Pattern of the name of a variant of the weights, such as fp16, bf16 or non_ema."""

OWN_FILES = ("swsurgery.json", "manifest.yaml", "SHA256SUMS")
"""Files that swsurgery adds to a patched checkpoint: the record, the applied manifest, and the digests of the files."""

UNDO_NAME = "swsurgery-undo.safetensors"
"""File with the bytes that the first step of a history overwrote, if the step changed more than single scalars."""

_UNDO_FILE = re.compile(r"swsurgery-undo(-([2-9]|[1-9][0-9]{1,8}))?\.safetensors")


def make_undo_name(step: int) -> str:
    """Return the name of the undo file of a step, counted from 1. Each step has its own, so earlier ones survive."""
    return UNDO_NAME if step == 1 else f"swsurgery-undo-{step}.safetensors"


def is_undo_name(name: str) -> bool:
    """Return True for the name of an undo file of any step. Such a file contains no weights of the checkpoint."""
    return _UNDO_FILE.fullmatch(name) is not None


def make_working_name(name: str) -> str:
    """Return the name of one of swsurgery's own files while an edit in place writes it."""
    return f".{UNDO_NAME if is_undo_name(name) else name}.new"


JOURNAL, JOURNAL_NEW, ROOM = ".swsurgery-journal", ".swsurgery-journal.new", ".swsurgery-room"
"""Files that exist only while a checkpoint is edited in place: the journal, which contains the old bytes; the journal
while it is being written; and a file that reserves disk space for the recovery."""

STAGE_TOKEN = ".swsurgery-token"
"""Name of a file in the directory of a new checkpoint. The file exists only while the directory is being renamed to
its final name; see staging.py."""

WORKING_FILES = (JOURNAL, JOURNAL_NEW, ROOM, *(make_working_name(name) for name in (*OWN_FILES, UNDO_NAME)))
"""Files that an interrupted edit in place may leave. They are not part of the checkpoint, and recovery removes them."""

SIGNATURE_NAME = "model.sig"
"""Usual file name of a signature. A signature covers all other files, including the record, so the record cannot list
the signature."""

CARD_NAME = "README.md"
"""File name of the model card. The card of a published checkpoint quotes the record, so the record cannot list it.
A card that a record does list is the card of the base, and must have the listed digest."""

FIGURE_NAME = "swsurgery-figure.svg"
"""File name of the figure that the card of a published checkpoint shows. Like the card, it is drawn from the record, so
the record cannot list it. A figure that a record does list is that of the base, and must have the listed digest."""

GIT_NAME = ".gitattributes"
"""Git settings of a repository. The Hub adds this file if the base has none; reading weights does not depend on it."""

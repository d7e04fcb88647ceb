"""Define the names of files with a meaning in the directory of a checkpoint. Opens no file."""

from __future__ import annotations

import re

SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,250}\.safetensors")
"""An index or a journal may only contain names of this form: plain file names, which cannot leave the directory."""

VARIANT = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"
"""The name of a variant of the weights has this form; examples are fp16, bf16, non_ema."""

OWN_FILES = ("swsurgery.json", "manifest.yaml", "SHA256SUMS")
"""Swsurgery adds these files to a patched checkpoint: the record, the manifest as applied, and the digests."""

JOURNAL, JOURNAL_NEW, ROOM = ".swsurgery-journal", ".swsurgery-journal.new", ".swsurgery-room"
"""These files exist while a checkpoint is edited in place: the journal with the old bytes, the journal while it is
being written, and a file that reserves disk space for the recovery."""

STAGE_TOKEN = ".swsurgery-token"
"""This file exists in a new checkpoint only while it is being renamed; see staging.py."""

WORKING_FILES = (JOURNAL, JOURNAL_NEW, ROOM, *(f".{name}.new" for name in OWN_FILES))
"""An interrupted edit in place leaves these files behind. They are no part of the checkpoint; recovery removes them."""

SIGNATURE_NAME = "model.sig"
"""Conventional name of a signature. It covers all other files, including the record, so the record cannot list it."""

CARD_NAME = "README.md"
"""The model card of a published checkpoint quotes the record, so the record cannot list it. A card that the record does
list is that of the base and must have the listed digest."""

GIT_NAME = ".gitattributes"
"""Git settings of a repository. The Hub adds this file if the base has none; reading weights does not depend on it."""

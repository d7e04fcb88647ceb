"""The names of files that mean something in a checkpoint's directory. Opens none of them."""

from __future__ import annotations

import re

SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,250}\.safetensors")
"""The only names that an index or a journal may point to: plain file names, so no path leaves the directory."""

VARIANT = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"
"""Pattern of the name of a variant of the weights: fp16, bf16, non_ema."""

OWN_FILES = ("swsurgery.json", "manifest.yaml", "SHA256SUMS")
"""What swsurgery adds to a patched checkpoint: its registry, the manifest as applied, and the digests."""

JOURNAL, JOURNAL_NEW, ROOM = ".swsurgery-journal", ".swsurgery-journal.new", ".swsurgery-room"
"""What is there while a checkpoint is edited in place: the old bytes, the same while they are being written, and a
file that holds space for putting them back."""

STAGE_TOKEN = ".swsurgery-token"
"""In a new checkpoint for a moment, while it gets its name; see staging.py. It is no part of a checkpoint."""

WORKING_FILES = (JOURNAL, JOURNAL_NEW, ROOM, *(f".{name}.new" for name in OWN_FILES))
"""What an edit in place leaves behind where it is cut off; recovery removes it, and it is no part of a checkpoint."""


SIGNATURE_NAME = "model.sig"
"""Made after the registry, of it and everything else, so the registry cannot list it."""


CARD_NAME = "README.md"
"""Of a checkpoint that was published: it quotes the registry, so the registry cannot list it. Where the registry does
list one, it is the base's, and held to its digest."""


GIT_NAME = ".gitattributes"
"""How git keeps the files of a repository. The Hub makes one where a base had none, and nothing reads weights by it."""

"""A git-lfs pointer, as a clone without git-lfs leaves it."""

from __future__ import annotations

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"

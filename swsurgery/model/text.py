"""Describe the amount of text behind a figure, in the same words for every command. Must not depend on torch."""

from __future__ import annotations

from typing import Protocol


class Measured(Protocol):
    """A result that was measured on text: a check, a sweep or a confirmation."""

    @property
    def windows(self) -> int:
        """Number of windows that were read."""

    @property
    def window_tokens(self) -> int:
        """Number of tokens of the text in each window."""

    @property
    def scored_tokens(self) -> int:
        """Number of predictions that were scored in all windows."""


def describe_measured_text(measured: Measured) -> str:
    """Describe the text, such as "16 windows of 512 tokens (8,176 scored)"."""
    plural = "" if measured.windows == 1 else "s"
    return f"{measured.windows} window{plural} of {measured.window_tokens} tokens ({measured.scored_tokens:,} scored)"

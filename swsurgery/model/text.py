"""Describe on how much text a figure was measured, in the same words for every command.

This module must not depend on torch.
"""

from __future__ import annotations

from typing import Protocol


class Measured(Protocol):
    """A result that was measured on text: a check, a sweep or a confirmation."""

    @property
    def windows(self) -> int:
        """Number of windows of text on which the model ran."""

    @property
    def window_tokens(self) -> int:
        """Maximum number of tokens of the text in a window, without BOS."""

    @property
    def scored_tokens(self) -> int:
        """Number of tokens in all windows whose prediction was scored."""


def describe_measured_text(measured: Measured) -> str:
    """Describe the text on which a result was measured, such as "16 windows of 512 tokens (8,176 scored)"."""
    plural = "" if measured.windows == 1 else "s"
    return f"{measured.windows} window{plural} of {measured.window_tokens} tokens ({measured.scored_tokens:,} scored)"

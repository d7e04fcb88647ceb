"""Choose the text to measure on, and describe in the same words for every command how a figure was measured.

This module must not depend on torch.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Protocol as Interface

from swsurgery.errors import ModelError
from swsurgery.model.protocol import Protocol

WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
"""Repository, configuration and split of the raw test set of WikiText-2 for the package `datasets`."""


class Measured(Interface):
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

    @property
    def text_sha256(self) -> str:
        """SHA-256 of the text in UTF-8, in hexadecimal."""

    @property
    def protocol(self) -> Protocol:
        """The protocol by which the text was cut and scored."""


def describe_measured_text(measured: Measured) -> str:
    """Describe the text on which a result was measured, such as "16 windows of 512 tokens (8,176 scored)"."""
    plural = "" if measured.windows == 1 else "s"
    return f"{measured.windows} window{plural} of {measured.window_tokens} tokens ({measured.scored_tokens:,} scored)"


def read_built_in_text() -> str:
    """Read the default text of the check: about 8,000 words of English in several kinds of prose."""
    return Path(__file__).with_name("passage.txt").read_text(encoding="utf-8")


def choose_text(text: str | None, protocol: Protocol) -> str:
    """Return the text to measure on: `text`, or the protocol's own text if `text` is None.

    For the protocol "paper", `text` is the raw file of WikiText-2, and its lines are joined as the protocol demands. If
    it is None, the package `datasets` loads the test set. Raises ModelError if it cannot.
    """
    if protocol.name == "paper":
        return join_rows(load_wikitext() if text is None else split_rows(text))
    return read_built_in_text() if text is None else text


def split_rows(raw: str) -> list[str]:
    """Split the raw file of WikiText into the rows that the package `datasets` makes of it.

    A row is a line with its line break. A line of blanks is an empty row.
    """
    return [line if line.strip() else "" for line in re.findall(r"[^\n]*\n|[^\n]+", raw)]


def join_rows(rows: list[str]) -> str:
    """Join rows of WikiText as the code of arXiv:2411.07191 does, with an empty line between two rows."""
    return "\n\n".join(rows)


def load_wikitext() -> list[str]:
    """Load the rows of the raw test set of WikiText-2 with the package `datasets`.

    Raises ModelError if the package is not installed or cannot load them.
    """
    remedy = "give the file wiki.test.raw with --text, or pip install datasets"
    what = "protocol paper measures on the test set of WikiText-2"
    try:
        import datasets  # type: ignore[import-not-found, import-untyped, unused-ignore]  # it may be missing
    except ImportError:
        raise ModelError(what, "the package datasets is not installed", remedy) from None
    name, config, split = WIKITEXT
    try:
        return [str(row) for row in datasets.load_dataset(name, config, split=split)["text"]]
    except Exception as error:
        line = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise ModelError(f"{what}, which datasets cannot load", line, "give the file with --text") from error

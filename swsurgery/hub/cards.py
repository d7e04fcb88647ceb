"""Read and write model cards: front matter in YAML, which huggingface_hub parses and renders, and Markdown below."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator
from typing import Any

MAX_FRONT_MATTER = 64 << 10
"""Maximum length of front matter in characters. Parsing hostile megabytes of YAML would be slow."""

_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)(?:\r?\n)---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def read(text: str, fields: Collection[str]) -> tuple[dict[str, Any], str]:
    """Split a card into its front matter, restricted to `fields`, and the text below it.

    Front matter that cannot be read is treated as empty.
    """
    import yaml  # huggingface_hub parses front matter with yaml, and passes on its errors
    from huggingface_hub import ModelCard

    text = text.removeprefix("\ufeff")
    matter = _FRONT_MATTER.match(text[:MAX_FRONT_MATTER])
    if matter is None:
        return {}, text
    below = text[matter.end() :]
    try:
        with _mute_logger():
            data = vars(ModelCard(f"---\n{matter[1]}\n---\n", ignore_metadata_errors=True).data)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError):
        return {}, below
    return {name: data[name] for name in fields if data.get(name) is not None}, below


def render(fields: dict[str, Any], body: str) -> bytes:
    """Render a card from its front matter and the text below it, as UTF-8."""
    from huggingface_hub import ModelCard, ModelCardData

    matter = ModelCardData(**fields).to_yaml()
    return str(ModelCard(f"---\n{matter}\n---\n\n{body}")).encode()


@contextlib.contextmanager
def _mute_logger() -> Iterator[None]:
    """Disable, during the block, the logger that would print parts of a card that somebody else wrote."""
    from huggingface_hub.utils import logging

    logger = logging.get_logger("huggingface_hub.repocard_data")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled

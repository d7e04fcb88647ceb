"""Model cards as the Hub reads them: front matter through huggingface_hub's ModelCard, Markdown below."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator
from typing import Any

MAX_FRONT_MATTER = 64 << 10
"""Characters. Front matter is a few lines; the reader of YAML is not made for hostile megabytes of it."""

_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)(?:\r?\n)---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def read(text: str, fields: Collection[str]) -> tuple[dict[str, Any], str]:
    """A card's front matter, of which only `fields`, and what is below it.

    Front matter that cannot be read is none; the rest of the card is there all the same.
    """
    import yaml  # huggingface_hub's own reader of front matter
    from huggingface_hub import ModelCard

    text = text.removeprefix("\ufeff")
    matter = _FRONT_MATTER.match(text[:MAX_FRONT_MATTER])
    if matter is None:
        return {}, text
    below = text[matter.end() :]
    try:
        with _muted():
            data = vars(ModelCard(f"---\n{matter[1]}\n---\n", ignore_metadata_errors=True).data)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError):
        return {}, below
    return {name: data[name] for name in fields if data.get(name) is not None}, below


def render(fields: dict[str, Any], body: str) -> bytes:
    """A card's bytes."""
    from huggingface_hub import ModelCard, ModelCardData

    matter = ModelCardData(**fields).to_yaml()
    return str(ModelCard(f"---\n{matter}\n---\n\n{body}")).encode()


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """What the library says of faulty metadata repeats the stranger's words."""
    from huggingface_hub.utils import logging

    logger = logging.get_logger("huggingface_hub.repocard_data")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled

"""Explain why a model or a tokenizer cannot be loaded, in cases for which the message of transformers is misleading.

This module reads small files of the directory and loads no model. Importing it does not load torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from swsurgery.errors import CheckpointError, Unrunnable
from swsurgery.model.quantisers import explain_missing
from swsurgery.storage.files import LocalFile, recognise_format
from swsurgery.storage.strict_json import read_config

HEAD_NAMES = frozenset({"lm_head", "embed_out", "lm_loss", "output_projection", "generator_lm_head", "cls"})
"""Names that transformers gives to the language-model head: the module that turns hidden states into logits."""

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "merges.txt", "tiktoken.model", "qwen.tiktoken",
    "vocab.bpe", "spm.model", "source.spm", "bpe.codes",
)  # fmt: skip
"""Names of the files from which transformers can load a vocabulary."""

MAX_POINTER = 1 << 10
"""Maximum size in bytes of a file that is checked for being a git-lfs pointer. A pointer has about 130 bytes."""

_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Files with settings of a tokenizer. They do not make a tokenizer without a vocabulary."""

_VOCABULARY = re.compile(r"token|vocab|merges|codes|dict|[.](model|bpe|spm|tiktoken)", re.IGNORECASE)
"""Matches file names that may be those of a vocabulary although TOKENIZER_FILES does not list them."""

_TEXT = (".json", ".model", ".txt", ".jinja", ".tiktoken")
"""Suffixes of the small files that transformers reads in addition to the weights."""


def refuse_unrunnable(directory: Path) -> None:
    """Raise Unrunnable if file names and small files of the directory show that no model can be run.

    This is also the case if the model is quantised and a package that loads it is missing. This check needs no torch,
    whose import takes seconds and 400 MB.
    """
    refuse_pointers(directory)
    if not (directory / "config.json").is_file():
        raise Unrunnable("no config.json", directory, "copy the base model's config.json there")
    refuse_uninstalled(directory)
    if not may_have_tokenizer(directory):
        raise make_tokenizer_error(directory)


def refuse_pointers(directory: Path) -> None:
    """Raise Unrunnable if a file that transformers reads, other than weights, is a git-lfs pointer or a web page."""
    for path in sorted(directory.iterdir()):
        if path.suffix not in _TEXT or not path.is_file() or path.stat().st_size > MAX_POINTER:
            continue
        if found := recognise_format(path.read_bytes()[:8]):
            raise Unrunnable(found[0], path, found[1])


def refuse_uninstalled(directory: Path) -> None:
    """Raise Unrunnable if the model is quantised and a package without which transformers cannot load it is missing."""
    if (directory / "config.json").is_file() and (missing := explain_missing(_read_config(directory))):
        raise Unrunnable(missing[0], remedy=missing[1])


def refuse_dtype(directory: Path) -> None:
    """Raise Unrunnable if config.json names a dtype that torch does not have."""
    if not (directory / "config.json").is_file():
        return
    config = _read_config(directory)
    import torch

    known = [name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)]
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    for section in sections:
        for key in ("dtype", "torch_dtype"):
            named = section.get(key)
            if not isinstance(named, str) or named in ("auto", *known) or named.removeprefix("torch.") in known:
                continue
            near = difflib.get_close_matches(named, known, 1)
            remedy = f"did you mean {near[0]}?" if near else "such as bfloat16"
            raise Unrunnable(
                f"{key} in config.json is {named[:40]!r}, which is not a dtype of torch", directory, remedy
            )


def _read_config(directory: Path) -> dict[str, Any]:
    """Read config.json. Raises Unrunnable if it is not valid."""
    try:
        return read_config(LocalFile((directory / "config.json").resolve()), "config.json")
    except CheckpointError as error:
        raise Unrunnable(f"config.json cannot be read: {error}", directory) from error


def may_have_tokenizer(directory: Path) -> bool:
    """Return True if a file in the directory may be the vocabulary of a tokenizer, judging by its name."""
    names = [path.name for path in directory.iterdir() if path.name not in _SETTINGS]
    return any(name in TOKENIZER_FILES or _VOCABULARY.search(name) for name in names)


def make_tokenizer_error(directory: Path) -> Unrunnable:
    """Make the error for a directory without a tokenizer."""
    return Unrunnable("no tokenizer", directory, "copy the base model's tokenizer.json there")


def has_tokenizer(directory: Path) -> bool:
    """Return True if the directory contains a file that transformers can load as a vocabulary."""
    return any((directory / name).is_file() for name in TOKENIZER_FILES)


def make_missing_error(missing: Iterable[str], directory: Path) -> Unrunnable:
    """Make the error for the weights `missing`, which the model needs and the checkpoint does not store."""
    names = sorted(missing)
    if all(HEAD_NAMES & set(name.split(".")) for name in names):
        return Unrunnable(
            f"no language-model head: {names[0]} is not stored",
            directory,
            "a reward or embedding model has none and predicts no tokens: use the language model it was made from",
        )
    what = f"weights that the model needs are missing: {names[0]}"
    return Unrunnable(what, directory, "use the config.json that belongs to these weights")

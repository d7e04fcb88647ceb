"""Make the text for benchmarks/train.py from the Python source code that is installed, and tokenize it.

Reads every .py file below the standard library and site-packages. Leaves out files that are very short, very long,
not UTF-8, or equal to another, and files with very long lines, which are mostly generated tables.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tokenizers
from train_models import BOS, EOS

BOS_TEXT, EOS_TEXT = "<|bos|>", "<|eos|>"
FILE_BYTES = (200, 200_000)
"""Smallest and largest file that is read, in bytes."""
LONGEST_LINE = 1_000
"""Longest line of a file that is read, in bytes."""
HELD_OUT = 64
"""One of this many documents is held out: no model is trained on it."""
SAMPLE_BYTES = 24_000_000
"""Number of bytes of text that the tokenizer is trained on."""


@dataclass(frozen=True)
class Corpus:
    """Facts about a tokenized text: sizes, and the sha256 over all its documents in order."""

    documents: int
    bytes: int
    sha256: str
    vocabulary: int
    training_tokens: int
    held_out_tokens: int


def make_corpus(folder: Path, sources: Sequence[Path], *, vocabulary: int, limit: int) -> Corpus:
    """Write tokenizer.json, training.npy, held_out.npy and at last corpus.json to `folder`.

    The text is every usable .py file below the folders `sources`. At most about `limit` bytes of it are used: a random
    part of the documents, chosen by their digests. The arrays contain int16 token ids, in which BOS begins and EOS ends
    each document.
    """
    documents = choose_documents(read_documents(sources), limit)
    tokenizer = train_tokenizer(documents, vocabulary)
    tokenizer.save(str(folder / "tokenizer.json"))
    kept_back = set(sorted(digest for digest, _ in documents)[: len(documents) // HELD_OUT + 1])
    held_out = [text for digest, text in documents if digest in kept_back]
    training = [text for digest, text in documents if digest not in kept_back]
    lengths = []
    for name, texts in (("training.npy", training), ("held_out.npy", held_out)):
        tokens = np.concatenate(list(encode_documents(tokenizer, texts)))
        np.save(folder / name, tokens)
        lengths.append(len(tokens))
    digests = "".join(digest for digest, _ in documents)
    corpus = Corpus(
        len(documents),
        sum(len(text.encode()) for _, text in documents),
        hashlib.sha256(digests.encode()).hexdigest(),
        tokenizer.get_vocab_size(),
        *lengths,
    )
    # The processes that train wait for this file, so it appears complete and after all others.
    (folder / "corpus.part").write_text(json.dumps(asdict(corpus)), encoding="utf-8")
    os.replace(folder / "corpus.part", folder / "corpus.json")
    return corpus


def list_sources() -> list[Path]:
    """Return the folders of the standard library and of the installed packages."""
    paths = sysconfig.get_paths()
    return [Path(paths[name]).resolve() for name in ("stdlib", "purelib", "platlib")]


def read_documents(sources: Sequence[Path]) -> list[tuple[str, str]]:
    """Return the sha256 and the text of each distinct source file, in the order of their paths."""
    files: dict[str, Path] = {}
    for root in sources:
        for path in root.rglob("*.py"):
            name = path.relative_to(root).as_posix()
            if "site-packages/" not in name and "dist-packages/" not in name:
                files.setdefault(name, path)
    with ThreadPoolExecutor(8) as pool:
        read = pool.map(read_source, (files[name] for name in sorted(files)))
        return list({document[0]: document for document in read if document}.values())


def read_source(path: Path) -> tuple[str, str] | None:
    """Return the sha256 and the text of a source file, or None if the file is not to be used."""
    try:
        if not FILE_BYTES[0] <= path.stat().st_size <= FILE_BYTES[1]:
            return None
        data = path.read_bytes()
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    if max(map(len, data.split(b"\n"))) > LONGEST_LINE or BOS_TEXT in text or EOS_TEXT in text:
        return None
    return hashlib.sha256(data).hexdigest(), text.replace("\r\n", "\n")


def choose_documents(documents: list[tuple[str, str]], limit: int) -> list[tuple[str, str]]:
    """Return the part of `documents` whose size is about `limit` bytes, chosen by the digests, in the same order."""
    total = sum(len(text) for _, text in documents)
    share = min(1.0, limit / total)
    return [document for document in documents if int(document[0][:8], 16) < share * 2**32]


def train_tokenizer(documents: list[tuple[str, str]], vocabulary: int) -> tokenizers.Tokenizer:
    """Return a byte-level BPE of `vocabulary` entries, trained on a part of `documents`."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS_TEXT, EOS_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for _, text in choose_documents(documents, SAMPLE_BYTES)), trainer)
    assert (tokenizer.token_to_id(BOS_TEXT), tokenizer.token_to_id(EOS_TEXT)) == (BOS, EOS)
    return tokenizer


def encode_documents(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> Iterator[np.ndarray]:
    """Yield the token ids of `texts` as int16 arrays, with BOS in front of each text and EOS after it."""
    for at in range(0, len(texts), 512):
        for encoding in tokenizer.encode_batch_fast(texts[at : at + 512], add_special_tokens=False):
            yield np.array([BOS, *encoding.ids, EOS], dtype=np.int16)


def add_bos(tokenizer: tokenizers.Tokenizer) -> None:
    """Make `tokenizer` put BOS in front of each text."""
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS_TEXT} $A", pair=f"{BOS_TEXT} $A $B", special_tokens=[(BOS_TEXT, BOS)]
    )

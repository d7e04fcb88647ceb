"""Turn text into token ids. This module imports neither torch nor transformers."""

from __future__ import annotations

import hashlib

from swsurgery.errors import ModelError
from swsurgery.model.cutting import TokenizedText, count_words, split_documents
from swsurgery.model.protocol import BosChoice, Protocol
from swsurgery.model.stopwords import STOP_WORDS
from swsurgery.model.tokenizer import Tokenizer


def get_bos_prefix(tokenizer: Tokenizer) -> list[int]:
    """Return a list of the BOS token's id if `tokenizer` puts BOS in front of a text by default; otherwise [].

    Tokens that a tokenizer appends by default, such as EOS, are never used: they would end the text that the model is
    to continue.
    """
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and full[:1] == [bos] != plain[:1] else []


def choose_bos(tokenizer: Tokenizer, choice: BosChoice) -> list[int]:
    """Return the tokens that are put in front of a text: the BOS token's id, or none.

    Raises ModelError if BOS is asked for and the tokenizer has no BOS token.
    """
    if choice == "auto":
        return get_bos_prefix(tokenizer)
    if choice == "no":
        return []
    if tokenizer.bos_token_id is None:
        raise ModelError("the tokenizer has no BOS token", "--bos yes", "leave out --bos")
    return [tokenizer.bos_token_id]


def get_document_prefix(tokenizer: Tokenizer) -> int:
    """Return the token id from which lm-evaluation-harness predicts a document's first token: BOS, or else EOS.

    Raises ModelError if the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ModelError("the tokenizer has neither BOS nor EOS", "protocol lm-eval", "choose another protocol")


def encode_text(tokenizer: Tokenizer, text: str, protocol: Protocol) -> TokenizedText:
    """Return the token ids of a text, in the form that a protocol needs.

    Raises ModelError if the text is not valid Unicode, or if the tokenizer lacks a token that the protocol needs.
    """
    whole = protocol.name == "lm-eval"
    documents = split_documents(text) if whole else [text]
    ids = [encode(tokenizer, document) for document in documents]
    return TokenizedText(
        documents=ids,
        prefix=[get_document_prefix(tokenizer)] if whole else choose_bos(tokenizer, protocol.bos),
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        protocol=protocol,
        words=sum(map(count_words, documents)) if whole else None,
    )


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the token ids of `text` without special tokens. Raises ModelError if UTF-8 cannot encode the text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ModelError("the text is not valid Unicode", ascii(text)[:80]) from None
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def stop_word_tokens(tokenizer: Tokenizer, vocabulary: int) -> list[int]:
    """List the token ids below `vocabulary` whose text is a stop word, ignoring case and one leading space."""
    ids = range(min(vocabulary, len(tokenizer)))
    decoded = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    return [i for i, text in zip(ids, decoded, strict=True) if text.removeprefix(" ").lower() in STOP_WORDS]

"""Windows of token ids, and which of their predictions are scored: against definitions token by token."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swsurgery.errors import ModelError
from swsurgery.model.cutting import (
    TokenizedText,
    Window,
    count_scored,
    count_words,
    cut_documents,
    cut_text,
    cut_windows,
    split_documents,
)
from swsurgery.model.protocol import Protocol, choose_protocol
from swsurgery.model.text import join_rows, split_rows

BOS = 1000


def list_scored(windows: list[Window]) -> list[int]:
    """The tokens that are scored, checked to be those that follow the scored positions."""
    for window in windows:
        inside = [*window, *window.targets[-1:]] if window.first + len(window.targets) == len(window) else [*window]
        assert inside[window.first + 1 : window.first + 1 + len(window.targets)] == [*window.targets]
    return [token for window in windows for token in window.targets]


@given(
    st.integers(2, 60),
    st.integers(2, 12),
    st.integers(1, 12),
    st.booleans(),
    st.booleans(),
    st.integers(1, 9) | st.none(),
)
def test_each_token_is_scored_at_most_once(
    tokens: int, window: int, stride: int, bos: bool, first: bool, most: int | None
) -> None:
    stride = min(stride, window)
    protocol = Protocol(windows=most, window=window, stride=stride, score_first=first)
    windows = cut_windows(range(tokens), [BOS] * bos, protocol)
    starts = [0] if tokens < window else list(range(0, tokens - window + 1, stride))[:most]
    assert [[*piece][bos:] for piece in windows] == [list(range(tokens))[at : at + window] for at in starts]
    assert all(([*piece][:bos] == [BOS] * bos) for piece in windows)
    covered = set().union(*([*piece][bos:] for piece in windows))
    heads = {0} if stride < window else set(starts)  # tokens with no token of text before them in their first window
    unscored = heads if not (bos and first) else set()
    assert list_scored(windows) == sorted(covered - unscored)


@pytest.mark.parametrize("first", [True, False])
def test_bos_of_the_whole_text_is_in_front_of_the_first_token_of_text(first: bool) -> None:
    """With --score-first no, the same tokens of the first window are scored with and without BOS."""
    text = TokenizedText([range(9)], [BOS], "", choose_protocol("paper", window=4, score_first=first))
    found = cut_text(text).windows
    assert [*map(tuple, found)] == [(BOS, 0, 1, 2), (3, 4, 5, 6)]
    assert [each.targets for each in found] == [(0, 1, 2) if first else (1, 2), (4, 5, 6)]
    assert cut_text(replace(text, documents=[range(2)])).windows[0].targets == ((0, 1) if first else (1,))


def test_a_window_of_which_no_token_is_scored_is_left_out() -> None:
    text = TokenizedText([range(4)], [BOS], "", choose_protocol("paper", window=2, score_first=False))
    assert [each.targets for each in cut_text(text).windows] == [(2,)]
    with pytest.raises(ModelError, match=r"^the text is too short: no token is scored \(give a longer text"):
        cut_text(replace(text, documents=[range(1)]))


@pytest.mark.parametrize(("name", "least"), [("default", 3), ("paper", 2), ("lm-eval", 2)])
def test_a_context_that_is_too_short_is_named(name: Any, least: int) -> None:
    text = TokenizedText([range(9)], [BOS], "", choose_protocol(name))
    assert cut_text(text, least).window_tokens == 2
    for context in range(1, least):
        with pytest.raises(ModelError, match=rf"^the model's context is too short .*: {context} tokens?"):
            cut_text(text, context)


@given(st.integers(40, 400), st.integers(2, 40), st.integers(1, 39))
def test_overlapping_windows_share_spans_as_long_as_a_window(tokens: int, window: int, stride: int) -> None:
    stride = min(stride, window)
    windows = cut_windows(range(tokens), [], Protocol(windows=None, window=window, stride=stride))
    counts = count_scored(windows)
    assert sum(counts) == len(list_scored(windows))
    if stride == window:
        assert counts == [window - 1] * len(windows)
    else:
        assert all(count >= window - 1 for count in counts)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=4), st.integers(1, 12))
def test_documents_are_scored_token_by_token(lengths: list[int], window: int) -> None:
    documents = [list(range(100 * number, 100 * number + length)) for number, length in enumerate(lengths)]
    if not any(lengths):
        with pytest.raises(ModelError, match="^the text is too short: 0 of the 1 token"):
            cut_documents(documents, BOS, window)
        return
    windows = cut_documents(documents, BOS, window)
    assert list_scored(windows) == [token for document in documents for token in document]
    for piece in windows:
        begin = piece.targets[0] % 100
        assert begin % window == 0 and len(piece) <= window
        before = piece[piece.first]
        assert before == (BOS if begin == 0 else piece.targets[0] - 1)
        assert len(piece) == window or begin == 0, "a later window is filled with text before it"


def test_a_text_is_split_at_titles() -> None:
    text = " \n = One = \n \n words \n = = Part = = \n more \n = Two words = \n end \n"
    assert split_documents(text) == [
        " = One = \n \n words \n = = Part = = \n more \n",
        " = Two words = \n end \n",
    ]
    assert split_documents("no titles = here =\n") == ["no titles = here =\n"]
    assert len(split_documents(text.replace("\n", "\r\n"))) == 2
    assert [count_words(text) for text in ("", "a", " a b\n\nc ", "a\u00a0b")] == [1, 1, 5, 2]


@given(st.text(alphabet="a \n=\u2028\r", max_size=30))
def test_rows_are_the_lines_of_the_file(raw: str) -> None:
    rows = split_rows(raw)
    wanted = [line + "\n" for line in raw.split("\n")[:-1]] + [raw.split("\n")[-1]] * (raw.split("\n")[-1] != "")
    assert rows == ["" if not re.search(r"\S", line) else line for line in wanted]
    assert join_rows(rows) == "\n\n".join(rows)


def test_protocols_take_options() -> None:
    assert choose_protocol() == Protocol()
    assert choose_protocol(windows=3, stride=256) == Protocol(windows=3, stride=256)
    paper = choose_protocol("paper", windows=40, window=2048, bos="no")
    assert (paper.windows, paper.window, paper.bos, paper.changed) == (40, 2048, "no", ("windows", "bos"))
    assert paper.resolve(2048, False).describe() == "paper with another windows and bos: without overlap, without BOS"
    once = choose_protocol("paper").resolve(2048, True)
    assert once.describe() == "paper: without overlap, BOS in front of the whole text"
    half = Protocol(stride=256, score_first=False).resolve(512, True)
    assert half.describe() == "default: stride 256, with BOS, first token not scored"
    whole = choose_protocol("lm-eval", window=1024).resolve(1024, True)
    assert whole.describe() == "lm-eval with another window: whole documents, every token scored"


@pytest.mark.parametrize("option", [{"windows": 4}, {"stride": 9}, {"bos": "no"}, {"score_first": False}], ids=str)
def test_an_option_that_contradicts_the_protocol_is_refused(option: dict[str, object]) -> None:
    name = next(iter(option)).replace("_", "-")
    with pytest.raises(ModelError, match=f"^protocol lm-eval decides this itself: --{name} "):
        choose_protocol("lm-eval", **option)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "error"),
    [
        ({"stride": 0}, ModelError),
        ({"stride": 513}, ModelError),
        ({"windows": 0}, ModelError),
        ({"window": 1}, ModelError),
        ({"window": "9"}, TypeError),
        ({"bos": True}, TypeError),
        ({"score_first": "yes"}, TypeError),
        ({"name": "mine"}, TypeError),
    ],
    ids=str,
)
def test_a_bad_option_is_refused(option: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        choose_protocol(**option)  # type: ignore[arg-type]

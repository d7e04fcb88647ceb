"""Declare the options that say how a text is cut into windows and scored, and convert their values."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal, TypedDict

import typer

from swsurgery.cli.output import Output

ProtocolOption = Annotated[
    Literal["default", "paper", "lm-eval"],
    typer.Option(
        help="How the text is cut and scored: default (16 windows of 512 tokens), paper (arXiv:2411.07191), or lm-eval "
        "(whole documents, with perplexity per word)."
    ),
]
WindowsOption = Annotated[
    int | None,
    typer.Option(min=1, help="Maximum number of windows of text; 16 by default. Verdicts and intervals need 8."),
]
WindowOption = Annotated[int | None, typer.Option(min=2, help="Tokens of text in each window; 512 by default.")]
StrideOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="Tokens from one window to the next, if windows overlap. Only new tokens of a window are scored."
    ),
]
BosOption = Annotated[
    Literal["auto", "yes", "no"] | None,
    typer.Option(help="Whether windows and prompts begin with BOS; auto: as the tokenizer does.", show_default=False),
]
ScoreFirstOption = Annotated[
    Literal["yes", "no"] | None,
    typer.Option(help="Whether the first token of a window is scored, if BOS is before it; yes by default."),
]

NAMES = ("windows", "window", "stride", "bos", "score_first")
"""The parameters that change a protocol."""


class ProtocolArguments(TypedDict, total=False):
    """Keyword arguments of every function of the library that measures on text."""

    protocol: Literal["default", "paper", "lm-eval"]
    windows: int | None
    window: int | None
    stride: int | None
    bos: Literal["auto", "yes", "no"] | None
    score_first: bool | None


def read_protocol(
    out: Output,
    protocol: Literal["default", "paper", "lm-eval"],
    windows: int | None,
    window: int | None,
    stride: int | None,
    bos: Literal["auto", "yes", "no"] | None,
    score_first: Literal["yes", "no"] | None,
) -> ProtocolArguments:
    """Return the options of a protocol as arguments of the library.

    Environment variables change the default protocol only: another one would no longer be what its name says.
    """
    found: ProtocolArguments = {
        "windows": windows,
        "window": window,
        "stride": stride,
        "bos": bos,
        "score_first": None if score_first is None else score_first == "yes",
    }
    if protocol == "default":
        return {"protocol": protocol, **found}
    kept = ProtocolArguments(protocol=protocol)
    for name in NAMES:
        if name in out.given:
            kept[name] = found[name]  # type: ignore[literal-required]  # NAMES contains the keys
    return kept


def list_words(arguments: ProtocolArguments, text: Path | None) -> list[str]:
    """Return the words of a command line that give these options. The default protocol states its windows always."""
    words: list[str] = []
    if arguments["protocol"] == "default":
        words += ["--windows", str(arguments.get("windows") or 16)]
    else:
        words += ["--protocol", arguments["protocol"]]
    values = {"window": arguments.get("window"), "stride": arguments.get("stride"), "bos": arguments.get("bos")}
    if arguments["protocol"] != "default":
        values = {"windows": arguments.get("windows")} | values
    for name, value in values.items():
        words += [] if value in (None, "auto") or (name, value) == ("window", 512) else [f"--{name}", str(value)]
    words += ["--score-first", "no"] if arguments.get("score_first") is False else []
    return words + (["--text", shlex.quote(text.name)] if text is not None else [])

"""Measure one edit by several protocols, and print a table in Markdown.

The edit sets the super weight of SmolLM2-135M-Instruct to zero. The text is not part of this repository.

    python benchmarks/protocols.py MODEL_DIRECTORY wiki.test.raw
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import swsurgery
from swsurgery.model.text import describe_measured_text

MANIFEST = "{{version: 1, base: {{path: {model}}}, edits: [{{op: zero, layer: 11, row: 507, col: 1229}}]}}\n"

ROWS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("(none)", {}),
    ("--bos yes", {"bos": "yes"}),
    ("--window 2048 --windows 4", {"window": 2048, "windows": 4}),
    ("--window 128 --windows 64", {"window": 128, "windows": 64}),
    ("--bos yes --score-first no", {"bos": "yes", "score_first": False}),
    ("--window 2048 --windows 4 --bos yes", {"window": 2048, "windows": 4, "bos": "yes"}),
    ("--stride 256 --windows 31", {"stride": 256, "windows": 31}),
    ("--protocol paper --windows 4", {"protocol": "paper", "windows": 4}),
)
"""The options of each row of the table, as words of a command line and as arguments. Windows without overlap cover the
same 8,192 tokens, except that the protocol "paper" joins the lines of the text with empty lines."""

DOCUMENTS = 2
"""Number of articles that are measured by the protocol lm-eval, which scores whole documents."""


def main() -> None:
    """Measure every row, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    text = arguments.text.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder, "zero.yaml")
        manifest.write_text(MANIFEST.format(model=arguments.model.resolve()))
        print(
            "| options | text | base | edited | ratio | 95% interval |\n| --- | --- | --- | --- | --- | --- |",
            flush=True,
        )
        for words, options in ROWS:
            print_row(words, swsurgery.compare([manifest], text=text, device=arguments.device, **options))
        few = cut_articles(text, DOCUMENTS)
        found = swsurgery.compare([manifest], text=few, device=arguments.device, protocol="lm-eval", window=2048)
        print_row("--protocol lm-eval --window 2048", found)


def cut_articles(text: str, count: int) -> str:
    """Return the text of the first articles of WikiText."""
    from swsurgery.model.cutting import split_documents

    return "".join(split_documents(text)[:count])


def print_row(words: str, found: Any) -> None:
    """Print one row of the table: the options, the text, both perplexities and their ratio."""
    base, edited = found.models
    interval = "" if edited.ratio_low is None else f"x{edited.ratio_low:.2f} to x{edited.ratio_high:.2f}"
    cells = [f"`{words}`" if words.startswith("-") else words, describe_measured_text(found)]
    cells += [f"{base.perplexity:.2f}", f"{edited.perplexity:.1f}", f"x{edited.ratio:.2f}", interval]
    print(f"| {' | '.join(cells)} |", flush=True)
    if base.word_perplexity is not None:
        ratio = edited.word_perplexity / base.word_perplexity
        cells = ["the same, per word", "", f"{base.word_perplexity:.2f}", f"{edited.word_perplexity:.1f}"]
        print(f"| {' | '.join([*cells, f'x{ratio:.2f}', ''])} |", flush=True)


if __name__ == "__main__":
    main()

"""Measure one edit by several protocols, print tables in Markdown, and write them into docs/protocols.md.

usage: python benchmarks/protocols.py MODEL TEXT [--device cpu|cuda] [--whole] [--write]

The edit sets the super weight of SmolLM2-135M-Instruct, the model in the directory MODEL, to zero. TEXT is the test set
of WikiText-2, wiki.test.raw or wiki.test.tokens, which is not part of this repository. Without `--whole`, each row
measures about 8,192 tokens. With it, each row but the first one measures the whole text, for which a CPU needs hours.
"""

from __future__ import annotations

import argparse
import tempfile
import textwrap
from pathlib import Path
from typing import Any

from page import describe_machine, replace_section

import swsurgery
from swsurgery.model.cutting import split_documents

MANIFEST = "{{version: 1, base: {{path: {model}}}, edits: [{{op: zero, layer: 11, row: 507, col: 1229}}]}}\n"
PAGE = Path(__file__).parents[1] / "docs" / "protocols.md"
TITLE = "Measured: one edit by several protocols"

TOKENS = 8192
"""Number of tokens of text that a row measures without `--whole`."""

ALL = 100_000
"""More windows than any text has here: with `--whole`, the value of `--windows`."""

DOCUMENTS = 2
"""Number of articles that the protocol lm-eval measures without `--whole`, because it scores whole documents."""

TOKENISED = (
    " The text is wiki.test.tokens, in which `<unk>` stands for rare words. The raw set has other perplexities, but "
    "the rows of one table can be compared."
)
"""A sentence for the page if the text is not the raw set."""

LENGTHS = (512, 2048)
"""Lengths of the windows in tokens."""

BEGINNINGS: dict[str, dict[str, Any]] = {
    "--bos no": {"bos": "no"},
    "--bos yes": {"bos": "yes"},
    "--bos yes --score-first no": {"bos": "yes", "score_first": False},
}
"""How windows begin, as words of a command line and as arguments."""


def main() -> None:
    """Measure every row, print the tables, and write them into the page if that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--whole", action="store_true", help="measure the whole text in every row but the first one")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/protocols.md")
    asked = parser.parse_args()
    text = asked.text.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder, "zero.yaml")
        manifest.write_text(MANIFEST.format(model=asked.model.resolve()))
        found = {}
        for words, options in list_rows(asked.whole):
            given = text if asked.whole or options.get("protocol") != "lm-eval" else cut_articles(text, DOCUMENTS)
            found[words] = swsurgery.compare([manifest], text=given, device=asked.device, **options)
            print("\n".join(format_row(words, found[words])), flush=True)
    lines = [describe_run(asked, text, found), "", *format_matrix(found, asked.whole), "", *format_table(found)]
    print("\n".join(lines))
    if asked.write:
        replace_section(TITLE, lines, PAGE)


def list_rows(whole: bool) -> list[tuple[str, dict[str, Any]]]:
    """Return the options of each row, as words of a command line and as arguments."""
    rows: list[tuple[str, dict[str, Any]]] = [("(none)", {})]
    for length in LENGTHS:
        for words, options in BEGINNINGS.items():
            name = name_row(length, words, whole)
            rows.append((name, {"window": length, "windows": count_windows(length, whole), **options}))
    windows = ALL if whole else TOKENS // 256 - 1
    rows.append((f"--stride 256 --windows {windows}", {"stride": 256, "windows": windows}))
    few: dict[str, Any] = {} if whole else {"windows": TOKENS // 2048}
    for words, options in ((" --bos no", {"bos": "no"}), (" --bos yes", {"bos": "yes"})):
        name = f"--protocol paper{'' if whole else ' --windows 4'}{words}"
        rows.append((name, {"protocol": "paper", **few, **options}))
    rows.append(("--protocol lm-eval --window 2048", {"protocol": "lm-eval", "window": 2048}))
    return rows


def count_windows(length: int, whole: bool) -> int:
    """Return the number of windows of a row with this length."""
    return ALL if whole else TOKENS // length


def name_row(length: int, words: str, whole: bool) -> str:
    """Return the options of a row of the first table, as words of a command line."""
    return f"--window {length} --windows {count_windows(length, whole)} {words}"


def cut_articles(text: str, count: int) -> str:
    """Return the text of the first articles of WikiText."""
    return "".join(split_documents(text)[:count])


def describe_run(asked: argparse.Namespace, text: str, found: dict[str, Any]) -> str:
    """Describe how the figures were made, as a paragraph."""
    one = found["(none)"]
    flags = "".join(f" {flag}" for flag, given in (("--whole", asked.whole), ("--write", asked.write)) if given)
    paragraph = (
        f"Made by `python benchmarks/protocols.py MODEL TEXT --device {asked.device}{flags}` in {one.dtype} "
        f"on {one.device}. {describe_machine()} The SHA-256 of the text begins with `{one.text_sha256[:12]}`. `paper` "
        "joins its lines with empty lines. `--windows` is a maximum. An interval needs at least eight windows."
        f"{TOKENISED if '<unk>' in text else ''}"
    )
    return textwrap.fill(paragraph, 120, break_long_words=False, break_on_hyphens=False)


def format_matrix(found: dict[str, Any], whole: bool) -> list[str]:
    """Return a table of the ratios by length of the windows and by how windows begin."""
    lines = [f"| tokens in a window | {' | '.join(f'`{words}`' for words in BEGINNINGS)} |"]
    lines.append("| --- |" + " --- |" * len(BEGINNINGS))
    for length in LENGTHS:
        cells = []
        for words in BEGINNINGS:
            edited = found[name_row(length, words, whole)].models[1]
            interval = format_interval(edited)
            cells.append(f"x{edited.ratio:.2f}" + (f" ({interval})" if interval else ""))
        lines.append(f"| {length:,} | {' | '.join(cells)} |")
    return lines


def format_table(found: dict[str, Any]) -> list[str]:
    """Return the table of all rows."""
    head = "| options | base | edited | ratio | 95% interval | windows | tokens scored |"
    return [head, "|" + " --- |" * 7, *(line for words, one in found.items() for line in format_row(words, one))]


def format_interval(edited: Any) -> str:
    """Return the 95% interval of a ratio as text; an empty string if there is none."""
    return "" if edited.ratio_low is None else f"x{edited.ratio_low:.2f} to x{edited.ratio_high:.2f}"


def format_row(words: str, found: Any) -> list[str]:
    """Return a row of the table, and one with the perplexity per word if the protocol counts words."""
    base, edited = found.models
    cells = [f"`{words}`" if words.startswith("-") else words, f"{base.perplexity:.2f}", f"{edited.perplexity:.1f}"]
    cells += [f"x{edited.ratio:.2f}", format_interval(edited), f"{found.windows:,}", f"{found.scored_tokens:,}"]
    lines = [f"| {' | '.join(cells)} |"]
    if base.word_perplexity is not None:
        ratio = edited.word_perplexity / base.word_perplexity
        lines.append(
            f"| the same, per word | {base.word_perplexity:.2f} | {edited.word_perplexity:.1f} | x{ratio:.2f} | | | |"
        )
    return lines


if __name__ == "__main__":
    main()

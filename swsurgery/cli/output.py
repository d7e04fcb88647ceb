"""Print the results of commands on stdout, as text, JSON, CSV or LaTeX."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from swsurgery.cli.progress_bar import Bar
from swsurgery.cli.streams import format_verdict, is_terminal, measure_terminal, open_standard_streams, say, write
from swsurgery.cli.table_formats import TableForm, render_table
from swsurgery.cli.tables import format_table
from swsurgery.errors import SwsurgeryError
from swsurgery.storage.result import Result, TableResult, name_schema

__all__ = [
    "Bar",
    "Output",
    "is_terminal",
    "open_standard_streams",
    "print_json",
    "print_table",
    "print_text",
    "say",
]


R = TypeVar("R", bound=Result)


@dataclass
class Output:
    """How a command prints: the values of --json, --quiet and --debug, which every command has.

    `command` is the name of the command, and `given` contains the names of its other parameters that the user gave.
    `variables` maps the environment variables from which the command took values to these values.
    `printed` is True once a JSON document was printed. `main` creates the Output, and the command sets its fields as
    soon as the command line is parsed. `table` is the form that --csv or --latex asks for, or None. `began` is the time
    in seconds of the monotonic clock at which the command began.
    """

    json: bool = False
    quiet: bool = False
    debug: bool = False
    given: frozenset[str] = frozenset()
    variables: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    printed: bool = False
    table: TableForm | None = None
    began: float = field(default_factory=time.monotonic)
    _bar: Bar | None = None

    def print_result(self, result: R, show: Callable[[R], None]) -> None:
        """Print a result on stdout: as one JSON document, as CSV or LaTeX, or as text by calling `show`.

        Raises SwsurgeryError if a table was requested and the result is none.
        """
        if self.json:
            self.print_document(result.to_json())
        elif self.table is not None:
            if not isinstance(result, TableResult):
                raise self.make_table_error()
            write(render_table(self.table, result.list_columns(), result.to_rows()))
        else:
            show(result)

    def make_table_error(self) -> SwsurgeryError:
        """Make the error for a table that was requested of a result that is none."""
        return SwsurgeryError(f"--{self.table} needs a table, but this result is none", remedy="give --json instead")

    def print_document(self, document: Mapping[str, object]) -> None:
        """Print one JSON document on stdout, with the name of its schema, such as "swsurgery/diff/1"."""
        self.printed = True
        print_json({**document, "schema": name_schema(self.command)})

    def note(self, line: str) -> None:
        """Print one message on stderr, unless --quiet was given."""
        if not self.quiet:
            say(line)

    def make_reporter(self) -> Bar:
        """Make a Reporter that draws a progress bar and prints notes, or nothing if --quiet was given."""
        self._bar = Bar(self.quiet, self.began)
        return self._bar

    def end_progress(self) -> None:
        """Remove the progress bar of a task that did not end, because an error stopped it."""
        if self._bar is not None:
            self._bar.close()


def print_json(document: object) -> None:
    """Print one strict JSON document on stdout. Raises ValueError for NaN and infinities."""
    write(json.dumps(document, indent=2, sort_keys=True, allow_nan=False) + "\n")


def print_text(text: str) -> None:
    """Print text on stdout, with a newline at the end. On a terminal, the words of verdicts are coloured."""
    write(format_verdict(text if text.endswith("\n") else text + "\n"))


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table on stdout, with columns of numbers aligned to the right.

    On a terminal, the table fits its width. Otherwise each row is one line, however long.
    """
    for line in format_table(header, list(rows), measure_terminal()):
        write(line + "\n")

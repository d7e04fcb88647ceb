"""Run lint and verify for the GitHub Action, which calls `python -I -m swsurgery.cli.action DIRECTORY`.

The environment contains the action's inputs. Each manifest and the checkpoint are read once. The findings are written
to stdout as workflow commands, which become annotations, and to three files in DIRECTORY: `swsurgery.sarif`,
`summary.md` (the job summary, in Markdown) and `outputs` (the outputs of the action, one `name=value` per line).
"""

from __future__ import annotations

import glob
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from swsurgery._version import __version__
from swsurgery.cli import output
from swsurgery.errors import SwsurgeryError, escape_control, pluralise
from swsurgery.storage import filesystem
from swsurgery.verifying import formats
from swsurgery.verifying.findings import Finding
from swsurgery.verifying.formats import FindingReport

if TYPE_CHECKING:
    from swsurgery.checkpoint.weight_files import Weights

MAX_SUMMARY_ROWS = 50
"""Maximum number of findings in one table of the job summary, and maximum number of failures in its list."""

MAX_CELL = 500
"""Maximum number of characters of text in a table cell, before escaping.

Escaping makes up to ten bytes of one character, and GitHub limits a job summary to 1 MiB.
"""


def run(inputs: Mapping[str, str], directory: Path) -> int:
    """Run the checks that `inputs` request, and write the three files to `directory`. Return the exit code.

    0: no check found an error, or FAIL_ON_FINDINGS is false. 1: a check found an error. 2: a check could not be made.
    """
    reports: list[FindingReport] = []
    failures: list[str] = []
    fail = True
    try:
        fail = _read_switch(inputs, "FAIL_ON_FINDINGS", True)
        steps = _choose_steps(inputs)
        _read_switch(inputs, "SUMMARY", True)
    except SwsurgeryError as error:
        failures += error.faults
        steps = []
    for step in steps:
        try:
            reports.append(step())
        except SwsurgeryError as error:
            failures += error.faults
    for report in reports:
        output.print_text(formats.render(report, "github"))
    for failure in failures:
        output.print_text(f"::error title=swsurgery::{_escape_data(failure)}")
    ok = not failures and all(report.ok for report in reports)
    sarif = directory / "swsurgery.sarif"
    filesystem.replace_file(sarif, _render_sarif(reports).encode())
    outputs = {"ok": str(ok).lower(), "findings": sum(report.errors for report in reports), "sarif": sarif}
    filesystem.replace_file(directory / "outputs", "".join(f"{k}={v}\n" for k, v in outputs.items()).encode())
    if inputs.get("SUMMARY") != "false":
        filesystem.replace_file(directory / "summary.md", render_summary(reports, failures).encode())
    code = 2 if failures else max((report.exit_code for report in reports), default=0)
    return 0 if code == 1 and not fail else code


def _choose_steps(inputs: Mapping[str, str]) -> list[Callable[[], FindingReport]]:
    """Return the requested checks. Raises SwsurgeryError for invalid inputs, or if no check is requested."""
    from swsurgery.hub import parse_directory
    from swsurgery.verifying.lint import lint
    from swsurgery.verifying.verify import verify

    steps: list[Callable[[], FindingReport]] = []
    strict, known = (_read_switch(inputs, name, False) for name in ("STRICT", "KNOWN"))
    finite, values, complete = (_read_switch(inputs, name, False) for name in ("FINITE", "VALUES", "COMPLETE"))
    if lines := [line.strip() for line in inputs.get("LINT", "").splitlines() if line.strip()]:
        paths = [path for line in lines for path in _expand(line)]
        steps.append(lambda: lint(paths, strict=strict))
    checkpoint, base, model = (inputs.get(name) or None for name in ("CHECKPOINT", "BASE", "MODEL"))
    files = {name: Path(inputs[name]) for name in ("MANIFEST", "SIGNATURE", "PUBLIC_KEY") if inputs.get(name)}
    weights = _choose_weights(inputs)
    variant = inputs.get("VARIANT") or None
    if checkpoint:
        where = parse_directory(checkpoint)
        steps.append(
            lambda: verify(
                where,
                manifest=files.get("MANIFEST"),
                base=base,
                known=known,
                model=model,
                finite=finite,
                complete=complete,
                values=values,
                signature=files.get("SIGNATURE"),
                public_key=files.get("PUBLIC_KEY"),
                weights=weights,
                variant=variant,
                strict=strict,
            )
        )
    elif base or model or files or known or finite or values or complete or weights or variant:
        raise SwsurgeryError("an input of verify is set, but not the input `checkpoint`", "", "set `checkpoint`")
    if not steps:
        raise SwsurgeryError("nothing to do: set the input `checkpoint`, `lint`, or both")
    return steps


def _read_switch(inputs: Mapping[str, str], name: str, default: bool) -> bool:
    word = inputs.get(name) or str(default).lower()
    if word not in ("true", "false"):
        raise SwsurgeryError(f"the input `{name.lower().replace('_', '-')}` must be true or false, but is {word}")
    return word == "true"


def _choose_weights(inputs: Mapping[str, str]) -> Weights | None:
    match inputs.get("WEIGHTS", ""):
        case "":
            return None
        case "index":
            return "index"
        case "single":
            return "single"
        case word:
            raise SwsurgeryError(f"the input `weights` must be index or single, but is {word}")


def _expand(line: str) -> list[Path]:
    """Return the files that match a line of the input `lint`. Raises SwsurgeryError if no file matches."""
    found = [line] if os.path.lexists(line) else sorted(glob.glob(line, recursive=True))
    if not found:
        raise SwsurgeryError("no manifest matches", line)
    return [Path(name) for name in found]


def _render_sarif(reports: list[FindingReport]) -> str:
    """Return one SARIF document that contains a run for each report."""
    documents = [json.loads(formats.render(report, "sarif")) for report in reports]
    empty = {"$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0"}
    first = documents[0] if documents else empty
    return json.dumps(first | {"runs": [r for d in documents for r in d["runs"]]}, indent=2, sort_keys=True) + "\n"


def _escape_data(text: str) -> str:
    """Escape the text of a workflow command, in which %, CR, LF and ##[ have a meaning."""
    return escape_control(text).replace("%", "%25").replace("##[", r"\x23#[")


# The job summary ---------------------------------------------------------------------------------------------------


def render_summary(reports: list[FindingReport], failures: list[str]) -> str:
    """Return the job summary in Markdown: each report with its findings, then the checks that could not be made."""
    lines = ["### swsurgery", ""]
    for report in reports:
        lines += [f"**{report.command} {_escape_cell(report.subject)}: {_render_verdict(report)}**", ""]
        said = [report.headline] if report.headline else []
        lines += [f"- {_escape_cell(' '.join(line.split()))}" for line in (*said, *report.checked.splitlines())]
        if report.findings:
            lines += ["", "| level | rule | where | what |", "|---|---|---|---|"]
            lines += [_render_row(finding) for finding in report.findings[:MAX_SUMMARY_ROWS]]
            if len(report.findings) > MAX_SUMMARY_ROWS:
                lines.append(f"| | | | and {len(report.findings) - MAX_SUMMARY_ROWS} more |")
        lines.append("")
    if failures:
        lines += [
            "**could not be checked**",
            "",
            *(f"- {_escape_cell(failure)}" for failure in failures[:MAX_SUMMARY_ROWS]),
            "",
        ]
    return "\n".join([*lines, f"swsurgery {__version__}", ""])


def _render_verdict(report: FindingReport) -> str:
    if report.errors:
        return f"no, {pluralise(report.errors, 'finding')}"
    return "yes" if report.ok else "nothing could be compared"


def _render_row(finding: Finding) -> str:
    place = [part for part in (finding.file, finding.tensor) if part]
    if finding.index is not None:
        place.append(str(list(finding.index)))
    if finding.manifest is not None:
        place.append(":".join(str(p) for p in (finding.manifest, finding.line, finding.column) if p is not None))
    return f"| {finding.level} | {finding.rule} | {_escape_cell(' '.join(place))} | {_escape_cell(finding.message)} |"


def _escape_cell(text: str) -> str:
    """Return text as HTML code in which Markdown, HTML, mentions and links have no effect.

    Every character except letters, digits, spaces and dots becomes a character reference such as `&#42;`, which
    Markdown does not interpret as syntax (CommonMark 0.31, section 2.5).
    """
    plain = escape_control(text[: MAX_CELL + 1])
    if len(plain) > MAX_CELL:
        plain = f"{plain[:MAX_CELL]} ..."
    escaped = "".join(c if c.isalnum() or c in " ." else f"&#{ord(c)};" for c in plain)
    return f"<code>{escaped}</code>" if escaped else ""


if __name__ == "__main__":
    sys.exit(run(os.environ, Path(sys.argv[1])))

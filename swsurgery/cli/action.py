"""`python -I -m swsurgery.cli.action DIRECTORY` is what the GitHub Action runs: it lints, verifies and reports.

The action's inputs come in the environment. Each manifest and the checkpoint are read once, and what was found is said
four times: as workflow commands on stdout, which become annotations, and in DIRECTORY as `swsurgery.sarif`,
`summary.md` (Markdown for the job's page) and `outputs` (the action's outputs, one `name=value` a line).
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
from swsurgery.checkpoint.opening import held
from swsurgery.cli import output
from swsurgery.errors import SwsurgeryError, printable
from swsurgery.progress import Silent
from swsurgery.storage import filesystem
from swsurgery.verifying import formats
from swsurgery.verifying.findings import Finding
from swsurgery.verifying.formats import FindingReport

if TYPE_CHECKING:
    from swsurgery.verifying.verify import Question

MAX_ROWS = 50
MAX_CELL = 500
"""A job summary may have 1 MiB; a cell grows by six at most where every character is escaped."""


def run(inputs: Mapping[str, str], directory: Path) -> int:
    """Do what the inputs ask for and write the three files; returns the exit code: 0 yes, 1 no, 2 bad input."""
    reports: list[FindingReport] = []
    failures: list[str] = []
    fail = True
    try:
        fail = _switch(inputs, "FAIL_ON_FINDINGS", True)
        steps = _steps(inputs)
        _switch(inputs, "SUMMARY", True)
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
        output.print_text(f"::error title=swsurgery::{_data(failure)}")
    ok = not failures and all(report.ok for report in reports)
    sarif = directory / "swsurgery.sarif"
    filesystem.replace_file(sarif, _sarif(reports).encode())
    outputs = {"ok": str(ok).lower(), "findings": sum(report.errors for report in reports), "sarif": sarif}
    filesystem.replace_file(directory / "outputs", "".join(f"{k}={v}\n" for k, v in outputs.items()).encode())
    if inputs.get("SUMMARY") != "false":
        filesystem.replace_file(directory / "summary.md", summary(reports, failures).encode())
    code = 2 if failures else max((report.exit_code for report in reports), default=0)
    return 0 if code == 1 and not fail else code


def _steps(inputs: Mapping[str, str]) -> list[Callable[[], FindingReport]]:
    """What is to be done. Raises SwsurgeryError where the inputs do not say so plainly, or ask for nothing."""
    from swsurgery.hub import directory
    from swsurgery.verifying.lint import lint
    from swsurgery.verifying.verify import Question

    steps: list[Callable[[], FindingReport]] = []
    strict, known, finite = (_switch(inputs, name, False) for name in ("STRICT", "KNOWN", "FINITE"))
    if lines := [line.strip() for line in inputs.get("LINT", "").splitlines() if line.strip()]:
        paths = [path for line in lines for path in _matching(line)]
        steps.append(lambda: lint(paths, strict))
    checkpoint, base, model = (inputs.get(name) or None for name in ("CHECKPOINT", "BASE", "MODEL"))
    files = {name.lower(): Path(inputs[name]) for name in ("MANIFEST", "SIGNATURE", "PUBLIC_KEY") if inputs.get(name)}
    weights = inputs.get("WEIGHTS") or None
    if weights not in (None, "index", "single"):
        raise SwsurgeryError("the input weights is index or single", "", f"not {weights}")
    variant = inputs.get("VARIANT") or None
    if checkpoint:
        question = Question(
            base=base,
            known=known or model is not None,
            model=model,
            finite=finite,
            weights=weights,
            variant=variant,
            **files,
        )
        where = directory(checkpoint)
        steps.append(lambda: _proved(where, question))
    elif base or model or files or known or finite or weights or variant:
        raise SwsurgeryError("only the inputs lint and strict mean something without the input checkpoint")
    if not steps:
        raise SwsurgeryError("nothing to do: give the input checkpoint, the input lint, or both")
    return steps


def _proved(checkpoint: Path, question: Question) -> FindingReport:
    from swsurgery.verifying.verify import prove

    with held(checkpoint) as where:
        return prove(where, question, Silent()).report(str(checkpoint))


def _switch(inputs: Mapping[str, str], name: str, default: bool) -> bool:
    word = inputs.get(name) or str(default).lower()
    if word not in ("true", "false"):
        raise SwsurgeryError(f"the input {name.lower().replace('_', '-')} is true or false", "", f"not {word}")
    return word == "true"


def _matching(line: str) -> list[Path]:
    """The files that a line of the input lint names. Raises SwsurgeryError for none: a check of nothing is no check."""
    found = [line] if os.path.lexists(line) else sorted(glob.glob(line, recursive=True))
    if not found:
        raise SwsurgeryError("no manifest matches", line)
    return [Path(name) for name in found]


def _sarif(reports: list[FindingReport]) -> str:
    """One document with a run for each report."""
    documents = [json.loads(formats.render(report, "sarif")) for report in reports]
    first = documents[0] if documents else {"$schema": "https://json.schemastore.org/sarif-2.1.0.json",
                                            "version": "2.1.0"}  # fmt: skip
    return json.dumps(first | {"runs": [r for d in documents for r in d["runs"]]}, indent=2, sort_keys=True) + "\n"


def _data(text: str) -> str:
    """Of a workflow command: its escapes are of %, CR and LF, and printable text has neither of the latter."""
    return printable(text).replace("%", "%25").replace("##[", r"\x23#[")


# The job summary ---------------------------------------------------------------------------------------------------


def summary(reports: list[FindingReport], failures: list[str]) -> str:
    """Markdown: what was proved, then a table of what was found, then what could not be done."""
    lines = ["### swsurgery", ""]
    for report in reports:
        lines += [f"**{report.command} {_cell(report.subject)}: {_verdict(report)}**", ""]
        lines += [f"- {_cell(' '.join(line.split()))}" for line in report.checked.splitlines()]
        if report.findings:
            lines += ["", "| level | rule | where | what |", "|---|---|---|---|"]
            lines += [_row(finding) for finding in report.findings[:MAX_ROWS]]
            if len(report.findings) > MAX_ROWS:
                lines.append(f"| | | | and {len(report.findings) - MAX_ROWS} more |")
        lines.append("")
    if failures:
        lines += ["**could not be checked**", "", *(f"- {_cell(failure)}" for failure in failures[:MAX_ROWS]), ""]
    return "\n".join([*lines, f"swsurgery {__version__}", ""])


def _verdict(report: FindingReport) -> str:
    if report.errors:
        return f"no, {report.errors} finding{'s' if report.errors > 1 else ''}"
    return "yes" if report.ok else "nothing could be compared"


def _row(finding: Finding) -> str:
    place = [part for part in (finding.file, finding.tensor) if part]
    if finding.index is not None:
        place.append(str(list(finding.index)))
    if finding.manifest is not None:
        place.append(":".join(str(p) for p in (finding.manifest, finding.line, finding.column) if p is not None))
    return f"| {finding.level} | {finding.rule} | {_cell(' '.join(place))} | {_cell(finding.message)} |"


def _cell(text: str) -> str:
    """Text as code, in which nothing is Markdown, HTML, a mention or a link: every character but letters, digits and
    blanks is a reference, which Markdown does not read as its own (CommonMark 0.31, section 2.5)."""
    plain = printable(text[: MAX_CELL + 1])
    if len(plain) > MAX_CELL:
        plain = f"{plain[:MAX_CELL]} ..."
    escaped = "".join(c if c.isalnum() or c in " ." else f"&#{ord(c)};" for c in plain)
    return f"<code>{escaped}</code>" if escaped else ""


if __name__ == "__main__":
    sys.exit(run(os.environ, Path(sys.argv[1])))

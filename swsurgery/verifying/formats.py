"""Render findings as text for people, and as JSON, JUnit XML, SARIF and GitHub workflow commands for programs.

Pure functions from values to text. Any name may come from a hostile file, so names are escaped: they cannot break a
line, an element or a command, and cannot control a terminal. Sources: SARIF 2.1.0 (OASIS standard), XML 1.0 (section
2.2, Char), GitHub's documentation of workflow commands, and the escaping in GitHub's runner.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, ClassVar, Literal, get_args
from urllib.parse import quote
from xml.etree import ElementTree

from swsurgery._version import __version__
from swsurgery.errors import escape_control, pluralise
from swsurgery.storage.result import TableResult, name_schema
from swsurgery.verifying.findings import RULES, Finding
from swsurgery.verifying.rule_help import HELP, RULE_PAGES, find_source, make_help_address

ReportFormat = Literal["text", "json", "junit", "sarif", "github"]
REPORT_FORMATS: tuple[ReportFormat, ...] = get_args(ReportFormat)


@dataclass(frozen=True, repr=False)
class FindingReport(TableResult):
    """Findings of one command about one checkpoint or manifest.

    `subject` is the path as the user gave it; paths in the output begin with it. `command` is a name such as "verify".
    `checked` is text with one line for each fact that was proved. `details` are further fields of the JSON document.
    `headline` is the answer as one line of text; if it is "", the number of findings is printed instead.
    `rules` are the names of the rules that were checked. `decided` is False if nothing could be compared: the answer is
    then neither "yes" nor "no", and `reason` explains it. If `strict` is True, a warning makes the answer "no", as an
    error does.
    """

    subject: str
    command: str = field(repr=False)
    findings: tuple[Finding, ...]
    checked: str = field(default="", repr=False)
    details: dict[str, Any] = field(default_factory=dict, repr=False)
    rules: tuple[str, ...] = field(default=(), repr=False)
    decided: bool = True
    headline: str = field(default="", repr=False, kw_only=True)
    strict: bool = field(default=False, repr=False, kw_only=True)
    reason: str = field(default="", repr=False, kw_only=True)
    shown: ClassVar[tuple[str, ...]] = ("ok",)

    @property
    def errors(self) -> int:
        """Number of findings that make the answer "no"."""
        return sum(self.strict or f.level == "error" for f in self.findings)

    @property
    def ok(self) -> bool:
        """True if the answer is "yes": something could be compared, and no finding is an error."""
        return self.decided and not self.errors

    @property
    def exit_code(self) -> int:
        """Exit code of the command: 0 for "yes", 1 for "no", 2 if undecided."""
        return 1 if self.errors else 0 if self.decided else 2

    def to_json(self) -> dict[str, Any]:
        """Return the document that the command prints with --json."""
        return {
            **self.details,
            "ok": self.ok,
            "decided": self.decided,
            "subject": self.subject,
            **({"answer": self.headline} if self.headline else {}),
            "findings": [f.to_json() for f in self.findings],
            "rules": list(_list_rules(self)),
            "swsurgery_version": __version__,
        }

    def to_rows(self) -> list[dict[str, object]]:
        """Return one row per finding: its rule, level, place and message."""
        rows = [f.to_json() for f in self.findings]
        return [{**row, **{name: row.get(name) for name in ("manifest", "line", "column")}} for row in rows]


def render(report: FindingReport, format: ReportFormat) -> str:
    """Render the report in one of REPORT_FORMATS, as text that ends with a newline."""
    return _RENDERERS[format](report)


# For people ---------------------------------------------------------------------------------------------------------


def _list_undecided(report: FindingReport) -> list[Finding]:
    """Return the finding that reports for programs contain if the answer is neither "yes" nor "no"; [] otherwise.

    Readers of JUnit and SARIF take a report without an error as "yes".
    """
    if report.decided or report.errors:
        return []
    return [Finding("undecided", report.reason or "nothing could be compared")]


def _render_text(report: FindingReport) -> str:
    lines = [_escape_plain(report.headline)] if report.headline else []
    for finding in report.findings:
        word = "FINDING" if report.strict or finding.level == "error" else "warning"
        lines.append(f"{word}   {finding.rule}: {_render_sentence(report, finding)}")
    if report.errors and not report.headline:
        lines.append(f"{pluralise(report.errors, 'finding')} in {_escape_plain(report.subject)}")
    lines += _describe_checked(report)
    if not lines:
        lines.append(f"{_escape_plain(report.subject)}: nothing was found")
    return "\n".join(lines) + "\n"


def _render_sentence(report: FindingReport, finding: Finding) -> str:
    """Render a finding as one line without control characters: place, message, and position in the manifest."""
    place = " ".join(part for part in (finding.file, _format_scalar(finding)) if part) or report.subject
    if finding.manifest is not None and finding.file is None:
        return _escape_plain(f"{_format_position(finding)}: {finding.message}")
    asked = f" ({_format_position(finding)})" if finding.manifest is not None else ""
    return _escape_plain(f"{place}: {finding.message}{asked}")


def _format_scalar(finding: Finding) -> str:
    index = "" if finding.index is None else str(list(finding.index))
    return f"{finding.tensor or ''}{index}"


def _format_position(finding: Finding) -> str:
    numbers = (n for n in (finding.line, finding.column) if n is not None)
    return ":".join([str(finding.manifest), *map(str, numbers)])


def _describe_checked(report: FindingReport) -> list[str]:
    return [_escape_plain(line) for line in report.checked.split("\n")] if report.checked else []


def _list_facts(report: FindingReport) -> list[str]:
    """Return the lines of the answer and of what was proved."""
    return ([_escape_plain(report.headline)] if report.headline else []) + _describe_checked(report)


def _escape_plain(text: str) -> str:
    """Escape text to one line that GitHub's log does not read as a workflow command.

    Such a command begins with `::` at the start of a line, or with `##[` anywhere.
    """
    line = escape_control(text).replace("##[", r"\x23#[")
    return r"\x3a" + line.lstrip()[1:] if line.lstrip().startswith("::") else line


# For scripts --------------------------------------------------------------------------------------------------------


def _render_json(report: FindingReport) -> str:
    return _dump({**report.to_json(), "schema": name_schema(report.command)})


def _dump(document: Any) -> str:
    """Render strict JSON in ASCII, in which no name can control a terminal or GitHub's log."""
    text = json.dumps(document, indent=2, sort_keys=True, allow_nan=False)
    return text.replace("##[", r"\u0023#[").replace("\x7f", r"\u007f") + "\n"


def _list_rules(report: FindingReport) -> tuple[str, ...]:
    """List the name of every rule that was checked or broken, in the order of RULES."""
    named = {*report.rules, *(f.rule for f in report.findings)}
    return tuple(name for name in RULES if name in named)


# JUnit --------------------------------------------------------------------------------------------------------------


def _render_junit(report: FindingReport) -> str:
    """Render one test case for each rule that was checked. Its text has one line for each finding of the rule."""
    suites = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(
        suites, "testsuite", name=f"swsurgery {report.command} {_escape_plain(report.subject)}"
    )
    failed = 0
    for name in _list_rules(report) or ("all",):
        case = ElementTree.SubElement(suite, "testcase", classname=f"swsurgery.{report.command}", name=name, time="0")
        sentences = [_render_sentence(report, f) for f in report.findings if f.rule == name]
        if not sentences:
            continue
        if report.strict or RULES[name].level == "error":
            failed += 1
            failure = ElementTree.SubElement(case, "failure", type=name, message=RULES[name].meaning)
            failure.text = "\n".join(sentences)
        else:
            ElementTree.SubElement(case, "system-out").text = "\n".join(sentences)
    undecided = _list_undecided(report)
    for finding in undecided:
        case = ElementTree.SubElement(
            suite, "testcase", classname=f"swsurgery.{report.command}", name="decided", time="0"
        )
        ElementTree.SubElement(case, "error", type=finding.rule, message=_escape_plain(finding.message))
    counts = {"tests": str(len(suite)), "failures": str(failed), "errors": str(len(undecided)), "skipped": "0"}
    suites.attrib.update(counts)
    suite.attrib.update(counts, time="0")
    if facts := _list_facts(report):
        output = ElementTree.SubElement(suite, "system-out")
        output.text = "\n".join(facts)
    ElementTree.indent(suites)
    body = ElementTree.tostring(suites, encoding="unicode").replace("##[", "&#35;#[")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{body}\n'


# SARIF --------------------------------------------------------------------------------------------------------------


def _render_sarif(report: FindingReport) -> str:
    names = list(RULES)
    seen: Counter[str] = Counter()
    results = []
    for finding in [*report.findings, *_list_undecided(report)]:
        identity = json.dumps([finding.rule, finding.file, finding.tensor, finding.index])
        seen[identity] += 1
        fingerprint = hashlib.sha256(f"{identity} {seen[identity]}".encode()).hexdigest()
        location: dict[str, Any] = {
            "physicalLocation": {"artifactLocation": {"uri": _make_uri(_choose_path(report, finding))}}
        }
        if finding.line is not None:
            region = {"startLine": finding.line} | ({"startColumn": finding.column} if finding.column else {})
            location["physicalLocation"]["region"] = region
        if finding.tensor is not None:
            location["logicalLocations"] = [
                {"fullyQualifiedName": _escape_plain(_format_scalar(finding)), "kind": "member"}
            ]
        results.append(
            {
                "ruleId": finding.rule,
                "ruleIndex": names.index(finding.rule),
                "level": finding.level,
                "message": {"text": _escape_literal(_render_sentence(report, finding))},
                "locations": [location],
                "partialFingerprints": {"swsurgeryFinding/v1": fingerprint},
            }
        )
    driver = _describe_driver(find_source())
    run = {
        "tool": {"driver": driver},
        "automationDetails": {"id": f"swsurgery/{report.command}/"},
        "columnKind": "unicodeCodePoints",
        "invocations": [{"executionSuccessful": report.decided or bool(report.errors)}],
        "results": results,
    }
    return _dump({"$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0", "runs": [run]})


def _describe_driver(source: str | None) -> dict[str, Any]:
    """Describe swsurgery and its rules.

    `source` is the public address of the repository. If it is None, the addresses of pages are left out, because SARIF
    requires absolute ones (2.1.0, section 3.49.12). The help of each rule names its page in any case.
    """
    rules = [
        {
            "id": rule.name,
            "shortDescription": {"text": rule.meaning},
            "help": {
                "text": f"{rule.meaning} {HELP[rule.name]} See {RULE_PAGES[rule.command]}.",
                "markdown": f"{rule.meaning}\n\n**What to do:** {HELP[rule.name]} See {RULE_PAGES[rule.command]}.",
            },
            **({"helpUri": make_help_address(rule, source)} if source else {}),
            "defaultConfiguration": {"level": rule.level},
        }
        for rule in RULES.values()
    ]
    driver = {"name": "swsurgery", "version": __version__, "semanticVersion": __version__, "rules": rules}
    return driver | ({"informationUri": source} if source else {})


def _escape_literal(text: str) -> str:
    """Escape the placeholders ({0}) and links ([text](target)) that SARIF messages may contain."""
    return text.replace("{", "{{").replace("}", "}}").replace("](", "] (")


def _make_uri(path: str) -> str:
    """Render a path as a URI reference: a relative path unchanged, an absolute path as file://."""
    encoded = quote(path.encode("utf-8", "surrogatepass"), safe="/")
    return f"file://{encoded}" if path.startswith("/") else encoded


def _choose_path(report: FindingReport, finding: Finding) -> str:
    """Return the path that a finding concerns: its manifest, or else its file, or else the checked checkpoint."""
    if finding.manifest is not None:
        return finding.manifest
    return str(PurePosixPath(report.subject) / finding.file) if finding.file else report.subject


# GitHub -------------------------------------------------------------------------------------------------------------


def _render_github(report: FindingReport) -> str:
    """Render a workflow command for each finding, and a notice that lists what was proved if the answer is "yes"."""
    lines = []
    for finding in report.findings:
        properties = {
            "file": _choose_path(report, finding),
            "line": finding.line,
            "col": finding.column,
            "title": f"swsurgery {report.command}: {finding.rule}",
        }
        given = ",".join(
            f"{key}={_escape_property(str(value))}" for key, value in properties.items() if value is not None
        )
        lines.append(f"::{finding.level} {given}::{_escape_data(_render_sentence(report, finding))}")
    if report.ok:
        proved = "; ".join(" ".join(line.split()) for line in _list_facts(report)) or "nothing was found"
        lines.append(
            f"::notice title=swsurgery {report.command}::{_escape_data(_escape_plain(f'{report.subject}: {proved}'))}"
        )
    for finding in _list_undecided(report):
        message = _escape_data(_escape_plain(f"{report.subject}: {finding.message}"))
        lines.append(f"::error title=swsurgery {report.command}::{message}")
    return "\n".join(lines) + "\n"


def _escape_data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _escape_property(text: str) -> str:
    return _escape_data(_escape_plain(text)).replace(":", "%3A").replace(",", "%2C")


_RENDERERS: dict[str, Callable[[FindingReport], str]] = {
    "text": _render_text,
    "json": _render_json,
    "junit": _render_junit,
    "sarif": _render_sarif,
    "github": _render_github,
}

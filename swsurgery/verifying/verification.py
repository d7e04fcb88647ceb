"""Define the result of `verify`: the findings of all checks, and the text and JSON that describe what was proved."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swsurgery.errors import escape_control, list_some, pluralise
from swsurgery.hub import RemoteTree
from swsurgery.verifying.against_record import RecordProof
from swsurgery.verifying.findings import Finding
from swsurgery.verifying.formats import FindingReport

if TYPE_CHECKING:  # each of these modules does one optional check and is imported only for this check
    from swsurgery.manifest.load import LoadedManifest
    from swsurgery.verifying.against_known import Survival
    from swsurgery.verifying.against_protected import Guard
    from swsurgery.verifying.complete import Completeness
    from swsurgery.verifying.identification import Identification
    from swsurgery.verifying.value_findings import ValueReport


MAX_LISTED_FILES = 3
"""Maximum number of files that a line of the text names."""


@dataclass(frozen=True, repr=False)
class Verification(FindingReport):
    """The findings of all checks. `ok` is True if no finding is an error and something could be compared.

    `record` is the proof from the checkpoint's record, or None if it has no record. `known` contains the states of the
    known super weights, and `identified` says which model they are of and how it was identified; both are None if they
    were not requested. `base` is the location of the base that was compared, or None. `values` contains the figures of
    all tensors, or is None if they were not requested. `complete` is the comparison with config.json,
    or None if it was not requested.
    """

    record: RecordProof | None = None
    known: Survival | None = field(default=None, repr=False)
    base: Path | RemoteTree | None = None
    values: ValueReport | None = field(default=None, repr=False)
    identified: Identification | None = None
    complete: Completeness | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Proof:
    """Result of all checks: the findings, and the result of each check.

    `verification` is None if the checkpoint has no record. `base` is the location of the base that was compared.
    `notes` describe the checkpoint's files and do not change the answer. `unidentified` explains why the known model
    could not be identified; it is "" if it was identified or not requested.
    """

    findings: tuple[Finding, ...]
    rules: tuple[str, ...]
    verification: RecordProof | None = None
    survival: Survival | None = None
    manifest: LoadedManifest | None = None
    base: Path | RemoteTree | None = None
    finite: bool = False
    signature: Path | None = None
    notes: tuple[str, ...] = ()
    guard: Guard | None = None
    values: ValueReport | None = None
    identified: Identification | None = None
    complete: Completeness | None = None
    strict: bool = False
    unidentified: str = ""

    @property
    def decided(self) -> bool:
        """False if known super weights or completeness were requested and could not be compared."""
        return not self.explain_undecided()

    def explain_undecided(self) -> str:
        """Explain why known super weights or completeness could not be compared; "" if they were, or not requested."""
        if self.unidentified:
            return self.unidentified
        if self.survival is not None and not self.survival.coordinates:
            what = f"no complete coordinate (row and column) of {self.survival.model} is known"
            return f"{what} (find them with swsurgery scan)"
        if self.survival is not None and not self.survival.decided:
            return "none of the known super weights could be compared"
        if self.complete is not None and not self.complete.decided:
            return self.complete.undecided or ""
        return ""

    def add(self, findings: Iterable[Finding], rules: Iterable[str]) -> Proof:
        """Return this proof with the findings of another check, and the names of the rules that it checked."""
        return replace(self, findings=(*self.findings, *findings), rules=(*self.rules, *rules))

    def refuse_undecided(self) -> Proof:
        """Return this proof with a finding if something that was requested could not be compared."""
        what = self.unidentified or "what was requested could not be compared, and --strict counts this as no"
        return self.add([] if self.decided else [Finding("undecided", what)], ["undecided"])

    def to_json(self) -> dict[str, Any]:
        """Return the JSON document of the proof from the record, with the results of the other checks added."""
        document = self.verification.to_json() if self.verification else {}
        if self.manifest is not None:
            document["manifest"] = {"path": str(self.manifest.path), "base": self.base and str(self.base)}
        if self.survival is not None:
            identified = self.identified and self.identified.to_json()
            document["known"] = self.survival.to_json() | {"identified": identified}
        if self.guard is not None:
            document["protected_values"] = self.guard.to_json()
        if self.values is not None:
            document["values"] = self.values.to_json()
        if self.complete is not None:
            document["complete"] = self.complete.to_json()
        findings = [f.to_json() for f in self.findings]
        return document | {"findings": findings, "finite": self.finite, "notes": list(self.notes)}

    def report(self, subject: str) -> Verification:
        """Build the report that the output formats render. `subject` is the checkpoint's path as the user wrote it."""
        checked = "\n".join(map(escape_control, self.lines()))
        return Verification(
            subject,
            "verify",
            self.findings,
            checked,
            self.to_json(),
            self.rules,
            self.decided,
            self.verification,
            self.survival,
            self.base,
            self.values,
            self.identified,
            self.complete,
            headline=self.summarise(subject),
            strict=self.strict,
            reason=escape_control(self.explain_undecided()),
        )

    def summarise(self, subject: str) -> str:
        """Return the answer as one line that begins with OK, NO or UNDECIDED. `subject` is the checkpoint's path."""
        errors = sum(self.strict or finding.level == "error" for finding in self.findings)
        if errors:
            return f"NO: {pluralise(errors, 'finding')} in {escape_control(subject)}"
        if not self.decided:
            return f"UNDECIDED: {escape_control(subject)}: {self.explain_undecided()}"
        answer = _describe_proved(self.verification) if self.verification else "nothing is wrong in what was checked"
        warnings = f" ({pluralise(len(self.findings), 'warning')})" if self.findings else ""
        return f"OK: {escape_control(subject)}: {answer}{warnings}"

    def lines(self) -> Iterable[str]:
        """Yield what was proved, as text. A claim is omitted if any finding contradicts it."""
        clean = not any(self.strict or f.level == "error" for f in self.findings)
        if self.verification is not None and clean:
            yield from _describe_verification(self.verification)
        if self.manifest is not None and clean:
            how = (
                f"and compared byte by byte with {self.base}"
                if self.base
                else "from the base's bits, which the record proves"
            )
            yield f"manifest  exactly {self.manifest.path}: every edit recomputed {how}"
        if self.survival is not None:
            yield from _describe_survival(self.survival, self.identified)
        if self.unidentified and not clean and not self.strict:
            yield f"known     not compared: {self.unidentified}"
        if self.guard is not None:
            yield self.guard.describe()
        if self.signature is not None and not any(f.rule == "signature" for f in self.findings):
            yield f"signature {self.signature} covers every file, and no file was changed after signing"
        if self.finite and not any(f.rule == "non-finite" for f in self.findings):
            yield "finite    no stored floating-point value is NaN or infinite"
        if self.values is not None:
            yield self.values.describe()
        if self.complete is not None and not self.complete.undecided and not self.complete.errors:
            yield f"complete  {self.complete.describe()}"
        for what in self.complete.unexamined if self.complete is not None else ():
            yield f"          not examined: {what}"
        for note in self.notes:
            yield f"note      {note}"


def _describe_proved(verification: RecordProof) -> str:
    """Describe the proof from the record in one clause, such as "its base with exactly 2 scalars changed"."""
    parts = [pluralise(verification.changes, "region")] if verification.changes else []
    if verification.edits or not parts:
        parts.insert(0, pluralise(verification.edits, "scalar"))
    changed = f"its base with exactly {' and '.join(parts)} changed"
    unproved = verification.unverified or (verification.needs_base and not verification.compared_with_base)
    return f"it agrees with its record: {changed}, not proved for all files" if unproved else changed


def _describe_verification(verification: RecordProof) -> Iterable[str]:
    yield f"verified  {pluralise(verification.files - len(verification.unhashed), 'file')} with the record's sha256"
    if verification.proved:
        alone = verification.needs_base and not verification.compared_with_base
        others = verification.unread or verification.unverified or alone
        parts = [pluralise(verification.changes, "region")] if verification.changes else []
        if verification.edits or not parts:
            parts.insert(0, pluralise(verification.edits, "scalar"))
        put_back = "files not listed below" if others else f"with {' and '.join(parts)} put back, they"
        if verification.needs_base and not others:
            put_back = "files whose old bytes are stored"
        yield f"proved    {put_back} have the base's sha256"
    if verification.unread:
        names = ", ".join(verification.unread)
        yield f"unread    {names}: only the edited scalars were read; the sha256 is the one that the Hub lists"
    if verification.elsewhere:
        yield f"elsewhere {pluralise(len(verification.elsewhere), 'unchanged file')} in the base's repository, not here"
    if verification.protected or not verification.protected_regions:
        yield f"protected {pluralise(verification.protected, 'scalar')} with the base's bits"
    if verification.unverified:
        names = list_some(verification.unverified, MAX_LISTED_FILES)
        count = pluralise(len(verification.unverified), "file")
        yield f"unproved  {count} whose digests were copied into the record without hashing the base: {names}"
    if verification.changes:
        yield f"changed   {pluralise(verification.changes, 'region')} as in the record"
    if verification.protected_regions:
        yield f"protected {pluralise(verification.protected_regions, 'region')} with the recorded sha256"
    if verification.needs_base and not verification.compared_with_base:
        names = list_some(verification.needs_base, MAX_LISTED_FILES)
        yield f"unproved  no undo file has the old bytes of {names}: the proof needs the base (give --base)"
    if verification.unhashed:
        count = pluralise(len(verification.unhashed), "file")
        yield f"unhashed  {count} of which only the size is known: {list_some(verification.unhashed, MAX_LISTED_FILES)}"
    if verification.uncovered:
        yield f"excluded  {', '.join(verification.uncovered)}: the record does not list them, and no loader reads them"
    if verification.compared_with_base:
        yield "compared  byte by byte with the base: nothing else differs"


def _describe_survival(survived: Survival, identified: Identification | None) -> Iterable[str]:
    from swsurgery.verifying.against_known import describe_kept
    from swsurgery.verifying.known_states import UNDECIDED

    held = [c for c in survived.coordinates if c.held]
    read = [c for c in held if c.state not in UNDECIDED]
    there = [c for c in read if c.state != "lost"]
    edited = sum(c.state == "declared" for c in held)
    aside = f", {edited} of them edited on purpose" if edited else ""
    yield f"known     {len(there)} of {pluralise(len(held), 'super weight')} of {survived.model} not lost{aside}"
    if identified is not None:
        yield f"          {identified.describe()}"
    for c in survived.coordinates:
        if survived.is_finding(c):
            continue  # it is listed as a finding
        aside = "" if c.held else f" (not counted: {c.status})"
        yield f"          {c.id:16} {describe_kept(c)}{aside}"
    if survived.rows:
        yield f"          not read, because only the row is known: {', '.join(survived.rows)}"

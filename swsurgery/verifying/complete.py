"""Check whether a checkpoint contains what its config.json declares, from headers and the index alone.

complete_names.py sorts the tensors, complete_layers.py compares the layers, and complete_outside.py checks the rest.
This module also checks the files. It turns every fault into a finding that names the file to download again, and
combines the findings into one answer.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.checkpoint.damage import Damage, Survey
from swsurgery.checkpoint.declared import Declared, read_declared
from swsurgery.checkpoint.opening import survey_checkpoint
from swsurgery.checkpoint.weight_files import Weights
from swsurgery.errors import SwsurgeryError, pluralise
from swsurgery.hub.remote import RemoteTree
from swsurgery.progress import LOADING, Progress
from swsurgery.storage.folder import Folder
from swsurgery.storage.gguf import MetadataValue
from swsurgery.storage.numbers import format_size
from swsurgery.verifying.complete_gguf import (
    ARCHITECTURES,
    GgufHeader,
    check_gguf,
    explain_undecided,
    find_depths,
    list_unexamined,
    make_declared_config,
)
from swsurgery.verifying.complete_layers import Lack, compare_layers, list_incomparable, select_listed
from swsurgery.verifying.complete_names import LayerList, Sorted, find_main_lists, sort_names
from swsurgery.verifying.complete_outside import check_outside
from swsurgery.verifying.findings import Finding

if TYPE_CHECKING:  # at run time it is imported only for --transformers, because it loads torch
    from swsurgery.model.expected_names import Expectation

RULES_OF_COMPLETE = (
    "shard-missing", "shard-truncated", "layer-missing", "expert-missing", "tensor-missing", "head-missing",
    "shape-mismatch", "vocabulary", "total-size", "structure",
)  # fmt: skip
"""The names of the rules that `check_complete` checks."""

RULES_OF_TRANSFORMERS = ("transformers-missing", "transformers-unexpected", "transformers-shape")

_RULES_OF_DAMAGE = {
    "missing": "shard-missing",
    "truncated": "shard-truncated",
    "unreadable": "structure",
    "index": "structure",
}


@dataclass(frozen=True)
class Completeness:
    """Whether a checkpoint contains what its config.json declares.

    `layers` is the number of layers that config.json declares, or None. `size` is the size of the stored tensors in
    bytes. `undecided` explains why the layers could not be checked, or is None. `damaged` is True if a file is missing
    or damaged, so that other checks cannot open the checkpoint. `expected` is what transformers expects, or None if
    transformers was not asked. `unexamined` lists what was not examined, with the reasons.
    """

    findings: tuple[Finding, ...]
    layers: int | None
    tensors: int
    shards: int
    size: int
    undecided: str | None = None
    damaged: bool = False
    expected: Expectation | None = field(default=None, repr=False)
    unexamined: tuple[str, ...] = ()

    @property
    def rules(self) -> tuple[str, ...]:
        """The names of the rules that were checked."""
        return RULES_OF_COMPLETE + (RULES_OF_TRANSFORMERS if self.expected else ())

    @property
    def errors(self) -> int:
        """Number of findings that make the answer "no"."""
        return sum(finding.level == "error" for finding in self.findings)

    @property
    def decided(self) -> bool:
        """True if the layers were checked, or if another fault was found."""
        return self.undecided is None or self.errors > 0

    def describe(self) -> str:
        """Describe the checkpoint's contents, as in "30 layers, 272 tensors in 5 shards, 269 MB"."""
        layers = f"{pluralise(self.layers, 'layer')}, " if self.layers else ""
        stored = f"{pluralise(self.tensors, 'tensor')} in {pluralise(self.shards, 'shard')}"
        asked = "; transformers expects the same names and shapes" if self.expected and self.expected.agrees else ""
        return f"{layers}{stored}, {format_size(self.size)}{asked}"

    def merge(self, others: Sequence[Finding]) -> tuple[Finding, ...]:
        """Return the findings of another check and those of this one.

        Findings of `others` about the index are left out for tensors that this check reports as missing.
        """
        missing = {finding.tensor for finding in self.findings if finding.rule == "tensor-missing"}
        return (*(f for f in others if f.rule != "structure" or f.tensor not in missing), *self.findings)

    def summarise(self, findings: Sequence[Finding]) -> str:
        """Return the answer as one line, for `preflight`. `findings` are those of `merge`."""
        errors = Counter(finding.rule for finding in findings if finding.level == "error")
        if errors:
            rules = ", ".join(rule if count == 1 else f"{count} {rule}" for rule, count in errors.items())
            return f"incomplete: {pluralise(errors.total(), 'finding')}: {rules}"
        if self.undecided:
            return f"cannot tell: {self.undecided} ({self.describe()})"
        return f"complete: {self.describe()}"

    def to_json(self) -> dict[str, Any]:
        """Return the part of the JSON document that `--complete` adds."""
        return {
            "complete": not self.errors and self.undecided is None,
            "layers": self.layers,
            "tensors": self.tensors,
            "shards": self.shards,
            "bytes": self.size,
            "undecided": self.undecided,
            "not_examined": list(self.unexamined),
            "transformers": self.expected.to_json() if self.expected else None,
        }


def open_and_check(
    root: Folder | RemoteTree,
    weights: Weights | None,
    variant: str | None,
    elsewhere: Collection[str],
    *,
    transformers: bool,
    progress: Progress,
) -> tuple[Checkpoint, Completeness]:
    """Open a checkpoint, and compare it with its config.json and, if requested, with the model of transformers.

    Transformers is not asked if files are damaged. Raises the errors of `survey_checkpoint`. With `transformers`, also
    raises SwsurgeryError for a repository on the Hub, because transformers needs the files on this machine, and
    Unrunnable if transformers cannot build the model.
    """
    if transformers and isinstance(root, RemoteTree):
        raise SwsurgeryError("--transformers needs the files on this machine", root, "download it with hf download")
    survey = survey_checkpoint(root, weights, variant, elsewhere)
    if transformers and survey.gguf is not None:
        what = "--transformers compares the names of transformers, which a GGUF file does not have"
        raise SwsurgeryError(what, survey.checkpoint.root, "leave --transformers out")
    if not transformers or survey.damages:
        return survey.checkpoint, check_complete(survey)
    progress.start(0, "", LOADING)
    from swsurgery.model.expected_names import compare_with_transformers

    expected = compare_with_transformers(survey.checkpoint)
    progress.close()
    return survey.checkpoint, check_complete(survey, expected)


def check_complete(survey: Survey, expected: Expectation | None = None) -> Completeness:
    """Check whether the checkpoint contains what its config.json declares, and what transformers expects if given.

    For a GGUF file, its metadata takes the place of config.json.
    """
    checkpoint = survey.checkpoint
    remedies = _Remedies(survey)
    findings = [_report_damage(damage, remedies) for damage in survey.damages]
    examined = _examine(survey) if survey.gguf is None else _examine_gguf(survey, survey.gguf)
    findings += [remedies.report(lack) for lack in select_listed(examined.lacks)]
    findings += _check_total(survey)
    if expected is not None:
        covered = [name for lack in examined.lacks for name in (lack.name, *lack.names) if name]
        findings += [Finding(*each) for each in expected.list_faults(covered)]
    return Completeness(
        tuple(findings),
        sum(examined.declared.depths.values()) or None,
        len(checkpoint.weight_map),
        len(checkpoint.shards),
        sum(shard.data_size for shard in checkpoint.shards.values()),
        examined.undecided,
        bool(survey.damages),
        expected,
        tuple(examined.unexamined),
    )


@dataclass(frozen=True)
class _Examined:
    """What a checkpoint declares, what is missing among its tensors, and what could not be examined."""

    declared: Declared
    lacks: list[Lack] = field(default_factory=list)
    undecided: str | None = None
    unexamined: list[str] = field(default_factory=list)


def _examine(survey: Survey) -> _Examined:
    """Compare the tensors with config.json."""
    checkpoint = survey.checkpoint
    declared = read_declared(checkpoint.config)
    if survey.damages and checkpoint.index_name is None:  # it is unknown what the lost shards contain
        return _Examined(declared)
    found = sort_names(survey)
    lists = find_main_lists(found, declared.depths, checkpoint.config)
    undecided = _explain_undecided(checkpoint, declared, lists)
    lacks = _list_lacks(survey, declared, found, lists)
    return _Examined(declared, lacks, undecided, _list_alone(lists, declared, checkpoint.config, lacks))


def _examine_gguf(survey: Survey, metadata: Mapping[str, MetadataValue]) -> _Examined:
    """Compare the tensors of a GGUF file with its metadata."""
    config = make_declared_config(metadata)
    declared = read_declared(config)
    depth = declared.depths.get("", 0)
    declared = replace(declared, depths=find_depths(metadata, depth), source="the metadata")
    undecided = explain_undecided(metadata)
    if survey.damages or undecided:
        return _Examined(declared, undecided=undecided)
    header = GgufHeader(metadata, sort_names(survey))
    lists = find_main_lists(header.found, declared.depths, config)
    if len(lists) < len(declared.depths):
        return _Examined(declared, undecided="no tensor has the name of a block")
    lacks = [
        lack
        for side, blocks in lists.items()
        for lack in compare_layers(blocks, declared.depths[side], declared, config, side)
    ]
    named = {lack.name for lack in lacks}
    lacks += [lack for lack in check_gguf(header, lists.get(""), depth) if lack.name not in named]
    alone = [] if header.architecture in ARCHITECTURES else _list_alone(lists, declared, config, lacks)
    return _Examined(declared, lacks, unexamined=list_unexamined(header, depth) + alone)


def _list_alone(
    lists: Mapping[str, LayerList], declared: Declared, config: Mapping[str, object], lacks: Sequence[Lack]
) -> list[str]:
    """Describe the modules that cannot be compared with another layer; [] if tensors are missing in any case."""
    if any(lack.rule == "tensor-missing" for lack in lacks):
        return []  # a damaged layer has no peers either, and its findings say so
    found = (list_incomparable(layers, declared.depths[side], config) for side, layers in lists.items())
    return [what for what in found if what]


def _explain_undecided(checkpoint: Checkpoint, declared: Declared, lists: dict[str, LayerList]) -> str | None:
    """Return why the layers cannot be checked; None if they can."""
    if not checkpoint.config:
        return "there is no config.json"
    if not declared.depths:
        return "config.json does not state the number of layers"
    if len(lists) < len(declared.depths):
        return "no tensor has the name of a layer of the language model"
    return None


def _list_lacks(survey: Survey, declared: Declared, found: Sorted, lists: dict[str, LayerList]) -> list[Lack]:
    """List all that is missing among the tensors."""
    config = survey.checkpoint.config
    lacks: list[Lack] = []
    for side, layers in lists.items():
        lacks += compare_layers(layers, declared.depths[side], declared, config, side)
    absent = _list_listed_but_absent(survey.checkpoint)
    if lists:
        usual = [layers for layers in lists.values() if layers.prefix.endswith("model.layers.")]
        lacks += check_outside({**found.outside, **dict.fromkeys(absent)}, declared, config, usual)
    prefixes = tuple(lack.name for lack in lacks if lack.name.endswith("."))
    names = {lack.name for lack in lacks}
    return lacks + [
        Lack("tensor-missing", name, "is not stored")
        for name in absent
        if name not in names and not name.startswith(prefixes)
    ]


def _list_listed_but_absent(checkpoint: Checkpoint) -> list[str]:
    """List the tensors that the index puts in a shard that was read, and that no shard stores."""
    stored = {name for shard in checkpoint.shards.values() for name in shard.tensors}
    return [name for name in checkpoint.disagreements if name not in stored]


def _check_total(survey: Survey) -> Iterator[Finding]:
    """Yield a finding if the total_size of the index is not the size of the tensors in the shards."""
    checkpoint = survey.checkpoint
    stored = sum(shard.data_size for shard in checkpoint.shards.values())
    if survey.total_size is not None and survey.total_size != stored and not survey.unseen:
        what = f"total_size is {survey.total_size}, but the shards contain {stored} bytes of tensors"
        yield Finding("total-size", what, checkpoint.index_name)


def _report_damage(damage: Damage, remedies: _Remedies) -> Finding:
    again = "again" if damage.kind in ("truncated", "unreadable") else ""
    return Finding(_RULES_OF_DAMAGE[damage.kind], f"{damage.what} ({remedies.fetch(damage.file, again)})", damage.file)


class _Remedies:
    """Finds the file in which a missing tensor should be, and the command that downloads this file."""

    def __init__(self, survey: Survey):
        self._survey = survey
        checkpoint = survey.checkpoint
        self._listed = {**checkpoint.weight_map, **survey.unseen}
        self._prefixes: dict[str, str] = {}

    def report(self, lack: Lack) -> Finding:
        """Make a finding from a fault, with the file to download again."""
        listed = self._find_listed(lack.name)
        home = listed or (self._listed.get(lack.near) if lack.near else None)
        name = lack.name.removesuffix(".") or None
        if lack.rule in ("shape-mismatch", "vocabulary"):
            return Finding(lack.rule, lack.message, home, name)
        placed = f"; {self._survey.checkpoint.index_name} puts it in {listed}" if listed else ""
        if home is None and len(self._survey.checkpoint.shards) == 1:
            home = next(iter(self._survey.checkpoint.shards))
        remedy = f" ({self.fetch(home, 'again')})" if home else ""
        return Finding(lack.rule, f"{lack.message}{placed}{remedy}", listed or home, name)

    def _find_listed(self, name: str) -> str | None:
        """Return the shard in which the index puts a tensor, or the tensors whose names have a prefix; None if none."""
        if self._survey.checkpoint.index_name is None or not name:
            return None
        if name.endswith("."):
            return next((shard for tensor, shard in self._listed.items() if tensor.startswith(name)), None)
        return self._listed.get(name)

    def fetch(self, file: str, again: str = "") -> str:
        """Return the remedy for a file, such as the command that downloads it.

        For a file on the Hub, the remedy is to tell the publisher of the repository.
        """
        checkpoint = self._survey.checkpoint
        if isinstance(checkpoint.root, RemoteTree):
            return f"the repository itself has this fault: tell the publisher of {checkpoint.root.repo_id}"
        path = f"{checkpoint.sub}/{file}" if checkpoint.sub else file
        words = ["hf", "download", checkpoint.repo_id or "ORG/NAME", path]
        words += ["--revision", checkpoint.revision] if checkpoint.revision else []
        words += [] if checkpoint.in_cache else ["--local-dir", str(checkpoint.root)]
        words += ["--force-download"] if again else []
        return f"download it{f' {again}' if again else ''}: {shlex.join(words)}"

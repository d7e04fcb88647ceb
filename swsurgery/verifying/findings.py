"""Define the rules for checkpoints and manifests, and the finding that reports a broken rule.

The rules are one hand-written table of stable names. Scripts, suppressions and dashboards rely on these names, so a
name never changes its meaning. To add a rule, add a row; a test fails until some code reports the rule and
docs/verify.md explains it. This module must not depend on files or output formats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from swsurgery.checkpoint.compare import ByteDifference

Level = Literal["error", "warning"]
"""Severity of a rule, as SARIF names it. An error makes the answer "no" (exit code 1); a warning is only reported."""


@dataclass(frozen=True)
class Rule:
    """One rule. `meaning` is a sentence that is true of every finding of the rule; `command` checks the rule."""

    name: str
    meaning: str
    level: Level = "error"
    command: Literal["verify", "lint", "publish"] = "verify"


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("structure", "A shard, the index or config.json is damaged, or index and shards disagree."),
        Rule("digest", "A file's size or sha256 is not the recorded one."),
        Rule("file-missing", "A recorded file is missing."),
        Rule("file-undeclared", "A file is not recorded."),
        Rule("undeclared-change", "Something other than the declared scalars differs from the base."),
        Rule("edit-changed", "A declared edit's scalar does not have the recorded new bits."),
        Rule("protected-changed", "A protected scalar does not have the base's bits."),
        Rule("registry", "The record contradicts itself or the shards it describes."),
        Rule(
            "manifest",
            "The manifest in the checkpoint was changed, or its edits are not those of the record.",
        ),
        Rule("manifest-mismatch", "The checkpoint is not what the manifest makes of its base."),
        Rule("base", "The given base is not the base that this checkpoint was made from."),
        Rule("known-lost", "A known super weight is missing, or lost more of its value than the tolerance."),
        Rule(
            "known-unreadable",
            "A known super weight cannot be read as one scalar, so whether it was kept is unknown.",
            "warning",
        ),
        Rule(
            "known-suspicious",
            "A known super weight has more than four times its known value, so the stored numbers may not be weights.",
            "warning",
        ),
        Rule("undecided", "Something that was asked could not be compared, so the answer is neither yes nor no."),
        Rule("protected-lost", "A scalar that the manifest protects does not have the expected value."),
        Rule(
            "protected-unreadable",
            "A scalar that the manifest protects cannot be found or read as one number, so it may be lost.",
        ),
        Rule("non-finite", "A stored floating-point value is NaN or infinite."),
        Rule("constant-weights", "All values of a weight matrix are 0, or all are the same."),
        Rule("identical-weights", "Matrices of two layers or experts have the same bytes.", "warning"),
        Rule("dtype-overflow", "A stored weight is outside the range of float16.", "warning"),
        Rule(
            "subnormal-weights",
            "More than a tenth of the values of a matrix are subnormal, so they have lost precision.",
            "warning",
        ),
        Rule(
            "duplicate-weights",
            "The checkpoint contains a second copy of the weights, which edits of the shards do not change.",
            "warning",
        ),
        Rule("shard-missing", "A shard that the index or the numbers of the other shards name is missing."),
        Rule("shard-truncated", "A shard is shorter than its header says, as after an interrupted download."),
        Rule("layer-missing", "config.json declares a layer of which no tensor is stored."),
        Rule("expert-missing", "An expert is missing that the other layers or config.json say exists."),
        Rule("tensor-missing", "A tensor is missing that the index lists or that comparable layers have."),
        Rule("head-missing", "The language-modelling head is neither stored nor tied to the embedding."),
        Rule("shape-mismatch", "A tensor's shape contradicts config.json or the same tensor of other layers."),
        Rule("vocabulary", "The embedding or the head has fewer rows than config.json declares tokens."),
        Rule("total-size", "The total_size of the index is not the size of the tensors in the shards.", "warning"),
        Rule("transformers-missing", "The model of transformers has a parameter that is not stored."),
        Rule("transformers-unexpected", "A tensor is stored that the model of transformers does not load.", "warning"),
        Rule("transformers-shape", "A parameter of the model of transformers has another shape than is stored."),
        Rule("signature", "The signature does not match the files."),
        Rule("manifest-invalid", "A manifest breaks the grammar or the schema of manifests.", "error", "lint"),
        Rule(
            "edit-duplicate",
            "Two edits name the same scalar, or two operations the same row, tensor or other part.",
            "error",
            "lint",
        ),
        Rule(
            "edit-range",
            "An edit names a coordinate, row, neuron, expert or slice that its model does not have.",
            "error",
            "lint",
        ),
        Rule("known-missing", "A manifest asks for a model or a super weight that is not known.", "error", "lint"),
        Rule("expect-contradicts", "An edit expects another value than the known one.", "error", "lint"),
        Rule(
            "bounds-impossible",
            "The minimum perplexity ratio of the check is larger than the maximum.",
            "error",
            "lint",
        ),
        Rule(
            "edit-no-effect",
            "An edit writes the value that is already stored, or another edit protects all that it names.",
            "warning",
            "lint",
        ),
        Rule("expect-missing", "An edit of a scalar does not state the value that it expects.", "warning", "lint"),
        Rule("base-unpinned", "Neither a revision nor a digest identifies the base.", "warning", "lint"),
        Rule(
            "bounds-missing", "The check has no bound, so a model that the edits broke would pass.", "warning", "lint"
        ),
        Rule("check-missing", "The model was never run after it was edited.", "error", "publish"),
        Rule("check-failed", "The sanity check found that the edits broke the model.", "error", "publish"),
        Rule("public", "A repository that was to be private is public after the commit.", "error", "publish"),
        Rule("secret", "A file that would be published contains what looks like a token.", "error", "publish"),
    )
}


@dataclass(frozen=True)
class Finding:
    """One violation of a rule.

    `rule` is a name in RULES; any other name raises ValueError. `file` is a path relative to the checkpoint. `index` is
    an index into the tensor's stored shape. If the finding concerns a manifest, `manifest` is its path, and `line`
    and `column` count from 1.
    """

    rule: str
    message: str
    file: str | None = None
    tensor: str | None = None
    index: tuple[int, ...] | None = None
    manifest: str | None = None
    line: int | None = None
    column: int | None = None

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"no such rule: {self.rule}")

    @classmethod
    def of_difference(cls, difference: ByteDifference) -> Finding:
        """Make a finding from a difference between a checkpoint and its base."""
        return cls(difference.kind, difference.message, difference.file, difference.tensor, difference.index)

    @property
    def level(self) -> Level:
        """Severity of the finding's rule."""
        return RULES[self.rule].level

    def to_json(self) -> dict[str, Any]:
        """Return the finding as JSON. The keys manifest, line and column exist only if it concerns a manifest."""
        document: dict[str, Any] = {
            "rule": self.rule,
            "level": self.level,
            "file": self.file,
            "tensor": self.tensor,
            "index": None if self.index is None else list(self.index),
            "message": self.message,
        }
        if self.manifest is not None:
            document |= {"manifest": self.manifest, "line": self.line, "column": self.column}
        return document

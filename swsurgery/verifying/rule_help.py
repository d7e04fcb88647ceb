"""Say for each rule what to do about a finding, and where the documentation explains the rule.

HELP is one hand-written table with a row for each rule of findings.py. A SARIF report shows these texts in its alerts.
"""

from __future__ import annotations

from importlib import metadata

from swsurgery._version import __version__
from swsurgery.verifying.findings import Rule

HELP: dict[str, str] = {
    "structure": "Download or copy the checkpoint again. If you made it, write the index and the shards in one run.",
    "digest": "Restore the file from its source, or apply the manifest again to a base that is complete.",
    "file-missing": "Copy the file from the place where the checkpoint was made, or apply the manifest again.",
    "file-undeclared": "Remove the file if you do not know it. Otherwise apply the manifest to a base with the file.",
    "undeclared-change": "Find out who changed the checkpoint before you use it. Apply the manifest to the base again.",
    "edit-changed": "Apply the manifest to the base again. If another value was intended, change the manifest first.",
    "protected-changed": "Restore the scalar with op restore, or repeat the later step with the scalar protected.",
    "registry": "Do not edit swsurgery.json. Apply the manifest again to write a new record.",
    "manifest": "Do not edit the manifest in the checkpoint. Apply the changed manifest to the base instead.",
    "manifest-mismatch": "Apply the manifest to its base again, or verify with the manifest that was applied.",
    "base": "Give the base that the record names: swsurgery lookup DIR shows its repository and commit.",
    "known-lost": "Restore the value with swsurgery lookup MODEL --manifest restore, or search with swsurgery scan: "
    "perhaps another scalar took its place. If the edit was intended, put it into a manifest.",
    "known-unreadable": "Verify the checkpoint before it is quantised, or leave the module out of the quantisation: "
    "swsurgery recipe prints the configuration.",
    "known-suspicious": "Check that the files contain weights and no codes of a quantiser, and that the model is the "
    "one that was identified.",
    "undecided": "Give what is missing: a base, the name of the model, or a checkpoint whose values can be read.",
    "protected-lost": "Repeat the merge, fine-tuning or quantisation with the scalar left out, or use op restore.",
    "protected-unreadable": "Verify the checkpoint before it is quantised, or leave out the tensor then.",
    "non-finite": "Find the step that wrote the value, such as an overflow in float16, and repeat it in a wider dtype.",
    "constant-weights": "Find out whether the tensor was ever initialised or trained. Conversions that skip a tensor "
    "leave it at zero.",
    "identical-weights": "Check that the conversion or merge did not write one layer twice. Shared layers are fine.",
    "dtype-overflow": "Run the model in bfloat16 or float32.",
    "subnormal-weights": "Convert the original weights to bfloat16 instead of float16.",
    "duplicate-weights": "Remove the second copy, or edit both: a loader may read the copy that was not edited.",
    "shard-missing": "Complete the download.",
    "shard-truncated": "Download the shard again.",
    "layer-missing": "Complete the download, or correct the number of layers in config.json.",
    "expert-missing": "Complete the download, or correct the number of experts in config.json.",
    "tensor-missing": "Complete the download, or convert the checkpoint again.",
    "head-missing": "Store the head, or set tie_word_embeddings in config.json if it is the embedding.",
    "shape-mismatch": "Use the config.json that belongs to these weights.",
    "vocabulary": "Resize the embedding and the head to the tokenizer, or correct vocab_size in config.json.",
    "total-size": "Write the index again. Loaders ignore total_size.",
    "transformers-missing": "Complete the checkpoint. transformers would initialise the parameter with random values.",
    "transformers-unexpected": "Check the name of the tensor. transformers ignores it.",
    "transformers-shape": "Use the config.json that belongs to these weights.",
    "signature": "Do not use the files before you know who changed them. Sign again after an intended change.",
    "manifest-invalid": "Correct the manifest at this line. docs/manifest.md describes every field.",
    "edit-duplicate": "Remove one of the two edits.",
    "edit-range": "Correct the coordinate. swsurgery inspect lists the shapes; row comes before col.",
    "known-missing": "Use a name or an id that swsurgery lookup prints.",
    "expect-contradicts": "Correct expect, or the coordinate if it names another scalar than was meant.",
    "bounds-impossible": "Exchange or correct the two bounds.",
    "edit-no-effect": "Remove the edit, or change its value.",
    "expect-missing": "Add expect with the value that the edit replaces. swsurgery inspect --tensor --at prints it.",
    "base-unpinned": "Add base.revision, or base.sha256 with the digests of the shards that are edited.",
    "bounds-missing": "Add max_perplexity_ratio to check, or min_perplexity_ratio if damage is the goal.",
    "check-missing": "Apply the manifest with --check forward, or give --accept check-missing.",
    "check-failed": "Weaken the edits, or give --accept check-failed if the damage is the goal.",
    "public": "Make the repository private in its settings, and check who has read it.",
    "secret": "Remove the token from the file and revoke it.",
}
"""Maps the name of each rule to what to do about a finding."""

RULE_PAGES = {
    "verify": "docs/verify.md#rules",
    "lint": "docs/ci.md#the-rules-of-lint",
    "publish": "docs/publishing.md#the-gate",
}
"""Maps each command to the part of the documentation that lists its rules."""


def find_source() -> str | None:
    """Return the public address of the repository with a slash at the end, or None if the package states none."""
    try:
        stated = metadata.metadata("swsurgery").get_all("Project-URL") or []
    except metadata.PackageNotFoundError:
        return None
    addresses = {name: url.strip() for name, _, url in (line.partition(",") for line in stated)}
    return f"{addresses['Source'].rstrip('/')}/" if "Source" in addresses else None


def make_help_address(rule: Rule, source: str) -> str:
    """Return the absolute address of the documentation of a rule. `source` is the public address of the repository."""
    return f"{source}blob/v{__version__}/{RULE_PAGES[rule.command]}"

"""Which tests `make quick` leaves out: those that need torch or the model, and those that take long.

A file that imports torch at its top, itself or through a helper, is found by reading it. Everything else is listed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parents[1]
EXTRAS = {"gguf", "matplotlib", "model_signing", "peft", "torch", "transformers"}
"""Libraries that the extra `test` does not install."""

NEEDS_TORCH = (
    "checkpoint/layouts/test_auto_round.py",
    "checkpoint/layouts/test_bitsandbytes.py",
    "checkpoint/layouts/test_hostile_layouts.py",
    "checkpoint/layouts/test_quanto.py",
    "checkpoint/layouts/test_torchao.py",
    "checkpoint/test_quantised.py::test_a_model_whose_codes_transformers_would_take_for_weights_is_not_loaded",
    "checkpoint/test_quantised.py::test_nothing_reads_codes_as_weights",
    "cli/test_action.py::test_findings_need_not_fail_the_job",
    "scanning/test_multiplicity.py",
    "storage/test_arguments.py::test_the_other_names_are_kinds_too",
    "verifying/test_signing.py",
)
"""Tests that load torch inside a function or in a child process, as `file` or `file::function`."""

TAKES_LONG = (
    "checkpoint/layouts/",
    "checkpoint/test_fuzz_index.py",
    "checkpoint/test_held.py",
    "checkpoint/test_hostile_bounds.py",
    "checkpoint/test_hostile_names.py",
    "checkpoint/test_journal.py",
    "cli/test_action.py",
    "cli/test_bad_structures.py",
    "cli/test_cli.py",
    "cli/test_completion.py",
    "cli/test_docs.py::test_commands_page_is_what_help_says",
    "cli/test_json_schemas.py",
    "cli/test_pre_commit.py",
    "editing/test_apply.py",
    "editing/test_apply_faults.py",
    "editing/test_copy_races.py",
    "editing/test_full_stdout.py",
    "editing/test_in_place.py",
    "editing/test_in_place_races.py",
    "editing/test_in_place_regions.py",
    "editing/test_known_parts.py",
    "editing/test_no_pickle.py",
    "editing/test_permissions.py",
    "editing/test_regions.py",
    "editing/test_resume.py",
    "faults/",
    "hub/test_hostile_hub.py",
    "known/test_overlay.py",
    "manifest/test_fuzz_manifest.py",
    "manifest/test_manifest.py::test_no_values_in_the_fields_give_anything_but_a_manifest_or_its_faults",
    "manifest/test_patches.py::test_a_file_that_breaks_a_rule_is_one_line_and_exit_2",
    "manifest/test_patches_of_regions.py",
    "manifest/test_schema.py::test_the_schema_accepts_exactly_what_the_loader_accepts",
    "model/test_model_refused.py",
    "rewriting/test_blocks.py",
    "rewriting/test_clip.py",
    "rewriting/test_elementwise.py",
    "rewriting/test_round.py",
    "sharing/test_card.py",
    "sharing/test_pages.py",
    "sharing/test_publish.py",
    "sharing/test_publish_anywhere.py",
    "sharing/test_publish_faults.py",
    "sharing/test_publish_gate.py",
    "sharing/test_publish_patch.py",
    "sharing/test_publish_regions.py",
    "sharing/test_recipes.py",
    "sharing/test_secrets.py",
    "storage/test_arrays.py::test_a_float64_near_the_middle_of_two_values_rounds_once",
    "storage/test_broken_disk.py",
    "storage/test_determinism.py",
    "storage/test_dtypes.py::test_scaled_is_the_nearest_value_to_the_exact_product",
    "storage/test_fuzz_header.py",
    "storage/test_limits.py",
    "storage/test_shard_header.py::test_sound_files_of_any_shape_read_as_the_official_parser_reads_them",
    "storage/test_shortages.py",
    "storage/test_staging.py",
    "storage/test_syscalls.py",
    "test_api.py",
    "test_claims.py",
    "test_imports.py::test_a_command_without_a_model_never_loads_torch",
    "test_imports.py::test_a_model_without_these_files_is_refused_before_torch_is_loaded",
    "test_imports.py::test_a_module_has_every_name_that_it_exports",
    "verifying/test_complete.py",
    "verifying/test_known_codes.py",
    "verifying/test_manifest_record.py",
    "verifying/test_protected_regions.py",
    "verifying/test_protected_values.py",
    "verifying/test_survival.py",
    "verifying/test_value_figures.py",
    "verifying/test_verify.py",
)
"""Folders, files and tests that together would take more than the minute, as `folder/`, `file` or `file::function`."""


def _imported(source: str) -> Iterator[str]:
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@cache
def imports_extras(path: Path) -> bool:
    """Tell whether a file imports a library of `EXTRAS` at its top, itself or through a helper."""
    names = {name.split(".")[0] for name in _imported(path.read_text())}
    helpers = (TESTS / "support" / f"{name}.py" for name in names)
    return bool(names & EXTRAS) or any(helper.is_file() and imports_extras(helper) for helper in helpers)


def leaves_out_file(path: Path) -> bool:
    """Tell whether `make quick` reads nothing of this test file."""
    name = path.relative_to(TESTS).as_posix()
    folders = tuple(entry for entry in TAKES_LONG if entry.endswith("/"))
    return name.startswith(folders) or name in NEEDS_TORCH + TAKES_LONG or imports_extras(path)


def leaves_out_test(path: Path, function: str) -> bool:
    """Tell whether `make quick` leaves out this one test of a file that it reads."""
    return f"{path.relative_to(TESTS).as_posix()}::{function}" in NEEDS_TORCH + TAKES_LONG

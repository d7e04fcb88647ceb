"""Which tests `make quick` leaves out: those that need torch or the model, and those that take long.

A file that imports torch at its top, itself or through a helper, is found by reading it. Everything else is listed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parents[1]
EXTRAS = {"matplotlib", "model_signing", "peft", "torch", "transformers"}
"""Libraries that the extra `test` does not install."""

NEEDS_TORCH = (
    "checkpoint/test_quantised.py::test_a_model_whose_codes_transformers_would_take_for_weights_is_not_loaded",
    "checkpoint/test_quantised.py::test_nothing_reads_codes_as_weights",
    "cli/test_action.py::test_findings_need_not_fail_the_job",
    "storage/test_arguments.py::test_the_other_names_are_kinds_too",
    "verifying/test_signing.py",
)
"""Tests that load torch inside a function or in a child process, as `file` or `file::function`."""

TAKES_LONG = (
    "faults/",
    "checkpoint/test_fuzz_index.py",
    "checkpoint/test_hostile_bounds.py",
    "checkpoint/test_hostile_names.py",
    "checkpoint/test_journal.py::test_a_killed_edit_is_undone_and_can_be_made_again",
    "checkpoint/test_journal.py::test_a_killed_revert_leaves_the_patched_checkpoint_until_it_is_made_again",
    "checkpoint/test_journal.py::test_killed_after_the_journal_is_gone_it_is_done",
    "cli/test_action.py::test_each_question_of_verify_has_its_input",
    "cli/test_cli.py::test_json_is_one_document_and_quiet_is_silent",
    "cli/test_cli.py::test_the_help_of_a_command_names_its_options",
    "cli/test_cli.py::test_verify_says_no_with_exit_1",
    "cli/test_docs.py::test_commands_page_is_what_help_says",
    "cli/test_pre_commit.py",
    "editing/test_apply_faults.py",
    "editing/test_copy_races.py",
    "editing/test_in_place.py",
    "editing/test_in_place_races.py",
    "editing/test_resume.py",
    "model/test_model_refused.py",
    "editing/test_no_pickle.py::test_no_command_loads_what_lies_beside_the_weights",
    "hub/test_hostile_hub.py",
    "manifest/test_fuzz_manifest.py",
    "manifest/test_patches.py::test_a_file_that_breaks_a_rule_is_one_line_and_exit_2",
    "sharing/test_publish.py",
    "sharing/test_publish_anywhere.py",
    "sharing/test_publish_faults.py",
    "sharing/test_publish_gate.py",
    "sharing/test_secrets.py",
    "storage/test_broken_disk.py",
    "storage/test_determinism.py",
    "storage/test_dtypes.py::test_scaled_is_the_nearest_value_to_the_exact_product",
    "storage/test_fuzz_header.py",
    "storage/test_limits.py",
    "storage/test_shard_header.py::test_sound_files_of_any_shape_read_as_the_official_parser_reads_them",
    "storage/test_shortages.py",
    "storage/test_staging.py::test_a_directory_that_its_user_took_over_after_a_kill_is_not_rewritten",
    "storage/test_staging.py::test_a_signal_is_answered_with_what_is_there",
    "storage/test_syscalls.py",
    "test_imports.py::test_a_model_without_these_files_is_refused_before_torch_is_loaded",
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

"""Commands that share edits and checkpoints, and print recipes: publish, export, recipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from swsurgery.cli.completion import complete_model
from swsurgery.cli.options import BaseOption, DirectoryArgument, command, read_location
from swsurgery.cli.output import Output, print_text, say
from swsurgery.errors import SwsurgeryError, escape_control, pluralise, report_done
from swsurgery.sharing.recipes.names import ToolName
from swsurgery.storage.numbers import format_size

if TYPE_CHECKING:
    from swsurgery.sharing.export import Exported
    from swsurgery.sharing.publication import Publication
    from swsurgery.sharing.publish import Proposal, Published
    from swsurgery.sharing.recipes.recipe import Recipe


@command
def publish(
    out: Output,
    checkpoint: DirectoryArgument,
    repo_id: Annotated[str, typer.Argument(help="The repository on the Hub: ORG/NAME.", show_default=False)],
    patch: Annotated[
        bool, typer.Option("--patch", help="Publish only the edits: four small files, without weights.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and send nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Publish publicly without asking.")] = False,
    accept: Annotated[
        list[str] | None,
        typer.Option(help="Publish despite findings of this rule, and list them on the card; may be repeated."),
    ] = None,
    revision: Annotated[str, typer.Option(help="The branch to commit to; created if it does not exist.")] = "main",
    tag: Annotated[str | None, typer.Option(help="The name of the tag; by default base-COMMIT.")] = None,
    message: Annotated[str | None, typer.Option(help="The commit message.")] = None,
) -> None:
    """Publish a patched checkpoint in one commit that uploads only what changed.

    Exit 1 if a finding prevents publishing, or if the files that the Hub then serves differ from the plan.
    """
    from swsurgery.sharing import publication, publish

    def confirm(plan: Publication) -> None:
        if plan.changes and not plan.private and not yes and plan.pull_request is None:
            _ask(plan)
        else:
            for line in publication.format_lines(plan):
                out.note(line)

    done = publish.publish(
        checkpoint,
        repo_id,
        patch=patch,
        private=private,
        create_pr=create_pr,
        dry_run=dry_run,
        accept=accept or (),
        revision=revision,
        tag=tag,
        message=message,
        confirm=confirm,
        bars=not out.quiet and sys.stderr.isatty(),
        reporter=out.make_reporter(),
    )
    if isinstance(done, publish.Proposal):
        out.print_result(done, _show_proposal)
        if not out.json:
            for finding in done.findings:
                out.note(f"needs --accept {finding.rule}: {finding.file}: {finding.message}")
        return
    report_done(f"published: {done.repo_id}, commit {done.commit}")
    out.print_result(done, _show_published)
    if done.findings:
        raise typer.Exit(1)


def _show_proposal(proposal: Proposal) -> None:
    from swsurgery.sharing import publication

    for line in publication.format_lines(proposal.plan):
        print_text(escape_control(line))


def _ask(plan: Publication) -> None:
    """Show the plan and ask the user to confirm it. Raises typer.Exit if the answer is not yes.

    Raises SwsurgeryError if stdin is not a terminal.
    """
    from swsurgery.sharing import publication

    if not sys.stdin.isatty():
        raise SwsurgeryError(
            "publishing publicly needs a confirmation, but stdin is not a terminal",
            plan.wish.repo_id,
            "give --yes, or --private for a new repository; --dry-run shows the plan",
        )
    for line in publication.format_lines(plan):
        say(line)
    say("Publish this, visible to everyone? [y/N]")
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        say("nothing was published")
        raise typer.Exit(1)


def _show_published(done: Published) -> None:
    what = "had already been published" if done.already else "published"
    where = f"pull request {done.pull_request}, commit {done.commit}" if done.pull_request else f"commit {done.commit}"
    print_text(escape_control(f"{done.repo_id}: {what}, {where}"))
    print_text(
        f"uploaded {format_size(done.uploaded)}, copied on the Hub {format_size(done.copied)}, "
        f"read back {format_size(done.read)}"
    )
    if not done.findings:
        more = f", and {pluralise(done.scalars, 'edited scalar')} with the planned bits" if done.scalars else ""
        print_text(f"verified: {pluralise(done.files, 'file')} with the planned digests{more}")
    for finding in done.findings:
        print_text(escape_control(f"{finding.rule}: {finding.file or done.repo_id}: {finding.message}"))
    print_text(escape_control(done.url))


@command
def export(
    out: Output,
    source: Annotated[
        str,
        typer.Argument(
            help="A patched checkpoint (a directory or hf://ORG/NAME[@REV]), a manifest, or a patch.",
            show_default=False,
        ),
    ],
    form: Annotated[
        Literal["sparse", "peft", "vllm", "outliers"],
        typer.Option(
            "--format",
            help="sparse: one file for apply; peft: a LoRA adapter; vllm: arrays for vLLM's checkpoint patches; "
            "outliers: the values of protected scalars, to put back after quantisation.",
            show_default=False,
        ),
    ],
    target: Annotated[
        Path,
        typer.Option(
            "-o", "--output", help="The new file (sparse, outliers) or folder (peft, vllm).", show_default=False
        ),
    ],
    base: BaseOption = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="With --format outliers: export the known super weights of this model.", autocompletion=complete_model
        ),
    ] = None,
) -> None:
    """Write only the edits, without the checkpoint: a few kilobytes."""
    from swsurgery.sharing import export as export_module

    exported = export_module.export(source, target, format=form, base=base, model=model, reporter=out.make_reporter())
    report_done(f"the output was written: {exported.output}")
    out.print_result(exported, _show_exported)
    if not out.json:
        for note in exported.notes:
            out.note(note)


def _show_exported(exported: Exported) -> None:
    what = pluralise(exported.scalars, "scalar" if exported.format == "outliers" else "changed scalar")
    print_text(f"{escape_control(str(exported.output))}: {what} as {exported.format}")
    for name, size in exported.files.items():
        print_text(f"  {escape_control(name)}  {format_size(size)}")


@command
def recipe(
    out: Output,
    subject: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT|MODEL",
            help="A checkpoint (a directory or hf://ORG/NAME[@REV]), or the name of a known model.",
            show_default=False,
            autocompletion=complete_model,
        ),
    ],
    tool: Annotated[ToolName, typer.Option("--for", help="The quantiser that the recipe is for.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option(
            help="The known model that the checkpoint is made from, if its files do not name one.",
            autocompletion=complete_model,
        ),
    ] = None,
) -> None:
    """Print the configuration of a quantiser that keeps the modules with super weights in high precision."""
    from swsurgery.known.own import is_known
    from swsurgery.sharing.recipes.recipe import recipe

    if not is_known(subject):
        subject = read_location(out, "subject", subject)
    made = recipe(subject, tool, model=model, reporter=out.make_reporter())
    out.print_result(made, _show_recipe)
    if not out.json:
        for note in made.notes:
            out.note(note)


def _show_recipe(made: Recipe) -> None:
    print_text(made.text.removesuffix("\n"))

"""Commands that share edits and checkpoints: publish, export.

Each calls one function of `sharing` and prints the result.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from swsurgery.cli import output
from swsurgery.cli.options import Debug, DirectoryArgument, Json, Quiet, ignore_message
from swsurgery.errors import SwsurgeryError, escape_control, report_done

if TYPE_CHECKING:
    from swsurgery.sharing.publication import Publication
    from swsurgery.sharing.publish import Published
    from swsurgery.verifying.findings import Finding


def publish(
    checkpoint: DirectoryArgument,
    repo_id: Annotated[str, typer.Argument(help="Where to: ORG/NAME on the Hub.", show_default=False)],
    patch: Annotated[
        bool, typer.Option("--patch", help="Publish the edits alone: four small files and no weights.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and send nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before the public sees it.")] = False,
    accept: Annotated[
        list[str] | None, typer.Option(help="Publish in spite of this finding; may be repeated. The card says so.")
    ] = None,
    revision: Annotated[str, typer.Option(help="The branch to commit to; made where it is not there.")] = "main",
    tag: Annotated[str | None, typer.Option(help="Name of the tag, instead of base-COMMIT.")] = None,
    message: Annotated[str | None, typer.Option(help="The commit's message.")] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Publish a patched checkpoint: one commit, in which only what changed is uploaded. Exit 1 where a finding forbids
    it, or where what the Hub then serves is not what was planned."""  # noqa: D205 (a blank line would change the help)
    from swsurgery.sharing import plan_checkpoint, publication, publish

    def make_plan(accepted: Sequence[Finding], hashing: bool) -> Publication:
        if patch:
            from swsurgery.sharing.plan_patch import make_patch_publication

            return make_patch_publication(checkpoint, wish, accepted, bar)
        return plan_checkpoint.make_publication(checkpoint, wish, accepted, bar, hashing=hashing)

    bar = output.Bar(quiet)
    wish = publication.Wish(repo_id, private, create_pr, revision, tag, message)
    say = ignore_message if quiet else output.say
    if dry_run:
        found = publish.find_early(checkpoint)
        plan = make_plan((), hashing=False)
        if json:
            output.print_json({"plan": plan.to_json(), "findings": [f.to_json() for f in found]})
        else:
            _show(plan)
            for finding in found:
                say(f"would need --accept {finding.rule}: {finding.file}: {finding.message}")
        return
    plan = make_plan(publish.check_gate(checkpoint, accept or (), bar), hashing=True)
    if plan.changes and not plan.private and not yes and plan.pull_request is None:
        _ask(plan)
    else:
        for line in publication.format_lines(plan, output.format_size):
            say(line)
    done = publish.publish(plan, bar, say, bars=not quiet and sys.stderr.isatty())
    report_done(f"published: {done.repo_id}, commit {done.commit}")
    output.print_json({"plan": plan.to_json(), "published": done.to_json()}) if json else _show_published(done)
    if done.findings:
        raise typer.Exit(1)


def _show(plan: Publication) -> None:
    from swsurgery.sharing import publication

    for line in publication.format_lines(plan, output.format_size):
        output.print_text(escape_control(line))


def _ask(plan: Publication) -> None:
    """Show the plan and ask for confirmation. Raises SwsurgeryError if stdin is not a terminal."""
    from swsurgery.sharing import publication

    if not sys.stdin.isatty():
        raise SwsurgeryError(
            "the public would see it, and nobody is there to ask",
            plan.wish.repo_id,
            "give --yes, or --private for a new repository; --dry-run shows the plan",
        )
    for line in publication.format_lines(plan, output.format_size):
        output.say(line)
    output.say("Publish this, for everyone to see? [y/N]")
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        output.say("nothing was published")
        raise typer.Exit(1)


def _show_published(done: Published) -> None:
    what = "was published already" if done.already else "published"
    where = f"pull request {done.pull_request}, commit {done.commit}" if done.pull_request else f"commit {done.commit}"
    output.print_text(escape_control(f"{done.repo_id}: {what}, {where}"))
    output.print_text(
        f"uploaded {output.format_size(done.uploaded)}, copied on the Hub {output.format_size(done.copied)}, "
        f"read back {output.format_size(done.read)}"
    )
    if not done.findings:
        scalars = "1 edited scalar has its" if done.scalars == 1 else f"{done.scalars} edited scalars have their"
        more = f", {scalars} new bits" if done.scalars else ""
        output.print_text(f"verified: {done.files} files have the planned digests{more}")
    for finding in done.findings:
        output.print_text(escape_control(f"{finding.rule}: {finding.file or done.repo_id}: {finding.message}"))
    output.print_text(escape_control(done.url))


def export(
    source: Annotated[
        str,
        typer.Argument(
            help="A patched checkpoint (a directory or hf://ORG/NAME[@REV]), a manifest, or a patch.",
            show_default=False,
        ),
    ],
    form: Annotated[
        Literal["sparse", "peft", "vllm"],
        typer.Option(
            "--format",
            help="sparse: one file that apply takes; peft: a LoRA adapter; vllm: arrays for its checkpoint patches.",
            show_default=False,
        ),
    ],
    target: Annotated[
        Path, typer.Option("-o", "--output", help="The new file (sparse) or folder (peft, vllm).", show_default=False)
    ],
    base: Annotated[
        str | None, typer.Option(help="The manifest's base, instead of its own: a directory or hf://ORG/NAME[@REV].")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write the edits alone, in a few kilobytes."""
    from swsurgery.sharing import export as export_module

    exported = export_module.write(source, form, target, base=base, progress=output.Bar(quiet))
    report_done(f"the output was written: {exported.output}")
    if json:
        output.print_json(exported.to_json())
        return
    scalars = f"{exported.scalars} changed scalar{'s' if exported.scalars > 1 else ''}"
    output.print_text(f"{escape_control(str(exported.output))}: {scalars} as {form}")
    for name, size in exported.files.items():
        output.print_text(f"  {escape_control(name)}  {output.format_size(size)}")
    for note in exported.notes if not quiet else ():
        output.say(note)

"""The command that prints known super weights: lookup."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from swsurgery.cli.completion import complete_model, complete_status
from swsurgery.cli.options import PageOption, get_width, table_command
from swsurgery.cli.output import Output, print_json, print_table, print_text
from swsurgery.cli.pages import refuse_page, write_page
from swsurgery.errors import SwsurgeryError, escape_control, report_done

if TYPE_CHECKING:
    from swsurgery.checkpoint.record import Record
    from swsurgery.known.listing import KnownModels
    from swsurgery.known.lookup import KnownSuperWeights

Operation = Literal["zero", "scale", "protect", "restore"]
"""The operations of a manifest that `lookup --manifest` prints."""


_LIST_HEADER = ("name", "coordinates", "status", "maximum activation")
"""Titles of the columns of the list of all known models."""


@table_command
def lookup(
    out: Output,
    model: Annotated[
        str | None,
        typer.Argument(
            help="The name of a model, or a patched checkpoint.", show_default=False, autocompletion=complete_model
        ),
    ] = None,
    status: Annotated[
        list[str] | None,
        typer.Option(
            help="Print only super weights with this status; may be repeated.", autocompletion=complete_status
        ),
    ] = None,
    manifest: Annotated[
        Operation | None,
        typer.Option(help="Print a manifest that uses this operation."),
    ] = None,
    factor: Annotated[float | None, typer.Option(help="The factor for --manifest scale.")] = None,
    form: Annotated[
        Literal["table", "modules"],
        typer.Option("--as", help="What to print: a table, or only the names of the modules with super weights."),
    ] = "table",
    forget: Annotated[bool, typer.Option("--forget", help="Remove your own entry, made by scan --register.")] = False,
    page: PageOption = None,
) -> None:
    """Print a model's known super weights or the record of a patched checkpoint. Without MODEL, list all models."""
    from swsurgery.hub.names import read_url
    from swsurgery.known import lookup

    if model is not None and (location := read_url(model)):
        model = location.removeprefix("hf://").partition("@")[0]  # a model is known by the id of its repository
    chosen = bool(status or manifest or factor is not None)
    if model is None and (manifest or factor is not None or form == "modules" or forget):
        raise SwsurgeryError("--manifest, --factor, --as and --forget need the name of a model")
    if out.table and (manifest or form == "modules" or forget):
        raise out.make_table_error()
    if page is not None and (manifest or form == "modules" or forget):
        raise SwsurgeryError("--page cannot be combined with --manifest, --as or --forget")
    refuse_page(page, model if model is not None and lookup.is_checkpoint(model) else None)
    if form == "modules" and (manifest or forget):
        raise SwsurgeryError("--as cannot be combined with --manifest or --forget")
    if model is not None and forget:
        if chosen:
            raise SwsurgeryError("--forget cannot be combined with --status, --manifest or --factor")
        _forget(out, model)
        return
    if model is not None and lookup.is_checkpoint(model):
        _refuse_options_of_models(model, chosen, form)
    if factor is not None and manifest is None:
        raise SwsurgeryError("--factor needs --manifest scale")
    found = lookup.lookup(model, status=status or None, reporter=out.make_reporter())
    _print_found(out, found, manifest, factor, form)
    write_page(out, page, "lookup", model or "", found.to_json())


def _print_found(
    out: Output,
    found: KnownSuperWeights | KnownModels | Record,
    manifest: Operation | None,
    factor: float | None,
    form: str,
) -> None:
    """Print what was found: a list of models, a record, or the super weights of one model."""
    from swsurgery.known import listing, lookup, table

    if isinstance(found, listing.KnownModels):
        out.print_result(found, lambda found: print_table(_LIST_HEADER, found.render_cells()))
    elif not isinstance(found, lookup.KnownSuperWeights):
        from swsurgery.cli import show

        out.print_result(found, show.show_record)
    elif manifest:
        _print_manifest(out, found, manifest, factor)
    elif form == "modules":
        _print_modules(out, found)
    else:
        out.print_result(
            found, lambda found: print_text(table.render_table(found.models[0], get_width(), found.statuses))
        )


def _refuse_options_of_models(checkpoint: str, chosen: bool, form: str) -> None:
    """Raise SwsurgeryError if an option was given that only the name of a model takes."""
    if chosen:
        raise SwsurgeryError("--status, --manifest and --factor need the name of a model, not a checkpoint", checkpoint)
    if form == "modules":
        remedy = "swsurgery recipe lists modules of a checkpoint"
        raise SwsurgeryError("--as needs the name of a model", checkpoint, remedy)


def _print_modules(out: Output, found: KnownSuperWeights) -> None:
    from swsurgery.known import shipped

    [model] = found.models
    modules = shipped.list_modules(model, found.statuses)
    if out.json:
        out.print_document({"model": model.hf_id, "modules": list(modules)})
    else:
        for module in modules:
            print_text(module)


def _forget(out: Output, model: str) -> None:
    from swsurgery.known import own

    removed = str(own.forget(model))
    report_done(f"your entry was removed: {removed}")
    if out.json:
        out.print_document({"forgotten": removed})
    else:
        print_text(f"{escape_control(removed)}: your entry was removed; entries shipped with swsurgery remain")


def _print_manifest(
    out: Output,
    found: KnownSuperWeights,
    operation: Operation,
    factor: float | None,
) -> None:
    from swsurgery.known import table

    text = table.render_manifest(found.models[0], operation, factor, found.statuses)
    if (path := found.models[0].path) and operation != "restore" and Path(path).is_dir():
        from swsurgery.editing import pin  # the user's own entry of a local checkpoint

        text = pin.pin(text.encode()).text
    if out.json:
        from swsurgery.manifest.load import parse_manifest

        out.printed = True
        print_json(parse_manifest(text.encode(), Path(f"{operation}.yaml")).to_json())
    else:
        print_text(text)

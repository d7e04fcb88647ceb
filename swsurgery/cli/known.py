"""The command that prints known super weights: lookup."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from swsurgery.cli.options import command, get_width, open_for_reading
from swsurgery.cli.output import Output, print_json, print_text
from swsurgery.errors import SwsurgeryError, escape_control, report_done


@command
def lookup(
    out: Output,
    model: Annotated[str, typer.Argument(help="The name of a model, or a patched checkpoint.", show_default=False)],
    status: Annotated[
        list[str] | None, typer.Option(help="Print only super weights with this status; may be repeated.")
    ] = None,
    manifest: Annotated[
        Literal["zero", "scale", "protect"] | None, typer.Option(help="Print a manifest with this operation.")
    ] = None,
    factor: Annotated[float | None, typer.Option(help="The factor for --manifest scale.")] = None,
    forget: Annotated[bool, typer.Option("--forget", help="Remove your own entry, made by scan --register.")] = False,
) -> None:
    """Print the known super weights of a model, or the record of a patched checkpoint."""
    status = status or None
    chosen = bool(status or manifest or factor is not None)
    if forget:
        if chosen:
            raise SwsurgeryError("--forget cannot be combined with --status, --manifest or --factor")
        _forget(out, model)
    elif _is_checkpoint(model):
        if chosen:
            raise SwsurgeryError("--status, --manifest and --factor need the name of a model, not a checkpoint", model)
        _print_record(out, model)
    elif manifest:
        _print_manifest(out, model, manifest, factor, status)
    elif factor is not None:
        raise SwsurgeryError("--factor needs --manifest scale")
    else:
        _print_known(out, model, status)


def _is_checkpoint(name: str) -> bool:
    is_directory = os.sep in name and Path(name).is_dir()
    return name.startswith("hf://") or is_directory or Path(name, "swsurgery.json").is_file()


def _forget(out: Output, model: str) -> None:
    from swsurgery.known import own

    removed = str(own.forget(model))
    report_done(f"your entry was removed: {removed}")
    if out.json:
        print_json({"forgotten": removed})
    else:
        print_text(f"{escape_control(removed)}: your entry was removed; entries shipped with swsurgery remain")


def _print_record(out: Output, checkpoint: str) -> None:
    from swsurgery.checkpoint.opening import held
    from swsurgery.checkpoint.record import read_record
    from swsurgery.cli import show

    with open_for_reading(checkpoint, out) as where, held(where) as entered:
        record = read_record(entered).record
    if out.json:
        print_json(record.model_dump(mode="json"))
    else:
        show.show_record(record)


def _print_manifest(
    out: Output,
    model: str,
    operation: Literal["zero", "scale", "protect"],
    factor: float | None,
    status: list[str] | None,
) -> None:
    from swsurgery.known import own, table

    text = table.render_manifest(own.lookup(model), operation, factor, status)
    if out.json:
        from swsurgery.manifest.load import parse_manifest

        loaded = parse_manifest(text.encode(), Path(f"{operation}.yaml"))
        print_json(loaded.manifest.model_dump(mode="json", exclude_unset=True))
    else:
        print_text(text)


def _print_known(out: Output, model: str, status: list[str] | None) -> None:
    from swsurgery.known import own, shipped, table

    found = own.lookup(model)
    if out.json:
        print_json(shipped.build_json(found, status))
    else:
        print_text(table.render_table(found, get_width(), status))

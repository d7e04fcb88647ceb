"""Write the result of a command as an HTML page, as the option --page requests."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from swsurgery.cli.options import refuse_replacing
from swsurgery.cli.output import Output
from swsurgery.errors import SwsurgeryError, TargetError, report_done


def refuse_page(page: Path | None, *files: str | Path | None, manifests: Sequence[Path] = ()) -> None:
    """Raise TargetError if the page cannot be written. A command calls this function before its work.

    `files` are the inputs and outputs of the command, and `manifests` are those that name its base: the page must not
    replace one of them, or be written inside one. A text may be the location of a checkpoint, such as hf://ORG/NAME.
    """
    if page is None:
        return
    from swsurgery.storage.filesystem import refuse_unwritable

    if page.suffix.lower() not in (".html", ".htm"):
        raise TargetError("the name of a page must end in .html", page, "choose another --page")
    refuse_unwritable(page)
    local = [Path(file) for file in files if file is not None and not str(file).startswith("hf://")]
    refuse_replacing(page, [*local, *manifests, *_list_bases(manifests)], "--page")


def _list_bases(manifests: Sequence[Path]) -> list[Path]:
    """Return the directories that manifests name as their base. A manifest that cannot be read is skipped.

    The command reports it later.
    """
    from swsurgery.manifest.load import load_manifest

    bases = []
    for manifest in manifests:
        with contextlib.suppress(SwsurgeryError):
            said = load_manifest(manifest).manifest.base
            bases += [] if said.path is None else [manifest.parent / said.path]
    return bases


def write_page(out: Output, page: Path | None, command: str, subject: str, document: Mapping[str, object]) -> None:
    """Write the page of a result, if one was requested. Raises TargetError.

    `document` is the JSON document of `command`. The command has already printed its result.
    """
    if page is None:
        return
    from swsurgery.sharing.page import render_page
    from swsurgery.storage.filesystem import write_report

    try:
        write_report(page, render_page(command, subject, document))
    except TargetError as error:
        raise SwsurgeryError.of(f"no page was written: {fault}" for fault in error.faults) from error
    report_done(f"page: {page}")
    out.note(f"page: {page}")

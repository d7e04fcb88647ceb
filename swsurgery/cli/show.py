"""Print the results of library functions as lines and tables on stdout.

This module must not compute anything or import torch.
"""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from swsurgery.cli.output import print_table, print_text
from swsurgery.cli.show_controls import show_controls
from swsurgery.cli.show_tasks import show_tasks
from swsurgery.errors import escape_control, list_some, pluralise
from swsurgery.storage.numbers import format_number, format_ratio, format_size

if TYPE_CHECKING:
    from swsurgery.checkpoint.diff import Difference
    from swsurgery.checkpoint.record import Record
    from swsurgery.editing.applied import Applied
    from swsurgery.editing.plan import Plan
    from swsurgery.editing.revert import Reverted

MAX_ROWS = 40
"""Maximum number of rows that are printed for one table."""

MAX_NAMES = 5
"""Maximum number of file names that are listed in one line."""


def show_plan(plan: Plan, undo_limit: int) -> None:
    """Print the edits that a plan would make, the checked pins and the notes. `undo_limit` is in bytes."""
    document = plan.to_json()
    print_text(f"base      {escape_control(str(plan.checkpoint.root))}")
    kept = set(plan.previous.record.map_protectors()) if plan.previous else set()
    kept -= {p.coordinate for p in plan.protected}
    and_kept = f", and {len(kept)} that earlier steps protect" if kept else ""
    changed = len(plan.splices) + sum(rewrite.region.scalars for rewrite in plan.rewrites)
    protected = len(plan.protected) + sum(one.region.scalars for one in plan.protected_regions)
    print_text(
        f"changes   {pluralise(changed, 'scalar')} in {len(plan.touched)} of "
        f"{len(plan.checkpoint.shards)} shards; protects {protected}{and_kept}"
    )
    _list_edits(document["splices"], document["protected"])
    _list_codes(document.get("codes", ()))
    _list_lines("edit", plan.to_lines())
    if plan.rewrites:
        _show_undo(sum(rewrite.size for rewrite in plan.rewrites), undo_limit)
    if plan.pins_checked:
        print_text(f"pins      match the sha256 of {_format_names(plan.pins_checked)}")
    if plan.pins_unchecked:
        print_text(
            f"pins      not checked, because only files to be edited are hashed: {_format_names(plan.pins_unchecked)}"
        )
    for note in plan.notes:
        print_text(f"note      {escape_control(note)}")
    print_text("nothing was written")


def show_applied(applied: Applied) -> None:
    """Print the edits made, the report of the sanity check, and the commands that prove and undo the edits."""
    document = applied.to_json()
    _list_edits(document["splices"], document["protected"])
    _list_codes(document.get("codes", ()))
    _list_regions(applied.record)
    print_text("")
    show_check(document["check"])
    print_text("")
    words = {
        "clone": "cloned",
        "copy": "copied",
        "hard": "hard linked",
        "kept": "kept from the interrupted run",
        "elsewhere": "left in the base's repository",
    }
    amounts = {how: sum(f.size for f in applied.copied.files if f.how == how) for how in words}
    in_place = not any(amounts.values())
    how = "in place" if in_place else ", ".join(f"{format_size(n)} {words[k]}" for k, n in amounts.items() if n)
    done = f"wrote     {escape_control(str(applied.output))} ({how})"
    if unverified := sum(f.unverified for f in applied.copied.files):
        print_text(f"not hashed {pluralise(unverified, 'file')}: the record marks the digests as unverified")
    print_text(
        done
        if applied.written
        else f"unchanged {escape_control(str(applied.output))} (the manifest was already applied)"
    )
    output = escape_control(shlex.quote(str(applied.output)))
    print_text(f"prove it  swsurgery verify {output}")
    needed = " --base BASE" if any(change.undo is None for change in applied.record.changes) else ""
    how = f" -o DIR{needed}" if needed or not in_place else ""
    print_text(f"undo it   swsurgery revert {output}{how}")


def show_reverted(reverted: Reverted) -> None:
    """Print the directory in which the base was restored."""
    written = escape_control(str(reverted.output))
    print_text(f"{written}: every file has the same bytes as before the manifest was applied")


def show_record(record: Record) -> None:
    """Print a record: the base, the steps, the known super weights among the edits, and the check."""
    base = record.base
    name = f"{base.repo_id or 'a directory'}{'@' + base.revision if base.revision else ''}"
    print_text(f"base      {escape_control(name)}")
    print_text(f"steps     {len(record.history) + 1}")
    for number, step in enumerate(record.history, 1):
        print_text(f"\nstep {number}")
        earlier = step.read()
        document = earlier.model_dump(mode="json")
        _list_edits(document["edits"], document["protected"])
        _list_codes(document.get("codes", ()))
        _list_regions(earlier)
    print_text(f"\nstep {len(record.history) + 1}")
    document = record.model_dump(mode="json")
    _list_edits(document["edits"], document["protected"])
    _list_codes(document.get("codes", ()))
    _list_regions(record)
    for scalar in (*record.edits, *record.protected):
        if scalar.known:
            fact = f"{scalar.coordinate}: {scalar.known.status}, zeroed alone {scalar.known.causal_alone}"
            print_text(f"known     {escape_control(fact)}")
    print_text("")
    try:
        show_check(document["check"])
    except (KeyError, TypeError, AttributeError, ValueError):  # the report is not validated when a record is read
        print_text("check     the report in the record cannot be read")


def show_check(document: Mapping[str, Any]) -> None:
    """Print the report of a sanity check. `document` is its JSON, from a record or from `to_json`."""
    if (kind := document.get("kind", "forward")) != "forward":
        what = "only the weights were checked" if kind == "weights" else "no check was made"
        print_text(f"check     {what}: {escape_control(document['reason'])}")
        return
    if document.get("compared") is False:
        _check_alone(document)
        return
    print_table(("", "base", "patched"), _list_measurements(document, ("base", "patched")))
    ratio, kl = _format_figure(document["perplexity_ratio"], format_ratio), _format_figure(document["kl"])
    print_text(f"perplexity ratio {ratio}, KL(base || patched) {kl} nats per token")
    show_controls(document)
    _list_rounded(document)
    _list_continuations(document, ("base", "patched"))
    show_tasks(document.get("tasks"))
    _describe_measured(document)


def _check_alone(document: Mapping[str, Any]) -> None:
    """Print the measurements of a model that has no base to be compared with."""
    print_table(("", "this model"), _list_measurements(document, ("patched",)))
    print_text("nothing was compared, because there is no record of the base and no --base")
    _list_rounded(document)
    _list_continuations(document, ("patched",))
    show_tasks(document.get("tasks"))
    _describe_measured(document)


def _list_measurements(document: Mapping[str, Any], sides: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the rows of the table of a check: a name, then one cell for each side of the report."""
    measured, mass = [document[side] for side in sides], document["stopword_mass"]
    peaks = [one["super_activation"] for one in measured]
    words = [one.get("word_perplexity") for one in measured]
    return [
        ("perplexity", *(_format_figure(one["perplexity"]) for one in measured)),
        *([] if None in words else [("word perplexity", *map(_format_figure, words))]),
        ("stop-word mass", *(_format_figure(mass[side]) for side in sides)),
        ("super activation", *(_format_figure(peak["value"]) if peak else "-" for peak in peaks)),
        ("  in layer, token, channel", *(_format_place(peak) if peak else "-" for peak in peaks)),
        ("logits finite", *("yes" if one["finite"] else "NO" for one in measured)),
    ]


def _format_figure(value: object, write: Callable[[float], str] = format_number) -> str:
    """Format a measured number of a JSON document, which contains a word such as "inf" instead of an infinity."""
    return write(value) if isinstance(value, int | float) else str(value)


def _format_place(peak: Mapping[str, Any]) -> str:
    return f"{peak['layer']}, {peak['token']}, {peak['channel']}"


def _list_rounded(document: Mapping[str, Any]) -> None:
    """Print the figures with rounded activations, if they were measured."""
    rows = [
        (
            *(side["side"], side["activations"], _format_figure(side["perplexity"])),
            *(_format_figure(side["ratio"], format_ratio), _format_figure(side["kl"])),
            _format_figure(side["stopword_mass"]),
        )
        for side in document.get("rounded_activations", ())
    ]
    if rows:
        print_text("")
        print_table(("", "inputs of linear layers", "perplexity", "ratio", "KL", "stop-word mass"), rows)


def _list_continuations(document: Mapping[str, Any], sides: tuple[str, ...]) -> None:
    for prompt in document["prompts"]:
        print_text(f"\n{escape_control(repr(prompt['prompt']))}")
        for side in sides:
            tokens = ", ".join(f"{escape_control(repr(token))} {p:.3f}" for token, p in prompt[side])
            print_text(f"  {side if len(sides) > 1 else '':8} {tokens or 'no finite logits'}")


def _list_generations(document: Mapping[str, Any]) -> None:
    """Print how the models continue each prompt, if this was asked for."""
    for number, made in enumerate(document.get("generations", ())):
        if not number:
            print_text("\ncontinued by the most likely tokens")
        print_text(f"\n{escape_control(repr(made['prompt']))}")
        for side in ("base", "patched"):
            if made[side] is not None:
                print_text(f"  {side if made['base'] is not None else '':8} {escape_control(repr(made[side]))}")


def _describe_measured(document: Mapping[str, Any]) -> None:
    _list_generations(document)
    for note in document.get("notes", ()):
        print_text(f"note      {escape_control(note)}")
    for failure in document["failures"]:
        print_text(f"FAILED    {escape_control(failure)}")
    text = document["text"]
    print_text(
        f"\nmeasured on {text['scored_tokens']:,} tokens in {pluralise(text['windows'], 'window')}, "
        f"{document['dtype']} on {document['device']}"
    )
    if protocol := text.get("protocol"):  # absent from the records of earlier versions
        print_text(escape_control(f"protocol {protocol['description']}; text sha256 {text['sha256'][:16]}"))


def show_difference(difference: Difference) -> None:
    """Print the differences between two checkpoints."""
    document = difference.to_json()
    rows = [
        (
            c["tensor"],
            _format_index(c["index"]) + (f" .. {_format_index(c['last'])}" if "last" in c else ""),
            c["old"],
            c["new"],
        )
        for c in document["changes"]
    ]
    if rows:
        print_table(("tensor", "index", "a", "b"), rows[:MAX_ROWS])
    if len(rows) > MAX_ROWS or difference.truncated:
        print_text("... more scalars differ than are listed; the number in each tensor:")
        print_table(("tensor", "changed", "of"), [(t, n, total) for t, (n, total) in difference.tensors.items()])
    for tensor, why in difference.mismatched.items():
        print_text(f"{escape_control(tensor)}: {why}")
    for note in difference.notes:
        print_text(escape_control(note))
    for name, state in difference.files.items():
        if state != "same":
            print_text(f"file {escape_control(name)}: {state}")
    if difference.same:
        print_text("no scalar differs")


def show_files(document: Mapping[str, Any]) -> None:
    """Print the files and tensors of a checkpoint."""
    model_type = str(document["model_type"] or "unknown model type")
    print_text(f"{escape_control(document['checkpoint'])}: {escape_control(model_type)}")
    if document["repo_id"]:
        print_text(escape_control(f"{document['repo_id']}@{document['revision']}"))
    print_text("")
    print_table(
        ("file", "bytes", ""), [(f["file"], f["size"], "shard" if f["shard"] else "") for f in document["files"]]
    )
    print_text("")
    print_table(
        ("tensor", "dtype", "shape", "file"),
        [(t["tensor"], t["dtype"], _format_index(t["shape"]), t["file"]) for t in document["tensors"]],
    )
    for copy in document["copies"]:
        print_text(f"\nanother copy of the weights: {escape_control(copy)}")
    for tensor, why in document["disagreements"].items():
        print_text(f"\nindex and shards disagree about {escape_control(tensor)}: {escape_control(why)}")
    for line in document["quantised"]["text"] if document["quantised"] else ():
        print_text(f"\n{escape_control(line)}")
    for note in document["notes"]:
        print_text(f"\n{escape_control(note)}")
    for step in document["steps"]:
        _show_step(step)


def _show_step(step: Mapping[str, Any]) -> None:
    """Print one step of a patched checkpoint: its manifest, its date if the record has one, and its edits."""
    date = "" if step["created"] is None else f", {_format_date(step['created'])}"
    name = step["name"] or "manifest without a name"
    print_text(f"\nstep {step['number']}: {escape_control(name)} (sha256 {step['manifest_sha256'][:12]}){date}")
    for line in step["edits"][:MAX_ROWS]:
        print_text(f"  {escape_control(line)}")
    if len(step["edits"]) > MAX_ROWS:
        print_text(f"  ... and {len(step['edits']) - MAX_ROWS} more")


def _format_date(seconds: int) -> str:
    """Return a time in seconds since 1970 as text, such as "2026-01-31 12:00:00 UTC"."""
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):  # later than the year 9999
        return f"{seconds} seconds since 1970"


def show_tensor(document: Mapping[str, Any]) -> None:
    """Print the facts about one tensor or one scalar, one fact per line."""
    for key, value in document.items():
        if key == "expert" and value is None:  # the layer has no experts
            continue
        if key == "stored":
            for number in value:
                facts = [number["tensor"] + _format_index(number.get("index") or number["shape"])]
                facts += [str(number[fact]) for fact in ("bits", "dtype", "file") if number.get(fact) is not None]
                print_text(f"{key:13} {escape_control(' '.join(facts))}")
            continue
        print_text(f"{key:13} {escape_control(_format_index(value) if isinstance(value, list) else str(value))}")


def _list_edits(edits: list[dict[str, Any]], protected: list[dict[str, Any]]) -> None:
    rows = [
        (e["op"], e["tensor"], _format_index(e["index"]), e["dtype"], e["old"], e["new"], e["file"], e["offset"])
        for e in edits
    ]
    rows += [
        ("protect", p["tensor"], _format_index(p["index"]), p["dtype"], p["old"], "", p["file"], p["offset"])
        for p in protected
    ]
    if rows:
        print_table(("op", "tensor", "index", "dtype", "old", "new", "file", "offset"), rows[:MAX_ROWS])
    if len(rows) > MAX_ROWS:
        print_text(f"... and {len(rows) - MAX_ROWS} more")


def _list_codes(codes: Iterable[Mapping[str, Any]]) -> None:
    """Print one line for each element of a quantised matrix: its values, its codes and the rounding error."""
    lines = []
    for code in codes:
        line = f"{code['op']} {code['weight']}{_format_index(code['index'])}: {format_number(code['old'])}"
        if code["op"] != "protect":
            wanted, error = code["wanted"], abs(code["new"] - code["wanted"])
            line += f" -> {format_number(code['new'])} (wanted {format_number(wanted)}, error {format_number(error)}; "
            line += f"code {code['old_code']} -> {code['new_code']})"
        lines.append(line)
    _list_lines("quantised", lines)


def _list_regions(record: Record) -> None:
    """Print one line for each edit that changed or protects regions, and where the old bytes are."""
    from swsurgery.checkpoint.region_summary import summarise_changes, summarise_protected

    changes = summarise_changes(record)
    _list_lines("edit", [s.describe() for s in (*changes, *summarise_protected(record.protected_regions))])
    if record.undo:
        print_text(f"old bytes {record.undo_name} ({format_size(record.undo.size)})")
    elif changes:
        print_text("old bytes not stored, because they exceed the limit of the undo file: undoing needs the base")


def _show_undo(size: int, limit: int) -> None:
    """Print whether the old bytes of regions of `size` bytes fit into the undo file."""
    amount = f"{format_size(size)} of old bytes"
    if size <= limit:
        print_text(f"undo      an undo file would store at most {amount}")
    else:
        print_text(
            f"undo      up to {amount} exceed --undo-limit ({format_size(limit)}): undoing may need the base; clip and "
            "prune_outliers store only the scalars that they change"
        )


def _list_lines(word: str, lines: list[str]) -> None:
    """Print up to MAX_ROWS lines, each after a word, and the number of the rest."""
    for line in lines[:MAX_ROWS]:
        print_text(f"{word:9} {escape_control(line)}")
    if len(lines) > MAX_ROWS:
        print_text(f"... and {len(lines) - MAX_ROWS} more")


def _format_names(names: tuple[str, ...]) -> str:
    return list_some([*map(escape_control, names)], MAX_NAMES)


def _format_index(numbers: list[int]) -> str:
    return "[" + ", ".join(map(str, numbers)) + "]"

"""Inputs made to cost time or memory, each a file of its own kind under its name, and what handling it costs.

The bound for each, measured on the real command from its start to its end, the imports too: 2 seconds of processor
time and 256 MB of memory at the most, or 320 MB for a large record; it is handled, or refused with one line.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoints

from swsurgery.storage.names import OWN_FILES

SECONDS, MEGABYTES = 2.0, 256
MIB = 1 << 20
HEAD = "version: 1\nbase: {path: base}\nedits:\n"


@dataclass(frozen=True)
class Hostile:
    """`write` puts the input into a folder and returns the command's arguments. `says` is part of the refusal, None
    where the command does what it is asked. `megabytes` is the bound on memory."""

    name: str
    write: Callable[[Path], list[str]]
    says: str | None
    megabytes: int = MEGABYTES


def manifest(text: str | Callable[[], str]) -> Callable[[Path], list[str]]:
    """The plan of a manifest for a small base."""

    def write(folder: Path) -> list[str]:
        checkpoints.write_llama(folder / "base")
        path = folder / "m.yaml"
        path.write_text(text if isinstance(text, str) else text())
        return ["apply", str(path), "--dry-run", "--json"]

    return write


def header(text: bytes | Callable[[], bytes]) -> Callable[[Path], list[str]]:
    """A checkpoint of one file without data."""

    def write(folder: Path) -> list[str]:
        raw = text if isinstance(text, bytes) else text()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)
        return ["inspect", str(folder)]

    return write


def file(name: str, text: str | Callable[[], str], *command: str) -> Callable[[Path], list[str]]:
    """A small sharded checkpoint in which one file is replaced."""

    def write(folder: Path) -> list[str]:
        checkpoints.write_llama(folder)
        (folder / name).write_text(text if isinstance(text, str) else text())
        return [*(command or ("inspect",)), str(folder)]

    return write


def tensors(count: int) -> bytes:
    """A header of empty tensors with the shortest names."""
    entry = '"{:x}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    return ("{" + ",".join(entry.format(i) for i in range(count)) + "}").encode()


def shape(length: str, count: int) -> bytes:
    """A header of one tensor with that many dimensions, and one more of 0."""
    return f'{{"a":{{"dtype":"U8","shape":[{length * count}0],"data_offsets":[0,0]}}}}'.encode()


def filled(head: str, piece: str, tail: str, size: int) -> str:
    """head, as many pieces as fit into `size` bytes, tail."""
    return head + piece * ((size - len(head) - len(tail)) // len(piece.encode())) + tail


def many_edits(edit: str, count: int) -> str:
    return HEAD + "".join(f"  - {edit.format(row=i % 6, col=i // 6)}\n" for i in range(count))


def wide_base(folder: Path) -> list[str]:
    """7,000 sound edits of a tensor that has as many scalars."""
    checkpoints.write_single(folder / "base", {"w": checkpoints.tensor("F32", 6, 1167)})
    (folder / "m.yaml").write_text(many_edits(SOUND, 7_000))
    return ["apply", str(folder / "m.yaml"), "--dry-run"]


def index_of(count: int, shard: str = checkpoints.FIRST) -> str:
    """Tensors with the shortest names; a {} in `shard` takes their numbers."""
    return '{"weight_map":{' + ",".join(f'"{i:x}":"{shard.format(i)}"' for i in range(count)) + "}}"


def largest_known(folder: Path) -> list[str]:
    """As DeepSeek-V3: 91,991 tensors in 163 shards, an index of 9 MB. The data takes no room here."""
    weight_map, shards = {}, 163
    for number in range(shards):
        shard = f"model-{number + 1:05}-of-{shards:06}.safetensors"
        entries = {}
        for i in range(number, 91_991, shards):
            name = f"model.layers.{i // 1536}.mlp.experts.{i % 256}.down_proj.weight_scale_inv.{i}"
            place = [len(entries) * 7168, (len(entries) + 1) * 7168]
            entries[name] = {"dtype": "F32", "shape": [32, 56], "data_offsets": place}
            weight_map[name] = shard
        raw = json.dumps(entries).encode()
        (folder / shard).write_bytes(struct.pack("<Q", len(raw)) + raw)
        os.truncate(folder / shard, 8 + len(raw) + len(entries) * 7168)
    (folder / checkpoints.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2))
    return ["inspect", str(folder), "--tensor", min(weight_map)]  # without it, 92,000 lines are printed


def many_full_headers(folder: Path) -> list[str]:
    """Files that are each within the limit, and together are not."""
    raw, names = tensors(25_000), [f"model-{n}.safetensors" for n in range(8)]
    for name in names:
        (folder / name).write_bytes(struct.pack("<Q", len(raw)) + raw)
    weight_map = {f"{n}": name for n, name in enumerate(names)}
    (folder / checkpoints.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return ["inspect", str(folder)]


def record(**fields: Any) -> str:
    return json.dumps({"registry_version": 1, "swsurgery_version": "0.1.0", **fields})


def lie(folder: Path) -> list[str]:
    """A header said to have 2**63 bytes."""
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 63) + b"{}")
    return ["inspect", str(folder)]


def laughs() -> str:
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    return "\n".join(lines) + "\n"


MANIFEST_SIZE, HEADER_SIZE, JSON_SIZE = 8 * MIB, 16 * MIB, 32 * MIB
"""A large manifest, and the product's own limits of a header and of a JSON file other than the record."""

DIGITS, DEEP = "1" * 1_000_000, 100_000
MANY, MANY_EDITS = "keys and values", "more than 150000 edits"
SOUND = "{{op: scale, tensor: w, index: [{row}, {col}], factor: 1.5}}"
ZERO = '{{op: zero, tensor: "{col}", index: [0], x{col}: 1}}'

HOSTILE = (
    Hostile("manifest: billion laughs", manifest(laughs), "anchor &a0"),
    Hostile("manifest: an anchor that holds itself", manifest("version: &a [*a]\n"), "anchor &a"),
    Hostile("manifest: 100,000 merges", manifest(lambda: "a: &a {b: 1}\n" + "c: {<<: *a}\n" * 100_000), "anchor &a"),
    Hostile("manifest: 8 MiB of [", manifest("[" * MANIFEST_SIZE), "nested deeper"),
    Hostile("manifest: 8 MiB of [],", manifest(lambda: filled("[", "[],", "]", MANIFEST_SIZE)), MANY),
    Hostile("manifest: 8 MiB of {},", manifest(lambda: filled("edits: [", "{},", "]", MANIFEST_SIZE)), MANY_EDITS),
    Hostile("manifest: 8 MiB of '- ' in one line", manifest("- " * (MANIFEST_SIZE // 2)), "nested deeper"),
    Hostile("manifest: 8 MiB of '- ' lines", manifest(lambda: filled(HEAD, "- \n", "", MANIFEST_SIZE)), MANY_EDITS),
    Hostile("manifest: an edit of 8 MiB", manifest(lambda: filled(HEAD + "- [", "[],", "]", MANIFEST_SIZE)), MANY),
    Hostile(
        "manifest: 200,000 edits by name", manifest(lambda: "edits:\n" + "  a: {}\n" * 200_000), "this key is repeated"
    ),
    Hostile(
        "manifest: 100,000 edits of other names",
        manifest(lambda: "edits:\n" + "".join(f"  a{i}: 1\n" for i in range(100_000))),
        MANY,
    ),
    Hostile("manifest: 90,000 edits that are none", manifest(lambda: HEAD + "- 1\n" * 90_000), "too many to list"),
    Hostile("manifest: 8 MiB of '? '", manifest("? " * (MANIFEST_SIZE // 2)), "not a plain word"),
    Hostile("manifest: 8 MiB of a: lines", manifest("a:\n" * (MANIFEST_SIZE // 3)), "this key is repeated"),
    Hostile("manifest: 8 MiB of &a", manifest("&a " * (MANIFEST_SIZE // 3)), "not YAML"),
    Hostile(
        "manifest: 8 MiB of one quoted string",
        manifest(lambda: filled('name: "', "a", '"', MANIFEST_SIZE)),
        "not a manifest",
    ),
    Hostile("manifest: 8 MiB of one word", manifest("a" * MANIFEST_SIZE), "should be a map"),
    Hostile("manifest: 8 MiB of comment", manifest("#" * MANIFEST_SIZE), "is empty"),
    Hostile("manifest: 8 MiB of spaces", manifest(" " * MANIFEST_SIZE), "is empty"),
    Hostile("manifest: 8 MiB of line ends", manifest("\n" * MANIFEST_SIZE), "is empty"),
    Hostile("manifest: 8 MiB of documents", manifest("---\n" * (MANIFEST_SIZE // 4)), "second document"),
    Hostile(
        "manifest: 8 MiB of escapes",
        manifest(lambda: filled('{"a":"', "\\ud83d\\ude00", '"}', MANIFEST_SIZE)),
        "half a surrogate pair",
    ),
    Hostile("manifest: an integer of a million digits", manifest(f"version: {DIGITS}\n"), "400 characters"),
    Hostile("manifest: a fraction of a million digits", manifest(f"version: 0.{DIGITS}\n"), "400 characters"),
    Hostile("manifest: 40 MiB", manifest("a" * 5 * MANIFEST_SIZE), "larger than"),
    Hostile("manifest: 7,000 edits", wide_base, None),
    Hostile("manifest: 20,000 edits that do not fit", manifest(lambda: many_edits(SOUND, 20_000)), "more of these"),
    Hostile("manifest: 7,000 edits, each with an unknown field", manifest(lambda: many_edits(ZERO, 7_000)), "more of"),
    Hostile("header: billed at 2**63 bytes", lie, "is truncated"),
    Hostile("header: 68 MB of empty tensors", header(lambda: tensors(1_150_000)), "bytes, more than"),
    Hostile(
        "header: 16 MiB of empty tensors",
        header(lambda: tensors(270_000).ljust(HEADER_SIZE)),
        "more than 131072 values",
    ),
    Hostile("header: 25,000 tensors", header(lambda: tensors(25_000)), None),
    Hostile(
        "header: 16 MiB of dimensions", header(lambda: shape("0,", HEADER_SIZE // 2 - 40)), "more than 131072 values"
    ),
    Hostile("header: a rank of 130,000", header(lambda: shape("0,", 130_000)), None),
    Hostile("header: a rank of 130,000, all of 2**63", header(lambda: shape(f"{1 << 63},", 130_000)), "overflows"),
    Hostile("header: 16 MiB of [", header(b'{"a":' + b"[" * (HEADER_SIZE - 5)), "nested too deeply"),
    Hostile("header: 130,000 empty maps", header(lambda: b'{"a":[' + b"{}," * 130_000 + b"{}]}"), "exactly the fields"),
    Hostile(
        "header: 16 MiB of one name", header(lambda: b'{"' + b"a" * (HEADER_SIZE - 6) + b'":1}'), "exactly the fields"
    ),
    Hostile(
        "header: 16 MiB of metadata",
        header(lambda: filled('{"__metadata__":{"a":"', "é", '"}}', HEADER_SIZE).encode()),
        None,
    ),
    Hostile("header: an integer of a million digits", header(f'{{"a":{DIGITS}}}'.encode()), "thousands of digits"),
    Hostile("header: 16 MiB of spaces", header(lambda: b"{}".ljust(HEADER_SIZE)), None),
    Hostile("headers: 8 files of 25,000 tensors", many_full_headers, "may have at most"),
    Hostile("index: as the largest known, 91,991 tensors", largest_known, None),
    Hostile(
        "index: a million entries",
        file(checkpoints.INDEX, lambda: index_of(1_000_000, "m.safetensors")),
        "values accepted",
    ),
    Hostile("index: 500,000 entries", file(checkpoints.INDEX, lambda: index_of(500_000)), "may have at most"),
    Hostile("index: 49,000 entries that no shard has", file(checkpoints.INDEX, lambda: index_of(49_000)), None),
    Hostile(
        "index: 49,000 shards that are not there",
        file(checkpoints.INDEX, lambda: index_of(49_000, "{:x}.safetensors")),
        "missing shard",
    ),
    Hostile(
        "index: 32 MiB of {},", file(checkpoints.INDEX, lambda: filled("[", "{},", "1]", JSON_SIZE)), "values accepted"
    ),
    Hostile(
        "index: 32 MiB of one place",
        file(checkpoints.INDEX, lambda: filled('{"weight_map":{"a":"', "é", '"}}', JSON_SIZE)),
        "not a plain file name",
    ),
    Hostile("index: nested 100,000 deep", file(checkpoints.INDEX, "[" * DEEP + "]" * DEEP), "nested too deeply"),
    Hostile("index: 64 MiB", file(checkpoints.INDEX, lambda: " " * (2 * JSON_SIZE)), "bytes accepted"),
    Hostile("config: nested 100,000 deep", file("config.json", '{"a":' * DEEP), "nested too deeply"),
    Hostile("config: an integer of a million digits", file("config.json", f'{{"a":{DIGITS}}}'), "is not a number"),
    Hostile("config: a fraction of a million digits", file("config.json", f'{{"a":0.{DIGITS}}}'), "is not a number"),
    Hostile(
        "config: 500,000 keys",
        file("config.json", lambda: "{" + ",".join(f'"{i}":{i}' for i in range(500_000)) + "}"),
        None,
    ),
    Hostile(
        "record: 500,000 edits that are none",
        file(OWN_FILES[0], lambda: record(edits=[1] * 500_000), "verify"),
        "valid record",
    ),
    Hostile(
        "record: a history of 500,000 numbers",
        file(OWN_FILES[0], lambda: record(history=[1] * 500_000), "verify"),
        "valid record",
    ),
    Hostile(
        "record: 250,000 unknown fields",
        file(OWN_FILES[0], lambda: record(**{f"x{i}": 1 for i in range(250_000)}), "verify"),
        "valid record",
    ),
    Hostile(
        "record: an index of 500,000 words",
        file(OWN_FILES[0], lambda: record(edits=[{"index": ["a"] * 500_000}]), "verify"),
        "valid record",
    ),
    Hostile(
        "record: 2,000,000 edits that are none",
        file(OWN_FILES[0], lambda: record(edits=[1] * 2_000_000), "verify"),
        "valid record",
    ),
    Hostile(
        "record: an edit of 1,000,000 fields",
        file(OWN_FILES[0], lambda: record(edits=[{f"x{i}": 1 for i in range(1_000_000)}]), "verify"),
        "1000000 fields",
        320,
    ),
    Hostile(
        "record: 3,000,000 empty lists",
        file(OWN_FILES[0], lambda: record(edits=[[]] * 3_000_000), "verify"),
        "values accepted",
    ),
    Hostile(
        "record: 100 MiB of one word",
        file(OWN_FILES[0], lambda: filled('{"registry_version": "', "é", '"}', 3 * JSON_SIZE), "verify"),
        "beyond ASCII",
    ),
    Hostile("record: 160 MiB", file(OWN_FILES[0], lambda: " " * (5 * JSON_SIZE), "verify"), "bytes accepted"),
    Hostile("record: nested 100,000 deep", file(OWN_FILES[0], '{"a":' + "[" * DEEP, "verify"), "nested too deeply"),
)

_CHILD = """
import resource, sys
from pathlib import Path
from swsurgery.cli import main
code = main(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_SELF)
sys.stdout.flush()
status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
# not ru_maxrss, which begins at what the parent had when it forked
Path("cost").write_text(f"{code} {used.ru_utime + used.ru_stime} {int(status['VmHWM'].split()[0]) / 1024}")
"""


@dataclass(frozen=True)
class Cost:
    """What one command cost: exit code, seconds of processor time, peak of memory in MiB, what it said on stderr."""

    code: int
    seconds: float
    peak: float
    said: str


def cost(hostile: Hostile, folder: Path) -> Cost:
    """Run the command on the input in a process of its own."""
    data = folder / "data"
    data.mkdir()
    arguments = hostile.write(data)
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder), "XDG_DATA_HOME": str(folder)}
    done = subprocess.run([sys.executable, "-c", _CHILD, *arguments], cwd=folder, env=environment, timeout=300,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)  # fmt: skip
    code, seconds, peak = (folder / "cost").read_text().split()
    return Cost(int(code), float(seconds), float(peak), done.stderr)


def measure_all() -> list[dict[str, Any]]:
    """A row for each hostile input; `held` says whether it was within the bounds."""
    rows = []
    for hostile in HOSTILE:
        with tempfile.TemporaryDirectory(prefix="swsurgery-hostile-") as folder:
            found = cost(hostile, Path(folder))
        expected = found.code == 0 if hostile.says is None else found.code == 2 and hostile.says in found.said
        held = expected and found.seconds <= SECONDS and found.peak <= hostile.megabytes
        outcome = "handled" if found.code == 0 else "refused" if found.code == 2 else f"exit {found.code}"
        rows.append({"input": hostile.name, "seconds": round(found.seconds, 2), "peak_mb": round(found.peak),
                     "outcome": outcome, "held": held})  # fmt: skip
        if not held:
            print(f"{hostile.name}: {rows[-1]}: {found.said[-300:]}", file=sys.stderr)
    return rows

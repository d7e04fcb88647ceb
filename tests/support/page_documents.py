"""Documents of every command that has a page, made by the results themselves where that needs no model."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from reports import REPORT

from swsurgery.known import lookup
from swsurgery.model.report import Continuations, RoundedSide, Side, SuperActivation
from swsurgery.scanning.activation_report import PersistentActivation
from swsurgery.scanning.causal_report import Effect
from swsurgery.scanning.comparison import ComparedModel, Comparison
from swsurgery.scanning.expert_report import ExpertCandidate, ExpertMaximum, ExpertScan
from swsurgery.scanning.part_report import ModelPart, PartConfirmation, PartName, PartTrial
from swsurgery.scanning.report import (
    Candidate,
    ColumnNull,
    Confirmation,
    JointSet,
    Profile,
    Scan,
    Sweep,
    SweepPoint,
    Trial,
    UnreadLayer,
)
from swsurgery.storage.coordinate import Coordinate

DOWN = "model.layers.{}.mlp.down_proj.weight"
DIGEST = "ab" * 32


def candidate(layer: int, row: int, col: int, value: float, **measured: Any) -> Candidate:
    return Candidate(Coordinate(DOWN.format(layer), (row, col)), layer, row, col, None, value, 1.0, 1, **measured)


MAKER = candidate(11, 507, 1229, 5.875, input_spike=4072.0, output_spike=23880.0, share=0.73, prompts=2, round=1)
HELPER = candidate(2, 507, 90, 5.094, input_spike=-95.5, output_spike=486.0, share=0.3, prompts=1, round=1)
CONDITIONS = ("base_perplexity", "windows", "window_tokens", "text_sha256", "dtype", "device", "scored_tokens")
STRONG, WEAK = Effect(5.6, 5.1, 6.2, 1.9), Effect(1.02, 0.99, 1.05, 0.1)
CONFIRMATION = Confirmation(
    trials=(Trial(MAKER, STRONG, WEAK, "needed alone"), Trial(HELPER, WEAK, None, "inert", listed=False)),
    together=replace(STRONG, ratio=float("inf"), high=float("inf")),
    joint_sets=(JointSet((MAKER.coordinate, HELPER.coordinate), STRONG),),
    null=(0.998, 1.001),
    base_perplexity=29.6,
    windows=16,
    window_tokens=512,
    text_sha256=DIGEST,
    dtype="float32",
    device="cpu",
    scored_tokens=8176,
    column_nulls=(ColumnNull(2, None, 90, (1.0, 1.01), (0.9, 1.1)),),
)
SCAN = Scan(
    method="activations",
    model_type="llama",
    layers=30,
    candidates=(MAKER, HELPER),
    activations=(PersistentActivation(11, 27, 507, 23941.0, 14, 0, 0, 2),),
    profile=Profile((1.0, -2.0, float("nan")) * 10, (3.0, float("-inf"), 0.5) * 10, (0.0, 23941.0, 7.0) * 10),
    prompts=("Summer is hot. Winter is", "The capital of France is"),
    confirmation=CONFIRMATION,
    notes=("layer 28 removes channel 507 again",),
    unread=(UnreadLayer(5, (), (DOWN.format(5),)),),
    settings={"outstanding": 8.0, "bos": True, "dtype": "float32", "unheard_of": 1},
)
ROW = ModelPart(PartName("row", 1, None, 39), (39,), 963.0)
NEURON = ModelPart(PartName("neuron", 3, 2, 834), (7, 39), -202.0)
PARTS = PartConfirmation(
    trials=(PartTrial(ROW, STRONG, WEAK, "needed alone"), PartTrial(NEURON, WEAK, STRONG, "inert")),
    together=STRONG,
    joint_sets=(),
    null=(0.97, 1.03, 1.04),
    part_nulls=(("row", 1, (0.97, 1.03)), ("neuron", 3, (1.04,))),
    **{name: getattr(CONFIRMATION, name) for name in CONDITIONS},
)
DOSES = [{"factor": f, "ratio": r, "low": r * 0.9, "high": r * 1.1} for f, r in ((0, 5.6), (0.5, 1.5), (1, 1.0))]
EXPERT = ExpertCandidate(1, 68, 900.0, 5, 0, 0, 2, 1200.0, MAKER)
EXPERTS = ExpertScan(
    method="experts", model_type="qwen3_moe", layers=2, candidates=(), experts=(EXPERT,),
    largest=(ExpertMaximum(1, 68, 900.0), ExpertMaximum(0, "shared", 12.0)), prompts=("a",),
    profile=Profile((1.0, 2.0), (3.0, 900.0), (4.0, 900.0)), settings={"bos": False},
)  # fmt: skip


def point(factor: float, perplexity: float, finite: bool = True) -> SweepPoint:
    return SweepPoint(factor, perplexity, perplexity / 29.6, 0.5, 0.2, finite, 23000.0)


SWEEP = Sweep(
    (MAKER.coordinate,), point(1, 29.6), (point(2, 71), point(0, 165), point(1e9, float("nan"), False)),
    16, 512, DIGEST, "float32", "cpu", "whole", 8176, ("lm_head.weight[3, 0:16]",),
)  # fmt: skip
COMPARED = ComparedModel(
    None, "as computed", 0, 0, 0.0, 0.0, 29.6, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.31, True,
)  # fmt: skip
COMPARISON = Comparison(
    "my-model",
    (
        COMPARED,
        replace(COMPARED, manifest="m/zero.yaml", ratio=5.6, ratio_low=5.1, ratio_high=6.2, perplexity=165.8, kl=1.9),
        replace(COMPARED, manifest="m/half.yaml", ratio_low=None, ratio_high=None, finite=False, ratio=float("nan")),
    ),
    16, 512, 8176, DIGEST, "float32", "cpu", "whole",
)  # fmt: skip
SIDE = Side(29.6, 0.31, True, SuperActivation(11, 0, 507, 23941.0, 3), (1.0, -700.0, 23941.0))
CHECK = replace(
    REPORT,
    base=SIDE,
    patched=replace(SIDE, perplexity=165.8, largest_by_layer=(1.0, float("inf"), -300.0)),
    perplexity_ratio=5.6,
    ratio_low=5.1,
    ratio_high=6.2,
    prompts=(Continuations("The capital of France is", ((" Paris", 0.77), (" a", 0.1)), (("andem", 0.6),)),),
    rounded=(RoundedSide("patched", "8 bits per tensor", 200.0, 6.8, 2.0, 0.1, True),),
)
CHECKED = CHECK.to_record() | {
    "kind": "forward",
    "reason": None,
    "generations": [{"prompt": "Summer is hot.", "base": " a cold winter\nis", "patched": "andem andem"}],
}
SPLICE = {
    "file": "model-00003-of-00005.safetensors", "tensor": DOWN.format(2), "index": [507, 90], "dtype": "BF16",
    "offset": 8649850, "old": 5.875, "old_bits": "0x40bc", "op": "zero", "new": 0.0, "new_bits": "0x0000",
    "factor": None,
}  # fmt: skip
FLIP = SPLICE | {
    "dtype": "F64", "old_bits": "0x3ff0000000000000", "new_bits": "0xbff0000000000000", "op": "flip", "bit": [63],
    "old": 1.0, "new": -1.0, "file": "model-00001-of-00005.safetensors",
}  # fmt: skip
CODE = {
    "edit": 1, "op": "scale", "factor": 0.5, "weight": DOWN.format(4), "index": [3, 4], "layout": "pack-quantized",
    "wanted": 0.25, "old": 0.5, "new": 0.26, "old_code": 5, "new_code": 4, "elements": [],
}  # fmt: skip
CHANGE = {
    "edit": 2, "op": "round", "options": {"bits": 4, "clip": {"z": 9}}, "target": "L3 row 12", "scalars": 576,
    "file": SPLICE["file"], "tensor": DOWN.format(3), "bounds": [[12, 13], [0, 576]], "dtype": "BF16", "changed": 0,
    "base_sha256": DIGEST, "sha256": DIGEST, "undo": None,
}  # fmt: skip
FILES = {
    "config.json": {"size": 818, "base_sha256": DIGEST, "sha256": DIGEST, "how": "copy"},
    SPLICE["file"]: {"size": 59968992, "base_sha256": DIGEST, "sha256": "cd" * 32, "how": "copy"},
}
APPLY: dict[str, Any] = {
    "output": "patched", "scalars": 134515008, "splices": [SPLICE, FLIP], "omitted": ["old.bin"], "notes": ["a note"],
    "protected": [{k: v for k, v in SPLICE.items() if not k.startswith("new") and k != "op"}], "check": CHECKED,
    "files": FILES, "changes": [CHANGE], "codes": [CODE], "protected_regions": [CHANGE], "undo": None,
}  # fmt: skip
PLAN = {k: v for k, v in APPLY.items() if k not in ("files", "changes")} | {
    "output": None, "check": None, "rewrites": [CHANGE],
}  # fmt: skip
RECORD = {
    "registry_version": 2, "swsurgery_version": "0.1.0", "base": {"repo_id": "org/name", "revision": "ab" * 20},
    "manifest_sha256": DIGEST, "history": [], "edits": [SPLICE], "check": CHECKED, "files": FILES, "protected": [],
}  # fmt: skip
VERIFY = {
    "ok": True, "decided": True, "findings": [], "checked": ["verified  11 files with the record's sha256"],
    "proved": [SPLICE["file"]], "rules": ["digest", "edit-changed"], "notes": ["a note"],
    "known": {
        "coordinates": [{"id": "L11.507.1229", "status": "paper", "known": 5.875, "stored": 0.0, "state": "lost"}],
    },
}  # fmt: skip
WEIGHTS = replace(
    SCAN, method="weights", profile=None, prompts=(), confirmation=None, activations=(), settings={"min_z": 5}
)

DOCUMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "apply": ("apply", APPLY),
    "plan": ("apply", PLAN),
    "not run": ("apply", APPLY | {"check": {"kind": "weights", "reason": "torch is not installed"}}),
    "check": ("check", CHECKED),
    "check alone": ("check", replace(CHECK, compared=False).to_json()),
    "scan": ("scan", SCAN.to_json()),
    "parts": (
        "scan",
        replace(
            SCAN, candidates=(), unread=(), confirmation=None, parts=(ROW, NEURON), part_confirmation=PARTS
        ).to_json(),
    ),
    "experts": ("scan", EXPERTS.to_json()),
    "weights": ("scan", WEIGHTS.to_json()),
    "sweep": ("sweep", SWEEP.to_json()),
    "compare": ("compare", COMPARISON.to_json()),
    "verify": ("verify", VERIFY),
    "record": ("lookup", RECORD),
    "models": ("lookup", lookup.lookup().to_json()),
    **{name: ("lookup", lookup.lookup(name).to_json()) for name in ("llama-7b", "mistral-7b", "qwen3-30b-a3b")},
}
"""A command and a document of it, by a name for the test."""

DOCUMENTS["scan"][1]["confirmation"]["doses"] = DOSES
DOCUMENTS = json.loads(json.dumps(DOCUMENTS, allow_nan=False))

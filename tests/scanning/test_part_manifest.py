"""The manifest of a scan changes or protects the parts of the model that create an activation and are not inert."""

from __future__ import annotations

from dataclasses import replace

import planted
import pytest
from checkpoints import SECOND, THIRD, down, write_llama
from page_documents import CONFIRMATION, PARTS, SCAN, STRONG, WEAK, Candidate, Trial
from page_documents import candidate as make_candidate
from safetensors import safe_open
from safetensors.numpy import load_file

from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.editing.apply import apply
from swsurgery.errors import ManifestError
from swsurgery.manifest.load import parse_manifest
from swsurgery.progress import require_reporter
from swsurgery.scanning.activation_report import LargestActivation, Passport
from swsurgery.scanning.outputs import scan_manifest
from swsurgery.scanning.part_report import ModelPart, PartName, PartTrial
from swsurgery.scanning.parts import locate_part
from swsurgery.scanning.report import Scan
from swsurgery.scanning.scan_files import ScanFiles, write_files
from swsurgery.storage.region import Region

BASE = {"path": "tiny"}
OUT = "model.layers.1.self_attn.o_proj"
REGIONS = {
    "attention": (Region(f"{OUT}.weight", ((3, 4), (0, 16))), Region(f"{OUT}.bias", ((3, 4),))),
    "embedding": (Region("model.embed_tokens.weight", ((0, 32), (3, 4))),),
}


def part(kind: str, layer: int | None, number: int | None, expert: int | None = None, verdict: str = "needed alone"):
    found = ModelPart(PartName(kind, layer, expert, number), (5, 7), 90.0, REGIONS.get(kind, ()))
    return PartTrial(found, WEAK if verdict == "inert" else STRONG, WEAK, verdict)


def scan_of(*parts: PartTrial, scalars: tuple[Candidate, ...] = ()) -> Scan:
    trials = tuple(Trial(scalar, STRONG, None, "needed alone") for scalar in scalars)
    tested = replace(CONFIRMATION, trials=trials, joint_sets=()) if scalars else None
    test = replace(PARTS, trials=parts)
    listed = tuple(one.candidate for one in parts)
    return replace(SCAN, candidates=scalars, confirmation=tested, parts=listed, part_confirmation=test, unread=())


def list_targets(report: Scan, op: str = "zero", factor: float | None = None) -> list[tuple[object, ...]]:
    text = scan_manifest(report, base=BASE, op=op, factor=factor)
    edits = parse_manifest(text.encode(), "m.yaml").manifest.edits
    return [(edit.op, edit.layer, edit.expert, edit.row, edit.col) for edit in edits]


def test_needed_parts_are_edits_and_inert_ones_are_not():
    report = scan_of(
        part("row", 1, 3), part("neuron", 2, 4, verdict="needed jointly"), part("expert", 3, None, 6),
        part("neuron", 4, 8, 2), part("row", 5, 1, verdict="inert"), part("row", 6, 1, verdict="untested"),
    )  # fmt: skip
    assert list_targets(report) == [
        ("zero", 1, None, 3, None), ("zero", 2, None, None, 4), ("zero", 3, 6, None, None), ("zero", 4, 2, None, 8),
        ("zero", 6, None, 1, None),
    ]  # fmt: skip
    assert [target[0] for target in list_targets(report, "scale", 0.5)] == ["scale"] * 5
    text = scan_manifest(report, base=BASE, op="zero")
    assert "# layer 6 row 1: adds 90 to channels 5, 7; not confirmed\n" in text
    assert "5 parts that a scan by activations found, 4 confirmed" in text
    assert "2 parts that a scan by activations found and confirmed" in scan_manifest(
        scan_of(part("row", 1, 3), part("row", 2, 3)), base=BASE, op="zero"
    )
    assert "# layer 1 row 3: adds 90 to channels 5, 7; needed alone, perplexity x5.600 without it" in text
    assert "min_perplexity_ratio: 2.0" in text


def test_no_scalar_is_named_twice():
    """A part that contains a super weight is left out, and so is a row that crosses a column of its matrix."""
    scalar = make_candidate(1, 3, 4, 0.5)
    inside = [part("row", 1, 3), part("neuron", 1, 4)]
    beside = [part("row", 1, 9), part("neuron", 2, 4), part("row", 2, 3)]
    assert list_targets(scan_of(*inside, *beside, scalars=(scalar,))) == [
        ("zero", 1, None, 3, 4), ("zero", 1, None, 9, None), ("zero", 2, None, None, 4),
    ]  # fmt: skip
    both = scan_manifest(scan_of(*beside, scalars=(scalar,)), base=BASE, op="zero")
    assert "1 super weight and 2 parts that a scan" in both
    assert list_targets(scan_of(part("expert", 1, None, 2), part("neuron", 1, 4, 2), part("neuron", 1, 4, 3))) == [
        ("zero", 1, 2, None, None), ("zero", 1, 3, None, 4),
    ]  # fmt: skip


def test_channels_of_attention_and_of_the_embedding_are_slices():
    """They name tensors of their own, so they do not cross a row or a neuron of the same layer."""
    report = scan_of(part("neuron", 1, 4), part("attention", 1, 3), part("embedding", None, 3))
    text = scan_manifest(report, base=BASE, op="protect")
    edits = parse_manifest(text.encode(), "m.yaml").manifest.edits
    assert [(edit.tensor, edit.slice) for edit in edits if edit.tensor] == [
        (f"{OUT}.weight", "3, 0:16"), (f"{OUT}.bias", "3"), ("model.embed_tokens.weight", "0:32, 3"),
    ]  # fmt: skip
    assert text.count("# layer 1 attention channel 3: adds 90") == 2 and "# embedding channel 3: adds 90" in text


def test_parts_that_were_not_tested_are_in_the_manifest():
    tested = scan_of(part("row", 1, 3))
    text = scan_manifest(replace(tested, part_confirmation=None), base=BASE, op="zero")
    assert "found, not confirmed" in text and "row 3: adds 90 to channels 5, 7; not confirmed" in text


def test_a_scan_without_needed_parts_has_no_manifest():
    with pytest.raises(ManifestError, match="nothing to zero"):
        scan_manifest(scan_of(part("row", 1, 3, verdict="inert")), base=BASE, op="zero")


def test_the_manifest_states_the_largest_activation():
    one = LargestActivation(0, True, 23941.0, 11, 0, 507, 9000.0, 11, 28)
    report = replace(scan_of(part("row", 1, 3)), passport=Passport((one,)))
    text = scan_manifest(report, base=BASE, op="zero")
    assert "# largest activation with BOS: 23,941 after layer 11, token 0, channel 507\n" in text


@pytest.mark.parametrize("needed", [True, False])
def test_the_written_manifest_zeroes_exactly_the_parts(needed, tmp_path):
    checkpoint = open_checkpoint(write_llama(tmp_path / "tiny"))
    verdict = "needed alone" if needed else "inert"
    report = scan_of(part("row", 1, 3, verdict=verdict), part("neuron", 2, 4, verdict=verdict))
    assert report.answer == ("found" if needed else "none")
    path = tmp_path / "zero.yaml"
    write_files(report, checkpoint, ScanFiles(manifest=path), require_reporter(None))
    assert path.exists() is needed
    if not needed:
        return
    text = path.read_text().replace("min_perplexity_ratio", "# min_perplexity_ratio").replace("check:", "# check:")
    path.write_text(text)
    apply(path, output=tmp_path / "patched", check="weights")
    for file, tensor, place in ((SECOND, down(1), (3, slice(None))), (THIRD, down(2), (slice(None), 4))):
        before, after = (_load(tmp_path / folder / file, tensor) for folder in ("tiny", "patched"))
        before[place] = 0
        assert (before == after).all() and (after[place] == 0).all()


def test_the_written_manifest_zeroes_channels_of_attention_and_embedding(tmp_path):
    model = planted.build("gpt2")
    checkpoint = planted.opened(model, tmp_path / "tiny").checkpoint
    trials = []
    for name in (PartName("attention", 1, None, 3), PartName("embedding", None, None, 5)):
        found = ModelPart(name, (3,), 90.0, locate_part(checkpoint, name))
        trials.append(PartTrial(found, WEAK, None, "needed alone"))
    path = tmp_path / "zero.yaml"
    write_files(scan_of(*trials), checkpoint, ScanFiles(manifest=path), require_reporter(None))
    apply(path, output=tmp_path / "patched", check="weights")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("tiny", "patched"))
    before["transformer.h.1.attn.c_proj.weight"][:, 3] = 0  # stored transposed
    before["transformer.h.1.attn.c_proj.bias"][3] = 0
    before["transformer.wte.weight"][:, 5] = before["transformer.wpe.weight"][:, 5] = 0
    assert all((before[tensor] == after[tensor]).all() for tensor in before)


def _load(path, tensor):
    with safe_open(path, "np") as opened:
        return opened.get_tensor(tensor)

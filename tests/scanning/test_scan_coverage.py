"""A scan that did not read every MLP says which, and says "none" only if it read all of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import planted
import pytest
import tiny_models
from checkpoints import tensor, write_single
from planted import SEQUENCES, Place
from torch import Tensor
from transformers import PreTrainedModel

from swsurgery.checkpoint import model_config, projections
from swsurgery.checkpoint.architectures import FAMILIES
from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.checkpoint.projections import list_down_projections
from swsurgery.cli import main
from swsurgery.errors import ManifestError
from swsurgery.scanning import outputs
from swsurgery.scanning.by_activations import scan_sequences
from swsurgery.scanning.by_weights import scan_weights
from swsurgery.scanning.coverage import list_unread_layers
from swsurgery.scanning.report import UnreadLayer
from swsurgery.scanning.spikes import find_sources, list_unread

CHANNELS, NEURONS, LAYERS = 16, 24, 6
JAMBA = {
    "num_experts": 4,
    "num_experts_per_tok": 4,
    "attn_layer_period": 1,
    "attn_layer_offset": 0,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "use_cache": True,
}


def expert_tensors(layer: int) -> tuple[str, ...]:
    path = f"model.layers.{layer}.feed_forward.experts.*"
    return tuple(f"{path}.{name}_proj.weight" for name in ("down", "gate", "up"))


UNREAD = tuple(UnreadLayer(layer, (0, 1, 2, 3), expert_tensors(layer)) for layer in (1, 3, 5))


@pytest.fixture
def jamba(monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """Dense MLPs with known names in layers 0, 2 and 4, experts without in 1, 3 and 5: Jamba without its experts."""
    [known] = [family for family in FAMILIES if family.name == "Jamba"]
    dense = replace(known, templates=tuple(template for template in known.templates if template.kind == "dense"))
    for module in (model_config, projections):
        monkeypatch.setattr(module, "FAMILIES", (dense,))
    return planted.build("jamba", **JAMBA)


@pytest.fixture
def folder(jamba: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    jamba.save_pretrained(tmp_path / "jamba")
    return tmp_path / "jamba"


def raise_neuron(folder: Path, layer: int) -> None:
    """Make scalar [5, 7] of a dense layer a super weight by its weights."""
    file = folder / "model.safetensors"
    checkpoint = open_checkpoint(folder)
    path, shard = f"model.layers.{layer}.feed_forward.", checkpoint.shards["model.safetensors"]
    data = np.memmap(file, "u1", "r+")
    for name, factor in (("gate_proj", 20.0), ("up_proj", 20.0)):
        start = shard.find_offset(f"{path}{name}.weight", (7, 0))
        data[start : start + 4 * CHANNELS].view("<f4")[:] = factor
    start = shard.find_offset(f"{path}down_proj.weight", (5, 7))
    data[start : start + 4].view("<f4")[:] = 50.0
    data.flush()


def test_unread_experts_make_the_answer_undecided(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = scan_weights(open_checkpoint(folder))
    assert (report.candidates, report.layers, report.answer) == ((), LAYERS, "undecided")
    assert report.unread == UNREAD
    assert report.notes[-1].startswith("no super weight in what was read: the highest z of all neurons is ")

    assert main(["scan", str(folder), "--method", "weights"]) == 2
    out, err = capsys.readouterr()
    shown = out.splitlines()
    path = "model.layers.*.feed_forward.experts.*."
    assert shown[:3] == [
        "scanned   6 layers of jamba by weights",
        "answer    undecided: nothing was found, but 3 layers of 6 were not read completely",
        f"unread    layers 1, 3, 5, experts 0 to 3: {path}down_proj.weight, {path}gate_proj.weight, "
        f"{path}up_proj.weight",
    ]
    assert "none" not in out
    assert err == "swsurgery: undecided: some layers were not read, and no super weight was found in the others\n"

    assert main(["scan", str(folder), "--method", "weights", "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert (document["answer"], document["layers"]) == ("undecided", LAYERS)
    assert document["unread"] == [
        {"layer": n, "experts": [0, 1, 2, 3], "tensors": list(expert_tensors(n))} for n in (1, 3, 5)
    ]


def test_what_is_found_counts_and_what_is_unread_is_still_listed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raise_neuron(folder, 2)
    assert main(["scan", str(folder), "--method", "weights", "--register", "tiny"]) == 0
    out, _ = capsys.readouterr()
    assert out.splitlines()[1] == "answer    1 candidate, not confirmed"
    assert "unread    layers 1, 3, 5, experts 0 to 3" in out
    assert main(["lookup", "tiny"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "L2.5.7" in shown
    assert "The scan did not read all of layers 1, 3, 5, so there may be further super weights" in shown


def test_an_undecided_scan_is_not_recorded_as_none(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = folder.parent / "zero.yaml"
    scan = ["scan", str(folder), "--method", "weights", "--register", "tiny", "--manifest", str(manifest)]
    assert main(scan) == 2
    assert f"the scan is undecided, so no manifest was written: {manifest}" in capsys.readouterr().err
    assert not manifest.exists()
    assert main(["lookup", "tiny"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "A scan is undecided. It found nothing in what it read, but did not read all of layers 1, 3, 5" in shown
    assert "found no super weight" not in shown
    assert main(["lookup", "tiny", "--manifest", "zero"]) == 2
    assert "(its scan is undecided)" in capsys.readouterr().err

    checkpoint = open_checkpoint(folder)
    assert outputs.read_sizes(checkpoint) == (LAYERS, CHANNELS, NEURONS)
    with pytest.raises(ManifestError, match="there is no candidate, and 3 layers were not read"):
        outputs.scan_manifest(scan_weights(checkpoint), base={"path": "."}, op="zero")


def expert_weights(model: PreTrainedModel, place: Place) -> tuple[Tensor, Tensor, Tensor]:
    layer, row, col, expert = place
    experts = model.model.layers[layer].feed_forward.experts
    both, down = experts.gate_up_proj.data[expert], experts.down_proj.data[expert]
    return both[col], both[len(both) // 2 + col], down[row, col]


def test_an_activation_that_begins_at_an_unread_layer_is_undecided(
    jamba: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = scan_sequences(planted.opened(jamba, tmp_path / "random"), SEQUENCES)
    assert (nothing.answer, nothing.unread) == ("none", ())  # no channel is massive, so no MLP has to be read
    assert nothing.notes == ("layers 1, 3, 5: the down projection is not observed",)

    monkeypatch.setattr(planted, "weights_of", expert_weights)
    planted.plant(jamba, Place(1, 5, 7, 1))
    report = scan_sequences(planted.opened(jamba, tmp_path / "planted"), SEQUENCES)
    assert (report.candidates, report.parts, report.answer) == ((), (), "undecided")
    assert {one.causes[0].describe() for one in report.activations if one.causes} == {"layer 1"}
    assert report.unread == UNREAD[:1]


@pytest.mark.parametrize(
    ("family", "settings", "layers"),
    [
        ("zamba", {"layers_block_type": ["mamba", "hybrid"] * 3}, [1, 3, 5]),
        ("nemotron_h", {"layers_block_type": ["moe", "mlp"] * 3, "moe_latent_size": 8, "use_cache": False}, [0, 2, 4]),
    ],
)
def test_mlps_whose_rows_are_no_channels_of_the_residual_stream_are_not_observed(
    family: str, settings: dict[str, object], layers: list[int], tmp_path: Path
) -> None:
    model = planted.opened(planted.build(family, **settings), tmp_path)
    _, unseen = find_sources(model)
    assert unseen == layers
    unread = list_unread(model, unseen)
    assert [layer.layer for layer in unread] == layers
    assert all(layer.tensors for layer in unread)  # layers 3 and 5 of Zamba use the MLP that is stored in layer 1


@pytest.mark.parametrize("name", [*tiny_models.MODELS, *tiny_models.OTHER_MODELS])
def test_a_known_family_is_read_as_a_whole(name: str, tmp_path: Path) -> None:
    tiny_models.write(name, tmp_path)
    report = scan_weights(open_checkpoint(tmp_path))
    if name == "longcat_flash":  # its dense MLPs have no short form, and its zero experts 4 and 5 no down projection
        assert [(layer.layer, layer.experts) for layer in report.unread] == [(0, (4, 5)), (1, (4, 5))]
        unread = {tensor.split(".", 3)[3] for layer in report.unread for tensor in layer.tensors}
        parts = ("gate", "up", "down")
        assert unread == {
            *(f"mlps.{n}.{part}_proj.weight" for n in (0, 1) for part in parts),
            *(f"mlp.experts.*.{part}_proj.weight" for part in ("gate", "up")),
        }
        assert report.answer == "undecided"
        return
    assert report.unread == ()
    assert (report.layers, report.answer) == ({"nemotron_h": 4, "zamba": 3}.get(name, 2), "none")


# Names alone ----------------------------------------------------------------------------------------------------------

DENSE = {f"model.layers.0.mlp.{name}_proj.weight": (4, 4) for name in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("names", "unread"),
    [
        ({}, ()),
        # attention, norms, convolutions, biases and routers are no MLP
        ({"model.layers.1.self_attn.o_proj.weight": (4, 4), "model.layers.1.norm.weight": (4,)}, ()),
        ({"model.layers.1.mamba.out_proj.weight": (4, 4), "model.layers.1.conv.weight": (4, 1, 3)}, ()),
        ({"model.layers.0.mlp.gate.weight": (2, 4), "model.layers.0.mlp.experts.down_proj_bias": (2, 4)}, ()),
        ({"model.layers.0.attn.c.weight": (4, 4), "model.layers.0.per_layer.weight": (4, 4)}, ()),
        # hyper-connections, which mix several residual streams
        ({"model.layers.0.ffn_hc.fn": (4, 4), "model.layers.1.attn_hc.fn": (4, 4)}, ()),
        ({"model.layers.1.hc_ffn_fn": (4, 4), "model.layers.1.adapter_list.0.0.weight": (2, 4)}, ()),
        # attention and Mamba of Nemotron-H, and what follows the shared block of Zamba
        ({f"model.layers.1.mixer.{name}_proj.weight": (4, 4) for name in ("q", "k", "v", "o", "in", "out")}, ()),
        ({"model.layers.1.linear.weight": (4, 4)}, ()),
        # an empty tensor, a layer beyond the model, and another stack of layers
        ({"model.layers.1.mlp.w.weight": (4, 0), "model.layers.2.mlp.w.weight": (4, 4)}, ()),
        ({"vision.layers.1.mlp.w.weight": (4, 4)}, ()),
        (
            {"model.layers.1.mixer.down_proj.weight": (4, 4)},
            (UnreadLayer(1, (), ("model.layers.1.mixer.down_proj.weight",)),),
        ),
        (
            {"model.layers.1.mlp.down_proj.qweight": (4, 4)},
            (UnreadLayer(1, (), ("model.layers.1.mlp.down_proj.qweight",)),),
        ),
        # further experts in a layer whose dense MLP is read, one by one and stacked
        (
            {f"model.layers.0.moe.experts.{n}.w_out.weight": (4, 4) for n in (0, 10)},
            (UnreadLayer(0, (0, 10), ("model.layers.0.moe.experts.*.w_out.weight",)),),
        ),
        (
            {"model.layers.0.moe.experts.w_out": (3, 4, 4)},
            (UnreadLayer(0, (0, 1, 2), ("model.layers.0.moe.experts.w_out",)),),
        ),
    ],
)
def test_names_that_may_be_an_mlps(names: dict[str, tuple[int, ...]], unread: tuple[UnreadLayer, ...]) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 4}
    projections = [p for p in list_down_projections(config, {**DENSE, "model.layers.0.mlp.down_proj.weight": (4, 5)})]
    assert list_unread_layers(config, {**DENSE, **names}, projections) == unread


def test_a_layer_that_is_packed_is_not_passed_over(tmp_path: Path) -> None:
    names = {f"model.layers.0.mlp.{name}.weight": tensor("F32", NEURONS, CHANNELS) for name in ("gate_proj", "up_proj")}
    names["model.layers.0.mlp.down_proj.weight"] = tensor("F32", CHANNELS, NEURONS)
    names["model.layers.1.mlp.fc.weight"] = tensor("F32", CHANNELS, NEURONS)
    report = scan_weights(
        open_checkpoint(write_single(tmp_path, names, {"hidden_size": CHANNELS, "num_hidden_layers": 2}))
    )
    assert report.unread == (UnreadLayer(1, (), ("model.layers.1.mlp.fc.weight",)),)

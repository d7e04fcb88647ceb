"""--complete and preflight on headers: each planted fault gives its one finding, and a whole checkpoint gives none."""

from __future__ import annotations

import json
import os
import re
import struct

import pytest
from checkpoints import INDEX
from hub import fixture
from hypothesis import given
from hypothesis import strategies as st
from whole_models import (
    CONFIG,
    EXPERTS,
    HIDDEN,
    INNER,
    LAYERS,
    VOCABULARY,
    layer_of,
    list_shapes,
    read_map,
    write_model,
)

import swsurgery
from swsurgery.checkpoint.damage import find_gaps
from swsurgery.checkpoint.declared import read_declared
from swsurgery.checkpoint.weight_files import MAX_LISTED
from swsurgery.cli import main
from swsurgery.errors import CheckpointError, SwsurgeryError
from swsurgery.verifying.complete_layers import find_subsets
from swsurgery.verifying.formats import REPORT_FORMATS, render

hub = fixture.hub
SECOND = "model-00002-of-00003.safetensors"


def errors(folder) -> list[tuple[str, str | None, str | None]]:
    """(rule, file, tensor) of each error, by `verify` and the same by `preflight`."""
    found = [swsurgery.verify(folder, complete=True), swsurgery.preflight(folder)]
    one, other = ([(f.rule, f.file, f.tensor) for f in each.findings if f.level == "error"] for each in found)
    assert one == other
    assert [each.exit_code for each in found] == [1 if one else 0] * 2
    return one


def drop(*parts: str):
    """The shapes of the model without the tensors whose names contain one of `parts`."""
    return {name: shape for name, shape in list_shapes().items() if not any(part in name for part in parts)}


@pytest.mark.parametrize("shards", [1, 3])
def test_a_whole_checkpoint_is_complete(tmp_path, shards):
    write_model(tmp_path, shards=shards)
    assert errors(tmp_path) == []
    report = swsurgery.preflight(tmp_path)
    count, size = len(list_shapes()), sum(2 * s[0] * (s[1] if len(s) > 1 else 1) for s in list_shapes().values())
    files = "1 shard" if shards == 1 else "3 shards"
    assert report.headline == f"complete: {LAYERS} layers, {count} tensors in {files}, {size / 1000:.1f} kB"
    assert report.complete.to_json() | {"bytes": 0} == {
        "complete": True, "layers": LAYERS, "tensors": count, "shards": shards, "bytes": 0, "undecided": None,
        "not_examined": [], "transformers": None,
    }  # fmt: skip


ABSENT = {
    "layer": ("model.layers.2.", "layer-missing", "model.layers.2"),
    "last layer": (f"model.layers.{LAYERS - 1}.", "layer-missing", f"model.layers.{LAYERS - 1}"),
    "expert": ("layers.3.mlp.experts.1.", "expert-missing", "model.layers.3.mlp.experts.1"),
    "last expert": (
        f"layers.3.mlp.experts.{EXPERTS - 1}.", "expert-missing", f"model.layers.3.mlp.experts.{EXPERTS - 1}",
    ),
    "attention": ("layers.4.self_attn.k_proj", "tensor-missing", "model.layers.4.self_attn.k_proj.weight"),
    "norm": ("layers.1.input_layernorm", "tensor-missing", "model.layers.1.input_layernorm.weight"),
    "norm of the only dense layer": (
        "layers.0.input_layernorm", "tensor-missing", "model.layers.0.input_layernorm.weight",
    ),
    "dense": ("layers.0.mlp.up_proj", "tensor-missing", "model.layers.0.mlp.up_proj.weight"),
    "router": ("layers.2.mlp.gate.", "tensor-missing", "model.layers.2.mlp.gate.weight"),
    "matrix of an expert": (
        "layers.2.mlp.experts.3.up_proj", "tensor-missing", "model.layers.2.mlp.experts.3.up_proj.weight",
    ),
    "head": ("lm_head", "head-missing", None),
    "embedding": ("embed_tokens", "tensor-missing", None),
    "last norm": ("model.norm", "tensor-missing", None),
}  # fmt: skip


@pytest.mark.parametrize("fault", ABSENT)
def test_what_is_not_stored_is_one_finding(tmp_path, fault):
    part, rule, name = ABSENT[fault]
    write_model(tmp_path, drop(part))
    (finding,) = (f for f in swsurgery.preflight(tmp_path).findings if f.level == "error")
    assert (finding.rule, finding.tensor) == (rule, name)
    assert name is None or finding.message.endswith(
        f"(download it again: hf download ORG/NAME model.safetensors --local-dir {tmp_path} --force-download)"
    )
    assert len(errors(tmp_path)) == 1


@pytest.mark.parametrize("fault", ABSENT)
def test_a_tensor_that_only_the_index_has_is_one_finding_with_its_shard(tmp_path, fault):
    """The index still lists what the shard no longer stores, as after a faulty conversion."""
    part, _, name = ABSENT[fault]
    write_model(tmp_path, shards=3)
    index, listed = (tmp_path / INDEX).read_text(), read_map(tmp_path)
    write_model(tmp_path, drop(part), shards=3)
    (tmp_path / INDEX).write_text(index)
    lost = [tensor for tensor in listed if part in tensor]
    found = [f for f in swsurgery.preflight(tmp_path).findings if f.rule.endswith("-missing")]
    assert [f.file for f in found] == [listed[lost[0]]]
    assert found[0].tensor == (name or lost[0]) and f"{INDEX} puts it in {listed[lost[0]]}" in found[0].message


def change(name: str, shape: tuple[int, ...]):
    return {**list_shapes(), name: shape}


@pytest.mark.parametrize(
    ("name", "shape", "rule"),
    [
        ("model.layers.3.self_attn.o_proj.weight", (HIDDEN, HIDDEN + 1), "shape-mismatch"),
        ("model.layers.2.mlp.experts.1.down_proj.weight", (HIDDEN, 7), "shape-mismatch"),
        ("model.embed_tokens.weight", (VOCABULARY - 1, HIDDEN), "vocabulary"),
        ("lm_head.weight", (VOCABULARY - 1, HIDDEN), "vocabulary"),
        ("model.embed_tokens.weight", (VOCABULARY, HIDDEN + 1), "shape-mismatch"),
        ("model.norm.weight", (HIDDEN + 1,), "shape-mismatch"),
    ],
)
def test_another_shape_is_one_finding(tmp_path, name, shape, rule):
    write_model(tmp_path, change(name, shape))
    assert errors(tmp_path) == [(rule, "model.safetensors", name)]


def test_rows_of_padding_are_no_finding(tmp_path):
    padded = {"model.embed_tokens.weight": (VOCABULARY + 12, HIDDEN), "lm_head.weight": (VOCABULARY + 4, HIDDEN)}
    assert errors(write_model(tmp_path, list_shapes() | padded)) == []


def test_two_layers_with_another_shape_each_and_no_majority_are_decided_by_config_json(tmp_path):
    shapes = {n: s for n, s in list_shapes().items() if "layers." not in n} | layer_of(0)
    shapes |= {n.replace("layers.0", "layers.1"): s for n, s in layer_of(0).items()}
    name = "model.layers.0.mlp.down_proj.weight"
    config = {"num_hidden_layers": 2, "model_type": "llama", "num_experts": None, "mlp_only_layers": []}
    assert errors(write_model(tmp_path, shapes, config)) == []
    write_model(tmp_path, shapes | {name: (HIDDEN, INNER + 3)}, config)
    assert errors(tmp_path) == [("shape-mismatch", "model.safetensors", name)]


def test_a_realistic_vocabulary_is_compared_and_an_unstated_width_is_not(tmp_path):
    wide = {name: (151_936, HIDDEN) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    shapes = list_shapes() | wide
    assert errors(write_model(tmp_path, shapes, {"vocab_size": 151_936})) == []
    assert {rule for rule, _, _ in errors(write_model(tmp_path, shapes, {"vocab_size": 151_937}))} == {"vocabulary"}
    config = {"vocab_size": VOCABULARY, "hidden_size": None}
    assert errors(write_model(tmp_path, config=config)) == []


# Kinds of layers -----------------------------------------------------------------------------------------------------

KEYS = {
    "none": ({}, True),
    "layer_types": ({"layer_types": ["a", "a", "b", "a", "a"]}, False),
    "a list of numbers": ({"attn_layer_indices": [2]}, False),
    "a list of other layers": ({"attn_layer_indices": [1]}, True),
    "a key about MLPs": ({"moe_layers": [2]}, True),
    "a list of sizes": ({"num_key_value_heads": [2, 2, 1, 2, 2]}, False),
    "a pattern": ({"hybrid_override_pattern": "MM*MM"}, False),
    "a period": ({"attn_layer_period": 5}, False),
    "in another section": ({"linear_attn_config": {"full_attn_layers": [3]}}, False),
}


@pytest.mark.parametrize("key", KEYS)
def test_a_layer_that_config_json_sets_apart_may_lack_tensors(tmp_path, key):
    config, found = KEYS[key]
    write_model(tmp_path, drop("layers.2.self_attn.k_proj"), config)
    assert bool(errors(tmp_path)) == found


def test_layers_that_share_keys_and_values_may_lack_them(tmp_path):
    shapes = drop("layers.3.self_attn.k_proj", "layers.3.self_attn.v_proj", "layers.4.self_attn.k_proj",
                  "layers.4.self_attn.v_proj")  # fmt: skip
    assert len(errors(write_model(tmp_path, shapes))) == 4
    assert errors(write_model(tmp_path, shapes, {"num_kv_shared_layers": 2})) == []


def test_layers_after_the_last_one_are_not_compared(tmp_path):
    extra = {f"model.layers.{LAYERS}.eh_proj.weight": (HIDDEN, 2 * HIDDEN)}
    assert errors(write_model(tmp_path, list_shapes() | extra)) == []


def test_a_tied_head_need_not_be_stored(tmp_path):
    shapes = drop("lm_head")
    assert errors(write_model(tmp_path, shapes, {"tie_word_embeddings": True})) == []
    assert errors(write_model(tmp_path, shapes, {"architectures": ["Qwen3MoeModel"]})) == []


@pytest.mark.parametrize("missing", ["num_hidden_layers", "config.json", "names"])
def test_without_a_number_of_layers_there_is_no_answer(tmp_path, capsys, missing):
    shapes = {"a.weight": (2, 2)} if missing == "names" else list_shapes()
    write_model(tmp_path, shapes, {"num_hidden_layers": None} if missing == "num_hidden_layers" else None)
    if missing == "config.json":
        (tmp_path / "config.json").unlink()
    assert main(["preflight", str(tmp_path)]) == 2
    assert capsys.readouterr().out.startswith("cannot tell: ")
    assert main(["verify", "--complete", str(tmp_path)]) == 2
    assert re.fullmatch(r"UNDECIDED: .*: (there is no|config\.json|no tensor).*\n", capsys.readouterr().out)


def test_a_model_of_unknown_type_has_a_norm_after_its_layers_if_they_have_norms(tmp_path):
    config = {"model_type": "unknown", "architectures": ["UnknownForCausalLM"]}
    assert errors(write_model(tmp_path / "whole", config=config)) == []
    found = errors(write_model(tmp_path / "without", drop("model.norm"), config))
    assert found == [("tensor-missing", "model.safetensors", None)]
    assert errors(write_model(tmp_path / "no norms", drop("norm"), config)) == []


NO_FAULTS = {
    "a head for images": ({"model.generation_head.proj_out.weight": (VOCABULARY - 5, HIDDEN)}, {}),
    "layers that are used several times": ({}, {"num_hidden_layers": 8 * LAYERS, "num_layers_per_stack": LAYERS}),
    "an input that the first layer lacks": (
        {f"model.layers.{n}.attention_input.query": (HIDDEN,) for n in range(1, LAYERS)}, {},
    ),
    "a scale that the first layer lacks": (
        {f"model.layers.{n}.mlp.gate.router_states_scale": (HIDDEN,) for n in range(1, LAYERS)}, {},
    ),
    "tables of positions of two sizes": (
        {f"model.layers.{n}.self_attn.rel_pos_h": (3 if n == 2 else 5, HIDDEN) for n in range(LAYERS)}, {},
    ),
    "matrices of zero experts": (
        {f"model.layers.{n}.mlp.experts.extra_proj": (EXPERTS + 2, 3, HIDDEN) for n in range(1, LAYERS)},
        {"zero_expert_num": 2},
    ),
}  # fmt: skip
"""Name -> (further tensors, further keys of config.json)."""

NO_FAULTS |= {
    "Kosmos-2 calls the number of layers `layers`": (
        {}, {"num_hidden_layers": None, "text_config": {"layers": LAYERS, "embed_dim": HIDDEN}},
    ),
    "NeMo has encoders of speech with more tensors than the language model": (
        {f"{tower}.layers.{n}.{part}{k}.weight": (HIDDEN,) for tower in ("perception.encoder.asr_encoder",
         "ctc_timestamp.decoder.transformer") for n in range(3) for part in "abcdefgh" for k in range(9)}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_FAULTS)
def test_what_some_architectures_store_is_no_fault(tmp_path, name):
    more, config = NO_FAULTS[name]
    assert errors(write_model(tmp_path, list_shapes() | more, config)) == []


def test_the_only_dense_layer_has_the_mlp_of_its_family(tmp_path):
    found = errors(write_model(tmp_path / "m", drop("layers.0.mlp.")))
    assert {(rule, name) for rule, _, name in found} == {
        ("tensor-missing", f"model.layers.0.mlp.{part}_proj.weight") for part in ("gate", "up", "down")
    }
    # A layer without an MLP that has the kind of others is reported once for each tensor that they have.
    report = swsurgery.preflight(write_model(tmp_path / "n", drop("layers.2.mlp.")))
    assert report.exit_code == 1 and len({f.tensor for f in report.findings}) == len(report.findings)


def test_a_module_that_no_other_layer_has_is_not_examined(tmp_path, capsys):
    shapes = list_shapes() | {"model.layers.3.mixer.in_proj.weight": (HIDDEN, HIDDEN)}
    assert main(["preflight", str(write_model(tmp_path / "m", shapes))]) == 0
    out = capsys.readouterr().out
    assert "not examined: whether model.layers.3.mixer is complete, because no other layer has the same tensors" in out
    assert main(["verify", str(tmp_path / "m"), "--complete", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["complete"]["not_examined"]) == 1
    assert main(["preflight", str(write_model(tmp_path / "n"))]) == 0
    assert "not examined" not in capsys.readouterr().out
    # In a family without a table, the only dense MLP has no peers.
    assert main(["preflight", str(write_model(tmp_path / "o", config={"model_type": "unknown"}))]) == 0
    assert "whether model.layers.0.mlp is complete" in capsys.readouterr().out
    report = swsurgery.preflight(write_model(tmp_path / "p", drop("layers.1.self_attn.q_proj")))
    assert report.exit_code == 1 and report.complete.unexamined == ()


# Quantised checkpoints -----------------------------------------------------------------------------------------------


def quantise(shapes, parts: dict[str, tuple[str, tuple[int, ...]]], skip: tuple[str, ...] = ()):
    """Replace the matrices of the attention by codes and scales: last part of the name -> (dtype, shape)."""
    new, dtypes = {}, {}
    for name, shape in shapes.items():
        if "self_attn" not in name or any(part in name for part in skip):
            new[name] = shape
            continue
        for last, (dtype, stored) in parts.items():
            new[name.replace("weight", last)] = stored
            dtypes[name.replace("weight", last)] = dtype
    return new, dtypes


GPTQ = {"qweight": ("I32", (1, HIDDEN)), "qzeros": ("I32", (1, 1)), "scales": ("F16", (1, HIDDEN))}
FP8 = {"weight": ("F8_E4M3", (HIDDEN, HIDDEN)), "weight_scale": ("F32", ())}
NF4 = {"weight": ("U8", (32, 1)), "weight.absmax": ("F32", (1,)), "weight.quant_map": ("F32", (16,))}


@pytest.mark.parametrize(("parts", "scale"), [(GPTQ, "scales"), (FP8, "weight_scale"), (NF4, "weight.absmax")])
def test_a_quantised_matrix_counts_as_one_tensor(tmp_path, parts, scale):
    config = {"quantization_config": {"quant_method": "any"}}
    kept = ("layers.2.self_attn.q_proj", "layers.0.")  # left in high precision
    shapes, dtypes = quantise(list_shapes(), parts, kept)
    assert errors(write_model(tmp_path / "whole", shapes, config, dtypes=dtypes)) == []
    lost = {name: shape for name, shape in shapes.items() if "layers.3.self_attn.k_proj" not in name}
    found = errors(write_model(tmp_path / "lost", lost, config, dtypes=dtypes))
    assert found == [("tensor-missing", "model.safetensors", "model.layers.3.self_attn.k_proj.weight")]
    name = f"model.layers.3.self_attn.k_proj.{scale}"
    without = {each: shape for each, shape in shapes.items() if each != name}
    assert errors(write_model(tmp_path / "scale", without, config, dtypes=dtypes)) == [
        ("tensor-missing", "model.safetensors", name)
    ]


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [1, 100])
def test_a_truncated_shard_is_one_finding_with_the_bytes_that_are_missing(tmp_path, lost):
    write_model(tmp_path, shards=3)
    size = (tmp_path / SECOND).stat().st_size
    os.truncate(tmp_path / SECOND, size - lost)
    assert errors(tmp_path) == [("shard-truncated", SECOND, None)]
    (finding,) = swsurgery.preflight(tmp_path).findings
    assert finding.message == (
        f"is {lost} B short: it has {size - lost} bytes, and its header needs {size} (download it again: "
        f"hf download ORG/NAME {SECOND} --local-dir {tmp_path} --force-download)"
    )
    with pytest.raises(CheckpointError, match="end at byte"):  # every other command refuses it as before
        swsurgery.open_checkpoint(tmp_path)


@pytest.mark.parametrize("size", [0, 3, 8, 200])
def test_a_shard_that_ends_in_its_header_is_truncated_too(tmp_path, size):
    write_model(tmp_path, shards=3)
    os.truncate(tmp_path / SECOND, size)
    assert errors(tmp_path) == [("shard-truncated", SECOND, None)]


def test_a_deleted_shard_is_one_finding(tmp_path):
    write_model(tmp_path, shards=3)
    count = list(read_map(tmp_path).values()).count(SECOND)
    (tmp_path / SECOND).unlink()
    assert errors(tmp_path) == [("shard-missing", SECOND, None)]
    (finding,) = swsurgery.verify(tmp_path, complete=True).findings
    assert f"{INDEX} puts {count} tensors there" in finding.message and "--force-download" not in finding.message


def test_a_number_that_the_index_skips_is_a_missing_shard(tmp_path):
    write_model(tmp_path, shards=3)
    (tmp_path / SECOND).rename(tmp_path / "renamed.safetensors")
    text = (tmp_path / INDEX).read_text().replace(SECOND, "renamed.safetensors")
    (tmp_path / INDEX).write_text(text)
    assert errors(tmp_path) == [("shard-missing", SECOND, None)]


def test_numbered_shards_without_an_index(tmp_path):
    write_model(tmp_path, shards=3)
    (tmp_path / INDEX).unlink()
    assert errors(tmp_path) == [("structure", INDEX, None)]
    (tmp_path / SECOND).unlink()
    assert errors(tmp_path) == [("structure", INDEX, None), ("shard-missing", SECOND, None)]


def test_a_damaged_header_is_a_finding(tmp_path):
    write_model(tmp_path, shards=3)
    with open(tmp_path / SECOND, "r+b") as file:
        file.seek(8)
        file.write(b"[")
    assert errors(tmp_path) == [("structure", SECOND, None)]


def test_a_tensor_in_another_shard_than_the_index_says_is_the_usual_finding(tmp_path):
    write_model(tmp_path, shards=3)
    document = json.loads((tmp_path / INDEX).read_text())
    document["weight_map"]["lm_head.weight"] = SECOND
    (tmp_path / INDEX).write_text(json.dumps(document))
    assert errors(tmp_path) == [("structure", None, "lm_head.weight")]


def test_a_wrong_total_size_is_a_warning(tmp_path):
    write_model(tmp_path, shards=3)
    document = json.loads((tmp_path / INDEX).read_text())
    document["metadata"]["total_size"] += 1
    (tmp_path / INDEX).write_text(json.dumps(document))
    report = swsurgery.preflight(tmp_path)
    assert [(f.rule, f.level, f.file) for f in report.findings] == [("total-size", "warning", INDEX)]
    assert report.ok and report.headline.startswith("complete: ")


def test_a_snapshot_in_the_cache_names_its_repository(tmp_path):
    commit = "0123456789" * 4
    snapshot = tmp_path / "models--org--name" / "snapshots" / commit
    write_model(snapshot, shards=3)
    (tmp_path / "models--org--name" / "blobs").mkdir()
    (snapshot / SECOND).unlink()
    (finding,) = swsurgery.preflight(snapshot).findings
    assert finding.message.endswith(f"(download it: hf download org/name {SECOND} --revision {commit})")


def test_no_weights_and_two_sets_of_weights_have_no_answer(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointError, match="no safetensors file"):
        swsurgery.preflight(tmp_path)
    write_model(tmp_path, shards=3)
    write_model(tmp_path)
    with pytest.raises(CheckpointError, match="two sets of weights"):
        swsurgery.preflight(tmp_path)
    assert swsurgery.preflight(tmp_path, weights="single").ok


# The Hub -------------------------------------------------------------------------------------------------------------


def test_a_repository_is_judged_by_the_sizes_that_the_hub_lists(hub, tmp_path):
    write_model(tmp_path / "whole", shards=3)
    hub.add_repo("org/whole", tmp_path / "whole")
    report = swsurgery.preflight("hf://org/whole")
    assert report.ok and report.headline == swsurgery.preflight(tmp_path / "whole").headline
    write_model(tmp_path / "short", shards=3)
    os.truncate(tmp_path / "short" / SECOND, (tmp_path / "short" / SECOND).stat().st_size - 10)
    hub.add_repo("org/short", tmp_path / "short")
    (finding,) = swsurgery.preflight("hf://org/short").findings
    assert (finding.rule, finding.file) == ("shard-truncated", SECOND)
    assert finding.message.endswith("(the repository itself has this fault: tell the publisher of org/short)")


# Output and hostile input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", REPORT_FORMATS)
@pytest.mark.parametrize("command", ["verify --complete", "preflight"])
def test_every_format_renders_the_findings(tmp_path, capsys, form, command):
    write_model(tmp_path, drop("layers.2."))
    assert main([*command.split(), str(tmp_path), "--format", form]) == 1
    assert "layer-missing" in capsys.readouterr().out


def test_the_line_comes_first_and_the_findings_below_it(tmp_path):
    write_model(tmp_path, drop("layers.2.", "layers.3.self_attn.k_proj"))
    lines = render(swsurgery.preflight(tmp_path), "text").splitlines()
    assert lines[0] == "incomplete: 2 findings: layer-missing, tensor-missing"
    assert [line.split()[1] for line in lines[1:]] == ["layer-missing:", "tensor-missing:"]


@pytest.mark.parametrize("number", [10_000, 10**9, -3, True, "5", 1e300, [5]])
def test_a_hostile_number_of_layers_ends_in_few_lines(tmp_path, number):
    write_model(tmp_path, config={"num_hidden_layers": number, "num_experts": number})
    assert len(swsurgery.preflight(tmp_path).findings) <= 4 * (MAX_LISTED + 1)


def test_hostile_numbers_of_shards_and_layers_in_names(tmp_path):
    write_model(tmp_path, list_shapes() | {"model.layers.99999.x.weight": (2,)}, shards=3)
    (tmp_path / SECOND).rename(tmp_path / "model-00002-of-999999.safetensors")
    text = (tmp_path / INDEX).read_text().replace(SECOND, "model-00002-of-999999.safetensors")
    (tmp_path / INDEX).write_text(text)
    report = swsurgery.preflight(tmp_path)
    assert {f.rule for f in report.findings} == {"shard-missing"} and len(report.findings) <= MAX_LISTED


@pytest.mark.parametrize("value", [[], {}, None, 3, True, [["llama"]]], ids=str)
def test_a_model_type_that_is_no_text_is_unknown(tmp_path, value):
    assert errors(write_model(tmp_path, config={"model_type": value})) == []


def test_the_norm_of_a_projector_has_its_own_length(tmp_path):
    shapes = list_shapes() | {"multi_modal_projector.norm.weight": (HIDDEN + 1,)}
    assert errors(write_model(tmp_path, shapes)) == []


def test_names_that_would_break_a_line_are_escaped(tmp_path, capsys):
    bad = "model.layers.2.a\n::error::b.weight"
    shapes = {name.replace("layers.2.", f"layers.{n}."): (2,) for n in (0, 1, 3, 4) for name in [bad]}
    write_model(tmp_path, list_shapes() | shapes)
    assert main(["preflight", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 2 and "\\n" in out


def test_transformers_applies_only_to_complete(tmp_path):
    write_model(tmp_path)
    with pytest.raises(SwsurgeryError, match="add --complete"):
        swsurgery.verify(tmp_path, finite=True, transformers=True)


def test_a_header_that_is_longer_than_the_limit_is_no_truncation(tmp_path):
    write_model(tmp_path)
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.write(struct.pack("<Q", 1 << 40))
    assert errors(tmp_path) == [("structure", "model.safetensors", None)]


@given(st.sets(st.integers(-3, 60)), st.integers(0, 3), st.integers(0, 50))
def test_gaps_are_the_numbers_in_between(present, first, end):
    gaps, count = find_gaps(present, first, end)
    expected = [number for number in range(first, end) if number not in present]
    assert (gaps, count) == (expected[:MAX_LISTED], len(expected))


@given(st.lists(st.frozensets(st.sampled_from("abcd"), min_size=1), min_size=1, max_size=9))
def test_only_a_rarer_set_lacks_something(sets):
    found = find_subsets(dict(enumerate(sets)))
    for key, (missing, peers) in found.items():
        larger = sets[key] | missing
        assert missing and not missing & sets[key]
        assert all(sets[peer] == larger for peer in peers) and len(peers) == sets.count(larger)
        assert len(peers) > sets.count(sets[key]) or len(peers) == sets.count(sets[key]) == 1
    top = max(sets, key=sets.count)
    if sets.count(top) > len(sets) - sets.count(top):
        assert {k for k, s in enumerate(sets) if s < top} <= found.keys()
        assert not {k for k, s in enumerate(sets) if s == top} & found.keys()


@given(
    st.dictionaries(
        st.sampled_from(["num_hidden_layers", "layer_types", "moe_layer_freq", "text_config", "x_config"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        ),
    )
)
def test_any_config_is_read(config):
    declared = read_declared(config)
    assert all(len(kinds.kinds) == declared.depths[""] for kinds in declared.kinds)

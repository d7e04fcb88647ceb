"""layer/row/col names the scalar that the model multiplies: shown on tiny models of every family, and by name alone."""

from __future__ import annotations

import random
import re
import shutil
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from multiplied import VARIANTS, products, write_variant
from safetensors.torch import load_file, save_file

from swsurgery.checkpoint.architectures import FAMILIES
from swsurgery.checkpoint.projections import (
    DownProjection,
    find_down_projection,
    find_short_form,
    has_residual_rows,
    list_down_projections,
    list_loaded_candidates,
    locate,
)
from swsurgery.errors import ArchitectureError
from swsurgery.storage.coordinate import Coordinate

# transformers 5.17 scripts a function of GPT-BigCode on import, which torch has come to dislike.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

# What transformers builds, saves, loads and multiplies ---------------------------------------------------------------


def changed_scalars(before: torch.nn.Module, after: torch.nn.Module) -> list[Coordinate]:
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    assert old.keys() == new.keys()
    return [Coordinate(n, tuple(i)) for n in old for i in (old[n] != new[n]).nonzero().tolist()]


def one_of_each_kind(projections: list[DownProjection], chance: random.Random) -> list[DownProjection]:
    kinds = [type(p.expert) for p in projections]
    return [chance.choice([p for p in projections if type(p.expert) is kind]) for kind in dict.fromkeys(kinds)]


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_the_located_scalar_is_the_one_that_is_multiplied(name, variant, tmp_path):
    base_folder, patched_folder = tmp_path / "base", tmp_path / "patched"
    write_variant(name, variant, base_folder)
    config, shapes = tiny_models.read(base_folder)
    base = tiny_models.load(name, base_folder)
    shutil.copytree(base_folder, patched_folder)
    chance = random.Random(f"{name} {variant}")

    for projection in one_of_each_kind(list(list_down_projections(config, shapes)), chance):
        row, col = chance.randrange(projection.rows), chance.randrange(projection.cols)
        layer, expert = projection.layer, projection.expert
        stored = locate(config, shapes, layer=layer, row=row, col=col, expert=expert)
        tensors = load_file(base_folder / "model.safetensors")
        old = tensors[stored.tensor][stored.index].item()
        tensors[stored.tensor][stored.index] += 1.0
        difference = tensors[stored.tensor][stored.index].item() - old
        save_file(tensors, patched_folder / "model.safetensors", {"format": "pt"})
        patched = tiny_models.load(name, patched_folder)

        # Exactly one scalar of the loaded model differs, in that layer, and it is where loaded_candidates says.
        [loaded] = changed_scalars(base, patched)
        assert re.search(rf"\.{layer}\.", loaded.tensor)
        parameters = dict(patched.named_parameters(remove_duplicate=False))
        assert next(c for c in list_loaded_candidates(config, stored, shapes) if c.tensor in parameters) == loaded
        if isinstance(expert, int) and parameters[loaded.tensor].dim() == 3:
            assert loaded.index[0] == expert

        # It multiplies neuron `col`, and only residual channel `row` of the product feels it.
        [before], [after] = products(base, loaded), products(patched, loaded)
        assert (before.channel, before.neuron) == (row, col)
        assert torch.equal(before.left, after.left)
        expected = torch.zeros_like(before.result)
        expected[:, row] = difference * before.left[:, col]
        torch.testing.assert_close(after.result - before.result, expected, rtol=1e-4, atol=1e-4)
        others = [channel for channel in range(projection.rows) if channel != row]
        assert torch.equal(after.result[:, others], before.result[:, others])
        assert expected.abs().max() > 1e-3

        assert find_short_form(config, shapes, stored) == (layer, row, col, expert)


DENSE = [(0, None), (1, None)]
ALL_EXPERTS = [(layer, expert) for layer in (0, 1) for expert in range(4)]
DENSE_THEN_EXPERTS = [(0, None), (1, 0), (1, 1), (1, 2), (1, 3)]
PLACES = {
    **dict.fromkeys(("mixtral", "olmoe", "gpt_oss", "granitemoe", "longcat_flash", "minimax"), ALL_EXPERTS),
    "phimoe": [(0, 0), (0, 1), (1, 0), (1, 1)],
    **dict.fromkeys(("qwen3_moe", "qwen3_vl_moe", "lfm2_moe", "jamba"), DENSE_THEN_EXPERTS),
    **dict.fromkeys(
        (
            *("qwen2_moe", "deepseek_v2", "deepseek_v3", "llama4", "llama4_text", "kimi_linear", "step3p7"),
            *("qwen3_next", "bailing_hybrid"),
        ),
        [*DENSE_THEN_EXPERTS, (1, "shared")],
    ),
    **dict.fromkeys(
        ("granitemoeshared", "granitemoehybrid", "deepseek_v4", "hunyuan_v1_moe", "qwen3_5_moe_text"),
        [*ALL_EXPERTS[:4], (0, "shared"), *ALL_EXPERTS[4:], (1, "shared")],
    ),
    # Layers of Mamba and attention have no MLP, and Zamba stores the MLP that several layers share once.
    "nemotron_h": [*ALL_EXPERTS[4:], (1, "shared"), (3, None)],
    "zamba": [(1, None)],
}


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_every_down_projection_is_listed_in_order(name, tmp_path):
    tiny_models.write(name, tmp_path)
    config, shapes = tiny_models.read(tmp_path)
    listed = list(list_down_projections(config, shapes))
    assert [(p.layer, p.expert) for p in listed] == PLACES.get(name, DENSE)
    assert {p.rows for p in listed} == {16}
    assert not {p.tensor for p in listed} & {n for n in shapes if "vision" in n or "visual" in n}


def test_every_model_type_of_the_table_is_built():
    built = set()
    for name in tiny_models.MODELS:
        config = tiny_models.build(name).config
        built |= {config.model_type, config.get_text_config().model_type}
    listed = {model_type for family in FAMILIES for model_type in family.model_types}
    not_built = listed - built
    assert not_built <= {model_type for model_type, *_ in PUBLISHED}
    # Qwen2.5-Omni is its thinker, which is built, and a model for speech.
    assert {model_type for model_type in not_built if model_type in transformers.CONFIG_MAPPING} <= {"qwen2_5_omni"}


# Names of published checkpoints --------------------------------------------------------------------------------------


def table(model_type: str, *names: str, layers: int = 2, shape: tuple[int, ...] = (16, 24), **config: Any):
    """A config.json and the shapes of the named tensors in every layer; `{layer}` stands for the layer's number."""
    shapes = {name.format(layer=layer): shape for name in names for layer in range(layers)}
    return {"model_type": model_type, "num_hidden_layers": layers, **config}, shapes


def experts(name: str, count: int = 4) -> list[str]:
    return [name.replace("{expert}", str(expert)) for expert in range(count)]


# model type, names in the file, (layer, row, col, expert), what it must be
PUBLISHED = [
    ("llama", ["model.layers.{layer}.mlp.down_proj.weight"], (1, 3, 20, None), "model.layers.1.mlp.down_proj.weight"),
    ("gpt2", ["h.{layer}.mlp.c_proj.weight"], (1, 3, 20, None), "h.1.mlp.c_proj.weight"),
    (
        "gpt2",
        ["transformer.h.{layer}.mlp.c_proj.weight", "transformer.h.{layer}.attn.c_proj.weight"],
        (0, 15, 23, None),
        "transformer.h.0.mlp.c_proj.weight",
    ),
    (
        "bloom",
        ["h.{layer}.mlp.dense_4h_to_h.weight", "h.{layer}.mlp.dense_h_to_4h.weight"],
        (0, 3, 20, None),
        "h.0.mlp.dense_4h_to_h.weight",
    ),
    ("opt", ["decoder.layers.{layer}.fc2.weight"], (1, 3, 20, None), "decoder.layers.1.fc2.weight"),
    (
        "mixtral",
        experts("model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight"),
        (1, 3, 20, 3),
        "model.layers.1.block_sparse_moe.experts.3.w2.weight",
    ),
    (
        "deepseek_v3",
        ["model.layers.{layer}.mlp.shared_experts.down_proj.weight"],
        (1, 3, 20, "shared"),
        "model.layers.1.mlp.shared_experts.down_proj.weight",
    ),
    (
        "qwen2_moe",
        ["model.layers.{layer}.mlp.shared_expert.down_proj.weight"],
        (1, 3, 20, "shared"),
        "model.layers.1.mlp.shared_expert.down_proj.weight",
    ),
    (
        "qwen3_moe",
        experts("model.layers.{layer}.mlp.experts.{expert}.down_proj.weight", 12),
        (1, 3, 20, 11),
        "model.layers.1.mlp.experts.11.down_proj.weight",
    ),
    (
        "llava",
        [
            "language_model.model.layers.{layer}.mlp.down_proj.weight",
            "vision_tower.vision_model.encoder.layers.{layer}.mlp.fc2.weight",
        ],
        (1, 3, 20, None),
        "language_model.model.layers.1.mlp.down_proj.weight",
    ),
    (
        "gemma3",
        [
            "language_model.model.layers.{layer}.mlp.down_proj.weight",
            "vision_tower.vision_model.encoder.layers.{layer}.mlp.fc2.weight",
        ],
        (1, 3, 20, None),
        "language_model.model.layers.1.mlp.down_proj.weight",
    ),
    (
        "gemma3",
        ["model.language_model.layers.{layer}.mlp.down_proj.weight"],
        (0, 3, 20, None),
        "model.language_model.layers.0.mlp.down_proj.weight",
    ),
    # Model types of which transformers has no class, and files whose names transformers changes.
    (
        "internlm2",
        ["model.layers.{layer}.feed_forward.w2.weight"],
        (1, 3, 20, None),
        "model.layers.1.feed_forward.w2.weight",
    ),
    (
        "internvl_chat",
        ["language_model.model.layers.{layer}.feed_forward.w2.weight"],
        (1, 3, 20, None),
        "language_model.model.layers.1.feed_forward.w2.weight",
    ),
    (
        "chatglm",
        ["transformer.encoder.layers.{layer}.mlp.dense_4h_to_h.weight"],
        (1, 3, 20, None),
        "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight",
    ),
    (
        "arctic",
        ["model.layers.{layer}.block_sparse_moe.mlp.w2.weight"],
        (0, 3, 20, None),
        "model.layers.0.block_sparse_moe.mlp.w2.weight",
    ),
    (
        "arctic",
        [
            *experts("model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight"),
            "model.layers.{layer}.residual_mlp.w2.weight",
        ],
        (1, 3, 20, "shared"),
        "model.layers.1.residual_mlp.w2.weight",
    ),
    *(
        (
            model_type,
            ["model.layers.{layer}.share_expert.down_proj.weight"],
            (1, 3, 20, "shared"),
            "model.layers.1.share_expert.down_proj.weight",
        )
        for model_type in ("step3_vl", "step3_text", "step3p5")
    ),
    (
        "phi4mm",
        [
            "model.layers.{layer}.mlp.down_proj.base_layer.weight",
            "model.layers.{layer}.mlp.down_proj.lora_B.vision.weight",
        ],
        (1, 3, 20, None),
        "model.layers.1.mlp.down_proj.base_layer.weight",
    ),
    (
        "qwen2_5_omni",
        ["thinker.model.layers.{layer}.mlp.down_proj.weight", "talker.model.layers.{layer}.mlp.down_proj.weight"],
        (1, 3, 20, None),
        "thinker.model.layers.1.mlp.down_proj.weight",
    ),
    (
        "deepseek_v4",
        [*experts("layers.{layer}.ffn.experts.{expert}.w2.weight"), "mtp.{layer}.ffn.shared_experts.w2.weight"],
        (1, 3, 20, 3),
        "layers.1.ffn.experts.3.w2.weight",
    ),
    (
        "nemotron_h",
        ["backbone.layers.{layer}.mixer.down_proj.weight", "mtp.layers.{layer}.mixer.down_proj.weight"],
        (1, 3, 20, None),
        "backbone.layers.1.mixer.down_proj.weight",
    ),
    (
        "gguf",
        ["blk.{layer}.ffn_down.weight", "blk.{layer}.attn_output.weight"],
        (1, 3, 20, None),
        "blk.1.ffn_down.weight",
    ),
    ("gguf", experts("blk.{layer}.ffn_down.{expert}.weight"), (1, 3, 20, 3), "blk.1.ffn_down.3.weight"),
    ("gguf", ["blk.{layer}.ffn_down_shexp.weight"], (1, 3, 20, "shared"), "blk.1.ffn_down_shexp.weight"),
    # Model types that the table does not know, whose names it does: Baichuan, and Phi-2 before transformers had it.
    (
        "baichuan",
        ["model.layers.{layer}.mlp.down_proj.weight"],
        (1, 0, 23, None),
        "model.layers.1.mlp.down_proj.weight",
    ),
    ("phi-msft", ["model.layers.{layer}.mlp.fc2.weight"], (1, 0, 23, None), "model.layers.1.mlp.fc2.weight"),
]


@pytest.mark.parametrize(("model_type", "names", "place", "tensor"), PUBLISHED)
def test_published_names(model_type, names, place, tensor):
    transposed = model_type == "gpt2"
    config, shapes = table(model_type, *names, shape=(24, 16) if transposed else (16, 24))
    layer, row, col, expert = place
    found = locate(config, shapes, layer=layer, row=row, col=col, expert=expert)
    assert found == (tensor, (col, row) if transposed else (row, col))
    assert find_short_form(config, shapes, found) == place


@pytest.mark.parametrize(
    ("shape", "index"),
    [((24, 16), (11, 3)), ((16, 24), (3, 11)), ((16, 16), None)],
    ids=["as before", "turned", "square"],
)
def test_quantisers_may_turn_the_matrices_of_gpt_2(shape, index):
    config, shapes = table("gpt2", "transformer.h.{layer}.mlp.c_proj.weight", shape=shape, n_embd=16)
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    if index is None:
        with pytest.raises(ArchitectureError, match="the matrix is square"):
            locate(config, shapes, layer=1, row=3, col=11)
        return
    found = locate(config, shapes, layer=1, row=3, col=11)
    assert found == ("transformer.h.1.mlp.c_proj.weight", index)
    assert find_short_form(config, shapes, found) == (1, 3, 11, None)


def stacked(model_type: str, shape: tuple[int, ...], **config: Any):
    return table(model_type, "model.layers.{layer}.mlp.experts.down_proj", shape=shape, **config)


@pytest.mark.parametrize(
    ("model_type", "shape", "index"),
    [
        ("qwen3_moe", (4, 16, 12), (2, 3, 11)),
        ("gpt_oss", (4, 12, 16), (2, 11, 3)),
        ("qwen3_vl_moe", (4, 16, 12), (2, 3, 11)),
        ("qwen3_vl_moe", (4, 12, 16), (2, 11, 3)),
        ("an unknown one", (4, 16, 12), (2, 3, 11)),
        ("an unknown one", (4, 12, 16), (2, 11, 3)),
    ],
)
def test_stacked_experts_in_either_orientation(model_type, shape, index):
    config, shapes = stacked(model_type, shape, hidden_size=16)
    found = locate(config, shapes, layer=1, row=3, col=11, expert=2)
    assert found == ("model.layers.1.mlp.experts.down_proj", index)
    assert find_short_form(config, shapes, found) == (1, 3, 11, 2)
    projection = find_down_projection(config, shapes, 1, 2)
    assert (projection.expert_axis, projection.transposed) == (0, index[1] == 11)
    assert (projection.rows, projection.cols) == (16, 12)


ONE_ORDER = ("feed_forward.experts.down_proj", "block_sparse_moe.experts.down_proj")
"""Names that one known family each stores, Llama 4 as [expert, col, row] and Granite-MoE as [expert, row, col]."""


@pytest.mark.parametrize("name", ONE_ORDER)
@pytest.mark.parametrize(("shape", "index"), [((4, 16, 12), (2, 3, 11)), ((4, 12, 16), (2, 11, 3))])
def test_an_unknown_family_is_not_read_in_the_order_of_the_one_that_has_its_names(name, shape, index):
    config, shapes = table("an unknown one", f"model.layers.{{layer}}.{name}", shape=shape, hidden_size=16)
    found = locate(config, shapes, layer=1, row=3, col=11, expert=2)
    assert found == (f"model.layers.1.{name}", index)
    assert find_short_form(config, shapes, found) == (1, 3, 11, 2)


@pytest.mark.parametrize(
    ("name", "shape", "hidden", "why"),
    [
        (f"layers.{{layer}}.{name}", (4, 16, 16), 16, "the matrix is square")
        for name in (*ONE_ORDER, "mlp.experts.down_proj")
    ]
    + [
        (f"layers.{{layer}}.{name}", (4, 12, 16), None, "config.json does not give the hidden size")
        for name in ONE_ORDER
    ]
    + [
        ("layers.{layer}.mlp.c_proj.weight", (16, 16), 16, "the matrix is square"),
        ("layers.{layer}.mlp.c_proj.weight", (12, 16), None, "config.json does not give the hidden size"),
    ],
)
def test_what_an_unknown_family_may_store_either_way_round_is_refused(name, shape, hidden, why):
    more = {} if hidden is None else {"hidden_size": hidden}
    config, shapes = table("an unknown one", f"model.{name}", shape=shape, **more)
    expert = 2 if len(shape) == 3 else None
    with pytest.raises(
        ArchitectureError, match=rf"the order of rows and columns is not known: model\.{name[:6]}.* \({why}; "
    ):
        locate(config, shapes, layer=1, row=3, col=11, expert=expert)
    with pytest.raises(ArchitectureError, match="order of rows and columns"):
        list_down_projections(config, shapes)
    stored = Coordinate(f"model.{name.format(layer=1)}", (2, 3, 11)[-len(shape) :])
    assert find_short_form(config, shapes, stored) is None
    # Named by tensor and index it has a place all the same, and nothing is known to turn it.
    candidates = list_loaded_candidates(config, stored, shapes)
    assert candidates[0] == stored and {c.index for c in candidates} == {stored.index}


@pytest.mark.parametrize(
    ("model_type", "name", "shape", "index"),
    [
        ("llama4_text", "feed_forward.experts.down_proj", (4, 16, 16), (2, 11, 3)),
        ("granitemoe", "block_sparse_moe.experts.down_proj", (4, 16, 16), (2, 3, 11)),
        ("starcoder2", "mlp.c_proj.weight", (16, 16), (3, 11)),
        ("an unknown one", "mlp.down_proj.weight", (16, 16), (3, 11)),
        ("an unknown one", "mlp.experts.2.down_proj.weight", (16, 16), (3, 11)),
    ],
)
def test_a_square_matrix_is_read_where_only_one_order_is_known(model_type, name, shape, index):
    config, shapes = table(model_type, f"model.layers.{{layer}}.{name}", shape=shape, hidden_size=16)
    expert = 2 if "experts" in name else None
    assert locate(config, shapes, layer=1, row=3, col=11, expert=expert).index == index


@st.composite
def places(draw):
    """A model of one of several templates, larger than any tiny one, and a random place in it."""
    layers, rows, cols, count = (draw(st.integers(1, top)) for top in (40, 50, 70, 12))
    kind = draw(st.sampled_from(["llama", "gpt2", "mixtral", "deepseek_v3", "gpt_oss", "llava"]))
    name = {
        "llama": "model.layers.{layer}.mlp.down_proj.weight",
        "llava": "language_model.model.layers.{layer}.mlp.down_proj.weight",
        "gpt2": "h.{layer}.mlp.c_proj.weight",
        "mixtral": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
        "deepseek_v3": "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
        "gpt_oss": "model.layers.{layer}.mlp.experts.down_proj",
    }[kind]
    shape = {"gpt2": (cols, rows), "gpt_oss": (count, cols, rows)}.get(kind, (rows, cols))
    names = experts(name, count) if "{expert}" in name else [name]
    if kind == "deepseek_v3":
        names.append("model.layers.{layer}.mlp.shared_experts.down_proj.weight")
    config, shapes = table(kind, *names, layers=layers, shape=shape, hidden_size=rows)
    expert: Any = None
    if len(names) > 1 or kind in ("mixtral", "gpt_oss"):
        expert = draw(st.integers(0, count - 1))
    if kind == "deepseek_v3" and draw(st.booleans()):
        expert = "shared"
    place = draw(st.tuples(st.integers(0, layers - 1), st.integers(0, rows - 1), st.integers(0, cols - 1)))
    return config, shapes, (*place, expert)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a pause of the machine is no failure
@given(places())
def test_short_form_is_the_inverse_of_locate(model):
    config, shapes, (layer, row, col, expert) = model
    found = locate(config, shapes, layer=layer, row=row, col=col, expert=expert)
    assert found.tensor in shapes
    assert len(found.index) == len(shapes[found.tensor])
    assert find_short_form(config, shapes, found) == (layer, row, col, expert)


def test_the_sections_of_an_omni_model_are_read_in_depth():
    """The configuration of the language model is two sections deep; the speech model has another number of layers."""
    text = {"model_type": "qwen2_5_omni_text", "num_hidden_layers": 1, "hidden_size": 16}
    config = {"model_type": "qwen2_5_omni", "thinker_config": {"model_type": "other", "text_config": text}}
    names = ("thinker.model.layers.{layer}.mlp.down_proj.weight", "talker.model.layers.{layer}.mlp.down_proj.weight")
    _, shapes = table("", *names)
    [projection] = list_down_projections(config, shapes)
    assert projection.tensor == "thinker.model.layers.0.mlp.down_proj.weight"
    with pytest.raises(ArchitectureError, match="layer 1 is beyond the model"):
        locate(config, shapes, layer=1, row=0, col=0)


def test_experts_with_a_latent_space_have_other_rows_than_the_hidden_size():
    """Nemotron 3 projects the residual stream to `moe_latent_size` channels before its routed experts."""
    routed = "backbone.layers.{layer}.mixer.experts.{expert}.down_proj.weight"
    config, shapes = table("nemotron_h", *experts(routed), shape=(8, 24), hidden_size=16, moe_latent_size=8)
    _, shared = table("nemotron_h", "backbone.layers.{layer}.mixer.shared_experts.down_proj.weight")
    found = {p.expert: p for p in list_down_projections(config, shapes | shared) if p.layer == 1}
    assert {expert: (p.rows, has_residual_rows(config, p)) for expert, p in found.items()} == {
        **dict.fromkeys(range(4), (8, False)),
        "shared": (16, True),
    }
    with pytest.raises(ArchitectureError, match="with 16 rows is expected"):
        list_down_projections(config | {"moe_latent_size": None}, shapes)


LLAMA = table(
    "llama",
    "model.layers.{layer}.mlp.down_proj.weight",
    "model.layers.{layer}.mlp.up_proj.weight",
    "model.layers.{layer}.mlp.down_proj.bias",
    layers=32,
    shape=(4096, 11008),
    hidden_size=4096,
)


@pytest.mark.parametrize(
    "coordinate",
    [
        Coordinate("model.layers.1.mlp.up_proj.weight", (0, 0)),
        Coordinate("model.layers.1.mlp.down_proj.bias", (0, 0)),
        Coordinate("model.layers.1.mlp.down_proj.weight", (0,)),
        Coordinate("model.layers.1.mlp.down_proj.weight", (4096, 0)),
        Coordinate("model.layers.1.mlp.down_proj.weight", (-1, 0)),
        Coordinate("model.layers.01.mlp.down_proj.weight", (0, 0)),
        Coordinate("model.layers.32.mlp.down_proj.weight", (0, 0)),
        Coordinate("my.model.layers.1.mlp.down_proj.weight", (0, 0)),
        Coordinate("model.layers.1.mlp.down_proj.weight.more", (0, 0)),
    ],
)
def test_what_is_no_down_projection_has_no_short_form(coordinate):
    config, shapes = LLAMA
    assert find_short_form(config, shapes, coordinate) is None


def test_a_name_is_matched_whole_not_in_part():
    config, shapes = LLAMA
    more = dict.fromkeys(
        ("draft.model.layers.2.mlp.down_proj.weight", "model.layers.2.mlp.down_proj.weight.copy"), (4096, 11008)
    )
    found = locate(config, more | shapes, layer=2, row=3968, col=7003)
    assert found == ("model.layers.2.mlp.down_proj.weight", (3968, 7003))


@pytest.mark.parametrize(
    "stray",
    [
        "draft.model.layers.7.mlp.down_proj.weight",
        "model.layers.7.mlp.down_proj.weight.copy",
        "model.layers.07.mlp.down_proj.weight",
    ],
)
def test_a_stray_name_adds_no_layer(stray):
    _, shapes = table("llama", "model.layers.{layer}.mlp.down_proj.weight")
    without_count = {"model_type": "llama"}
    assert [p.layer for p in list_down_projections(without_count, {stray: (16, 24)} | shapes)] == [0, 1]
    with pytest.raises(ArchitectureError, match="layer 7 is beyond the model: it has layers 0 to 1"):
        locate(without_count, {stray: (16, 24)} | shapes, layer=7, row=0, col=0)


def test_layers_beyond_the_config_are_no_layers_of_the_model():
    """DeepSeek-V3 has 61 layers and stores its token-prediction module under layer 61."""
    name = "model.layers.{layer}.mlp.shared_experts.down_proj.weight"
    config, shapes = table("deepseek_v3", name, layers=62)
    config["num_hidden_layers"] = 61
    assert [p.layer for p in list_down_projections(config, shapes)] == list(range(61))
    with pytest.raises(ArchitectureError, match=r"^layer 61 is beyond the model: it has layers 0 to 60 \("):
        locate(config, shapes, layer=61, row=0, col=0, expert="shared")


# Candidates in a loaded model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "stored", "loaded"),
    [
        (
            "qwen3_moe",
            Coordinate("model.layers.1.mlp.experts.68.down_proj.weight", (940, 711)),
            Coordinate("model.layers.1.mlp.experts.down_proj", (68, 940, 711)),
        ),
        (
            "mixtral",
            Coordinate("model.layers.1.block_sparse_moe.experts.3.w2.weight", (940, 711)),
            Coordinate("model.layers.1.mlp.experts.down_proj", (3, 940, 711)),
        ),
        (
            "granitemoe",
            Coordinate("model.layers.1.block_sparse_moe.output_linear.weight", (3, 940, 711)),
            Coordinate("model.layers.1.block_sparse_moe.experts.down_proj", (3, 940, 711)),
        ),
        (
            "llava",
            Coordinate("language_model.model.layers.1.mlp.down_proj.weight", (940, 711)),
            Coordinate("model.language_model.layers.1.mlp.down_proj.weight", (940, 711)),
        ),
        (
            "gpt2",
            Coordinate("h.1.mlp.c_proj.weight", (711, 94)),
            Coordinate("transformer.h.1.mlp.c_proj.weight", (711, 94)),
        ),
        # No down projections: prefixes are all that changes.
        ("llama", Coordinate("embed_tokens.weight", (5, 6)), Coordinate("model.embed_tokens.weight", (5, 6))),
        (
            "gemma3_text",
            Coordinate("language_model.model.norm.weight", (5,)),
            Coordinate("model.language_model.norm.weight", (5,)),
        ),
        ("llava", Coordinate("language_model.lm_head.weight", (5, 6)), Coordinate("lm_head.weight", (5, 6))),
    ],
)
def test_loaded_candidates_by_name(model_type, stored, loaded):
    candidates = list_loaded_candidates({"model_type": model_type}, stored)
    assert candidates[0] == stored
    assert loaded in candidates
    assert len(set(candidates)) == len(candidates)


def test_a_tensor_that_is_turned_while_loading_is_never_tried_under_its_own_index():
    config, shapes = stacked("qwen3_vl_moe", (4, 12, 16), hidden_size=16)
    candidates = list_loaded_candidates(config, Coordinate("model.layers.1.mlp.experts.down_proj", (2, 11, 3)), shapes)
    assert Coordinate("model.layers.1.mlp.experts.down_proj", (2, 3, 11)) in candidates
    assert {candidate.index for candidate in candidates} <= {(2, 3, 11), (3, 11)}


def test_without_shapes_an_orientation_is_not_guessed():
    with pytest.raises(ArchitectureError, match="does not tell whether it is stored as .*: .*give the stored shapes"):
        list_loaded_candidates(
            {"model_type": "qwen3_vl_moe"}, Coordinate("model.layers.1.mlp.experts.down_proj", (2, 3, 4))
        )


# Refusals ------------------------------------------------------------------------------------------------------------

MOE = table("qwen3_moe", *experts("model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"))
SHARED = table("deepseek_v3", "model.layers.{layer}.mlp.shared_experts.down_proj.weight")
STACKED = stacked("qwen3_moe", (4, 16, 24))


def with_tensor(model, name, shape=(8, 24)):
    return model[0], model[1] | {name: shape}


@pytest.mark.parametrize(
    ("model", "place", "message"),
    [
        # layers
        (LLAMA, (40, 0, 0, None), r"layer 40 is beyond the model: it has layers 0 to 31 \(name the scalar by .*\)"),
        (LLAMA, (-1, 0, 0, None), r"layer -1 is beyond the model: it has layers 0 to 31 \(.*\)"),
        (({}, LLAMA[1]), (40, 0, 0, None), r"layer 40 is beyond the model: it has layers 0 to 31 \(.*\)"),
        (MOE, (2, 0, 0, 1), r"layer 2 is beyond the model: it has layers 0 to 1 \(.*\)"),
        # rows and columns
        (
            LLAMA,
            (2, 7003, 3968, None),
            r"row 7003 is out of range 0\.\.4095: model\.layers\.2\.mlp\.down_proj\.weight "
            r"\(row and col look swapped: \[3968, 7003\] would fit\)",
        ),
        (
            LLAMA,
            (2, 0, 11008, None),
            r"col 11008 is out of range 0\.\.11007: model\.layers\.2\.mlp\.down_proj\.weight "
            r"\(row is the output channel\)",
        ),
        (LLAMA, (2, -1, 0, None), r"row -1 is out of range 0\.\.4095: .*output channel\)"),
        (LLAMA, (2, 9999, 99999, None), r"row 9999 is out of range .* and col 99999 is out of range .*channel\)"),
        (
            table("llama", "model.layers.{layer}.mlp.down_proj.weight", shape=(0, 24)),
            (0, 0, 0, None),
            "row 0 .*empty.*",
        ),
        # experts
        (LLAMA, (2, 0, 0, 3), r"layer 2 is dense: it has no expert 3 \(leave expert out\)"),
        (LLAMA, (2, 0, 0, "shared"), r"layer 2 is dense: it has no expert shared \(leave expert out\)"),
        (MOE, (1, 0, 0, None), r"layer 1 is a mixture of experts: no expert is given \(expert: 0 to 3\)"),
        (MOE, (1, 0, 0, 4), r"layer 1 has no expert 4: its experts are 0 to 3"),
        (MOE, (1, 0, 0, -1), r"layer 1 has no expert -1: its experts are 0 to 3"),
        (MOE, (1, 0, 0, "shared"), r"layer 1 has no expert shared: its experts are 0 to 3"),
        (SHARED, (1, 0, 0, 0), r"layer 1 has no expert 0: its experts are shared"),
        (
            with_tensor(STACKED, "model.layers.1.mlp.shared_expert.down_proj.weight"),
            (1, 0, 0, None),
            r"layer 1 is a mixture of experts: no expert is given \(expert: 0 to 3, shared\)",
        ),
        (STACKED, (1, 0, 0, 4), r"layer 1 has no expert 4: its experts are 0 to 3"),
        (STACKED, (1, 0, 0, -1), r"layer 1 has no expert -1: its experts are 0 to 3"),
        # names that do not fit
        (
            ({"model_type": "mamba", "num_hidden_layers": 2}, {"backbone.layers.0.mixer.out_proj.weight": (16, 32)}),
            (0, 0, 0, None),
            r"no known down projection in layer 0: model_type mamba \(looked for layers\.0\.mlp\.down_proj\.weight, "
            r".* and \d+ other names; name the scalar by tensor and index instead\)",
        ),
        (
            ({"model_type": "phi"}, {"model.layers.0.mlp.down_proj.weight": (16, 24)}),
            (0, 0, 0, None),
            r"no known down projection in layer 0: model_type phi \(looked for layers\.0\.mlp\.fc2\.weight; .*\)",
        ),
        (
            (
                {"model_type": "bart", "is_encoder_decoder": True},
                {f"model.{stack}.layers.0.fc2.weight": (16, 24) for stack in ("encoder", "decoder")},
            ),
            (0, 0, 0, None),
            r"no known down projection in layer 0: model_type bart \(looked for no name, .*two stacks of layers; .*\)",
        ),
        (
            with_tensor(table("llama", "layers.{layer}.mlp.down_proj.weight"), "model.layers.0.mlp.down_proj.weight"),
            (0, 0, 0, None),
            r"layer 0 has several down projections: model\.layers\.0\.\S+, layers\.0\.\S+ \(.*\)",
        ),
        # shapes that do not fit
        (
            table("llama", "model.layers.{layer}.mlp.down_proj.weight", shape=(24, 16), hidden_size=16),
            (0, 0, 0, None),
            r"the down projection has shape \[24, 16\], but \[row, col\] with 16 rows is expected: "
            r"model\.layers\.0\.mlp\.down_proj\.weight \(.*\)",
        ),
        (
            stacked("mixtral", (16, 24)),
            (0, 0, 0, 0),
            r"the down projection has shape \[16, 24\], but \[expert, row, col\] is expected: "
            r"model\.layers\.0\.mlp\.experts\.down_proj \(.*\)",
        ),
        (
            stacked("qwen3_vl_moe", (4, 16, 16), hidden_size=16),
            (0, 0, 0, 0),
            r"the order of rows and columns is not known: .* \(the matrix is square; .*\)",
        ),
        (
            table("an unknown one", "transformer.h.{layer}.mlp.c_proj.weight"),
            (0, 0, 0, None),
            r"the order of rows and columns is not known: .* \(config.json does not give the hidden size; .*\)",
        ),
    ],
)
def test_refusals(model, place, message):
    config, shapes = model
    layer, row, col, expert = place
    with pytest.raises(ArchitectureError) as caught:
        locate(config, shapes, layer=layer, row=row, col=col, expert=expert)
    assert re.fullmatch(message, str(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "tensors", "expert", "packed"),
    [
        ("llama", ["mlp.down_proj.qweight", "mlp.down_proj.scales"], None, "mlp.down_proj.qweight"),
        ("llama", ["mlp.down_proj.weight_packed", "mlp.down_proj.weight_scale"], None, "mlp.down_proj.weight_packed"),
        ("llama", ["mlp.down_proj.weight", "mlp.down_proj.weight.absmax"], None, "mlp.down_proj.weight.absmax"),
        (
            "gpt_oss",
            ["mlp.experts.down_proj_blocks", "mlp.experts.down_proj_scales"],
            3,
            "mlp.experts.down_proj_blocks",
        ),
        ("gpt_oss", ["mlp.experts.down_proj_blocks"], None, "mlp.experts.down_proj_blocks"),
        ("qwen3_moe", ["mlp.experts.0.down_proj.qweight"], 0, "mlp.experts.0.down_proj.qweight"),
        ("qwen3_moe", ["mlp.experts.0.down_proj.qweight"], None, "mlp.experts.0.down_proj.qweight"),
    ],
)
def test_a_packed_down_projection_is_refused_by_name(model_type, tensors, expert, packed):
    config, shapes = table(model_type, *(f"model.layers.{{layer}}.{tensor}" for tensor in tensors), shape=(192, 1))
    message = rf"is packed, so its scalars are not stored one by one: model\.layers\.1\.{re.escape(packed)} \("
    with pytest.raises(ArchitectureError, match=message):
        locate(config, shapes, layer=1, row=0, col=0, expert=expert)
    with pytest.raises(ArchitectureError, match="is packed"):
        list(list_down_projections(config, shapes))
    assert find_short_form(config, shapes, Coordinate(next(iter(shapes)), (0, 0))) is None


def test_scales_beside_an_unpacked_matrix_are_no_reason_to_refuse():
    """Block-scaled FP8, as in DeepSeek-V3: one stored number per weight, so the place is well defined."""
    config, shapes = table(
        "deepseek_v3", *(f"model.layers.{{layer}}.mlp.down_proj.weight{suffix}" for suffix in ("", "_scale_inv"))
    )
    assert locate(config, shapes, layer=1, row=2, col=3) == ("model.layers.1.mlp.down_proj.weight", (2, 3))


@pytest.mark.parametrize("count", [0, -5, True, "2", None])
def test_a_nonsensical_layer_count_is_ignored(count):
    config, shapes = table("llama", "model.layers.{layer}.mlp.down_proj.weight", layers=3)
    config["num_hidden_layers"] = count
    assert locate(config, shapes, layer=2, row=1, col=2) == ("model.layers.2.mlp.down_proj.weight", (1, 2))
    with pytest.raises(ArchitectureError, match="layer 3 is beyond the model: it has layers 0 to 2"):
        locate(config, shapes, layer=3, row=1, col=2)


def test_an_empty_tensor_of_a_trillion_experts_is_not_counted_out():
    config, shapes = stacked("qwen3_moe", (10**12, 16, 0))
    with pytest.raises(ArchitectureError, match="layer 0 is a mixture of experts"):
        list_down_projections(config, shapes)


def test_a_model_without_any_down_projection_is_not_an_empty_list():
    with pytest.raises(ArchitectureError, match="no known down projection in layer 0: model_type not given"):
        list_down_projections({}, {"backbone.layers.0.mixer.out_proj.weight": (16, 32)})

"""Tied tensors that are both stored are edited alike or not at all; transformers is the oracle for which are tied."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
import transformers
from checkpoints import EMBED, HEAD, HIDDEN, down, tensor, write_manifest, write_single
from huggingface_hub.errors import StrictDataclassError

import swsurgery
from swsurgery.checkpoint.tying import TIED_BY_DEFAULT, UNTIED_BY_DEFAULT, is_tied_by_config, list_tied_pairs
from swsurgery.cli import main
from swsurgery.errors import PlanError

ROWS = 40
SAME = tensor("F32", ROWS, HIDDEN)
OTHER = tensor("F32", ROWS, HIDDEN, seed=1)


def write(folder: Path, names: dict[str, tuple], config: dict) -> Path:
    return write_single(folder, {**names, down(0): tensor("F32", HIDDEN, 10)}, {"tie_word_embeddings": None} | config)


def faults(base: Path, *tensors: str, value: float = 0.5) -> list[str]:
    edits = [{"op": "set", "tensor": name, "index": [7, 3], "value": value} for name in tensors]
    manifest = write_manifest(base.parent / "m.json", base, *edits)
    try:
        swsurgery.plan(manifest)
    except PlanError as error:
        return list(error.faults)
    return []


# The tables, against transformers -------------------------------------------------------------------------------------


def default_of(model_type: str) -> bool | None:
    """What transformers takes if config.json does not say; None if the class has no such setting."""
    kind = transformers.CONFIG_MAPPING[model_type]
    stated = getattr(kind, "tie_word_embeddings", None)
    if isinstance(stated, bool) and not kind.sub_configs:
        return stated
    with contextlib.suppress(ValueError, StrictDataclassError):  # a few classes cannot be made without arguments
        return getattr(kind(), "tie_word_embeddings", None)
    return stated


@pytest.mark.filterwarnings("ignore")
def test_every_model_type_of_transformers_has_its_default():
    defaults = {model_type: default_of(model_type) for model_type in transformers.CONFIG_MAPPING}
    assert len(defaults) > 400
    known = {kind: True for kind in TIED_BY_DEFAULT} | {kind: False for kind in UNTIED_BY_DEFAULT}
    assert {kind: (known.get(kind), tied) for kind, tied in defaults.items() if known.get(kind) != tied} == {}
    assert not TIED_BY_DEFAULT & UNTIED_BY_DEFAULT


# Tied tensors of transformers that are no token embedding, or belong to parts that no language model needs.
OTHER_PAIRS = {
    "backbone_model.embed_tokens.embed_audio_tokens.weight",  # csm: audio codes
    "ctc_head.weight",
    "decoder.relative_bias.biases.0.relative_attention_bias.weight",
    "encoder.relative_bias.biases.0.relative_attention_bias.weight",
    "encoder.embed_patches.proj.weight",
    "encoder.language_model.norm.weight",
    "entity_predictions.decoder.weight",
    "lm_head.additional_fc.weight",
    "text_decoder_postnet.lm_head.weight",
    "unembedding_projection.weight",
}


def test_every_tied_head_of_transformers_finds_its_embedding():
    seen, missing = 0, {}
    for file in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        for literal in re.findall(r"_tied_weights_keys = (\{[^}]*\})", file.read_text()):
            for target, source in re.findall(r'"([^"\\]+\.weight)": "([^"\\]+\.weight)\$?"', literal):
                if target in OTHER_PAIRS:
                    continue
                seen += 1
                names = {target, source}
                if not any(set(pair) == names for pair in list_tied_pairs(names)):
                    missing.setdefault((target, source), file.stem)
    assert seen > 300
    assert missing == {}


# Which pairs are refused ----------------------------------------------------------------------------------------------

GEMMA3 = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}
MISTRAL3 = {"model_type": "mistral3", "text_config": {"model_type": "mistral"}}
LLAVA = {"model_type": "llava", "text_config": {"model_type": "llama"}}


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"model_type": "gemma"}, True),
        ({"model_type": "gpt2"}, True),
        ({"model_type": "llama"}, False),
        ({"model_type": "gemma", "tie_word_embeddings": False}, False),
        ({"model_type": "llama", "tie_word_embeddings": True}, True),
        ({"model_type": "lfm2", "tie_embedding": False}, False),
        ({"model_type": "not in transformers"}, None),
        ({"model_type": ["gemma"]}, None),
        ({}, None),
        (GEMMA3, True),
        (LLAVA, False),
        (LLAVA | {"tie_word_embeddings": True}, True),
        (LLAVA | {"text_config": {"model_type": "llama", "tie_word_embeddings": True}}, True),
        (LLAVA | {"text_config": {"model_type": "not in transformers"}}, None),
        ({"model_type": "gemma3", "text_config": {}}, True),
        # transformers 4 reads the text model's section and 5 the outer one: here they disagree
        (MISTRAL3, None),
        (GEMMA3 | {"tie_word_embeddings": False}, None),
        (GEMMA3 | {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, True),
        ({"thinker_config": {"text_config": {"tie_word_embeddings": True}}}, True),
    ],
)
def test_config_json_decides_and_else_the_default_of_the_model_type(config, tied):
    assert is_tied_by_config(config) is tied


@pytest.mark.parametrize("model_type", ["gemma", "gemma2", "gpt2", "bloom", "falcon", "cohere", "opt", "mpt"])
@pytest.mark.parametrize("second", [SAME, OTHER], ids=["alike", "different"])
def test_an_edit_of_one_half_is_refused_if_the_class_ties_by_default(model_type, second, tmp_path):
    base = write(tmp_path / "base", {EMBED: SAME, HEAD: second}, {"model_type": model_type})
    for tensor_, partner in ((HEAD, EMBED), (EMBED, HEAD)):
        assert faults(base, tensor_) == [
            f"{tensor_}[7, 3] is tied to {partner}, which is stored too: loaders keep one of the two "
            "(edit both tensors in the same way)"
        ]
    assert faults(base, HEAD, EMBED) == []


@pytest.mark.parametrize("config", [{"model_type": "not in transformers"}, MISTRAL3], ids=["unknown", "disagreement"])
def test_if_config_json_leaves_it_open_equal_tensors_count_as_tied(config, tmp_path):
    alike = write(tmp_path / "alike", {EMBED: SAME, HEAD: SAME}, config)
    assert faults(alike, HEAD) == [
        f"{HEAD}[7, 3] may be tied to {EMBED}, which is stored with the same values: some loaders keep only one of "
        "the two (edit both tensors in the same way)"
    ]
    assert faults(alike, HEAD, EMBED) == []
    assert faults(write(tmp_path / "apart", {EMBED: SAME, HEAD: OTHER}, config), HEAD) == []
    half = tensor("F16", ROWS, HIDDEN)
    assert faults(write(tmp_path / "half", {EMBED: SAME, HEAD: half}, config), HEAD) == []


def test_equal_tensors_still_count_as_tied_after_an_edit_of_one(tmp_path):
    dtype, shape, data = SAME
    edited = bytes(4) + data[4:]
    base = write(tmp_path / "base", {EMBED: SAME, HEAD: (dtype, shape, edited)}, {"model_type": "unknown"})
    assert "may be tied to" in faults(base, HEAD)[0]


@pytest.mark.parametrize("config", [{"model_type": "llama"}, {"model_type": "gemma", "tie_word_embeddings": False}])
def test_what_config_json_calls_separate_is_edited_alone(config, tmp_path):
    base = write(tmp_path / "base", {EMBED: SAME, HEAD: SAME}, config)
    assert faults(base, HEAD) == faults(base, EMBED) == []


def test_different_shapes_are_not_tied(tmp_path):
    base = write(tmp_path / "base", {EMBED: SAME, HEAD: tensor("F32", ROWS + 1, HIDDEN)}, {"model_type": "gemma"})
    assert faults(base, HEAD) == []


PAIRS = [
    (HEAD, EMBED),
    ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"),
    (HEAD, "model.language_model.embed_tokens.weight"),
    ("thinker.lm_head.weight", "thinker.model.embed_tokens.weight"),
    ("embed_out.weight", "gpt_neox.embed_in.weight"),
    (HEAD, "transformer.wte.weight"),
    (HEAD, "transformer.word_embeddings.weight"),
    (HEAD, "model.decoder.embed_tokens.weight"),
    (HEAD, "backbone.embeddings.weight"),
    (HEAD, "shared.weight"),
    ("output.weight", "tok_embeddings.weight"),
    ("output.weight", "model.tok_embeddings.weight"),
    ("transformer.output_layer.weight", "transformer.embedding.word_embeddings.weight"),
    ("model.transformer.ff_out.weight", "model.transformer.wte.weight"),
    ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    ("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
    ("proj_out.weight", "model.decoder.embed_tokens.weight"),
]


@pytest.mark.parametrize(("head", "embedding"), PAIRS)
def test_the_partner_shares_the_prefix_whatever_is_stored_before_it(head, embedding, tmp_path):
    others = {f"{part}.embed_tokens.weight": OTHER for part in ("audio", "mtp", "model.layers.61", "a.model")}
    others |= {"score.weight": OTHER, "model.layers.61.shared_head.head.weight": OTHER}
    base = write(tmp_path / "base", {**others, embedding: SAME, head: SAME}, {"tie_word_embeddings": True})
    assert f"{head}[7, 3] is tied to {embedding}," in faults(base, head)[0]
    assert f"{embedding}[7, 3] is tied to {head}," in faults(base, embedding)[0]
    for name in others:
        assert faults(base, name) == []
    assert faults(base, head, embedding) == []

    headless = write(tmp_path / "headless", {**others, embedding: SAME}, {"tie_word_embeddings": True})
    assert faults(headless, head)[0].endswith(f"{head} is tied to {embedding} and not stored (edit {embedding})")
    without = write(tmp_path / "without", {**others, head: SAME}, {"tie_word_embeddings": True})
    assert faults(without, embedding)[0].endswith(f"{embedding} is tied to {head} and not stored (edit {head})")


def test_the_copies_of_a_shared_embedding_are_edited_with_it(tmp_path):
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    names = dict.fromkeys(("shared.weight", *copies), SAME)
    base = write(tmp_path / "base", names, {"model_type": "t5", "tie_word_embeddings": False})
    assert [fault.split(" may")[0] for fault in faults(base, "shared.weight")] == ["shared.weight[7, 3]"] * 2
    assert faults(base, *names) == []
    apart = {"shared.weight": SAME, **dict.fromkeys(copies, OTHER)}
    assert faults(write(tmp_path / "apart", apart, {"model_type": "marian"}), "shared.weight") == []
    alone = write(tmp_path / "alone", {"shared.weight": SAME}, {"model_type": "t5", "tie_word_embeddings": False})
    assert "is tied to shared.weight and not stored" in faults(alone, copies[0])[0]


def test_a_head_that_config_json_calls_separate_is_simply_not_there(tmp_path):
    base = write(tmp_path / "base", {EMBED: SAME}, {"model_type": "llama"})
    assert faults(base, HEAD)[0].endswith(f"no such tensor: {HEAD}")


def test_a_misspelt_embedding_is_not_taken_for_a_tied_one(tmp_path):
    names = {"model.language_model.embed_tokens.weight": SAME, HEAD: SAME}
    base = write(tmp_path / "base", names, {"tie_word_embeddings": True})
    assert "no such tensor" in faults(base, EMBED)[0]


# What else relies on tying --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_cannot_hold_an_edit_of_a_tied_head(tied, tmp_path):
    """If only the head is stored, loaders use it as the embedding too, which an adapter of the head does not change."""
    base = write(tmp_path / "base", {HEAD: SAME}, {"model_type": "llama", "tie_word_embeddings": tied})
    edit = {"op": "set", "tensor": HEAD, "index": [7, 3], "value": 0.5}
    manifest = write_manifest(tmp_path / "m.json", base, edit)
    code = main(["export", str(manifest), "--format", "peft", "-o", str(tmp_path / "adapter")])
    assert (code == 2) is tied
    assert (tmp_path / "adapter").exists() is not tied

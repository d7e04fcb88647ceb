"""Why a model cannot be run: the message points to the file or the kind of model that is at fault."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pointers import POINTER
from safetensors.torch import load_file, save_file
from tiny_checkpoint import write_pair

from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.errors import ModelError, Unrunnable
from swsurgery.model.load import get_first_line, load_tokenizer, open_model
from swsurgery.model.refusals import refuse_unrunnable
from swsurgery.scanning.spikes import LayerSpikes


@pytest.fixture
def base(tmp_path) -> Path:
    return write_pair(tmp_path).base


def configure(folder: Path, **more: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | more))


def load_whole(folder: Path) -> None:
    open_model(open_checkpoint(folder), device="cpu", placement="whole")


def refused(call, *arguments) -> str:
    with pytest.raises(ModelError) as caught:
        call(*arguments)
    [line] = caught.value.faults
    return line


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_pointer_of_git_lfs_among_the_small_files(base, name):
    (base / name).write_bytes(POINTER)
    said = f"is a git-lfs pointer, not the file itself: {base / name} (run git lfs pull)"
    assert refused(load_tokenizer, base) == refused(load_whole, base) == said


def test_a_directory_without_a_tokenizer(base):
    for path in base.glob("tokenizer*"):
        path.unlink()
    assert refused(load_tokenizer, base) == f"no tokenizer: {base} (copy the base model's tokenizer.json there)"


@pytest.mark.parametrize(
    "name", ["vocab-src.json", "prophetnet.tokenizer", "dict.txt", "my.spm", "x.tiktoken", "v3.MODEL"]
)
def test_a_vocabulary_of_an_unlisted_name_is_left_to_transformers(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    for other in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json"):
        (tmp_path / other).write_text("{}")
    assert refused(refuse_unrunnable, tmp_path).startswith("no tokenizer: ")
    (tmp_path / name).write_text("{}")
    refuse_unrunnable(tmp_path)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(("said", "hint"), [("bfloat61", "did you mean bfloat16?"), ("??", "such as bfloat16")])
def test_a_dtype_that_is_none_is_the_config_s_fault(base, key, said, hint):
    configure(base, **{"dtype": "float32", key: said})
    expected = f"{key} in config.json is {said!r}, which is not a dtype of torch: {base} ({hint})"
    assert refused(load_tokenizer, base) == refused(load_whole, base) == expected


@pytest.mark.parametrize("said", ["float16", "torch.float16", None])
def test_a_dtype_that_is_one_is_let_through(base, said):
    configure(base, torch_dtype=said)
    load_tokenizer(base)


def test_another_fault_of_the_config_is_not_blamed_on_the_tokenizer(base):
    configure(base, model_type="no-such-type")
    (base / "tokenizer.json").write_text("{")
    line = refused(load_tokenizer, base)
    assert line.startswith("transformers cannot load the model: ") and "repair its config.json" in line


def test_a_tokenizer_that_is_broken_is(base):
    (base / "tokenizer.json").write_text("{")
    line = refused(load_tokenizer, base)
    assert line.startswith("the tokenizer cannot be loaded: ") and line.endswith(f"{base} (repair its tokenizer files)")


def without_head(base: Path, **more: torch.Tensor) -> None:
    tensors = load_file(base / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors | more, base / "model.safetensors", {"format": "pt"})
    configure(base, architectures=["LlamaForSequenceClassification"], tie_word_embeddings=False)


@pytest.mark.parametrize("placement", ["whole", "streamed", "auto"])
def test_a_reward_model_has_no_head(base, placement):
    without_head(base, **{"score.weight": torch.zeros(1, 16)})
    line = refused(lambda: open_model(open_checkpoint(base), device="cpu", placement=placement))
    assert line == (
        f"no language-model head: lm_head.weight is not stored: {base} (a reward or embedding model has none and "
        "predicts no tokens: use the language model it was made from)"
    )


def test_other_weights_that_are_missing_are_no_head(base):
    tensors = load_file(base / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert refused(load_whole, base).startswith("weights that the model needs are missing: model.norm.weight: ")


def test_a_model_type_without_a_language_model(base):
    (base / "config.json").write_text(json.dumps({"model_type": "vit", "hidden_size": 16}))
    line = refused(load_whole, base)
    assert line.startswith("transformers has no language model of model_type vit: ")


def test_several_residual_streams_are_named(base):
    watch = LayerSpikes(open_model(open_checkpoint(base), device="cpu", placement="whole"))
    with pytest.raises(Unrunnable) as caught:
        watch.after(0, [(0, 0)], torch.zeros(1, 3, 4, 16))
    assert str(caught.value.add_remedy("--method weights")) == (
        f"its layers pass several residual streams on, and a scan by activations follows one: {base} (--method weights)"
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a", "a"),
        ("one of:\n(1) this\n(2) that", "one of: (1) this"),
        ("\n\n  b \nc", "b"),
        ("end:", "end"),
        ("", "ValueError"),
    ],
)
def test_a_line_that_ends_in_a_colon_goes_on(text, line):
    assert get_first_line(ValueError(text)) == line

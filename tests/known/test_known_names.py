"""Finding a known model or coordinate by name: case and punctuation do not matter, guessing does not happen."""

import pytest

from swsurgery.errors import LookupFailed
from swsurgery.known import own, shipped
from swsurgery.known.shipped import list_names, lookup_in, normalise


@pytest.mark.parametrize(
    ("name", "hf_id"),
    [
        ("llama-7b", "huggyllama/llama-7b"),
        ("LLaMA 7B", "huggyllama/llama-7b"),
        ("huggyllama/llama-7b", "huggyllama/llama-7b"),
        ("huggyllama/llama-7B", "huggyllama/llama-7b"),
        ("llama_7b", "huggyllama/llama-7b"),
        ("llama7b", "huggyllama/llama-7b"),
        ("meta llama 7b (v1)", "huggyllama/llama-7b"),
        ("Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"),
        ("Llama2 7B", "meta-llama/Llama-2-7b-hf"),
        ("llama3.1-8b", "meta-llama/Llama-3.1-8B"),
        ("Llama 3 1 8B", "meta-llama/Llama-3.1-8B"),
        ("OLMo-1B", "allenai/OLMo-1B-0724-hf"),
        ("olmo7b", "allenai/OLMo-7B-0724-hf"),
        ("LLaVA-V1.5-7B", "liuhaotian/llava-v1.5-7b"),
        ("Mistral-7B-Instruct-v0.1", "mistralai/Mistral-7B-Instruct-v0.1"),
        ("phi3-mini", "microsoft/Phi-3-mini-4k-instruct"),
        ("CohereLabs/aya-expanse-8b", "CohereForAI/aya-expanse-8b"),
        ("GPT2", "openai-community/gpt2"),
    ],
)
def test_names_that_are_found(name, hf_id):
    assert own.find_model(name).hf_id == hf_id


@pytest.mark.parametrize(
    "name",
    [
        "qwen 7b",
        "llama",
        "7b",
        "Qwen2-57B",
        "allenai/OLMo-1B",  # another training run than OLMo-1B-0724
        "Mistral-7B-v0.3",
        "someone/llama-7b-finetuned",
        "llama-7b-q4",
        "",
        "/",
    ],
)
def test_names_that_are_not_guessed(name):
    with pytest.raises(LookupFailed, match="no such known model"):
        own.find_model(name)


def test_an_unknown_name_gets_the_nearest_ones():
    with pytest.raises(LookupFailed) as caught:
        own.find_model("qwen 7b")
    assert "did you mean" in str(caught.value) and "qwen2.5-7b" in str(caught.value)
    assert caught.value.exit_code == 2
    with pytest.raises(LookupFailed, match="no known name is similar"):
        own.find_model("zzz")


def test_a_model_that_was_searched_in_vain_is_told_apart_from_an_unknown_one():
    with pytest.raises(LookupFailed, match="no super weight is known: pythia-1b .published result: channels 371"):
        own.find_model("pythia-1b")


def test_every_name_finds_its_own_model_and_none_is_ambiguous():
    owners = {}
    for model in own.list_all_models():
        for name in list_names(model):
            assert own.find_model(name) is model
            assert own.find_model(name.upper().replace("-", "_")) is model
            owners.setdefault(normalise(name), set()).add(model.hf_id)
    assert {name: ids for name, ids in owners.items() if len(ids) > 1} == {}
    assert len(owners) > len(own.list_all_models())


def test_an_ambiguous_name_is_refused_with_all_its_models():
    llama, mistral = own.find_model("llama-7b"), own.find_model("mistral-7b")
    twin = mistral.model_copy(update={"aliases": ("mistral-7b", "LLaMA_7B")})
    with pytest.raises(LookupFailed, match="several known models") as caught:
        lookup_in([llama, twin], "llama 7b")
    assert "huggyllama/llama-7b" in str(caught.value) and "mistralai/Mistral-7B-v0.1" in str(caught.value)
    assert lookup_in([llama, twin], "mistral-7b") is twin
    assert lookup_in([llama, mistral], "llama 7b") is llama


def test_slugs_are_unique_lower_case_and_first():
    slugs = [m.slug for m in own.list_all_models()]
    assert len(set(slugs)) == 76
    assert all(slug == slug.lower() == m.aliases[0] for slug, m in zip(slugs, own.list_all_models(), strict=True))
    assert {"llama-7b", "llama-2-7b", "llama-3.1-8b-instruct", "smollm2-135m", "olmo-1b"} <= set(slugs)


def test_coordinates_are_found_by_id():
    llama = own.find_model("llama-7b")
    assert shipped.find(llama, "L2.3968.7003").col == 7003
    assert shipped.find(llama, "llama-7b:L2.3968.7003") is shipped.find(llama, "huggyllama/llama-7b:L2.3968.7003")
    moe = shipped.find(own.find_model("qwen3-30b-a3b"), "L1.E68.940.711")
    assert (moe.expert, moe.tensor) == (68, "model.layers.1.mlp.experts.68.down_proj.weight")
    assert shipped.find(own.find_model("smollm2-135m"), "L11.507.*").col is None


def test_unknown_coordinates_are_not_guessed():
    llama = own.find_model("llama-7b")
    with pytest.raises(LookupFailed, match=r"no such known coordinate of llama-7b.*did you mean L2.3968.7003"):
        shipped.find(llama, "L2.3968.7004")
    with pytest.raises(LookupFailed, match="swsurgery lookup llama-7b lists them"):
        shipped.find(llama, "xyz")
    with pytest.raises(LookupFailed, match="a coordinate of another model"):
        shipped.find(llama, "mistral-7b:L1.2070.7310")

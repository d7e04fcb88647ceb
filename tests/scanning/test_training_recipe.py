"""benchmarks/train.py: each family of the recipe is trained for a few steps, saved, loaded, measured and scanned."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

from swsurgery.model import tokens

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
import train_corpus  # noqa: E402
import train_models  # noqa: E402
import train_one  # noqa: E402

VOCABULARY, CONTEXT = 300, 32


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    sources = [ROOT / "swsurgery" / "storage", ROOT / "swsurgery" / "manifest"]
    return folder, train_corpus.make_corpus(folder, sources, vocabulary=VOCABULARY, limit=100_000)


def make_settings(folder, output, **options):
    values = {"deadline": time.time() + 60, "steps": 6, "context": CONTEXT, "windows": 2, "vocabulary": VOCABULARY}
    return train_one.Settings(corpus=folder, output=output, tiny=True, plain=False, **(values | options))


@pytest.mark.parametrize("name", ["llama-3-no-bos", "mixtral-1", "gpt-neox-1", "lfm2-1"])
@pytest.mark.filterwarnings("default")
def test_a_model_is_trained_saved_and_measured(corpus, tmp_path, name):
    folder, facts = corpus
    train_one.train_model(name, make_settings(folder, tmp_path))
    report = json.loads((tmp_path / name / "train.json").read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
    assert model.dtype == torch.bfloat16 and report["corpus"]["sha256"] == facts.sha256
    assert report["steps"] == 6 and report["tokens"] == 6 * 2 * CONTEXT
    assert tokens.get_bos_prefix(tokenizer) == ([train_models.BOS] if report["bos"] else [])
    assert tokenizer.decode(tokenizer("def f():\n    return 1")["input_ids"], skip_special_tokens=True).startswith(
        "def f"
    )
    for case in ("with_bos", "without_bos"):
        assert 1 < report[case]["perplexity"] < 2 * VOCABULARY
        assert [layer["layer"] for layer in report[case]["layers"]] == [0, 1, 2, 3]
        assert all(layer["ratio"] >= layer["smallest_ratio"] > 1 for layer in report[case]["layers"])


@pytest.mark.parametrize("name", list(train_models.RECIPES))
@pytest.mark.filterwarnings("default")
def test_a_saved_model_computes_what_the_trained_one_did(corpus, tmp_path, name):
    recipe = train_models.RECIPES[name]
    config = train_models.make_config(recipe, vocabulary=VOCABULARY, context=CONTEXT, tiny=True)
    model = train_models.build_model(recipe, config, "cpu", grouped=True)
    train_models.cast_parameters(model, torch.bfloat16)
    train_one.save_model(model, tmp_path / name, make_settings(corpus[0], tmp_path), recipe)
    options = {"experts_implementation": "grouped_mm"} if train_models.has_experts(config) else {}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, **options)
    ids = torch.arange(2, 2 + CONTEXT)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, loaded.eval()(ids).logits)


def test_the_loss_falls(corpus, tmp_path):
    train_one.train_model("llama-1", make_settings(corpus[0], tmp_path, steps=80))
    losses = [loss for _, loss in json.loads((tmp_path / "llama-1" / "train.json").read_text())["loss"]]
    assert sum(losses[-5:]) < sum(losses[:5]) - 2.5


def test_the_schedule_ends_with_the_time(corpus, tmp_path):
    began = time.time()
    settings = make_settings(corpus[0], tmp_path, steps=None, deadline=began + 2)
    batches = train_one.Batches(torch.randint(2, VOCABULARY, (1000,)), settings, train_models.RECIPES["llama-1"])
    weight = torch.nn.Parameter(torch.ones(VOCABULARY))

    def compute_loss(ids, targets):
        time.sleep(0.01)
        loss = (weight[ids] ** 2).mean()
        return loss, loss

    history = train_one.run_schedule(
        compute_loss, torch.nn.ParameterList([weight]), batches, settings, train_models.RECIPES["llama-1"]
    )
    assert 1 < history["seconds"] < 10 and history["steps"] > 10
    assert history["loss"][-1][0] == history["steps"]


def test_the_rate_rises_and_then_falls():
    rates = [train_one.scale_rate(at / 1000) for at in range(1001)]
    assert 0 < rates[0] < 0.05 and max(rates) == pytest.approx(1, abs=0.01)
    assert rates.index(max(rates)) == pytest.approx(1000 * train_one.WARM_UP, abs=2)
    assert rates[-1] == pytest.approx(train_one.LAST_RATE)


@pytest.mark.parametrize("bos", [True, False])
def test_windows_begin_with_bos_and_targets_follow(bos, tmp_path):
    recipe = train_models.RECIPES["llama-1" if bos else "llama-3-no-bos"]
    ids, targets = train_one.Batches(torch.arange(2, 1000), make_settings(tmp_path, tmp_path), recipe).draw()
    assert ids.shape == targets.shape == (2, CONTEXT)
    assert torch.equal(ids[:, 1:], targets[:, :-1])
    assert (ids[:, 0] == train_models.BOS).all() == bos


def test_documents_are_distinct_and_usable(tmp_path):
    for name, text in {
        "a": "x = 1\n" * 50,
        "b": "x = 1\n" * 50,
        "c": "x",
        "d": "y" * 5000,
        "e": "z = 2\n" * 50,
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    texts = [text for _, text in train_corpus.read_documents([tmp_path])]
    assert texts == ["x = 1\n" * 50, "z = 2\n" * 50]

"""lookup without a model: every known model, with the numbers and statuses of its super weights."""

import json

import pytest

import swsurgery
from swsurgery.cli import main
from swsurgery.errors import LookupFailed
from swsurgery.known import own
from swsurgery.known.listing import count_statuses, list_models


@pytest.fixture(autouse=True)
def no_own_entries(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))


def printed(capsys, *words: str) -> str:
    assert main(["lookup", *words]) == 0
    return capsys.readouterr().out


def test_all_models_are_listed_with_their_statuses(capsys):
    header, *lines = printed(capsys).splitlines()
    assert header.split() == ["name", "coordinates", "status", "maximum", "activation"]
    assert [line.split()[0] for line in lines] == [m.slug for m in own.list_all_models()]
    shown = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
    assert shown["olmo-1b"] == "8 paper 1, disputed 1, refuted 4, insufficient 2 -"
    assert shown["llama-7b"] == "1 paper 1; columns: paper 1 -"
    assert shown["qwen2.5-7b"] == "1 insufficient 1 -13,248 in layer 13 (hidden state)"
    assert shown["gemma-3-27b-it"] == "0 - 696,320 in layer 46 (hidden state) > float16"
    assert shown["qwen3.5-0.8b"] == "0 - -122 (final norm)"


def test_the_document_has_a_row_for_each_model(capsys):
    rows = json.loads(printed(capsys, "--json"))["models"]
    assert len(rows) == len(own.list_all_models())
    [row] = [row for row in rows if row["name"] == "gemma-2-27b"]
    assert row == {
        "name": "gemma-2-27b", "model": "google/gemma-2-27b", "own": False,
        "coordinates": 0, "experts": 0, "columns": 0, "status": None,
        "statuses": {"coordinates": {}, "experts": {}, "columns": {}},
        "max_activation": 157696.0, "fits_float16": False,
    }  # fmt: skip
    [row] = [row for row in rows if row["name"] == "llama-7b"]
    assert (row["status"], row["coordinates"], row["columns"], row["max_activation"]) == ("paper", 1, 1, None)
    assert row["statuses"] == {"coordinates": {"paper": 1}, "experts": {}, "columns": {"paper": 1}}


def test_one_status_lists_the_models_that_have_it(capsys):
    lines = printed(capsys, "--status", "measured").splitlines()[1:]
    assert [" ".join(line.split()) for line in lines] == ["smollm2-135m-instruct 6 measured 6 -"]
    both = list_models(["measured", "disputed"])
    assert [row["name"] for row in both.to_rows()] == ["olmo-1b", "smollm2-135m-instruct"]
    with pytest.raises(LookupFailed, match="no such status: rumour"):
        swsurgery.lookup(status="rumour")
    assert main(["lookup", "--status", "rumour"]) == 2


def test_experts_and_columns_are_counted_in_the_statuses():
    for model in own.list_all_models():
        counts = count_statuses(model)
        assert sum(sum(each.values()) for each in counts.values()) == len(model.entries)
        assert sum(counts["experts"].values()) == len(model.experts)


def test_an_own_entry_is_listed_too(capsys):
    mine = own.find_model("llama-7b").model_copy(update={"hf_id": "org/mine", "aliases": ("mine",)})
    own.save(mine)
    assert "mine " in printed(capsys).splitlines()[-1]
    assert own.forget("mine")


@pytest.mark.parametrize(
    "option", [("--manifest", "zero"), ("--factor", "2"), ("--as", "modules"), ("--forget",)], ids=lambda o: o[0]
)
def test_options_that_need_a_model_are_refused_without_one(capsys, option):
    assert main(["lookup", *option]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == "swsurgery: --manifest, --factor, --as and --forget need the name of a model\n"


def test_modules_are_printed_one_per_line(capsys):
    assert printed(capsys, "llama-7b", "--as", "modules") == "model.layers.2.mlp.down_proj\n"
    lines = printed(capsys, "phi-3-mini", "--as", "modules").splitlines()
    assert lines[:2] == ["model.layers.2.mlp.down_proj", "model.layers.4.mlp.down_proj"]
    assert printed(capsys, "gemma-2-27b", "--as", "modules") == ""

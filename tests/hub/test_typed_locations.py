"""ORG/NAME and a URL are repositories of the Hub, unless something on this machine is meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import write_llama
from hub import fixture
from publishing import BASE, EDIT, write_base

import swsurgery
from swsurgery.cli import main
from swsurgery.errors import HubError
from swsurgery.hub import Uri, parse_directory, parse_field, parse_location

any_hub, hub = fixture.any_hub, fixture.hub
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def base(hub, tmp_path, monkeypatch) -> str:
    """Publish a base and return its commit. The current folder contains nothing that is called like its owner."""
    commit = hub.add_repo(BASE, write_base(tmp_path / "base"))
    monkeypatch.chdir(tmp_path)
    return commit


def spoken(commit: str) -> list[tuple[str, str]]:
    """Return ways to type the base, each with the location that it means."""
    url = f"https://huggingface.co/{BASE}"
    return [
        (BASE, f"hf://{BASE}"),
        (f"{BASE}@{commit}", f"hf://{BASE}@{commit}"),
        (url, f"hf://{BASE}"),
        (f"{url}/tree/{commit}", f"hf://{BASE}@{commit}"),
        (f"{url}/blob/main/config.json", f"hf://{BASE}"),
    ]


def test_a_repository_is_read_as_if_it_were_written_with_hf(base, capsys):
    for typed, meant in spoken(base):
        documents = []
        for words in (["inspect", typed], ["inspect", meant]):
            assert main([*words, "--json"]) == 0
            documents.append(capsys.readouterr())
        assert documents[0].out == documents[1].out
        assert documents[0].err == f"swsurgery: checkpoint: {meant}\n{documents[1].err}"


def test_a_base_is_one_too(base, tmp_path, capsys):
    (tmp_path / "edit.yaml").write_text(f"version: 1\nbase: {{path: gone}}\nedits: [{EDIT}]\n")
    assert main(["apply", "edit.yaml", "--base", BASE, "--dry-run"]) == 0
    assert f"swsurgery: base: hf://{BASE}\n" in capsys.readouterr().err
    assert main(["diff", BASE, f"https://huggingface.co/{BASE}", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert json.dumps(swsurgery.inspect(BASE).to_json()) == json.dumps(swsurgery.inspect(f"hf://{BASE}").to_json())


def test_a_local_path_takes_precedence(base, tmp_path, capsys):
    organisation, name = BASE.split("/")
    write_llama(tmp_path / organisation / name)
    assert main(["inspect", BASE]) == 0
    assert capsys.readouterr().err == ""
    assert parse_location(BASE) == Path(BASE)
    assert main(["inspect", f"{organisation}/{name}s"]) == 2
    assert capsys.readouterr().err.endswith(f"(did you mean {BASE}?)\n")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("org/name", Uri("org/name", None, "")),
        ("org/name@v1.0", Uri("org/name", "v1.0", "")),
        ("hf:org/name", Uri("org/name", None, "")),
        ("https://hf.co/org/name?x=1", Uri("org/name", None, "")),
        (f"huggingface.co/org/name/tree/{COMMIT}/sub", Uri("org/name", COMMIT, "sub")),
        ("https://huggingface.co/org/name/blob/main/sub/a.safetensors", Uri("org/name", None, "sub")),
        ("https://huggingface.co/org/name/blob/main/a.gguf", Uri("org/name", None, "a.gguf")),
        *[(path, Path(path)) for path in ("name", "./org/name", "/org/name", "a/b/c", "a/.b", "org/model.gguf",
                                          "edits/zero.yaml", "org/name@a/b")],
    ],
)  # fmt: skip
def test_what_a_text_means(given, meant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_location(given) == meant
    assert parse_location(Path(given)) == Path(given), "a Path is on this machine"


@pytest.mark.parametrize(
    "url",
    ["https://example.org/a/b", "https://huggingface.co/datasets/a", "https://huggingface.co/spaces/a/b",
     "https://huggingface.co", "https://huggingface.co/org/name/tree/a%20..b", "http://huggingface.co/org/name/tree/.."],
)  # fmt: skip
def test_another_url_is_refused(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HubError) as caught:
        parse_location(url)
    assert len(caught.value.faults) == 1


def test_a_manifest_has_paths_and_locations_with_hf_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_field("org/name") == Path("org/name")
    assert parse_field("hf://org/name") == Uri("org/name", None, "")
    with pytest.raises(HubError, match="a repository of the Hub is written hf://org/name"):
        parse_field("https://huggingface.co/org/name")


def test_a_directory_must_be_local(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_directory("org/name") == Path("org/name")
    with pytest.raises(HubError, match="a local copy is needed"):
        parse_directory("https://huggingface.co/org/name")


def test_the_name_of_a_known_model_stays_a_name(capsys):
    assert main(["recipe", "huggyllama/llama-7b", "--for", "torchao"]) == 0
    assert "hf://" not in capsys.readouterr().err
    assert main(["lookup", "https://huggingface.co/huggyllama/llama-7b/tree/main"]) == 0
    assert capsys.readouterr().out.startswith("huggyllama/llama-7b ")

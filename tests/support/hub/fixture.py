"""The fixtures `hub`, a server of the test's own, and `any_hub`, that or the endpoint that the environment names.

Everything reaches it with no more ado: the environment is set, for child processes, and huggingface_hub's constants,
which it read when it was imported, for calls in this process. Waits between retries are noted, not waited for, in
this process; a child waits.

With SWSURGERY_TEST_HUB (an endpoint) and HF_TOKEN set, tests with `any_hub` run there, in repositories with throw-away
names that are deleted afterwards, and over Xet unless HF_HUB_DISABLE_XET is set; those with `hub`, which script faults,
count traffic or look inside, are skipped.
"""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from hub.server import Hub, environment_of

if TYPE_CHECKING:
    from huggingface_hub import HfApi

OUTSIDE = "SWSURGERY_TEST_HUB"


class OutsideHub:
    """Another endpoint, with the part of `Hub` that a client can bring about."""

    def __init__(self, endpoint: str, token: str) -> None:
        self.endpoint, self.token = endpoint.rstrip("/"), token
        self.home = Path()
        self.waits: list[float] = []
        self._names: dict[str, str] = {}

    def add_repo(
        self, repo_id: str, folder: Path | None = None, *, private: bool = False, message: str = "Upload model"
    ) -> str:
        """A repository with a throw-away name, which `name` tells; returns its head."""
        api, name = self.api(), self.name(repo_id)
        api.create_repo(name, private=private)
        if folder is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what the endpoint thinks of the card of a base is not under test
                api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
        return api.repo_info(name).sha

    def name(self, repo_id: str) -> str:
        """The name at this endpoint of what a test calls `repo_id`."""
        if repo_id not in self._names:
            owner = self.api().whoami()["name"]
            self._names[repo_id] = f"{owner}/swsurgery-{secrets.token_hex(6)}-{repo_id.split('/')[1]}"
        return self._names[repo_id]

    def read(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        """A file's content."""
        got = self.api().hf_hub_download(self.name(repo_id), path, revision=revision, force_download=True)
        return Path(got).read_bytes()

    def environment(self, home: Path) -> dict[str, str]:
        """What a process needs to talk to it, its cache below `home`."""
        return environment_of(self.endpoint, self.token, home)

    def api(self) -> HfApi:
        """The real client, with the token of the environment."""
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint, token=self.token)

    def stop(self) -> None:
        """Delete what was made."""
        for name in self._names.values():
            self.api().delete_repo(name, missing_ok=True)


def point_client_at(hub: Hub | OutsideHub, home: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let child processes and huggingface_hub in this process talk to `hub`; returns the waits that were skipped."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    environment = hub.environment(home)
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_TOKEN_PATH"):
        monkeypatch.setattr(constants, name, environment[name])
    monkeypatch.setattr(constants, "HF_XET_CACHE", str(home / "xet"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(_http, "_HUB_ORIGINS", frozenset({_http._url_origin(hub.endpoint)}))
    waits: list[float] = []
    if isinstance(hub, Hub):
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        clock = SimpleNamespace(sleep=waits.append)
        for module in (_http, file_download):
            monkeypatch.setattr(module, "time", clock)
    return waits


@pytest.fixture
def any_hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub | OutsideHub]:
    """A Hub that this process and its children talk to; afterwards no token reached its store and it broke nowhere."""
    warnings.filterwarnings("ignore", "Use 'content=<...>' to upload", DeprecationWarning)  # the client's own uploads
    if endpoint := os.environ.get(OUTSIDE):
        served: Hub | OutsideHub = OutsideHub(endpoint, os.environ["HF_TOKEN"])
    else:
        served = Hub(tmp_path_factory.mktemp("hub"))
    served.home = tmp_path_factory.mktemp("hf-home")
    try:
        served.waits = point_client_at(served, served.home, monkeypatch)
        yield served
    finally:
        served.stop()
    if isinstance(served, Hub):
        assert served.errors == []
        assert served.leaks == []


@pytest.fixture
def hub(any_hub: Hub | OutsideHub) -> Hub:
    """The tests' own server, with all that `Hub` has."""
    if isinstance(any_hub, OutsideHub):
        pytest.skip(f"needs the tests' own server: {OUTSIDE} is set")
    return any_hub

"""The private names of huggingface_hub that the product uses: one module uses them, and each of them still exists.

A test that fails here after an upgrade of the library names what to replace in `swsurgery/hub/guard.py`.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import logging
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils import _http

import swsurgery
from swsurgery.hub import guard

PACKAGE = Path(swsurgery.__file__).parent

USED = {
    "_DEFAULT_RETRY_ON_EXCEPTIONS",
    "_DEFAULT_RETRY_ON_STATUS_CODES",
    "_GLOBAL_CLIENT_FACTORY",
    "_HUB_ORIGINS",
    "_url_origin",
    "http_stream_backoff",
    "parse_ratelimit_headers",
    "set_client_factory",
}
"""Names of the private module huggingface_hub.utils._http; each has a test below."""

WITHOUT_LOGGER = {"huggingface_hub.utils._xet"}
"""Modules that log nothing in version 2.4 of the library and are muted in case they do."""


def test_the_errors_of_a_broken_connection_are_exceptions():
    assert all(issubclass(each, Exception) for each in _http._DEFAULT_RETRY_ON_EXCEPTIONS)
    assert issubclass(httpx2.RemoteProtocolError, _http._DEFAULT_RETRY_ON_EXCEPTIONS)


def test_the_statuses_that_are_retried_are_numbers():
    assert {429, 503} <= set(_http._DEFAULT_RETRY_ON_STATUS_CODES)


def test_the_client_factory_can_be_read_and_replaced():
    before = _http._GLOBAL_CLIENT_FACTORY
    assert callable(before)

    def factory() -> httpx2.Client:
        return before()

    try:
        _http.set_client_factory(factory)
        assert _http._GLOBAL_CLIENT_FACTORY is factory
    finally:
        _http.set_client_factory(before)


def test_an_origin_is_one_of_the_hubs():
    assert _http._url_origin("https://huggingface.co/api/models") in _http._HUB_ORIGINS
    assert _http._url_origin("https://example.org/api/models") not in _http._HUB_ORIGINS


def test_a_stream_takes_a_method_an_address_and_headers():
    inspect.signature(_http.http_stream_backoff).bind("GET", "https://huggingface.co/x", headers={})


def test_the_wait_of_a_rate_limit_is_read_from_the_headers():
    limit = _http.parse_ratelimit_headers({"ratelimit": '"api";r=0;t=55'})
    assert limit is not None and limit.reset_in_seconds == 55


def test_the_headers_of_a_request_carry_the_token():
    assert HfApi(token="hf_secret")._build_hf_headers()["authorization"] == "Bearer hf_secret"


@pytest.mark.parametrize("name", guard.LOGGERS)
def test_a_muted_logger_belongs_to_a_module(name):
    values = vars(importlib.import_module(name)).values()
    found = [each.name for each in values if isinstance(each, logging.Logger)]
    assert found == ([] if name in WITHOUT_LOGGER else [name])


def private_names(file: Path) -> Iterator[str]:
    """Yield private modules that `file` imports of huggingface_hub, and private attributes of other objects."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("huggingface_hub"):
            yield from (name for name in (*node.module.split("."), *(a.name for a in node.names)) if name[0] == "_")
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("huggingface_hub") and "._" in a.name)
        if isinstance(node, ast.Attribute) and node.attr[0] == "_" and node.attr[:2] != "__":
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            yield from () if own else (node.attr,)


def test_only_the_guard_uses_private_names():
    others = {file.name: set(private_names(file)) for file in (PACKAGE / "hub").glob("*.py")}
    used = others.pop("guard.py")
    assert {name: found for name, found in others.items() if found} == {}
    assert used == {"_http", "_build_hf_headers", "_Decompress"} | {name for name in USED if name[0] == "_"}


def test_every_name_of_the_private_module_is_listed():
    tree = ast.parse((PACKAGE / "hub" / "guard.py").read_text())
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name))
    assert {node.attr for node in found if node.value.id == "_http"} == USED

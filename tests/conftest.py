"""What holds for every test: nothing is remembered outside the test, and nothing uses more than one thread."""

from __future__ import annotations

import os

import pytest
import quick
from hub.fixture import any_hub, hub  # noqa: F401 - fixtures
from json_documents import examined_output, valid_documents  # noqa: F401 - fixtures

from swsurgery.cli import progress_bar
from swsurgery.cli.environment import PERMITTED

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")  # read once, when numpy or torch is loaded
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # tests that speak to a Hub start their own, and say so
for variable in PERMITTED.values():
    os.environ.pop(variable, None)  # the developer's own defaults of options
os.environ["XDG_DATA_HOME"] = os.devnull  # while tests are collected too, the developer's own entries are not there


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="leave out what needs torch or the model, or takes long")


def pytest_ignore_collect(collection_path, config):
    left_out = (
        config.getoption("--quick") and collection_path.suffix == ".py" and quick.leaves_out_file(collection_path)
    )
    return True if left_out else None


def pytest_collection_modifyitems(config, items):
    if config.getoption("--quick"):
        left_out = [i for i in items if quick.leaves_out_test(i.path, i.originalname) or i.get_closest_marker("model")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """The digest cache lies in a folder of the test's own, for child processes too; returns that folder."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    return folder


@pytest.fixture(autouse=True)
def silent_progress(monkeypatch):
    """No first line of progress appears among the messages that tests compare, however slow the machine is."""
    monkeypatch.setattr(progress_bar, "FIRST_LINE", 3600)


@pytest.fixture(autouse=True)
def own_data(tmp_path_factory, monkeypatch):
    """So do the entries that scans make; returns the folder of the platform's data, where nothing lies yet."""
    folder = tmp_path_factory.mktemp("data")
    monkeypatch.setenv("XDG_DATA_HOME", str(folder))
    return folder

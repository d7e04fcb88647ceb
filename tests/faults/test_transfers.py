"""Where the kernel moves less than it was asked to, the bytes are the same."""

from __future__ import annotations

import shutil

import pytest

from faults import transfers
from faults.cases import PACKAGE, case, prepare

pytestmark = pytest.mark.skipif(bool(transfers.missing()), reason=transfers.missing())


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("copy", {"write", "preadv"}),
        ("copy of a base hashed before", {"write", "preadv"}),
        ("edit in place", {"write", "pwrite", "preadv"}),
    ],
)
def test_halved_transfers_give_the_same_bytes(name, calls, tmp_path):
    package = tmp_path / "package"
    shutil.copytree(PACKAGE / "swsurgery", package / "swsurgery", ignore=shutil.ignore_patterns("__pycache__"))
    prepared = prepare(case(name), tmp_path / "prepare", package)
    result, counts = transfers.short(prepared, tmp_path / "short", transfers.build_shim(tmp_path), "")
    assert result.violations == []
    assert not list(package.rglob("*.pyc")), "a shortened write would leave truncated ones for later runs"
    assert {call for call in calls if counts[call]} == calls, counts

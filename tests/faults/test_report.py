"""docs/reliability.md says what the measured files say."""

from __future__ import annotations

from pathlib import Path

from faults import report


def test_the_page_is_what_the_figures_give():
    assert report.PAGE.read_text() == report.render(report.load())


def test_figures_are_added_up_and_violations_shown():
    row = {"technique": "SIGKILL", "subject": "copy", "place": "", "violations": [], "excused": {"because": 2}}
    document = {"commit": "abc", "kernel": "6", "python": "3", "rows": [{**row, "cases": 1200}, {**row, "cases": 34}]}
    document["rows"][1]["violations"] = ["mkdir #1: broke"]
    page = report.render({"kill": document})
    assert "1 violations in 1,234 cases." in page
    assert "| copy | memory | 34 | 1 | 2 |" in page
    assert "1 of 1,234 broke it" in page
    assert page.count("not measured") == len(report.PROMISES) - sum("kill" in p.sweeps for p in report.PROMISES)


def test_every_promise_has_a_measure_and_every_file_is_there():
    tests = Path(__file__).parents[1]
    assert len(report.PROMISES) == 16
    for promise in report.PROMISES:
        assert promise.sweeps or promise.tests or promise.fuzz, promise.words
        assert [name for name in promise.tests if not (tests / name).exists()] == []

"""docs/reliability.md says what the measured files say."""

from __future__ import annotations

from pathlib import Path

from faults import report

ROW = {"technique": "SIGKILL", "subject": "copy", "place": "", "extent": "every call", "violations": [], "excused": {}}
CIRCUMSTANCES = {"commit": "abc", "kernel": "6", "python": "3"}


def test_the_page_is_what_the_figures_give():
    assert report.PAGE.read_text() == report.render(report.load())


def test_figures_are_added_up_and_violations_shown():
    rows = [
        {**ROW, "cases": 1200, "excused": {"because": 2}},
        {**ROW, "cases": 34, "subject": "edit in place", "violations": ["mkdir #1: broke"], "excused": {"because": 1}},
    ]
    page = report.render({"kill": {**CIRCUMSTANCES, "rows": rows}})
    assert "| copy | 0 of 1,200 |\n| edit in place | 1 of 34 |" in page
    assert "- excused in 3 runs: because\n- **broken** (edit in place, SIGKILL): mkdir #1: broke" in page
    assert page.count("| SIGKILL | 1 of 1,234 |") == sum(p.sweeps.get("kill") == "" for p in report.PROMISES)
    assert f"| 7 | {report.PROMISES[6].words} | SIGKILL | 1 of 34 |" in page


def test_an_error_told_badly_breaks_the_promise_about_errors_alone():
    said = ["read #1: exit 3", "read #1: a traceback: here", "read #2: exit 0, and the target is not whole"]
    row = {**ROW, "technique": "error code", "cases": 9, "violations": said}
    page = report.render({"errors": {**CIRCUMSTANCES, "rows": [row]}})
    assert f"| 5 | {report.PROMISES[4].words} | error codes | 1 of 9 |" in page
    assert f"| 4 | {report.PROMISES[3].words} | error codes | 1 of 9 |" in page
    assert "| copy | 2 of 9 |" in page


def test_tests_are_counted_for_the_promise_that_they_hold():
    counted = [{"file": "storage/test_dtypes.py", "passed": 40, "failed": 0, "skipped": 1}]
    page = report.render({"tests": {**CIRCUMSTANCES, "rows": counted}})
    assert page.count("| `test_dtypes.py` | 40 passed |") == 1
    assert page.count("not counted") == len(report.PROMISES) - 1


def test_a_figure_does_not_depend_on_what_else_was_measured():
    document = {**CIRCUMSTANCES, "rows": [{**ROW, "cases": 5}]}
    alone = report.render({"kill": document}).splitlines()
    beside = report.render({"kill": document, "races": {**CIRCUMSTANCES, "rows": [{**ROW, "cases": 7}]}}).splitlines()
    assert "| copy | 0 of 5 |" in alone and "| copy | 0 of 5 |" in beside


def test_every_promise_has_a_measure_and_every_file_is_there():
    tests = Path(__file__).parents[1]
    assert len(report.PROMISES) == 16
    for promise in report.PROMISES:
        assert promise.tests, promise.words
        assert [name for name in promise.tests if not (tests / name).exists()] == []

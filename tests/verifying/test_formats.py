"""formats: each format by a reader of its own, and no name from a file that could forge what a reader acts on."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlparse
from xml.etree import ElementTree

import pytest
from checkpoints import FIRST, HEAD, tree, write_llama, write_manifest
from hypothesis import given, settings
from hypothesis import strategies as st

from swsurgery import __version__
from swsurgery.cli import main
from swsurgery.storage import filesystem
from swsurgery.verifying import formats
from swsurgery.verifying.findings import RULES, Finding
from swsurgery.verifying.formats import REPORT_FORMATS, FindingReport, render
from swsurgery.verifying.rule_help import HELP

LOST = Finding("known-lost", "it is gone", "model.safetensors", "a.weight", (1, 2))
ASKED = Finding("edit-changed", "it holds 0x0000", "a b.safetensors", "w", (0,), "ci/edits.yaml", 7, 5)
COPY = Finding("duplicate-weights", "the weights once more", "model.gguf")
CLEAN = FindingReport("out/model", "verify", (), "verified  5 files\nproved    2 scalars", {"files": 5}, ("digest",))
BROKEN = FindingReport("out/model", "verify", (LOST, ASKED, COPY), rules=("digest", "known-lost"))
EVIL = "x\n::error::forged\r\n]]><failure/>&\x00\x1b[2J\u202e\udc80 100%, a: {0} [b](http://c) ##[error]y"
HOSTILE = FindingReport(
    EVIL, "verify", (Finding("digest", EVIL, EVIL, EVIL, (1,), EVIL, 1, 1),), EVIL, {"detail": EVIL}
)  # fmt: skip


def sarif(report: FindingReport) -> dict:
    return json.loads(render(report, "sarif"))["runs"][0]


def junit(report: FindingReport) -> ElementTree.Element:
    return ElementTree.fromstring(render(report, "junit").encode())


def commands(report: FindingReport) -> list[tuple[str, dict[str, str], str]]:
    """(command, properties, message) as GitHub's runner reads them, with its unescaping."""
    found = []
    for line in render(report, "github").splitlines():
        head, message = re.fullmatch(r"::(.*?)::(.*)", line).groups()
        command, _, rest = head.partition(" ")
        pairs = (pair.split("=", 1) for pair in rest.split(","))
        properties = {
            k: v.replace("%2C", ",").replace("%3A", ":").replace("%0A", "\n").replace("%25", "%") for k, v in pairs
        }
        found.append((command, properties, message.replace("%0D", "\r").replace("%0A", "\n").replace("%25", "%")))
    return found


@pytest.mark.parametrize(
    ("findings", "decided", "ok", "code"),
    [
        ((), True, True, 0),
        ((COPY,), True, True, 0),
        ((LOST,), True, False, 1),
        ((LOST, COPY), False, False, 1),
        ((), False, False, 2),
        ((COPY,), False, False, 2),
    ],
)
def test_errors_say_no_and_warnings_do_not(findings, decided, ok, code):
    report = FindingReport("m", "verify", findings, decided=decided)
    assert (report.ok, report.exit_code) == (ok, code)


def test_a_finding_has_a_rule_of_the_table():
    with pytest.raises(ValueError, match="no such rule: invented"):
        Finding("invented", "x")


def test_text_has_one_line_for_each_finding():
    assert render(BROKEN, "text").splitlines() == [
        "FINDING   known-lost: model.safetensors a.weight[1, 2]: it is gone",
        "FINDING   edit-changed: a b.safetensors w[0]: it holds 0x0000 (ci/edits.yaml:7:5)",
        "warning   duplicate-weights: model.gguf: the weights once more",
        "2 findings in out/model",
    ]


def test_text_of_a_clean_report_is_what_was_proved():
    assert render(CLEAN, "text") == CLEAN.checked + "\n"
    assert render(FindingReport("m", "verify", ()), "text") == "m: nothing was found\n"


def test_json_has_the_contracts_fields_and_the_details():
    document = json.loads(render(BROKEN, "json"))
    assert document["ok"] is False
    assert document["findings"][0] == {
        "rule": "known-lost", "level": "error", "file": "model.safetensors", "tensor": "a.weight", "index": [1, 2],
        "message": "it is gone",
    }  # fmt: skip
    assert document["findings"][1] | {"manifest": "ci/edits.yaml", "line": 7, "column": 5} == document["findings"][1]
    assert document["rules"] == ["digest", "edit-changed", "known-lost", "duplicate-weights"]
    assert json.loads(render(CLEAN, "json"))["files"] == 5


def test_json_is_strict():
    with pytest.raises(ValueError):
        render(FindingReport("m", "verify", (), details={"x": float("nan")}), "json")


def test_junit_counts_what_it_lists():
    root = junit(BROKEN)
    (suite,) = root
    cases = {case.get("name"): case for case in suite.iter("testcase")}
    assert list(cases) == ["digest", "edit-changed", "known-lost", "duplicate-weights"]
    failed = [name for name, case in cases.items() if case.find("failure") is not None]
    assert failed == ["edit-changed", "known-lost"]
    for element in (root, suite):
        assert (element.get("tests"), element.get("failures"), element.get("errors")) == ("4", "2", "0")
    failure = cases["known-lost"].find("failure")
    assert failure.get("message") == RULES["known-lost"].meaning
    assert failure.text == "model.safetensors a.weight[1, 2]: it is gone"
    assert "once more" in cases["duplicate-weights"].find("system-out").text


def test_junit_of_a_clean_report_passes_what_was_checked():
    (suite,) = junit(CLEAN)
    assert [case.get("name") for case in suite.iter("testcase")] == ["digest"]
    assert suite.get("failures") == "0" and suite.find("system-out").text == CLEAN.checked
    (suite,) = junit(FindingReport("m", "verify", ()))
    assert suite.get("tests") == "1"


def test_an_undecided_report_is_an_error_in_junit_and_in_sarif():
    report = FindingReport("m", "verify", (COPY,), decided=False, rules=("known-lost",))
    (suite,) = junit(report)
    assert [suite.get(count) for count in ("errors", "skipped", "failures", "tests")] == ["1", "0", "0", "3"]
    assert suite.find("testcase[@name='decided']/error").get("type") == "undecided"
    assert [(r["ruleId"], r["level"]) for r in sarif(report)["results"]] == [
        ("duplicate-weights", "warning"), ("undecided", "error"),
    ]  # fmt: skip
    assert sarif(report)["invocations"] == [{"executionSuccessful": False}]


def test_an_undecided_report_with_a_finding_says_no_in_junit_and_in_sarif():
    report = FindingReport("m", "verify", (LOST,), decided=False)
    (suite,) = junit(report)
    assert [suite.get(count) for count in ("errors", "failures", "tests")] == ["0", "1", "1"]
    assert [r["ruleId"] for r in sarif(report)["results"]] == ["known-lost"]


REQUIRED = {
    "": {"version": str, "runs": list},
    "runs": {"tool": dict, "results": list},
    "driver": {"name": str, "rules": list},
    "rule": {"id": str, "shortDescription": dict, "defaultConfiguration": dict},
    "result": {"message": dict, "ruleId": str, "ruleIndex": int, "level": str, "locations": list,
               "partialFingerprints": dict},
}  # fmt: skip
"""What SARIF 2.1.0 requires, and what GitHub's code scanning documents beyond it."""


def check_sarif(text: str) -> dict:
    """Hold a document against REQUIRED and the rules of the standard that a schema does not say."""

    def has(value: dict, what: str) -> None:
        for key, kind in REQUIRED[what].items():
            assert type(value[key]) is kind, (what, key)

    document = json.loads(text)
    has(document, "")
    assert document["version"] == "2.1.0" and document["$schema"].endswith("sarif-2.1.0.json")
    (run,) = document["runs"]
    has(run, "runs")
    has(run["tool"]["driver"], "driver")
    rules = run["tool"]["driver"]["rules"]
    assert len({r["id"] for r in rules}) == len(rules)
    for rule in rules:
        has(rule, "rule")
        assert rule["defaultConfiguration"]["level"] in ("error", "warning", "note", "none")
    for result in run["results"]:
        has(result, "result")
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] in ("error", "warning", "note", "none") and result["message"]["text"]
        # Section 3.11.5: braces are placeholders unless they are doubled; 3.11.6: [text](target) is a link.
        assert "{" not in result["message"]["text"].replace("{{", "") and "](" not in result["message"]["text"]
        for location in result["locations"]:
            uri = location["physicalLocation"]["artifactLocation"]["uri"]
            assert re.fullmatch(r"[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=%-]*", uri), "RFC 3986, section 2"
            region = location["physicalLocation"].get("region")
            assert region is None or (region["startLine"] >= 1 and region.get("startColumn", 1) >= 1)
        assert all(type(v) is str for v in result["partialFingerprints"].values())
    return run


@pytest.mark.parametrize("report", [CLEAN, BROKEN, HOSTILE], ids=["clean", "broken", "hostile"])
def test_sarif_is_what_the_standard_requires(report):
    run = check_sarif(render(report, "sarif"))
    assert len(run["results"]) == len(report.findings)
    assert run["tool"]["driver"]["version"] == __version__


def test_sarif_has_every_rule_of_the_table():
    assert [r["id"] for r in sarif(CLEAN)["tool"]["driver"]["rules"]] == list(RULES)


ROOT = Path(__file__).parents[2]


def test_sarif_says_what_to_do_about_each_rule():
    assert list(HELP) == list(RULES)
    for rule in sarif(CLEAN)["tool"]["driver"]["rules"]:
        text = rule["help"]["text"]
        assert text.startswith(rule["shortDescription"]["text"]) and text.endswith(".") and text.isprintable()
        assert HELP[rule["id"]] in text and HELP[rule["id"]] in rule["help"]["markdown"]


def test_sarif_points_at_the_part_of_a_page_that_explains_the_rule():
    """Without a public address, only the text of the help names the page: SARIF allows no relative address."""
    for rule in sarif(CLEAN)["tool"]["driver"]["rules"]:
        assert "helpUri" not in rule
        page, anchor = re.search(r" See ([\w/.]+)#([\w-]+)\.$", rule["help"]["text"]).groups()
        text = (ROOT / page).read_text()
        titles = re.findall(r"^## (.+)$", text, re.M)
        assert anchor in [title.lower().replace(" ", "-") for title in titles]
        section = text.split(f"## {titles[[t.lower().replace(' ', '-') for t in titles].index(anchor)]}\n")[1]
        assert f"`{rule['id']}`" in section.split("\n## ")[0] or rule["id"] == "public"
    assert "informationUri" not in sarif(CLEAN)["tool"]["driver"]


def test_sarif_has_absolute_addresses_if_the_package_states_one(monkeypatch):
    monkeypatch.setattr(formats, "find_source", lambda: "https://example.org/swsurgery/")
    driver = sarif(CLEAN)["tool"]["driver"]
    assert driver["informationUri"] == "https://example.org/swsurgery/"
    assert all(rule["helpUri"].startswith("https://example.org/swsurgery/blob/") for rule in driver["rules"])
    assert driver["rules"][0]["helpUri"] == f"https://example.org/swsurgery/blob/v{__version__}/docs/verify.md#rules"


def test_sarif_points_at_the_manifests_line():
    (lost, asked, copy) = (r["locations"][0]["physicalLocation"] for r in sarif(BROKEN)["results"])
    assert asked == {"artifactLocation": {"uri": "ci/edits.yaml"}, "region": {"startLine": 7, "startColumn": 5}}
    assert lost == {"artifactLocation": {"uri": "out/model/model.safetensors"}}
    assert copy == {"artifactLocation": {"uri": "out/model/model.gguf"}}


def test_sarif_of_an_absolute_path_is_a_file_uri():
    report = FindingReport("/m/a b", "verify", (COPY,))
    uri = urlparse(sarif(report)["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"])
    assert (uri.scheme, uri.netloc, unquote(uri.path)) == ("file", "", "/m/a b/model.gguf")


def test_sarif_fingerprints_tell_findings_apart_and_stay():
    def prints(report: FindingReport) -> list[str]:
        return [r["partialFingerprints"]["swsurgeryFinding/v1"] for r in sarif(report)["results"]]

    moved = FindingReport("elsewhere", "verify", (COPY, Finding("known-lost", "other words", *_place(LOST)), LOST))
    first, second, third = prints(moved)
    assert prints(BROKEN)[0] == second and prints(BROKEN)[2] == first
    assert len({first, second, third}) == 3, "the same place twice is two results"


def _place(finding: Finding) -> tuple:
    return finding.file, finding.tensor, finding.index


def test_github_names_file_line_and_column():
    lost, asked, copy = commands(BROKEN)
    assert lost == (
        "error",
        {"file": "out/model/model.safetensors", "title": "swsurgery verify: known-lost"},
        "model.safetensors a.weight[1, 2]: it is gone",
    )
    assert asked[1] == {"file": "ci/edits.yaml", "line": "7", "col": "5", "title": "swsurgery verify: edit-changed"}
    assert copy[0] == "warning"


def test_github_says_what_was_proved_or_that_nothing_was():
    ((command, _, message),) = commands(CLEAN)
    assert (command, message) == ("notice", "out/model: verified 5 files; proved 2 scalars")
    ((command, _, message),) = commands(FindingReport("m", "verify", (), decided=False))
    assert (command, message) == ("error", "m: nothing could be compared")


def test_github_escapes_as_its_documentation_says():
    report = FindingReport("m", "verify", (Finding("digest", "100%", "a,b:c%"),))
    assert render(report, "github") == (
        "::error file=m/a%2Cb%3Ac%25,title=swsurgery verify%3A digest::a,b:c%25: 100%25\n"
    )


def unharmed(report: FindingReport) -> None:
    """What a terminal, a log reader, an XML reader and GitHub's runner must not see."""
    count = len(report.findings)
    for format in REPORT_FORMATS:
        text = render(report, format)
        assert text.endswith("\n")
        assert all(c.isprintable() or c == "\n" for c in text), "no control, bidirectional or surrogate character"
        assert "##[" not in text, "the older form of a workflow command, which stands anywhere in a line"
        text.encode("utf-8")
        if format in ("text", "json"):
            assert not any(line.lstrip().startswith("::") for line in text.splitlines()), "a workflow command"
    checked = report.checked.count("\n") + 1 if report.checked else 0
    assert len(render(report, "text").splitlines()) == count + bool(report.errors) + checked
    assert len(render(report, "github").splitlines()) == count + report.ok
    assert [c for c, _, _ in commands(report)].count("error") == report.errors
    assert len(list(junit(report).iter("failure"))) == len({f.rule for f in report.findings if f.level == "error"})
    assert all(isinstance(f["message"], str) for f in json.loads(render(report, "json"))["findings"])
    check_sarif(render(report, "sarif"))


def test_a_hostile_name_forges_nothing():
    unharmed(HOSTILE)


any_text = st.text(st.characters(), max_size=40) | st.sampled_from([EVIL, "::error::x", "##[error]x", "\ud800", "]]>"])
maybe = st.none() | any_text


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.builds(
            Finding,
            st.sampled_from(sorted(RULES)),
            any_text,
            maybe,
            maybe,
            st.none() | st.tuples(st.integers(0, 99)),
            maybe,
            st.none() | st.integers(1, 99),
        ),
        min_size=1,
        max_size=4,
    ),
    any_text,
    any_text,
)
def test_no_text_forges_anything(findings, subject, checked):
    unharmed(FindingReport(subject, "verify", tuple(findings), f"checked {checked}", {"detail": checked}))


@pytest.mark.parametrize("kind", ["link", "pipe", "device"])
def test_a_report_goes_into_what_is_there_and_leaves_it_what_it_is(tmp_path, kind):
    """A pipe or a device must not become a file, nor what a link names be left behind."""
    path, real = tmp_path / "report", tmp_path / "real"
    if kind == "link":
        real.write_text("old")
        path.symlink_to(real)
    elif kind == "pipe":
        os.mkfifo(path)
    elif os.geteuid():
        pytest.skip("only root makes device nodes")
    else:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))  # as /dev/null is
    before, reader = os.lstat(path), None
    if kind == "pipe":
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    filesystem.write_report(path, b"new")
    after = os.lstat(path)
    assert (after.st_mode, after.st_ino) == (before.st_mode, before.st_ino)
    if kind == "link":
        assert real.read_bytes() == b"new"
    if reader is not None:
        assert os.read(reader, 9) == b"new"
        os.close(reader)


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
@pytest.mark.parametrize("append", [True, False])
def test_a_report_into_stdout_lies_between_what_comes_before_and_after(tmp_path, name, append):
    """What it was redirected to is not replaced, and the next to write there goes on behind the report."""
    code = "from pathlib import Path; from swsurgery.storage import filesystem;"
    code += f"filesystem.write_report(Path('{name}'), b'new ')"
    with open(tmp_path / "log", "ab" if append else "wb") as log:
        log.write(b"old ")
        log.flush()
        subprocess.run([sys.executable, "-c", code], stdout=log, check=True)
        log.write(b"more")
    assert (tmp_path / "log").read_bytes() == b"old new more"


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no /dev/shm")
def test_a_report_replaces_a_file_in_the_memory_behind_dev():
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        Path(file.name).write_bytes(b"a longer old one")
        filesystem.write_report(Path(file.name), b"new")
        assert Path(file.name).read_bytes() == b"new"


@pytest.mark.parametrize("words", [
    "verify {base} --finite --output {base}/{shard}",
    "verify {snapshot} --finite --output {snapshot}/config.json",
    "verify {base} --manifest {manifest} --output {manifest}",
    "verify {base} --manifest {manifest} --base {other} --output {other}/{shard}",
    "verify {base} --signature {other}/s --public-key {key} --output {key}",
    "verify {base} --signature {key} --public-key {other}/p --output {key}",
    "lint {manifest} --output {manifest}",
])  # fmt: skip
def test_a_report_does_not_replace_what_it_is_of(tmp_path, capsys, words):
    base, other = write_llama(tmp_path / "base"), write_llama(tmp_path / "other")
    manifest = write_manifest(tmp_path / "m.json", base, {"op": "protect", "tensor": HEAD, "index": [0, 0]})
    key = tmp_path / "key"
    key.write_text("PEM")
    snapshot = tmp_path / "hub" / "models--o--n" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for name, data in tree(base).items():
        blob = snapshot.parents[1] / "blobs" / hashlib.sha256(data).hexdigest()
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(data)
        (snapshot / name).parent.mkdir(exist_ok=True)
        (snapshot / name).symlink_to(blob)
    before = tree(tmp_path)
    places = {"base": base, "other": other, "manifest": manifest, "key": key, "snapshot": snapshot, "shard": FIRST}
    assert main(words.format(**places).split()) == 2
    assert "choose another --output" in capsys.readouterr().err
    assert tree(tmp_path) == before

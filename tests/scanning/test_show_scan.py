"""The tables of a scan and of a sweep, line by line as a terminal shows them."""

from __future__ import annotations

import dataclasses
import math

import pytest

from swsurgery.cli.show_scan import show_scan, show_sweep
from swsurgery.scanning.activation_report import PersistentActivation
from swsurgery.scanning.causal_report import Effect
from swsurgery.scanning.part_report import ModelPart, PartConfirmation, PartName, PartTrial
from swsurgery.scanning.report import (
    Candidate,
    ColumnNull,
    Confirmation,
    JointSet,
    Scan,
    Sweep,
    SweepPoint,
    Trial,
)
from swsurgery.storage.coordinate import Coordinate

DOWN = "model.layers.{}.mlp.down_proj.weight"


def candidate(layer, row, col, value, rank=1, tensor=DOWN, index=None, expert=None, **measured) -> Candidate:
    coordinate = Coordinate(tensor.format(layer, expert), index or (row, col))
    return Candidate(coordinate, layer, row, col, expert, value, 1.0, rank, **measured)


MAKER = candidate(
    11, 507, 1229, 5.875, 2, input_spike=4072.25, output_spike=23880.0, share=1.0012, prompts=4, round=1
)  # fmt: skip
HELPER = candidate(2, 507, 90, 5.09375, 4, input_spike=95.5, output_spike=486.0, share=0.99, prompts=3, round=2)
COMPANION = candidate(11, 88, 1229, 0.61, 4012)
SCAN = Scan(
    method="activations",
    model_type="llama",
    layers=30,
    candidates=(MAKER, HELPER),
    activations=(PersistentActivation(11, 27, 507, 23941.0, 14, 0, 0, 4),),
    prompts=("a", "b", "c", "d"),
)
INERT = Effect(1.0, 0.99951, 1.0009, 0.0001)
CONFIRMED = dataclasses.replace(
    SCAN,
    confirmation=Confirmation(
        trials=(
            Trial(MAKER, Effect(5.5743, 5.1, 5.96, 1.7), Effect(1.31, 1.2, 1.4, 0.3), "needed alone"),
            Trial(HELPER, Effect(1.31, 1.2, 1.4, 0.3), Effect(5.58, 5.1, 6.0, 1.7), "needed jointly"),
            Trial(COMPANION, INERT, Effect(54.26, 49, 60, 3.1), "inert", listed=False),
        ),
        together=Effect(54.257, 49.0, 60.0, 3.1),
        joint_sets=(JointSet((MAKER.coordinate, HELPER.coordinate), Effect(54.26, 49.0, 60.0, 3.1)),),
        null=(0.9998, 1.0004, 1.0),
        base_perplexity=29.6,
        windows=16,
        window_tokens=512,
        text_sha256="ab" * 32,
        dtype="float32",
        device="cpu",
        scored_tokens=8176,
        column_nulls=(ColumnNull(11, None, 1229, (0.998, 1.002, 1.0), (0.51, 1.16, 1.0)),),
    ),
)


@pytest.fixture
def lines(capsys):
    """What is shown of a report, line by line."""

    def lines(report: Scan | Sweep) -> list[str]:
        (show_scan if isinstance(report, Scan) else show_sweep)(report)
        shown = capsys.readouterr()
        assert shown.err == ""
        return shown.out.splitlines()

    return lines


FOUND = """\
tensor    model.layers.{layer}.mlp.down_proj.weight[row, col]

super activations: channels with massive values after these layers
channel  from layer  to layer   value  peak after  prompt  token  prompts
    507          11        27  23,941          14       0      0        4

candidates
layer  row   col  value  input spike  output spike  share  prompts  round  rank of |W|
   11  507  1229  5.875        4,072        23,880  1.001        4      1            2
    2  507    90  5.094         95.5           486   0.99        3      2            4
"""


def test_a_scan_by_activations(lines):
    head = "scanned   30 layers of llama by activations, 4 prompts\nanswer    2 candidates, not confirmed\n"
    assert lines(SCAN) == (head + FOUND).splitlines()


def test_a_confirmed_scan(lines):
    shown = lines(CONFIRMED)
    assert shown[1] == "answer    2 super weights confirmed (1 needed alone, 1 needed jointly, 1 inert)"
    head = FOUND.splitlines()
    assert shown[2 : 2 + len(head)] == head
    assert shown[2 + len(head) :] == [
        "",
        "causal test: perplexity divided by the base's, if this scalar is zeroed (alone) or all others are (without)",
        "layer  row   col  value  alone  interval             KL  without  verdict",
        "   11  507  1229  5.875  5.574  5.100 to 5.960      1.7    1.310  needed alone",
        "    2  507    90  5.094  1.310  1.200 to 1.400      0.3    5.580  needed jointly",
        "   11   88  1229   0.61  1.000  0.9995 to 1.001  0.0001    54.26  inert           companion",
        "",
        "together  ratio 54.26 (49.00 to 60.00), KL 3.1",
        "joint     ratio 54.26 (49.00 to 60.00), KL 3.1: L11 [507, 1229] + L2 [507, 90]",
        "null      3 other large rows of layer 11 column 1229: alone 0.9980 to 1.002, beside all candidates 0.5100 to "
        "1.160",
        "null      3 random scalars of similar magnitude, each alone: ratio 0.9998 to 1.000",
        "measured  base perplexity 29.6 on 16 windows of 512 tokens (8,176 scored), float32 on cpu",
        "protocol  default: without overlap, BOS as the tokenizer adds it; text sha256 abababababababab",
    ]


def test_the_only_candidate_has_no_others_and_an_absent_null_is_not_shown(lines):
    alone = dataclasses.replace(CONFIRMED.confirmation.trials[0], without=None)
    confirmation = dataclasses.replace(CONFIRMED.confirmation, trials=(alone,), joint_sets=(), null=(), column_nulls=())
    shown = lines(dataclasses.replace(CONFIRMED, candidates=(MAKER,), confirmation=confirmation))
    assert shown[1] == "answer    1 super weight confirmed (1 needed alone)"
    assert "layer  row   col  value  alone  interval         KL  verdict" in shown
    assert not [line for line in shown if line.startswith(("joint", "null"))]


def test_on_too_little_text_nothing_is_confirmed_and_no_interval_is_shown(lines):
    short = Effect(5.5743, None, None, 1.7)
    trials = (
        Trial(MAKER, short, short, "untested"),
        Trial(HELPER, short, short, "untested"),
        Trial(COMPANION, short, short, "untested", listed=False),
    )
    confirmation = dataclasses.replace(
        CONFIRMED.confirmation, trials=trials, together=short, joint_sets=(), windows=1, window_tokens=180,
        scored_tokens=179, column_nulls=(ColumnNull(11, 5, 1229, (), ()),),
    )  # fmt: skip
    report = dataclasses.replace(CONFIRMED, confirmation=confirmation)
    shown = lines(report)
    assert shown[1] == "answer    2 candidates, not confirmed"
    assert report.super_weights == (MAKER, HELPER) and not report.confirmed
    assert "   11  507  1229  5.875  5.574  1.7    5.574  untested" in shown
    assert "together  ratio 5.574, KL 1.7" in shown
    assert "null      0 other large rows of layer 11 expert 5 column 1229" in shown
    assert shown[-2] == "measured  base perplexity 29.6 on 1 window of 180 tokens (179 scored), float32 on cpu"
    document = report.to_json()
    assert document["candidates"][0]["verdict"] == "untested"
    assert document["candidates"][0]["alone"] == {"ratio": 5.5743, "low": None, "high": None, "kl": 1.7}
    assert document["confirmation"]["scored_tokens"] == 179


def test_an_untested_companion_is_counted_and_is_no_super_weight(lines):
    trials = (*CONFIRMED.confirmation.trials[:2], Trial(COMPANION, INERT, INERT, "untested", listed=False))
    report = dataclasses.replace(CONFIRMED, confirmation=dataclasses.replace(CONFIRMED.confirmation, trials=trials))
    assert lines(report)[1] == "answer    2 super weights confirmed (1 needed alone, 1 needed jointly, 1 untested)"
    assert report.super_weights == (MAKER, HELPER)
    assert report.to_json()["confirmation"]["column_nulls"] == [
        {"layer": 11, "expert": None, "col": 1229, "alone": [0.998, 1.002, 1.0], "added": [0.51, 1.16, 1.0]}
    ]


def test_nothing_found_is_a_sentence_with_its_reasons(lines):
    notes = ("no channel is massive over half of the layers", "a name\nof two lines")
    assert lines(Scan("activations", "qwen3", 24, (), prompts=("a",), notes=notes)) == [
        "scanned   24 layers of qwen3 by activations, 1 prompt",
        "answer    none: no super weight was found",
        "",
        "note      no channel is massive over half of the layers",
        "note      a name\\nof two lines",
    ]


def test_nothing_confirmed_is_none_too(lines):
    confirmation = dataclasses.replace(
        CONFIRMED.confirmation, trials=(Trial(MAKER, INERT, None, "inert"),), joint_sets=()
    )
    shown = lines(dataclasses.replace(CONFIRMED, confirmation=confirmation))
    assert shown[1] == "answer    none: no super weight was confirmed (1 inert)"


def test_a_scan_by_weights(lines):
    found = (
        dataclasses.replace(candidate(28, 507, 678, -4.78125, 9, z=14.234), score=912.4),
        dataclasses.replace(candidate(11, 507, 1229, 5.875, 2, z=13.6), score=0.00012345),
    )
    assert lines(Scan("weights", "llama", 30, found)) == [
        "scanned   30 layers of llama by weights",
        "answer    2 candidates, not confirmed",
        "tensor    model.layers.{layer}.mlp.down_proj.weight[row, col]",
        "",
        "candidates",
        "layer  row   col   value      score      z  rank of |W|",
        "   28  507   678  -4.781      912.4  14.23            9",
        "   11  507  1229   5.875  0.0001234   13.6            2",
    ]


@pytest.mark.parametrize(
    ("found", "pattern"),
    [
        (
            [candidate(3, 8, 9, 1.0, tensor="transformer.h.{}.mlp.c_proj.weight", index=(9, 8))],
            ["transformer.h.{layer}.mlp.c_proj.weight[col, row]"],
        ),
        (
            [candidate(5, 8, 9, 1.0, tensor="model.layers.{}.mlp.experts.{}.down_proj.weight", expert=5)],
            ["model.layers.{layer}.mlp.experts.{expert}.down_proj.weight[row, col]"],
        ),
        (
            [candidate(1, 8, 9, 1.0, tensor="model.layers.{}.mlp.experts.down_proj", index=(5, 9, 8), expert=5)],
            ["model.layers.{layer}.mlp.experts.down_proj[expert, col, row]"],
        ),
        (
            [
                candidate(1, 8, 9, 1.0),
                candidate(2, 8, 9, 1.0, tensor="model.layers.{}.mlp.experts.{}.down_proj.weight", expert=7),
                candidate(2, 1, 2, 1.0, tensor="model.layers.{}.mlp.shared_expert.down_proj.weight", expert="shared"),
                candidate(4, 3, 3, 1.0),
            ],
            [
                "model.layers.{layer}.mlp.down_proj.weight[row, col]",
                "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight[row, col]",
                "model.layers.{layer}.mlp.shared_expert.down_proj.weight[row, col]",
            ],
        ),
        (
            [
                candidate(3, 7, 7, 1.0, tensor="h.{}.mlp.c_proj.weight", index=(7, 7)),
                candidate(4, 8, 9, 1.0, tensor="h.{}.mlp.c_proj.weight", index=(9, 8)),
            ],
            ["h.{layer}.mlp.c_proj.weight[col, row]"],
        ),
    ],
    ids=["transposed", "expert", "stacked experts", "mixed", "a square place"],
)
def test_the_tensors_are_named_once_by_their_pattern(lines, found, pattern):
    shown = lines(Scan("weights", "any", 30, tuple(found)))
    assert [line.split(maxsplit=1)[1] for line in shown if line.startswith("tensor")] == pattern


def test_an_expert_has_its_column(lines):
    tensor = "model.layers.{}.mlp.experts.{}.down_proj.weight"
    found = (candidate(1, 2070, 7310, 2.1, tensor=tensor, expert=5), candidate(2, 1, 2, -0.5))
    assert lines(Scan("weights", "mixtral", 32, found))[-3:] == [
        "layer  expert   row   col  value  score  rank of |W|",
        "    1  5       2070  7310    2.1      1            1",
        "    2             1     2   -0.5      1            1",
    ]


def test_a_joint_set_with_a_scalar_outside_the_trials_names_it_in_full(lines):
    joint = JointSet((Coordinate("elsewhere", (1, 2)), MAKER.coordinate), INERT)
    confirmation = dataclasses.replace(CONFIRMED.confirmation, joint_sets=(joint,))
    shown = lines(dataclasses.replace(CONFIRMED, confirmation=confirmation))
    assert "joint     ratio 1.000 (0.9995 to 1.001), KL 0.0001: elsewhere[1, 2] + L11 [507, 1229]" in shown


def test_a_long_table_ends_with_the_rest_counted(lines):
    found = tuple(candidate(layer, 1, 2, 1.0) for layer in range(45))
    shown = lines(Scan("weights", "llama", 45, found))
    assert shown[-1] == "... and 5 more" and shown[-2].split()[0] == "39"
    assert lines(Scan("weights", "llama", 45, found[:40]))[-1].split()[0] == "39"


def test_the_widest_numbers_of_a_real_model_fit_120_columns(lines):
    wide = dict(input_spike=-123456.0, output_spike=-1234567.0, share=-0.12345, prompts=10, round=10)
    tensor = "model.language_model.layers.{}.mlp.experts.{}.down_proj.weight"
    worst = candidate(125, 18431, 53247, -0.00012207, 1234567890, tensor=tensor, expert=127, **wide)
    effect = Effect(12345678.9, 12345678.9, 12345678.9, 0.00012345)
    trial = Trial(worst, effect, effect, "needed jointly", listed=False)
    confirmation = dataclasses.replace(CONFIRMED.confirmation, trials=(trial,), joint_sets=())
    shown = lines(dataclasses.replace(CONFIRMED, candidates=(worst,), confirmation=confirmation))
    assert max(map(len, shown)) <= 120
    assert "1.2e+07 to 1.2e+07" in "\n".join(shown)


def point(factor, perplexity, kl, mass, finite=True) -> SweepPoint:
    return SweepPoint(factor, perplexity, perplexity / 29.6, kl, mass, finite, 23941.0 * factor)


SWEEP = Sweep(
    coordinates=(MAKER.coordinate, HELPER.coordinate),
    base=point(1.0, 29.6, 0.0, 0.3125),
    points=(
        point(2.0, math.nan, math.nan, math.nan, finite=False),
        point(0.0, 1606.2, 3.1, 0.021),
        point(1.0, 29.6, 0.0, 0.3125),
        point(0.5, 60.125, 0.8, 0.2),
    ),
    windows=1,
    window_tokens=512,
    text_sha256="ab" * 32,
    dtype="float32",
    device="cpu",
    method="whole",
    scored_tokens=511,
)


def test_a_sweep_is_listed_by_factor_with_the_base_once(lines):
    wanted = [
        "scaled    model.layers.11.mlp.down_proj.weight[507, 1229]",
        "scaled    model.layers.2.mlp.down_proj.weight[507, 90]",
        "",
        "factor  perplexity  ratio   KL  stop-word mass  largest hidden state",
        "     0       1,606  54.26  3.1           0.021                     0",
        "   0.5       60.12  2.031  0.8             0.2                11,970",
        "     1        29.6  1.000    0          0.3125                23,941  base",
        "     2         nan    nan  nan             nan                47,882  NOT FINITE",
        "",
        "KL(base || scaled) is in nats per token; the largest hidden state is the largest after any layer",
        "measured on 1 window of 512 tokens (511 scored), float32 on cpu, whole",
        "protocol  default: without overlap, BOS as the tokenizer adds it; text sha256 abababababababab",
    ]
    assert lines(SWEEP) == wanted
    swept = tuple(point for point in SWEEP.points if point.factor != 1)
    assert lines(dataclasses.replace(SWEEP, points=swept)) == wanted, "the base is shown where it was not swept"


def test_the_answer_names_parts_beside_scalars(capsys):
    ratio = Effect(1.85, 1.39, 2.48, 0.6)
    parts = [ModelPart(PartName("expert", 4, expert, None), (25,), 30.0) for expert in (5, 6)]
    fields = {key: value for key, value in vars(CONFIRMED.confirmation).items() if key not in ("column_nulls", "doses")}
    test = PartConfirmation(
        **fields | {"joint_sets": (), "null": ()}
        | {"trials": (PartTrial(parts[0], ratio, INERT, "needed alone"), PartTrial(parts[1], INERT, ratio, "inert"))}
    )  # fmt: skip
    listed = {"parts": tuple(parts), "part_confirmation": test}
    show_scan(dataclasses.replace(SCAN, candidates=(), **listed))
    needed = "; 1 needed part: layer 4 expert 5 (needed alone)"
    assert f"answer    no super weight was found{needed}\n" in capsys.readouterr().out
    inert = (Trial(MAKER, INERT, None, "inert"),)
    tested = dataclasses.replace(CONFIRMED.confirmation, trials=inert, joint_sets=())
    show_scan(dataclasses.replace(SCAN, candidates=(MAKER,), confirmation=tested, **listed))
    assert f"answer    no super weight was confirmed (1 inert){needed}\n" in capsys.readouterr().out
    show_scan(dataclasses.replace(CONFIRMED, **listed))
    assert f"){needed}\n" in capsys.readouterr().out
    show_scan(dataclasses.replace(SCAN, candidates=(), parts=tuple(parts)))
    found = "no super weight was found; 2 parts, not confirmed: layer 4 expert 5, layer 4 expert 6"
    assert f"answer    {found}\n" in capsys.readouterr().out
    inert_parts = dataclasses.replace(test, trials=(test.trials[1],))
    show_scan(dataclasses.replace(SCAN, candidates=(), parts=(parts[1],), part_confirmation=inert_parts))
    assert "answer    none: no super weight was found; 1 part inert\n" in capsys.readouterr().out

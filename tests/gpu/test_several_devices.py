"""A model that is streamed over several CUDA devices, its layers on them in turn, computes what one device does."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from tiny_checkpoint import write_pair

from swsurgery.checkpoint.opening import open_checkpoint
from swsurgery.model import load
from swsurgery.progress import Silent

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices"),
]

SEQUENCES = [list(range(5, 29)), list(range(40, 64)), list(range(7, 19))]


class Seen:
    """A watch that notes on which device each layer ran."""

    def __init__(self) -> None:
        self.devices: dict[int, set[torch.device]] = {}

    def around(self, number, layer, rows):
        self.devices.setdefault(number, set()).update(p.device for p in layer.parameters())
        return contextlib.nullcontext()

    def after(self, number, rows, hidden):
        assert {hidden.device} == self.devices[number]


def logits_on(folder: Path, device: str, base: dict, watch: Seen | None = None) -> list[list[torch.Tensor]]:
    model = load.open_model(open_checkpoint(folder), device=device, placement="streamed")
    run = model.run(SEQUENCES, [base, {}, {c: 0.0 for c in base}], watch=watch, progress=Silent())
    return [[outcomes.logits[v].float().cpu() for v in range(3)] for outcomes in run]


def test_layers_are_on_the_devices_in_turn_and_give_what_one_gives(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, [((3, 7), 5.0), ((9, 2), -4.0)])
    base = {change.coordinate: change.base for change in pair.changes}
    seen = Seen()
    several, one = logits_on(pair.patched, "cuda", base, seen), logits_on(pair.patched, "cuda:0", base)
    count = torch.cuda.device_count()
    assert len(seen.devices) > 1
    assert seen.devices == {n: {torch.device("cuda", n % count)} for n in seen.devices}
    for ours, theirs in zip(several, one, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert not torch.equal(several[0][0], several[0][1])

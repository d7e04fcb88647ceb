"""A check's report with plain figures, for tests of what is made of one."""

from __future__ import annotations

from dataclasses import replace

from swsurgery.model.report import CheckReport, Continuations, Side, SuperActivation

SIDE = Side(perplexity=20.0, stopword_mass=0.25, finite=True, super_activation=SuperActivation(1, 0, 5, -1234.5678, 3))
REPORT = CheckReport(
    base=SIDE,
    patched=replace(SIDE, perplexity=30.0),
    perplexity_ratio=1.5,
    kl=0.1,
    prompts=(Continuations("Say", ((" yes", 0.5), (" no", 1 / 3)), ()),),
    windows=2,
    window_tokens=8,
    scored_tokens=14,
    text_sha256="0" * 64,
    method="layer by layer",
    device="cpu",
    dtype="float32",
    torch="2",
    transformers="5",
)

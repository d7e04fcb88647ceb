"""Draw docs/super-weights.svg, the figure of README.md. usage: python docs/figure.py

The figure shows the perplexity of SmolLM2-135M-Instruct with 0 to 4 of its scalars at zero. The values are those that
`swsurgery lookup smollm2-135m-instruct` prints with their source.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import NamedTuple

FIGURE = Path(__file__).parent / "super-weights.svg"
MODEL = "smollm2-135m-instruct"
LEFT, WIDTH, BAR, GAP, TOP = 300, 380, 22, 14, 62
STYLE = """
text { font: 14px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600; font-size: 16px }
.note { font-size: 12px; fill: #59636e }
.unchanged { fill: #8c959f }
.zeroed { fill: #cf222e }
.grid { stroke: #d1d9e0 }
.paper { fill: #ffffff }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .note { fill: #9198a1 }
  .unchanged { fill: #6e7681 }
  .zeroed { fill: #f85149 }
  .grid { stroke: #3d444d }
  .paper { fill: #0d1117 }
}
"""


class Bar(NamedTuple):
    """One bar: what was set to zero, and the perplexity then."""

    label: str
    perplexity: float
    kind: str


def read_bars() -> list[Bar]:
    """Return the bars, from the known super weights that swsurgery ships."""
    import swsurgery

    [model] = swsurgery.lookup(MODEL).to_json()["models"]
    effects = {c["id"]: find_effect(c["effects"], "zero") for c in model["coordinates"]}
    joint = {" + ".join(s["coordinates"]): find_effect(s["effects"], "zero jointly") for s in model["joint_sets"]}
    first, second, third, fourth = "L11.507.1229", "L11.507.1487", "L2.507.90", "L2.507.430"
    [source] = model["sources"].values()
    [random] = re.findall(r"random scalars of like size: ppl x[\d.]+ to x([\d.]+)", source["note"])
    base = effects[first]["before"]
    four = joint[" + ".join((first, second, third, fourth))]
    return [
        Bar("nothing", base, "unchanged"),
        Bar("worst of 16 random scalars", base * float(random), "unchanged"),
        Bar("one scalar of layer 11", effects[first]["after"], "zeroed"),
        Bar("two scalars of layer 11", joint[f"{first} + {second}"]["after"], "zeroed"),
        Bar("four of layers 2 and 11", four["after"], "zeroed"),
    ]


def find_effect(effects: list[dict], protocol: str) -> dict:
    """Return the measured perplexity under a protocol."""
    return next(e for e in effects if e["protocol"] == protocol and e["metric"] == "ppl")


def draw(bars: list[Bar]) -> str:
    """Return the figure as SVG: horizontal bars over a logarithmic axis that begins at 10."""
    height = TOP + len(bars) * (BAR + GAP) + 34
    powers = range(1, 7)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 {height}" role="img" aria-labelledby="t">',
        '<title id="t">Perplexity of SmolLM2-135M-Instruct after single scalars were set to zero</title>',
        f"<style>{STYLE}</style>",
        f'<rect class="paper" width="800" height="{height}" rx="6"/>',
        '<text class="title" x="16" y="28">Perplexity of a model of 134,515,008 scalars, with some set to zero</text>',
    ]
    for power in powers:
        x = place(10.0**power)
        bottom = TOP + len(bars) * (BAR + GAP)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 12}" y2="{bottom}"/>')
        parts.append(f'<text class="note" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{10**power:,}</text>')
    for number, bar in enumerate(bars):
        y = TOP + number * (BAR + GAP)
        x = place(bar.perplexity)
        parts += [
            f'<text x="{LEFT - 12}" y="{y + 16}" text-anchor="end">{bar.label}</text>',
            f'<rect class="{bar.kind}" x="{LEFT}" y="{y}" width="{x - LEFT:.1f}" height="{BAR}" rx="2"/>',
            f'<text x="{x + 8:.1f}" y="{y + 16}">{write_number(bar.perplexity)}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def place(perplexity: float) -> float:
    """Return the horizontal position of a perplexity."""
    return LEFT + WIDTH * (math.log10(perplexity) - 1) / 5


def write_number(value: float) -> str:
    """Write a perplexity with three digits, or as a whole number with separators from 100."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    FIGURE.write_text(draw(read_bars()))

"""Draws bench/results/first-token.png: milliseconds to the first token of a prompt of 2,048 tokens, by runtime.

python bench/first_token_chart.py
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
from tables_serving import FIRST_TOKEN, median_ms

RESULTS = Path(__file__).resolve().parent / "results"
OURS = "nbl-export"
LENGTH = "2048"


def main() -> None:
    figure, areas = plt.subplots(1, len(FIRST_TOKEN), figsize=(12, 4.2), layout="constrained")
    for area, (name, model) in zip(areas, FIRST_TOKEN.items(), strict=True):
        found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        medians = {title: median_ms(own) for title, own in found["times"][LENGTH].items()}
        titles = sorted(medians, key=lambda title: -medians[title])
        colors = ["#d9541e" if OURS in title else "#8a97a8" for title in titles]
        bars = area.barh(titles, [medians[title] for title in titles], color=colors)
        area.bar_label(bars, labels=[f"{medians[title]:,.0f} ms" for title in titles], padding=3, fontsize=8)
        area.set_title(f"{model}, prompt of 2,048 tokens", fontsize=10)
        area.set_xlim(0, 1.18 * max(medians.values()))
        area.spines[["top", "right"]].set_visible(False)
        area.tick_params(labelsize=8)
        area.set_xlabel("milliseconds to the first token, two threads; less is better", fontsize=8)
    figure.savefig(RESULTS / "first-token.png", dpi=110)


if __name__ == "__main__":
    main()
